"""Structured Jacobians against the dense one that they stand for."""

import pytest
import torch
from torch.func import jacrev

from client.network_jacobian import jacobian
from tests.neural import MODULES, examples, network, random, shared_of

ALL = [(name, form, bias) for name in MODULES for form in ("vector", "matrix") for bias in (True, False)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def at_random(name, form, bias):
    """A network, three users' parameters and examples, the factors, and `n x m x o x P` by `jacrev`; in float64."""
    adapted = network(name, form=form, bias=bias)
    theta = (adapted.base + random(3, len(adapted.base), scale=0.3)).to(torch.float64)
    X = examples(name, "squared", 3, 4).X.to(torch.float64)
    eta, factors = jacobian(adapted, theta, X)
    dense = torch.stack([jacrev(adapted.outputs)(theta[i], X[i]) for i in range(3)])
    torch.testing.assert_close(eta, torch.stack([adapted.outputs(theta[i], X[i]) for i in range(3)]))
    return adapted, dense, factors


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
def test_neural_jacobian_at_every_entry(name, form, bias):
    """Of every entry of every adapted layer, picked in another order for each user."""
    adapted, dense, factors = at_random(name, form, bias)
    for layer, found in zip(adapted.architecture.layers, factors, strict=True):
        generator = torch.Generator().manual_seed(1)
        places = layer.start + torch.stack([torch.randperm(layer.size, generator=generator) for _ in range(3)])
        expected = torch.gather(dense, -1, places[:, None, None, :].expand(*dense.shape[:3], -1))
        torch.testing.assert_close(found.at(places), expected)
        assert expected.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
@pytest.mark.parametrize("own", [False, True])
def test_neural_jacobian_along_U(name, form, bias, own):
    """The derivative in W is the dense one times that of theta in W; for one U, or each user's own."""
    adapted, dense, factors = at_random(name, form, bias)
    shared = torch.stack([shared_of(adapted, scale) for scale in ((0.3, 0.5, 2.0) if own else (0.3, 0.3, 0.3))])
    shared = shared.to(torch.float64)
    w = torch.zeros(adapted.architecture.rank, dtype=torch.float64)
    in_w = torch.stack([jacrev(adapted.theta, argnums=1)(shared[i], w) for i in range(3)])
    expected = dense @ in_w[:, None]
    slices = zip(adapted.architecture.U_slices(), adapted.architecture.w_slices(), factors, strict=True)
    for U, W, found in slices:
        of = shared[:, U].reshape(3, found.layer.d, found.layer.rank)
        torch.testing.assert_close(found.along_U(of if own else of[0]), expected[..., W])


@pytest.mark.parametrize(("name", "form", "bias"), ALL)
def test_neural_gradient_of_a_layer(name, form, bias):
    """Residuals times the Jacobian, summed over examples and outputs, is what autograd would give."""
    adapted, dense, factors = at_random(name, form, bias)
    residual = random(*dense.shape[:3], seed=4).to(torch.float64)
    expected = (residual[..., None] * dense).sum((1, 2))
    for layer, found in zip(adapted.architecture.layers, factors, strict=True):
        torch.testing.assert_close(found.gradient(residual), expected[:, layer.start : layer.start + layer.size])


def test_neural_hooks_are_gone_afterwards():
    """A module that has been looked into runs as before, and holds nobody's inputs."""
    adapted = network("words")
    jacobian(adapted, adapted.base.expand(2, -1), examples("words", "squared", 2, 3).X)
    assert not any(module._forward_hooks for module in adapted.module.modules())
