"""The adaptive clipping norm."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.clipping import may_adapt, next_clipping_norm, split_noise

BOUNDS = (1e-3, 1e3)


@given(z=st.floats(0.05, 100), bit_share=st.floats(0.01, 0.99))
def test_two_noises_make_one_release(z, bit_share):
    """Noise on vectors and bits composes to the release's: z^-2 = z_Δ^-2 + (2σ_b)^-2."""
    z_delta, sigma_b = split_noise(z, bit_share=bit_share)
    assert z_delta**-2 + (2 * sigma_b) ** -2 == pytest.approx(z**-2, rel=1e-12)


def test_noise_of_a_bit_is_the_coordinate_unscaled():
    """A bit of ±1/2 fills its share of the ball, so undoing the scaling gives noise z / (2 share)."""
    share, z = 0.1, 4.0
    coordinate_of_a_half = share * 2 * 0.5
    assert coordinate_of_a_half == share
    assert split_noise(z, bit_share=share)[1] == z * 0.5 / coordinate_of_a_half


def test_moves_against_the_mean_bit():
    """More users below C than above lower C, and the other way round, by exp of half the mean."""
    assert next_clipping_norm(2.0, 0.5, bounds=BOUNDS) == 2.0 * math.exp(-0.25)
    assert next_clipping_norm(2.0, -0.5, bounds=BOUNDS) == 2.0 * math.exp(0.25)
    assert next_clipping_norm(2.0, 0.0, bounds=BOUNDS) == 2.0
    assert next_clipping_norm(2.0, 0.3, bounds=BOUNDS, learning_rate=0.2) == 2.0 * math.exp(-0.2 * 0.3)


@given(
    clipping_norm=st.floats(1e-300, 1e300),
    mean=st.floats(allow_nan=True, allow_infinity=True),
)
def test_stays_finite_and_within_bounds(clipping_norm, mean):
    """Whatever noise does to the bit, the next C is a number within the public bounds."""
    assert BOUNDS[0] <= next_clipping_norm(clipping_norm, mean, bounds=BOUNDS) <= BOUNDS[1]


def test_not_a_number_moves_nothing():
    """A mean that is not a number leaves C where it is."""
    assert next_clipping_norm(2.0, math.nan, bounds=BOUNDS) == 2.0


@pytest.mark.parametrize("answering", [1.0, 0.5])
def test_finds_the_median_whoever_answers(answering):
    """From far above and far below, C comes to the median norm also when half of the invited are absent."""
    norms = np.exp(np.random.default_rng(0).standard_normal(2001))
    median = float(np.median(norms))
    for start in (100.0, 0.01):
        clipping_norm = start
        for _ in range(200):
            mean = answering * float(np.mean((norms <= clipping_norm) - 0.5))
            clipping_norm = next_clipping_norm(clipping_norm, mean, bounds=BOUNDS)
        assert clipping_norm == pytest.approx(median, rel=0.01)


def test_needs_a_cohort_of_33_per_unit_of_noise():
    """Too few users for the noise, or noise that is no number, and C stays."""
    assert may_adapt(330, 10.0)
    assert not may_adapt(329, 10.0)
    assert not may_adapt(10**9, math.nan)
    assert not may_adapt(10**9, math.inf)


def test_refuses_bounds_and_norms_that_are_none():
    """Bounds and C must be positive and finite, the bit's share a part of the ball."""
    for bounds in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="bounds="):
            next_clipping_norm(1.0, 0.0, bounds=bounds)
    for clipping_norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clipping_norm="):
            next_clipping_norm(clipping_norm, 0.0, bounds=BOUNDS)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="bit_share="):
            split_noise(1.0, bit_share=share)
