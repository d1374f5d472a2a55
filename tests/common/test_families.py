"""Loss families: their derivatives, and logistic loss exact at any margin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from common.families import FAMILIES, expit

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]
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


@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("name", FAMILIES)
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
    }
