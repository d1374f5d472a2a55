"""How a network's outputs move with the entries of its adapted layers, without writing out any Jacobian.

An entry (p, q) of a linear layer moves output o of example j by sum_t L_top R_tq: R_t is the layer's input with a 1 for
the bias, L_to the derivative of the output in the layer's own output, and t runs over the places where the layer is
applied within the example (the patches of a convolution, the tokens of a sequence). An embedding is the same with R the
derivative and L the word, one-hot. So one forward pass and one backward pass an output, through activations only, give
every direction of U and every candidate of b by small products; the Jacobian in all parameters, which would be
`m x o x P` of every user, is never made.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import vjp, vmap

from common.architecture import Layer
from common.networks import FEW, AdaptedNetwork

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerJacobian:
    """One layer's factors, of n users with m examples, o outputs and T places each.

    Attributes:
        layer: Which.
        left: `n x m x o x T x rows`, or with 1 for o.
        right: `n x m x o x T x columns`, likewise, the bias's 1 included.
    """

    layer: Layer
    left: Tensor
    right: Tensor

    def along_U(self, U: Tensor) -> Tensor:
        """`n x m x o x (r c)`, derivative of the outputs in W by rows.

        Args:
            U: `d x r`, or `n x d x r`.
        """
        layer, n = self.layer, self.left.shape[0]
        U = U.expand(n, *U.shape[-2:])
        if layer.form == "matrix":
            is_left = layer.d == layer.rows
            long, short = (self.left, self.right) if is_left else (self.right, self.left)
            return (_by_user(long, U).mT @ short).flatten(-2)
        # K_r = U[:, r] as a matrix; sum_t L_t K_r R_t'
        K = U.index_select(1, _as_matrix(layer, U.device)).reshape(n, layer.rows, -1)
        moved = _by_user(self.left, K)
        moved = moved.reshape(*moved.shape[:-1], self.right.shape[-1], layer.rank)
        return torch.sum(self.right[..., None] * moved, (-3, -2))

    def at(self, places: Tensor) -> Tensor:
        """`n x m x o x C`, derivative of the outputs in single entries.

        Args:
            places: `n x C` int64, of each user, in the base and inside of this layer.
        """
        row, column = _row_and_column(self.layer, places)
        left = _picked(self.left, row)
        return (left * _picked(self.right, column)).sum(-2)

    def gradient(self, residual: Tensor) -> Tensor:
        """`n x size`, sum over examples and outputs of `residual` (`n x m x o`) times the derivative in every entry."""
        weighted = residual[..., None, None]
        if self.left.shape[2] == residual.shape[2]:
            left, right = (self.left * weighted).sum(2), self.right[:, :, 0]
        else:
            left, right = self.left[:, :, 0], (self.right * weighted).sum(2)
        matrix = left.flatten(1, 2).mT @ right.flatten(1, 2)
        weights = matrix[:, :, : self.layer.columns].flatten(1)
        return torch.cat([weights, matrix[:, :, -1]], 1) if self.layer.bias else weights


def jacobian(network: AdaptedNetwork, theta: Tensor, X: Tensor) -> tuple[Tensor, tuple[LayerJacobian, ...]]:
    """`n x m x o` outputs at `theta` (`n x P`) on `X` (`n x m x inputs`), and each adapted layer's factors."""
    layers, modules = network.architecture.layers, dict(network.module.named_modules())
    if len(theta) > FEW:
        eta, inputs, derivatives = vmap(partial(_batched, network, modules))(theta, X)
    else:
        each = [_alone(network, modules, own, x) for own, x in zip(theta, X, strict=True)]
        eta = torch.stack([eta for eta, _, _ in each])
        inputs = {layer.name: torch.stack([given[layer.name] for _, given, _ in each]) for layer in layers}
        derivatives = {layer.name: torch.stack([moved[layer.name] for _, _, moved in each]) for layer in layers}
    found = [_factors(layer, modules[layer.name], inputs[layer.name], derivatives[layer.name]) for layer in layers]
    return eta, tuple(found)


def _batched(
    network: AdaptedNetwork, modules: dict[str, nn.Module], theta: Tensor, X: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One user's outputs, what adapted layers are given, and the outputs' derivatives in what they give."""
    one_hot = torch.eye(network.architecture.outputs, dtype=X.dtype, device=X.device)[:, None, :]

    def run(moves: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        inputs: dict[str, Tensor] = {}
        with _Hooks(modules, moves, inputs):
            eta = network.outputs(theta, X)
        return eta, (eta, inputs)

    zeros = {name: X.new_zeros(len(X), *tail) for name, tail in network.tails.items()}
    _, pull, (eta, inputs) = vjp(run, zeros, has_aux=True)  # type: ignore[misc] # three values with has_aux
    (derivatives,) = vmap(pull)(one_hot.expand(-1, len(X), -1))
    return eta, inputs, derivatives


def _alone(
    network: AdaptedNetwork, modules: dict[str, nn.Module], theta: Tensor, X: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The same in one pass, with the examples written down once for each output."""
    m, o = len(X), network.architecture.outputs
    moves = {name: X.new_zeros(o * m, *tail, requires_grad=True) for name, tail in network.tails.items()}
    inputs: dict[str, Tensor] = {}
    with torch.enable_grad(), _Hooks(modules, moves, inputs):
        eta = network.outputs(theta, X.repeat(o, *[1] * (X.ndim - 1))).reshape(o, m, o)
        derivatives = torch.autograd.grad(eta.diagonal(dim1=0, dim2=2).sum(), list(moves.values()))
    return (
        eta[0].detach(),
        {name: value[:m].detach() for name, value in inputs.items()},
        {name: found.reshape(o, m, *found.shape[1:]) for name, found in zip(moves, derivatives, strict=True)},
    )


class _Hooks:
    """While this is open, adapted layers note their inputs and add a move to their outputs."""

    def __init__(self, modules: dict[str, nn.Module], moves: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        self._modules, self._moves, self._inputs = modules, moves, inputs
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, move in self._moves.items():

            def hook(
                _: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name, move: Tensor = move
            ) -> Tensor:
                self._inputs[name] = args[0]
                return output + move

            self._handles.append(self._modules[name].register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _factors(layer: Layer, part: nn.Module, inputs: Tensor, derivatives: Tensor) -> LayerJacobian:
    """From what a layer was given (`n x m x ...`) and the derivatives in what it gave (`n x o x m x ...`)."""
    derivatives = derivatives.transpose(1, 2)
    if isinstance(part, nn.Conv2d):
        padding: Any = part.padding  # in numbers, `common.networks.adapt` refuses others
        unfolded = nn.functional.unfold(
            inputs.flatten(0, 1), part.kernel_size, dilation=part.dilation, padding=padding, stride=part.stride
        )
        inputs = unfolded.mT.reshape(*inputs.shape[:2], *unfolded.mT.shape[1:])
        derivatives = derivatives.flatten(4).mT
    else:
        derivatives = derivatives.reshape(*derivatives.shape[:3], -1, derivatives.shape[-1])
    if isinstance(part, nn.Embedding):
        words = torch.arange(layer.rows, device=inputs.device)
        one_hot = (inputs.flatten(2)[..., None] == words).to(derivatives.dtype)
        return LayerJacobian(layer=layer, left=one_hot[:, :, None], right=derivatives)
    inputs = inputs.reshape(*inputs.shape[:2], 1, -1, inputs.shape[-1])
    if layer.bias:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
    return LayerJacobian(layer=layer, left=derivatives, right=inputs)


def _by_user(factor: Tensor, M: Tensor) -> Tensor:
    """`n x m x o x T x c`, each user's `factor` (`n x m x o x T x p`) times that user's `M` (`n x p x c`).

    One product a user, of that user's own rows: nobody's number depends on who else is in the batch.
    """
    return torch.bmm(factor.flatten(1, 3), M).reshape(*factor.shape[:4], M.shape[-1])


def _picked(factor: Tensor, index: Tensor) -> Tensor:
    """`n x m x o x T x C`, columns `index` (`n x C`) of each user."""
    shape = (*factor.shape[:-1], index.shape[1])
    return torch.gather(factor, -1, index[:, None, None, None, :].expand(shape))


def _row_and_column(layer: Layer, places: Tensor) -> tuple[Tensor, Tensor]:
    place, weights = places - layer.start, layer.rows * layer.columns
    is_weight = place < weights
    row = torch.where(is_weight, place // layer.columns, place - weights)
    return row, torch.where(is_weight, place % layer.columns, layer.columns)


def _as_matrix(layer: Layer, device: torch.device) -> Tensor:
    """`rows x (columns + bias)` by rows, which entry of the layer's part of the base each entry of its matrix is."""
    place = torch.arange(layer.rows * layer.columns, device=device).reshape(layer.rows, layer.columns)
    if layer.bias:
        bias = layer.rows * layer.columns + torch.arange(layer.rows, device=device)
        place = torch.cat([place, bias[:, None]], 1)
    return place.reshape(-1)
