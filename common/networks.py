"""A torch module as a function of one flat vector of parameters, and its personal layers.

`torch.func.functional_call` and not `torch.nn.utils.parametrize`: personal parameters never become part of a module, so
no `state_dict`, pickle or hook can carry them away, and the same function is batched over users by `torch.func.vmap`
(docs/decisions/015-networks.md).
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.parameter import is_lazy

from common.architecture import Architecture, Form, Kind, Layer
from common.errors import UmbelError
from common.model import IntArray

_KINDS: dict[type[nn.Module], Kind] = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Embedding: "embedding"}
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NORMS = (_BATCH_NORM, nn.modules.instancenorm._InstanceNorm)
_SEED = 0
_TRIED_EXAMPLES = 13
FEW = 4
"""Users up to whom a loop is faster than `vmap`, whose own work is then most of it."""
LARGEST_PERSONAL = 256
"""Most numbers in w and b of a user: their joint precision is kept, and solved for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedNetwork:
    """A module whose chosen layers are base + U_l W_il + B_il.

    Attributes:
        module: In evaluation mode; its own parameters are never read after `base` was taken.
        architecture: Its shape.
        base: `P` float32, the parameters it came with.
        inputs: Numbers that an example has.
        tails: Shape of what each adapted layer gives for one example, by name.
    """

    module: nn.Module
    architecture: Architecture
    base: torch.Tensor
    inputs: int
    tails: Mapping[str, tuple[int, ...]]

    def outputs(self, theta: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """`m x outputs`, the network with parameters `theta` (`P`) on `m` examples."""
        found: torch.Tensor = functional_call(self.module, self._named(theta), (X,))
        return found.reshape(X.shape[0], self.architecture.outputs)

    def each(self, theta: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """`n x m x outputs`, every user's network (`n x P`) on that user's examples (`n x m x inputs`)."""
        if len(theta) > FEW:
            many: torch.Tensor = vmap(self.outputs)(theta, X)
            return many
        return torch.stack([self.outputs(own, x) for own, x in zip(theta, X, strict=True)])

    def theta(self, shared: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """`... x P`, base + U_l W_l; b is added to it by who has one.

        Args:
            shared: `... x D`, the base and every U.
            w: `... x R`, every W.
        """
        architecture, parts, end = self.architecture, [], 0
        for layer, U, W in zip(architecture.layers, architecture.U_slices(), architecture.w_slices(), strict=True):
            delta = _matrix(shared[..., U], layer.d, layer.rank) @ _matrix(w[..., W], layer.rank, layer.c)
            parts += [w.new_zeros(*w.shape[:-1], layer.start - end), delta.flatten(-2)[..., _index(layer.places, w)]]
            end = layer.start + layer.size
        P = architecture.num_parameters
        return shared[..., :P] + torch.cat([*parts, w.new_zeros(*w.shape[:-1], P - end)], -1)

    def personal_theta(
        self, shared: torch.Tensor, w: torch.Tensor, support: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """`n x P`, base + U w + b.

        Args:
            shared: `D`, or `n x D`.
            w: `n x R`.
            support: `n x K` int64, places in the base, -1 where unused.
            b: `n x K`.
        """
        return self.theta(shared, w).scatter_add(1, support.clamp(min=0), torch.where(support >= 0, b, 0.0))

    def shared_gradient(self, gradient: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """`n x D`, gradients in the shared part from those in theta: dU_l = G_l W_l'.

        Args:
            gradient: `n x P`.
            w: `n x R`, with which it was taken.
        """
        architecture, n = self.architecture, len(gradient)
        parts = [gradient]
        for layer, W in zip(architecture.layers, architecture.w_slices(), strict=True):
            block = gradient[:, layer.start : layer.start + layer.size]
            G = block[:, _index(layer.order, w)].reshape(n, layer.d, layer.c)
            parts.append((G @ w[:, W].reshape(n, layer.rank, layer.c).mT).reshape(n, -1))
        return torch.cat(parts, dim=1)

    def shared_parameters(self, shared: torch.Tensor) -> dict[str, torch.Tensor]:
        """The released part by name: the module's parameters, and `NAME.U` of each adapted layer."""
        architecture = self.architecture
        found = self._named(shared[: architecture.num_parameters])
        for layer, U in zip(architecture.layers, architecture.U_slices(), strict=True):
            found[f"{layer.name}.U"] = shared[U].reshape(layer.d, layer.rank)
        return found

    def personal_parameters(self, w: torch.Tensor, support: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """One user's part by name: `NAME.W`, `r x c`, and `NAME.B`, sparse, of weight and bias as one matrix.

        Args:
            w: `R`.
            support: `K` places in the base, -1 where unused.
            b: `K`.
        """
        found = {}
        for layer, W in zip(self.architecture.layers, self.architecture.w_slices(), strict=True):
            found[f"{layer.name}.W"] = w[W].reshape(layer.rank, layer.c)
            inside = (support >= layer.start) & (support < layer.start + layer.size)
            place, columns = support[inside] - layer.start, layer.columns
            weights = layer.rows * columns
            row = torch.where(place < weights, place // columns, place - weights)
            column = torch.where(place < weights, place % columns, torch.full_like(place, columns))
            size = (layer.rows, columns + layer.bias)
            # checked, as a place outside would be somebody else's memory
            found[f"{layer.name}.B"] = torch.sparse_coo_tensor(
                torch.stack([row, column]), b[inside], size, check_invariants=True
            )
        return found

    def merge(self, theta: torch.Tensor) -> nn.Module:
        """The module with the parameters `theta` (`P`) written into it, for inference without any of this."""
        self.module.load_state_dict(self._named(theta), strict=False)
        return self.module

    def unmerge(self) -> nn.Module:
        """The module with the parameters it came with."""
        return self.merge(self.base)

    def to(self, device: str) -> "AdaptedNetwork":
        """The same on another device."""
        return replace(self, module=self.module.to(device), base=self.base.to(device))

    def _named(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        named, start = {}, 0
        for name, shape in self.architecture.parameters:
            size = math.prod(shape)
            named[name] = theta[start : start + size].reshape(shape)
            start += size
        return named


def _matrix(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], rows, columns)


def _index(places: IntArray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(places).to(like.device)


def load_module(place: str) -> nn.Module:
    """What the function named by "FILE.py:FUNCTION" returns; its random numbers are the same on every machine.

    Raises:
        UmbelError: If there is no such function, or it does not return a module.
    """
    path, colon, function = place.rpartition(":")
    if not (colon and path.endswith(".py") and function.isidentifier()):
        raise UmbelError(f"Expected network.module as 'FILE.py:FUNCTION', got network.module={place!r}.")
    if not Path(path).is_file():
        raise UmbelError(f"Expected a Python file, got network.module={place!r}, which is none. Correct the path.")
    spec = importlib.util.spec_from_file_location(f"umbel_network_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UmbelError(f"Expected a Python file, got network.module={place!r}.")
    code = importlib.util.module_from_spec(spec)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            spec.loader.exec_module(code)
            module = getattr(code, function)()
    except Exception as error:
        raise UmbelError(
            f"Expected {place} to return a torch.nn.Module, got {type(error).__name__}: {error}. Correct the file."
        ) from error
    if not isinstance(module, nn.Module):
        raise UmbelError(f"Expected {place} to return a torch.nn.Module, got {type(module).__name__}.")
    return module


def adapt(
    module: nn.Module,
    *,
    inputs: int,
    outputs: int,
    rank: int,
    sparsity: int,
    layers: Sequence[str] = ("*",),
    form: Form = "vector",
    train_base: bool = True,
) -> AdaptedNetwork:
    """Make chosen layers of a module low rank plus sparse.

    Args:
        module: Any, of `nn.Linear`, `nn.Conv2d`, `nn.Embedding` and layers without running statistics.
        inputs: Numbers that an example has.
        outputs: Numbers that it has to give for an example.
        rank: r of every adapted layer, lowered to what the layer has room for.
        sparsity: k of every adapted layer, lowered likewise.
        layers: Names of submodules, or patterns as in a shell.
        form: See `common.architecture`.
        train_base: Whether the base is learned too.

    Raises:
        UmbelError: If no layer matches, or the module cannot be trained in this way; says why and what to do.
    """
    _check(module)
    module = module.eval().requires_grad_(False)
    parameters = [(name, parameter) for name, parameter in module.named_parameters()]
    starts = dict(zip((name for name, _ in parameters), _starts(parameters), strict=True))
    chosen = [
        _layer(name, part, starts, kind=kind, form=form, rank=rank, sparsity=sparsity)
        for name, part in module.named_modules()
        if (kind := _kind(part)) is not None and any(fnmatchcase(name, pattern) for pattern in layers)
    ]
    known = [name for name, part in module.named_modules() if _kind(part) is not None]
    unmatched = [pattern for pattern in layers if not any(fnmatchcase(name, pattern) for name in known)]
    if unmatched or not chosen:
        raise UmbelError(
            "Expected network.layers to name linear, convolution or embedding layers, got "
            f"{list(unmatched or layers)}. There are: {', '.join(known) or 'none'}."
        )
    architecture = Architecture(
        parameters=tuple((name, tuple(parameter.shape)) for name, parameter in parameters),
        layers=tuple(sorted(chosen, key=lambda layer: layer.start)),
        outputs=outputs,
        train_base=train_base,
    )
    if architecture.rank + architecture.sparsity > LARGEST_PERSONAL:
        raise UmbelError(
            f"Expected at most {LARGEST_PERSONAL} numbers in w and b of a user, got {architecture.rank} and "
            f"{architecture.sparsity}. Lower model.rank or model.sparsity, adapt fewer layers, or set "
            "network.form='vector'."
        )
    base = torch.cat([parameter.detach().reshape(-1).to(torch.float32) for _, parameter in parameters])
    return _tried(AdaptedNetwork(module=module, architecture=architecture, base=base, inputs=inputs, tails={}))


def load_weights(network: AdaptedNetwork, path: Path) -> torch.Tensor:
    """`P` float32, a base from a safetensors file with the module's own names.

    Raises:
        UmbelError: If it is of another architecture, or not finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UmbelError(f"Expected a safetensors file, got network.weights={path}: {error}.") from error
    wanted = dict(network.architecture.parameters)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != wanted:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UmbelError(
            f"Expected network.weights with the module's parameters, got {path} with another {', '.join(wrong[:5])}. "
            "Save the state_dict of the same architecture."
        )
    base = torch.cat([tensors[name].reshape(-1).to(torch.float32) for name in wanted])
    if not torch.isfinite(base).all():
        raise UmbelError(f"Expected finite weights, got network.weights={path} with NaN or infinity.")
    return base


def _kind(part: nn.Module) -> Kind | None:
    # not a subclass of one, which may compute anything
    return _KINDS.get(type(part))


def _starts(parameters: Sequence[tuple[str, nn.Parameter]]) -> list[int]:
    sizes = [parameter.numel() for _, parameter in parameters]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _layer(name: str, part: Any, starts: dict[str, int], *, kind: Kind, form: Form, rank: int, sparsity: int) -> Layer:
    prefix = f"{name}." if name else ""
    rows = int(part.weight.shape[0])
    columns = part.weight.numel() // rows
    bias = getattr(part, "bias", None) is not None
    if f"{prefix}weight" not in starts:
        raise UmbelError(f"Expected layer {name!r} to have its weight as a parameter, got one that is computed.")
    start = starts[f"{prefix}weight"]
    if bias and starts[f"{prefix}bias"] != start + rows * columns:
        raise UmbelError(f"Expected the bias of layer {name!r} right after its weight, got another order.")
    full = Layer(
        name=name, kind=kind, start=start, rows=rows, columns=columns, bias=bias, form=form, rank=0, sparsity=0
    )
    most = full.d if form == "vector" else full.c
    return replace(full, rank=min(rank, most), sparsity=min(sparsity, full.size))


def _check(module: nn.Module) -> None:
    """Refuse what would keep users' data outside of theta, or cannot be told apart by user."""
    for name, part in module.named_modules():
        if isinstance(part, _NORMS) and (isinstance(part, _BATCH_NORM) or part.track_running_stats):
            raise UmbelError(
                "Expected layers without statistics over examples, which would be private state and mix examples, got "
                f"{type(part).__name__} {name!r}. Use nn.GroupNorm or nn.LayerNorm."
            )
        if isinstance(part, nn.Conv2d) and (part.groups, part.padding_mode) != (1, "zeros"):
            raise UmbelError(
                f"Expected nn.Conv2d with groups=1 and padding_mode='zeros', got {name!r} with groups={part.groups} "
                f"and padding_mode={part.padding_mode!r}. Use another layer."
            )
        if isinstance(part, nn.Conv2d) and isinstance(part.padding, str):
            raise UmbelError(f"Expected nn.Conv2d with padding in numbers, got {name!r} with {part.padding!r}.")
        if isinstance(part, nn.Embedding) and part.max_norm is not None:
            raise UmbelError(f"Expected nn.Embedding without max_norm, which changes weights in use, got {name!r}.")
        if isinstance(part, nn.Embedding) and (part.padding_idx is not None or part.scale_grad_by_freq or part.sparse):
            raise UmbelError(
                "Expected nn.Embedding without padding_idx, scale_grad_by_freq and sparse, whose gradients are not "
                f"derivatives, got {name!r}. Leave them out; a word of its own does for padding."
            )
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (other := owners.setdefault(id(parameter), name)) != name:
            raise UmbelError(
                f"Expected every weight to be used in one place, got {other!r} tied to {name!r}. Give each its own."
            )
        if is_lazy(parameter):
            raise UmbelError(f"Expected weights of known shapes, got {name!r} of a lazy module. Give it its shape.")
        if not parameter.is_floating_point():
            raise UmbelError(f"Expected weights of real numbers, got {name!r} of {parameter.dtype}.")
        if not torch.isfinite(parameter).all():
            raise UmbelError(f"Expected finite weights, got {name!r} with NaN or infinity.")


def _tried(network: AdaptedNetwork) -> AdaptedNetwork:
    """Run it forward and backward once: what does not fit is said here and not in a round."""
    generator = torch.Generator().manual_seed(_SEED)
    X = torch.rand(2 * _TRIED_EXAMPLES, network.inputs, generator=generator)
    # not at the base itself: where a last layer starts at zero, nothing below it would have a gradient
    theta = (network.base + 0.1 * torch.randn(network.base.shape, generator=generator)).requires_grad_()
    shapes = _Shapes()
    try:
        with shapes.of(network):
            eta = network.outputs(theta, X)
        direction = torch.randn(eta.shape, generator=generator)
        (gradient,) = torch.autograd.grad((eta * direction).sum(), theta, allow_unused=True)
        apart = vmap(network.outputs)(theta.expand(2, -1), X.reshape(2, _TRIED_EXAMPLES, -1)).flatten(0, 1)
    except Exception as error:
        raise UmbelError(
            f"Expected a differentiable network from {network.inputs} numbers to {network.architecture.outputs} an "
            f"example, got {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}. The last column of the "
            "data, the intercept, is not passed to a network."
        ) from error
    if not torch.allclose(eta, apart, rtol=1e-3, atol=1e-4):
        raise UmbelError("Expected outputs that depend on their own example alone, got a network that mixes examples.")
    for layer in network.architecture.layers:
        found = shapes.found[layer.name]
        if len(found) != 1:
            raise UmbelError(
                f"Expected every adapted layer to be used once, got {layer.name!r} used {len(found)} times. Leave it "
                "out of network.layers."
            )
        if found[0][0] != len(X):
            raise UmbelError(
                f"Expected examples along the first axis of what every adapted layer gives, got {layer.name!r} with "
                f"{found[0][0]} for {len(X)} examples. Leave it out of network.layers."
            )
        if gradient is None or not gradient[layer.start : layer.start + layer.size].any():
            raise UmbelError(
                f"Expected outputs that depend on layer {layer.name!r} in a differentiable way, got none. Remove what "
                "cuts its gradient, or leave it out of network.layers."
            )
    return replace(network, tails={name: tuple(found[0][1:]) for name, found in shapes.found.items()})


class _Shapes:
    """Shapes of what adapted layers give, noted whenever they are used."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, ...]]] = {}

    @contextmanager
    def of(self, network: AdaptedNetwork) -> Iterator[None]:
        """While this is open."""
        modules, handles = dict(network.module.named_modules()), []
        for layer in network.architecture.layers:
            noted: list[tuple[int, ...]] = []
            self.found[layer.name] = noted
            handles.append(
                modules[layer.name].register_forward_hook(
                    lambda _, __, output, noted=noted: noted.append(tuple(output.shape))
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
