"""The release: sum and noise in one."""

import math
from fractions import Fraction

import numpy as np
import pytest

from common.errors import UmbelError
from privacy.entropy import TAU, NoNoise, SeededNoise, SystemNoise
from privacy.lines import CRYPTOGRAPHIC_NOISE, DISCRETE_NOISE, SYSTEM_NOISE
from privacy.mechanism import check_capacity, check_delta_fp, coordinate_distance, delta_fp, distance_of, release


class Recorder:
    """A noise source that says what it was asked for, and answers with a constant."""

    name = "recorder"

    def __init__(self) -> None:
        self.asked: list[tuple[Fraction, int]] = []

    def rounded_gaussian(self, scale, size):
        """A thousand in every coordinate."""
        self.asked.append((scale, size))
        return np.full(size, 1000, np.int64)


def vector(*values):
    return np.array(values, np.int64)


def test_adds_noise_to_the_sum():
    """The release is the contributions' sum and the noise, once."""
    actual = release([vector(1, 2), vector(-10, 5)], size=2, noise_multiplier="1", grid_scale=4, source=Recorder())
    assert actual.tolist() == [991, 1007]
    assert actual.dtype == np.int64


def test_noise_is_what_the_ledger_says():
    """The ledger's decimal times the grid scale is the noise's scale, exactly, in one draw."""
    source = Recorder()
    release([vector(0, 0, 0)], size=3, noise_multiplier="13.361201", grid_scale=2**16, source=source)
    assert source.asked == [(Fraction(13361201, 10**6) * 2**16, 3)]


def test_noise_is_drawn_before_the_first_contribution_is_read():
    """The sum starts from the noise: no un-noised total exists at any time."""
    source = Recorder()

    def contributions():
        assert source.asked
        yield vector(1)

    assert release(contributions(), size=1, noise_multiplier="1", grid_scale=1, source=source) == [1001]


def test_contributions_are_left_alone():
    """What was summed is not changed."""
    contribution = vector(1, 2)
    release([contribution], size=2, noise_multiplier="1", grid_scale=1, source=Recorder())
    assert contribution.tolist() == [1, 2]


def test_system_noise_has_the_standard_deviation_of_the_ledger():
    """Released zeros have standard deviation z K within 0.5 % (false failure below 1e-11)."""
    size = 10**6
    actual = release([], size=size, noise_multiplier="2.5", grid_scale=2**16, source=SystemNoise())
    assert actual.std() == pytest.approx(2.5 * 2**16, rel=5e-3)


def test_without_noise_the_sum_is_exact():
    """A run without noise gets the sum."""
    actual = release([vector(1), vector(2)], size=1, noise_multiplier="0", grid_scale=2**30, source=NoNoise())
    assert actual.tolist() == [3]


@pytest.mark.parametrize(
    ("noise_multiplier", "source"), [("0", SystemNoise()), ("0.0", SeededNoise(1, 1)), ("1.0", NoNoise())]
)
def test_refuses_noise_that_the_ledger_does_not_say(noise_multiplier, source):
    """A source and a noise multiplier that disagree release nothing."""
    with pytest.raises(ValueError, match="accounting must agree"):
        release([], size=1, noise_multiplier=noise_multiplier, grid_scale=1, source=source)


@pytest.mark.parametrize("bad", [np.zeros(2), np.zeros(2, np.int32), np.zeros(3, np.int64), np.zeros((1, 2), np.int64)])
def test_refuses_what_is_not_a_vector_of_integers(bad):
    """Floats, narrow integers and other shapes are not added, and the message holds none of their values."""
    with pytest.raises(ValueError, match=r"Expected 2 int64, got dtype=.*, shape="):
        release([bad], size=2, noise_multiplier="1", grid_scale=1, source=SystemNoise())


def test_capacity():
    """Users times grid scale fit 62 bits, or the configuration is refused."""
    check_capacity(2**32 - 1, 2**30)
    check_capacity(1, 2**31)
    for max_users, grid_scale in ((2**32, 2**30), (1, 2**31 + 1), (0, 1), (1, 0), (-1, -1)):
        with pytest.raises(UmbelError, match="grid_scale"):
            check_capacity(max_users, grid_scale)


def test_delta_fp_is_the_distance_of_both_neighbours():
    """delta_fp is 1 + e^epsilon times the distance, and infinite where that is no float."""
    assert delta_fp(0.0, 30 * TAU) == 60 * TAU
    assert delta_fp(math.log(3), TAU) == pytest.approx(4 * TAU)
    assert delta_fp(1e4, TAU) == math.inf


@pytest.mark.parametrize("noise", CRYPTOGRAPHIC_NOISE)
def test_distance_of_an_event(noise):
    """A release is as far from ideal as its coordinates together; only discrete noise gets closer as it grows."""
    groups = [{"name": "model", "size": 40, "share": "0.9"}, {"name": "scalars", "size": 5, "share": "0.1"}]
    event = {"groups": groups, "noise": noise, "noise_multiplier": "0.5", "grid_scale": 2**16}
    more = 2.0**-68 if noise == DISCRETE_NOISE else 0.0  # 2^-8 (z K)^-4
    assert distance_of(event) == 45 * (TAU + more)
    assert distance_of(event | {"grid_scale": 2**20}) == 45 * (TAU + more / 2**16)


def test_distance_where_nothing_is_proved():
    """Discrete noise too narrow for the proof is charged as if it did not protect at all."""
    assert coordinate_distance(DISCRETE_NOISE, "0.05", 2**8) >= 1
    assert coordinate_distance(SYSTEM_NOISE, "0.05", 2**8) == TAU


def test_refuses_a_delta_too_small_for_the_noise():
    """A hundredth of delta is what precision may cost; a run that promises nothing is not asked."""
    check_delta_fp(8.0, 1e-12, 10**10 * TAU)
    check_delta_fp(50.0, 1e-6, 15_000 * TAU)
    check_delta_fp(math.inf, 1e-6, TAU)
    for epsilon, delta in ((60.0, 1e-12), (1e4, 1e-6), (math.nan, 1e-6)):
        with pytest.raises(UmbelError, match="finite precision"):
            check_delta_fp(epsilon, delta, 10**10 * TAU)
