"""Loss families: their derivatives, and logistic and softmax loss exact at any margin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.special import log_softmax

from common.families import FAMILIES, LINEAR_FAMILIES, expit

SQUARED, LOGISTIC, SOFTMAX = FAMILIES["squared"], FAMILIES["logistic"], FAMILIES["softmax"]
MARGINS = [0.0, -0.0, 1e-300, -1e-300, 0.3, -0.7, 5.0, -5.0, 36.0, -37.5, 709.0, -745.0, 1e4, -1e4, 1e300, -1e300]


def exact_logistic(eta: float, y: float):
    """Loss, y - p and p (1 - p) to 50 digits."""
    with mp.workdps(50):
        t = mpf(eta)
        p = 1 / (1 + mp.exp(-t))
        loss = mp.log1p(mp.exp(-abs(t))) + max(t, 0) - mpf(y) * t
        q = 1 / (1 + mp.exp(t))
        return float(loss), float(mpf(y) * q - (1 - mpf(y)) * p), float(p * q)


@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("eta", MARGINS)
def test_logistic_is_exact_at_any_margin(eta, y):
    """At margins up to 1e4 and beyond loss, residual and curvature are finite and right to 1e-13, without a warning.

    A loss of log(exp(-1000)) that is infinite, or lost in cancellation, is a known fault of others.
    """
    loss, residual, curvature = exact_logistic(eta, y)
    at, target = np.array([eta]), np.array([y])
    with np.errstate(all="raise", under="ignore"):
        actual = LOGISTIC.loss(at, target)[0], LOGISTIC.residual(at, target)[0], LOGISTIC.curvature(at)[0]
    assert np.isfinite(actual).all()
    for value, wanted in zip(actual, (loss, residual, curvature), strict=True):
        assert value == pytest.approx(wanted, rel=1e-13, abs=2e-16 if wanted == residual else 1e-300)


def test_logistic_known_values():
    """At margin 0 the loss is log 2, the residual 1/2 and the curvature 1/4; a wrong margin of 1e4 costs 1e4."""
    assert LOGISTIC.loss(np.zeros(2), np.array([0.0, 1.0])).tolist() == pytest.approx([np.log(2)] * 2)
    assert LOGISTIC.residual(np.zeros(2), np.array([0.0, 1.0])).tolist() == [-0.5, 0.5]
    assert LOGISTIC.curvature(np.zeros(1)).tolist() == [0.25]
    assert LOGISTIC.loss(np.array([1e4, -1e4]), np.array([0.0, 1.0])).tolist() == [1e4, 1e4]
    assert LOGISTIC.loss(np.array([1e4, -1e4]), np.array([1.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LINEAR_FAMILIES)
@given(eta=st.floats(-30, 30), y=st.sampled_from([0.0, 1.0]))
def test_residual_and_curvature_are_derivatives(name, eta, y):
    """Minus the first and the second derivative of the negative log likelihood, half the loss for squared."""
    family, h = FAMILIES[name], 1e-4
    scale = 0.5 if name == "squared" else 1.0
    target = np.full(3, y)
    below, at, above = (family.loss(np.array([eta - h, eta, eta + h]), target) * scale).tolist()
    slope = (above - below) / (2 * h)
    bend = (above - 2 * at + below) / h**2
    assert family.residual(np.array([eta]), np.array([y]))[0] == pytest.approx(-slope, abs=1e-6)
    assert family.curvature(np.array([eta]))[0] == pytest.approx(bend, abs=1e-4 * max(1.0, abs(at)))


def test_squared_values():
    """(y - eta)^2, y - eta and one."""
    eta, y = np.array([1.0, -2.0]), np.array([3.0, -2.5])
    assert SQUARED.loss(eta, y).tolist() == [4.0, 0.25]
    assert SQUARED.residual(eta, y).tolist() == [2.0, -0.5]
    assert SQUARED.curvature(eta).tolist() == [1.0, 1.0]


@given(st.floats(allow_nan=False))
def test_expit_is_a_probability_and_symmetric(eta):
    """In [0, 1] at any margin, with expit(-x) = 1 - expit(x) to rounding."""
    p, q = expit(np.array([eta, -eta])).tolist()
    assert 0 <= p <= 1
    assert p + q == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", LINEAR_FAMILIES)
def test_torch_agrees(name):
    """The same on tensors, bit for bit where no exponential is taken, else to rounding."""
    eta, y = np.array(MARGINS[:-2]), np.tile([0.0, 1.0], 7)
    family = FAMILIES[name]
    for ours, theirs in (
        (family.loss(eta, y), family.loss(torch.from_numpy(eta), torch.from_numpy(y))),
        (family.residual(eta, y), family.residual(torch.from_numpy(eta), torch.from_numpy(y))),
        (family.curvature(eta), family.curvature(torch.from_numpy(eta))),
    ):
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-13, atol=0)


def test_names_and_metrics():
    """What configuration and report call them."""
    assert {name: (family.name, family.metric) for name, family in FAMILIES.items()} == {
        "squared": ("squared", "rmse"),
        "logistic": ("logistic", "log_loss"),
        "softmax": ("softmax", "log_loss"),
    }


def exact_softmax(eta: list[float], y: int):
    """Loss, onehot(y) - p and p (1 - p) to 50 digits more than the margins cancel."""
    with mp.workdps(10_000):
        terms = [mp.exp(mpf(t)) for t in eta]
        total = mp.fsum(terms)
        p = [term / total for term in terms]
        rest = [mp.fsum(q for k, q in enumerate(p) if k != c) for c in range(len(p))]
        residual = [float(rest[c] if c == y else -p[c]) for c in range(len(p))]
        return float(mp.log(total) - mpf(eta[y])), residual, [float(q * r) for q, r in zip(p, rest, strict=True)]


@pytest.mark.parametrize("y", [0, 1, 2])
@pytest.mark.parametrize(
    "eta",
    [
        [0.0, 0.0, 0.0],
        [1e-300, -1e-300, 0.0],
        [0.3, -0.7, 2.0],
        [-36.0, 1.5, 0.0],
        [709.0, -745.0, 708.0],
        [1e4, 0.0, -1e4],
        [-1e4, -1e4, -1e4],
        [1e4, 1e4 - 40.0, 1e4 - 41.0],
        [5.0, 5.0, -1e4],
    ],
)
def test_softmax_is_exact_at_any_margin(eta, y):
    """At margins up to 1e4 loss, residual and curvature are finite and right to 1e-12, without a warning."""
    loss, residual, curvature = exact_softmax(eta, y)
    at, target = np.array([eta]), np.array([float(y)])
    with np.errstate(all="raise", under="ignore"):
        actual = SOFTMAX.loss(at, target), SOFTMAX.residual(at, target)[0], SOFTMAX.curvature(at)[0]
    np.testing.assert_allclose(actual[0], [loss], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(actual[1], residual, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(actual[2], curvature, rtol=1e-12, atol=1e-300)


def test_softmax_of_two_classes_is_logistic():
    """With eta = (0, t) it is the logistic loss of t, and so are its derivatives in t."""
    t, y = np.array(MARGINS), np.array(MARGINS[::-1]) > 0
    eta, y = np.stack([np.zeros_like(t), t], axis=-1), y.astype(np.float64)
    np.testing.assert_allclose(SOFTMAX.loss(eta, y), LOGISTIC.loss(t, y), rtol=1e-13)
    np.testing.assert_allclose(SOFTMAX.residual(eta, y)[:, 1], LOGISTIC.residual(t, y), rtol=1e-13, atol=2e-16)
    np.testing.assert_allclose(SOFTMAX.curvature(eta)[:, 1], LOGISTIC.curvature(t), rtol=1e-13)


def drawn_scores(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of up to some ten in magnitude, and a class for each of their examples, as floats."""
    rng = np.random.default_rng(3)
    return 10 * rng.standard_normal(shape), rng.integers(shape[-1], size=shape[:-1]).astype(np.float64)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 10)])
def test_softmax_agrees_with_scipy(shape):
    """Minus scipy's log_softmax at the class, whatever axes stand before the classes."""
    eta, y = drawn_scores(*shape)
    expected = -np.take_along_axis(log_softmax(eta, axis=-1), y[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(SOFTMAX.loss(eta, y), expected, rtol=1e-13, atol=1e-14)
    assert SOFTMAX.residual(eta, y).shape == SOFTMAX.curvature(eta).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax_agrees_with_torch(dtype):
    """Loss and residual are torch's cross_entropy and minus its gradient, on torch's own tensors and in their dtype."""
    eta, y = (torch.from_numpy(array).to(dtype) for array in drawn_scores(20, 7))
    eta.requires_grad_()
    theirs = torch.nn.functional.cross_entropy(eta, y.long(), reduction="none")
    (gradient,) = torch.autograd.grad(theirs.sum(), eta)
    loss, residual = SOFTMAX.loss(eta, y), SOFTMAX.residual(eta, y)
    assert (loss.dtype, residual.dtype) == (dtype, dtype)
    atol = 1e-14 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(
        loss.detach(), theirs.detach(), rtol=1e-13 if dtype == torch.float64 else 1e-5, atol=atol
    )
    np.testing.assert_allclose(residual.detach(), -gradient, rtol=0, atol=atol)
    (ours,) = torch.autograd.grad(loss.sum(), eta)
    np.testing.assert_allclose(ours, gradient, rtol=0, atol=atol)


def test_softmax_curvature_is_the_second_derivative():
    """Its derivative in each class's own score, by automatic differentiation."""
    eta, y = (torch.from_numpy(array) for array in drawn_scores(1, 6))
    hessian = torch.autograd.functional.hessian(
        lambda scores: torch.nn.functional.cross_entropy(scores, y.long(), reduction="sum"), eta
    )
    np.testing.assert_allclose(SOFTMAX.curvature(eta)[0], hessian[0, :, 0, :].diagonal(), rtol=1e-9, atol=1e-15)


def test_a_score_that_is_no_number_stays_with_its_example():
    """The examples beside it keep their loss."""
    eta, y = drawn_scores(3, 4)
    broken = eta.copy()
    broken[1, 2] = np.nan
    assert np.isnan(SOFTMAX.loss(broken, y)[1])
    assert SOFTMAX.loss(broken, y)[[0, 2]].tolist() == SOFTMAX.loss(eta, y)[[0, 2]].tolist()
    assert SOFTMAX.residual(broken, y)[[0, 2]].tolist() == SOFTMAX.residual(eta, y)[[0, 2]].tolist()
