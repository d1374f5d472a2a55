"""Populations drawn from a known model."""

import math

import numpy as np
import pytest

from common.data import DenseFeatures
from common.synthetic import draw_population

SMALL = {"users": 50, "dimension": 6, "rank": 2, "sparsity": 1}


def test_without_noise_the_targets_are_exactly_the_models() -> None:
    """y = x'(beta + U w_i + b_i) for every example of every user."""
    population, schema, truth = draw_population(**SMALL, examples=(1, 9), noise=0.0)
    X = population.features.rows(slice(None))
    expected = (X * truth.theta[population.user_of_example]).sum(axis=1)
    np.testing.assert_allclose(population.y, np.clip(expected, *schema.target_range), rtol=1e-12, atol=1e-12)
    assert abs(X).max() <= schema.feature_bound


def test_the_truth_has_the_declared_shape() -> None:
    """U has orthogonal columns of the declared scale, b the declared number of nonzeros, beta its length."""
    _, _, truth = draw_population(**SMALL, beta_scale=2.0, U_scale=3.0)
    np.testing.assert_allclose(truth.U.T @ truth.U, 9 * np.eye(2), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(truth.beta), 2.0)
    assert (np.count_nonzero(truth.b, axis=1) == 1).all()
    assert truth.w.shape == (50, 2)


def test_every_feature_can_be_in_a_support() -> None:
    """Each of 6 features is idiosyncratic for someone (200 users miss one with 6 (5/6)^200 < 1e-14)."""
    _, _, truth = draw_population(users=200, dimension=6, rank=1, sparsity=1)
    assert (truth.b != 0).any(axis=0).all()


def test_counts_are_constant_or_drawn_from_a_range() -> None:
    """A pair draws every number in between (2,000 users miss one with 5 (4/5)^2000 < 1e-190)."""
    constant, _, _ = draw_population(**SMALL, examples=4)
    assert set(constant.counts.tolist()) == {4}
    ragged, _, _ = draw_population(users=2000, dimension=2, rank=1, sparsity=0, examples=(2, 6))
    assert set(ragged.counts.tolist()) == {2, 3, 4, 5, 6}
    assert ragged.num_examples == ragged.offsets[-1] == ragged.counts.sum()


def test_the_seed_and_nothing_else_decides() -> None:
    """The same seed gives the same population whatever the global generators do; another seed another one."""
    first, _, _ = draw_population(**SMALL, seed=1)
    np.random.seed(0)
    again, _, _ = draw_population(**SMALL, seed=1)
    other, _, _ = draw_population(**SMALL, seed=2)
    assert first.y.tolist() == again.y.tolist()
    assert first.key.tolist() == again.key.tolist()
    assert first.y.tolist() != other.y.tolist()


def test_the_schema_follows_from_the_arguments_alone() -> None:
    """Two seeds have different data and one schema: nothing in it is computed from users."""
    _, one, _ = draw_population(**SMALL, seed=1)
    _, two, _ = draw_population(**SMALL, seed=2)
    assert one.target_range == two.target_range
    assert one.feature_names == two.feature_names
    assert one.feature_second_moment.tolist() == two.feature_second_moment.tolist()


@pytest.mark.parametrize("bound", [0.5, 1.0, 4.0])
def test_the_second_moment_is_that_of_the_clipped_normal(bound: float) -> None:
    """S agrees with 400,000 draws within 5 sd of their mean (fails by chance with probability 6e-7)."""
    population, schema, _ = draw_population(
        users=20_000, examples=10, dimension=2, rank=0, sparsity=0, feature_bound=bound
    )
    squares = population.features.rows(slice(None)) ** 2
    error = squares.mean() - schema.feature_second_moment[0, 0]
    assert abs(error) < 5 * squares.std() / math.sqrt(squares.size)
    assert schema.feature_second_moment[0, 1] == 0


def test_logistic_targets_follow_their_probabilities() -> None:
    """y - sigmoid(x'theta) sums to zero, also weighted by x'theta, within 5 sd (6e-7 each)."""
    population, schema, truth = draw_population(
        users=10_000, examples=20, dimension=4, rank=1, sparsity=1, family="logistic", noise=0.0
    )
    margin = (population.features.rows(slice(None)) * truth.theta[population.user_of_example]).sum(axis=1)
    probability = 1 / (1 + np.exp(-margin))
    spread = np.sqrt(probability * (1 - probability))
    for factor in (np.ones(margin.size), margin):
        total = (factor * (population.y - probability)).sum()
        assert abs(total) < 5 * np.linalg.norm(factor * spread)
    assert set(population.y.tolist()) == {0.0, 1.0}
    assert schema.target_range == (0.0, 1.0)


def test_noise_has_the_declared_spread() -> None:
    """Residuals of 40,000 examples have the declared variance within 5 sd of its estimate (6e-7)."""
    population, schema, truth = draw_population(users=2000, examples=20, dimension=3, rank=1, sparsity=1, noise=0.5)
    X = population.features.rows(slice(None))
    residual = population.y - (X * truth.theta[population.user_of_example]).sum(axis=1)
    inside = np.abs(population.y) < schema.target_range[1]
    assert inside.mean() > 0.99
    assert abs(np.mean(residual[inside] ** 2) - 0.25) < 5 * 0.25 * math.sqrt(2 / inside.sum())
    assert truth.noise == 0.5


def test_features_can_be_stored_in_single_precision() -> None:
    """float32 halves the memory; rows still come out as float64."""
    population, _, _ = draw_population(**SMALL, precision="float32")
    assert isinstance(population.features, DenseFeatures)
    assert population.features.X.dtype == np.float32
    assert population.features.rows(slice(0, 2)).dtype == np.float64


@pytest.mark.parametrize("wrong", [{"rank": 7}, {"sparsity": 7}, {"rank": -1}])
def test_a_truth_that_does_not_fit_is_named(wrong: dict[str, int]) -> None:
    """Neither rank nor sparsity may exceed the number of features."""
    with pytest.raises(ValueError, match="Expected rank and sparsity of at most dimension=6"):
        draw_population(**(SMALL | wrong))
