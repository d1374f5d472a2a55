"""Torch modules as functions of flat vectors, and which modules are refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.architecture import Layer
from common.errors import UmbelError
from common.networks import adapt, load_module, load_weights
from tests.neural import MODULES, mlp, network, random, shared_of

ALL = [(name, form, bias) for name in MODULES for form in ("vector", "matrix") for bias in (True, False)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def matrix_of(layer: Layer, flat: torch.Tensor) -> torch.Tensor:
    """`d x c` of a layer's part of the base, by hand."""
    weights = layer.rows * layer.columns
    M = flat[:weights].reshape(layer.rows, layer.columns)
    if layer.form == "vector":
        return flat[:, None]
    if layer.bias:
        M = torch.cat([M, flat[weights:, None]], 1)
    return M if layer.rows >= layer.columns + layer.bias else M.T


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
def test_neural_theta_is_base_plus_U_W(name, form, bias):
    """Every adapted layer's matrix moves by U W; nothing else moves."""
    adapted = network(name, form=form, bias=bias)
    architecture, shared = adapted.architecture, shared_of(adapted)
    w = random(architecture.rank, seed=1)
    theta, moved = adapted.theta(shared, w), torch.zeros(architecture.num_parameters, dtype=torch.bool)
    for layer, U, W in zip(architecture.layers, architecture.U_slices(), architecture.w_slices(), strict=True):
        of = slice(layer.start, layer.start + layer.size)
        by_hand = matrix_of(layer, adapted.base[of]) + shared[U].reshape(layer.d, -1) @ w[W].reshape(-1, layer.c)
        torch.testing.assert_close(matrix_of(layer, theta[of]), by_hand)
        moved[of] = True
    assert torch.equal(theta[~moved], adapted.base[~moved])
    assert not torch.equal(theta, adapted.base)


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
def test_neural_shared_gradient_is_that_through_theta(name, form, bias):
    """Autograd of the outputs in the shared vector, for three users at once."""
    adapted = network(name, form=form, bias=bias)
    w = random(3, adapted.architecture.rank, seed=1)
    X = torch.rand(3, 5, adapted.inputs)
    inner, outer = [], []
    for i in range(3):
        shared = shared_of(adapted).requires_grad_()
        theta = adapted.theta(shared, w[i]).detach().requires_grad_()
        inner.append(torch.autograd.grad(adapted.outputs(theta, X[i]).square().sum(), theta)[0])
        outer.append(torch.autograd.grad(adapted.outputs(adapted.theta(shared, w[i]), X[i]).square().sum(), shared)[0])
    torch.testing.assert_close(adapted.shared_gradient(torch.stack(inner), w), torch.stack(outer))


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
def test_neural_personal_parameters_add_up_to_theta(name, form, bias):
    """base + U W + B by name and as matrices is the theta that the network is run with."""
    adapted = network(name, form=form, bias=bias, sparsity=3)
    architecture, shared = adapted.architecture, shared_of(adapted)
    w, b = random(architecture.rank, seed=1), random(architecture.sparsity, seed=2)
    # the first and the last entry (of the bias, if there is one) of each layer, and a slot that is unused
    support = torch.tensor([p for one in architecture.layers for p in (one.start, -1, one.start + one.size - 1)])
    theta = adapted.theta(shared, w)
    for place, value in zip(support.tolist(), b.tolist(), strict=True):
        if place >= 0:
            theta[place] += value
    released, personal = adapted.shared_parameters(shared), adapted.personal_parameters(w, support, b)
    assert list(released)[: len(architecture.parameters)] == [name for name, _ in architecture.parameters]
    assert set(personal) == {f"{one.name}.{part}" for one in architecture.layers for part in "WB"}
    for layer in architecture.layers:
        of = slice(layer.start, layer.start + layer.size)
        B = personal[f"{layer.name}.B"].to_dense()
        assert B.shape == (layer.rows, layer.columns + layer.bias)
        assert (B != 0).sum() == 2
        flat = torch.cat([B[:, : layer.columns].reshape(-1), B[:, layer.columns :].reshape(-1)])
        W = personal[f"{layer.name}.W"]
        assert W.shape == (layer.rank, layer.c)
        delta = released[f"{layer.name}.U"] @ W + matrix_of(layer, flat)
        torch.testing.assert_close(matrix_of(layer, adapted.base[of]) + delta, matrix_of(layer, theta[of]))


def test_neural_merged_module_is_the_personal_network():
    """A merged module gives a user's outputs by itself; unmerged it is the one it was."""
    module = mlp()
    X = torch.rand(5, 4)
    before = module(X).detach()
    adapted = adapt(module, inputs=4, outputs=1, rank=2, sparsity=1)
    theta = adapted.theta(shared_of(adapted), random(adapted.architecture.rank))
    assert torch.equal(adapted.merge(theta)(X), adapted.outputs(theta, X))
    assert not torch.equal(adapted.merge(theta)(X), before)
    assert torch.equal(adapted.unmerge()(X), before)


def test_neural_personal_parameters_are_never_in_the_module():
    """Running a user's network leaves no trace of the user in the module."""
    adapted = network("classes")
    before = {name: value.clone() for name, value in adapted.module.state_dict().items()}
    adapted.outputs(adapted.theta(shared_of(adapted), random(adapted.architecture.rank)), torch.rand(5, 4))
    after = adapted.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_neural_layers_are_chosen_by_pattern():
    """Names and patterns; rank and sparsity are lowered to what a layer has room for."""
    adapted = network("classes", layers=("3",), rank=50, sparsity=1000, form="matrix", train_base=False)
    (layer,) = adapted.architecture.layers
    assert (layer.name, layer.rank, layer.sparsity) == ("3", 3, 21)
    assert not adapted.architecture.train_base
    assert [one.name for one in network("convolutions", layers=("f*", "head")).architecture.layers] == ["first", "head"]


MODULE_FILES = {
    "def make(): return 3\n": "got int",
    "def other(): pass\n": "AttributeError",
    "def make(): raise RuntimeError('no weights')\n": "RuntimeError: no weights",
    "def make(:\n": "SyntaxError",
}


@pytest.mark.parametrize("code", MODULE_FILES)
def test_neural_module_file_that_gives_no_module(tmp_path, code):
    """The message names what went wrong in it."""
    path = tmp_path / "net.py"
    path.write_text(code)
    with pytest.raises(UmbelError, match=MODULE_FILES[code]):
        load_module(f"{path}:make")


@pytest.mark.parametrize(
    "place", ["net.py", "net.py:", ":make", "net.txt:make", "net.py:not a name", "/no/net.py:make"]
)
def test_neural_module_place_that_is_none(place):
    """A place is a Python file, a colon and a function."""
    with pytest.raises(UmbelError, match=r"network\.module"):
        load_module(place)


def test_neural_module_is_the_same_everywhere(tmp_path):
    """Its random numbers have a seed of their own, and everybody else's are left alone."""
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\nstart = nn.Linear(2, 2)\ndef make(): return nn.Linear(3, 2)\n")
    torch.manual_seed(1)
    first, after = load_module(f"{path}:make"), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(load_module(f"{path}:make").weight, first.weight)


class _Passed(nn.Module):
    """Two linear layers with any function in between."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 3), nn.Linear(3, 1), between

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def _tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    module[1].weight = module[0].weight
    return module


def _with_nan():
    module = mlp(3)
    module[0].weight.data[0, 0] = torch.nan
    return module


class _OneTable(nn.Module):
    """An embedding of places, which has no axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(x + self.places(torch.arange(3)).mean(0))


class _Pictures(nn.Module):
    """One convolution, however it is made."""

    def __init__(self, **more) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, **more)

    def forward(self, x):
        return self.convolution(x.reshape(-1, 1, 1, 3).expand(-1, -1, 3, -1)).flatten(1).mean(1)


def _channels(layer):
    return nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), layer, nn.Flatten(), nn.Linear(8, 1))


REFUSED = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "nn.GroupNorm"),
    "instance norm": (lambda: _channels(nn.InstanceNorm2d(2, track_running_stats=True)), "nn.GroupNorm"),
    "tied": (_tied, "'0.weight' tied to '1.weight'"),
    "rounded": (lambda: _Passed(lambda self, x: torch.round(x)), "depend on layer 'first' in a differentiable way"),
    "detached": (lambda: _Passed(lambda self, x: x.detach()), "depend on layer 'first' in a differentiable way"),
    "cut off": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Threshold(1e9, 0.0)), "depend on layer '0'"),
    "used twice": (lambda: _Passed(lambda self, x: self.first(x)), "'first' used 2 times"),
    "mixed": (lambda: _Passed(lambda self, x: x - x.mean(0)), "mixes examples"),
    "branches": (lambda: _Passed(lambda self, x: x if x.sum() > 0 else -x), "differentiable network"),
    "not finite": (_with_nan, "'0.weight' with NaN"),
    "grouped": (lambda: _channels(nn.Conv2d(2, 2, 1, groups=2)), "groups=1"),
    "reflected": (lambda: _Pictures(padding=1, padding_mode="reflect"), "padding_mode='zeros'"),
    "same": (lambda: _Pictures(padding="same"), "padding in numbers"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "max_norm"),
    "padding_idx": (lambda: nn.Sequential(nn.Embedding(3, 2, padding_idx=0)), "padding_idx"),
    "frequencies": (lambda: nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), "scale_grad_by_freq"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1)), "lazy module"),
    "inputs": (lambda: mlp(5), "from 3 numbers to 1"),
    "outputs": (lambda: mlp(3, 2), "from 3 numbers to 1"),
    "no axis": (_OneTable, "examples along the first axis"),
    "too many": (lambda: nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 1)), "at most 256 numbers in w and b"),
    "weights of complex numbers": (lambda: nn.Sequential(nn.Linear(3, 1, dtype=torch.complex64)), "real numbers"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch says so of every lazy module
@pytest.mark.parametrize("name", REFUSED)
def test_neural_module_that_is_refused(name):
    """With what is the matter, and mostly what to do."""
    make, message = REFUSED[name]
    with pytest.raises(UmbelError, match=message):
        adapt(make(), inputs=3, outputs=1, rank=2, sparsity=150 if name == "too many" else 1)


@pytest.mark.parametrize("layers", [("nothing",), ("0", "1*"), ("1",)])
def test_neural_pattern_without_a_layer(layers):
    """Each pattern has to name a layer of a kind that can be adapted; those are listed."""
    with pytest.raises(UmbelError, match=r"There are: 0, 3\."):
        adapt(mlp(), inputs=4, outputs=1, rank=1, sparsity=1, layers=layers)


def test_neural_layers_of_another_class_are_not_adapted():
    """A subclass may compute anything; it is no candidate."""

    class Cosine(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)

    module = nn.Sequential(nn.Linear(3, 3), Cosine(3, 1))
    assert [one.name for one in adapt(module, inputs=3, outputs=1, rank=1, sparsity=1).architecture.layers] == ["0"]


def test_neural_last_layer_may_start_at_zero():
    """Nothing below it has a gradient then, which is no reason to refuse."""
    module = mlp()
    nn.init.zeros_(module[3].weight)
    assert len(adapt(module, inputs=4, outputs=1, rank=1, sparsity=1).architecture.layers) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_neural_weights_from_a_file(tmp_path, dtype):
    """In the module's order, whatever the file's."""
    adapted = network("convolutions")
    weights = {name: value.to(dtype) for name, value in reversed(adapted.module.state_dict().items())}
    save_file(weights, tmp_path / "w.safetensors")
    expected = adapted.base.to(dtype).to(torch.float32)
    assert torch.equal(load_weights(adapted, tmp_path / "w.safetensors"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("0.bias"), "another 0.bias"),
        (lambda w: w.update({"0.bias": torch.zeros(7)}), "another 0.bias"),
        (lambda w: w.update({"9.bias": torch.zeros(7)}), "another 9.bias"),
        (lambda w: w.update({"0.bias": torch.full((6,), torch.nan)}), "finite"),
        (lambda w: w.update({"0.bias": torch.full((6,), 1e300, dtype=torch.float64)}), "finite"),
    ],
)
def test_neural_weights_that_do_not_fit(tmp_path, change, message):
    """Another architecture, or numbers that are none in float32."""
    adapted = network("mlp")
    weights = dict(adapted.module.state_dict())
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UmbelError, match=message):
        load_weights(adapted, tmp_path / "w.safetensors")


def test_neural_weights_that_are_no_safetensors(tmp_path):
    """A pickle is not read."""
    (tmp_path / "w.pt").write_bytes(b"\x80\x05K\x01.")
    for path in (tmp_path / "w.pt", tmp_path / "missing"):
        with pytest.raises(UmbelError, match="Expected a safetensors file"):
            load_weights(network("mlp"), path)
