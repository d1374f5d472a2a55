"""The start of training: public, finite, and of the promised scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model import SharedModel
from server.initialization import initial_model, prior_noise_variance, regularized_moment, widened


def moment(seed, d):
    X = np.random.default_rng(seed).standard_normal((2 * d, d))
    return X.T @ X / (2 * d)


def test_regularized_moment():
    """S + .01 diag(S) + .1 tr(S)/d I, written out."""
    S = np.array([[2.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(regularized_moment(S), [[2.17, 0.5], [0.5, 1.16]], rtol=1e-15)
    assert S.tolist() == [[2.0, 0.5], [0.5, 1.0]]


@given(seed=st.integers(0, 2**32), d=st.integers(1, 8), rank=st.integers(0, 8), noise_variance=st.floats(1e-3, 1e3))
def test_u_explains_a_fifth_of_the_noise(seed, d, rank, noise_variance):
    """tr(U'SU) is .2 noise variances; beta is 0; U lies along leading directions of the public features."""
    rank = min(rank, d)
    S = moment(seed, d)
    model = initial_model(S, rank, noise_variance, np.random.default_rng(0))
    assert not model.beta.any()
    assert model.U.shape == (d, rank)
    assert model.noise_variance == noise_variance
    assert model.b_variance == pytest.approx(0.1 * noise_variance)
    if rank:
        regular = regularized_moment(S)
        assert np.trace(model.U.T @ regular @ model.U) == pytest.approx(0.2 * noise_variance)
        directions, values = model.gauge()
        np.testing.assert_allclose(values, values[0])
        leading = np.linalg.eigvalsh(regular)[::-1][:rank]
        captured = np.sort(np.linalg.eigvalsh(directions.T @ regular @ directions))[::-1]
        np.testing.assert_allclose(captured, leading, rtol=1e-6)


@pytest.mark.parametrize("S", [np.eye(6), np.diag([1.0, 0, 0, 0, 0, 0]), np.ones((6, 6))])
def test_ties_and_singular_moments_are_survived(S):
    """Equal or dependent features still give a finite start, the same one from the same generator."""
    models = [initial_model(S, 3, 1.0, np.random.default_rng(5)) for _ in range(2)]
    assert np.isfinite(models[0].U).all()
    assert np.array_equal(models[0].U, models[1].U)


def test_ties_are_broken_at_random():
    """With equal directions another generator starts elsewhere."""
    first, second = (initial_model(np.eye(6), 2, 1.0, np.random.default_rng(seed)) for seed in (1, 2))
    assert not np.allclose(first.U @ first.U.T, second.U @ second.U.T)


def test_noise_variance_from_the_declared_range():
    """(range / 4)^2 for squared loss, 1 for the others; nothing is pooled from users."""
    assert prior_noise_variance((-1.5, 2.5), "squared") == 1.0
    assert prior_noise_variance((0.0, 8.0), "squared") == 4.0
    assert prior_noise_variance((0.0, 1.0), "logistic") == 1.0


@pytest.mark.parametrize("S", [np.eye(6), moment(3, 6), np.ones((6, 6))])
@pytest.mark.parametrize("dead", [False, True])
def test_a_wider_model_keeps_its_columns(S, dead):
    """New columns of U lie outside what the released ones span, and have the scale of a new run's."""
    U = np.random.default_rng(1).standard_normal((6, 2)) * np.array([1.0, 0.0 if dead else 0.1])
    model = SharedModel(beta=np.arange(6.0), U=U, b_variance=0.3, noise_variance=0.7)
    wide, again = (widened(model, 5, S, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(wide.U, again.U)
    assert np.array_equal(wide.U[:, :2], U)
    V = wide.U[:, 2:]
    np.testing.assert_allclose(U.T @ V, 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.svd(V)[1], np.linalg.svd(V)[1][0])
    assert np.trace(V.T @ regularized_moment(S) @ V) == pytest.approx(0.2 * 0.7 * 3 / 5)
    assert np.array_equal(wide.beta, model.beta)
    assert (wide.b_variance, wide.noise_variance) == (0.3, 0.7)


def test_a_model_that_is_wide_enough_stays():
    """Nothing is added, and no randomness is used up."""
    model, rng = initial_model(moment(0, 4), 2, 1.0, np.random.default_rng(0)), np.random.default_rng(7)
    assert widened(model, 2, moment(0, 4), rng) is model
    assert rng.random() == np.random.default_rng(7).random()
