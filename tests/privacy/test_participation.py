"""The filter: integer costs that never favour the spender."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.gaussian import epsilon_of_mu, mu_of_epsilon
from privacy.participation import (
    UNITS,
    admit,
    checked_noise_multiplier,
    cost_units,
    is_noiseless,
    is_unlimited,
    limit_units,
    max_contributions,
    mu_max_string,
    noise_multiplier_for,
)

MULTIPLIERS = st.integers(50_000, 10**9).map(lambda z: f"{z // 10**6}.{z % 10**6:06d}")
LIMITS = st.integers(10**6, 63 * 10**9).map(lambda mu: f"{mu // 10**9}.{mu % 10**9:09d}")


def test_costs_are_written_out():
    """A contribution at z = 2 costs a quarter, at z = 3 a ninth rounded up."""
    assert cost_units("1") == UNITS == 2**50
    assert cost_units("2.000000") == 2**48
    assert cost_units("3") == 2**50 // 9 + 1
    assert limit_units("1.5") == 9 * 2**48
    assert limit_units("0.333333333") == (333333333**2 * 2**50) // 10**18


@given(z=MULTIPLIERS, mu=LIMITS)
def test_rounding_is_against_the_spender(z, mu):
    """Costs are at least, limits at most, the exact numbers, by less than a unit."""
    assert 0 <= cost_units(z) - UNITS / Fraction(z) ** 2 < 1
    assert 0 <= UNITS * Fraction(mu) ** 2 - limit_units(mu) < 1


@given(z=MULTIPLIERS, mu=LIMITS)
def test_max_contributions_is_the_largest_count_that_fits(z, mu):
    """So many contributions fit the limit, one more does not."""
    count = max_contributions(mu, z)
    assert count * cost_units(z) <= limit_units(mu) < (count + 1) * cost_units(z)


@given(rounds=st.integers(1, 10**5), mu=LIMITS)
def test_noise_multiplier_for_is_the_smallest(rounds, mu):
    """The planned noise lets a user contribute in every round, and a millionth less would not."""
    z = noise_multiplier_for(rounds, mu)
    assert rounds * cost_units(z) <= limit_units(mu)
    less = f"{float(z) - 1e-6:.6f}"
    assert float(less) < 0.05 or rounds * cost_units(less) > limit_units(mu)


def test_plan_of_the_reference_table():
    """Ten rounds within epsilon 1 at delta 1e-6 need z = 13.36, and exactly ten contributions fit."""
    mu_max = mu_max_string(1, 1e-6)
    z = noise_multiplier_for(10, mu_max)
    assert z == "13.359608"
    assert max_contributions(mu_max, z) == 10


@given(epsilon=st.floats(0.01, 1000), delta=st.sampled_from([1e-12, 1e-6, 1e-3]), s=st.integers(1, 100))
def test_mu_max_is_rounded_down_and_shared(epsilon, delta, s):
    """The filters of all nodes of a user together stay within the user's budget, by less than 1e-9 each."""
    mu_max = Fraction(mu_max_string(epsilon, delta, s))
    assert 0 <= Fraction(mu_of_epsilon(epsilon, delta)) / s - mu_max < Fraction(1, 10**9)
    assert epsilon_of_mu(float(mu_max) * s, delta) <= epsilon * (1 + 1e-12)


def test_mu_max_of_no_promise_is_inf():
    """A ledger without a budget says so in words, and its limit is not a number."""
    assert mu_max_string(float("inf"), 1e-6) == "inf"
    assert is_unlimited("inf")
    assert not is_unlimited("1.0")
    with pytest.raises(ValueError, match="decimal string"):
        limit_units("inf")


def test_noiseless_is_recognised_in_every_spelling():
    """Zero means no noise however many zeros it has; its cost is an error."""
    assert is_noiseless("0")
    assert is_noiseless("0.000000")
    assert not is_noiseless("0.05")
    with pytest.raises(ValueError, match=r"0\.05 <= noise_multiplier"):
        cost_units("0")


@pytest.mark.parametrize("bad", ["nan", "inf", "-1", "1e3", "", " 1", "1.", ".5", "1_0", "٣", "0.049999", "1" * 40])
def test_refuses_noise_that_is_not_a_plain_decimal(bad):
    """Only plain decimals of at least 0.05 are noise multipliers."""
    with pytest.raises(ValueError, match=r"Expected .*noise_multiplier"):
        checked_noise_multiplier(bad)


@pytest.mark.parametrize("bad", [1, 1.0, None, np.float32(1)])
def test_refuses_noise_that_is_not_a_string(bad):
    """Numbers are not taken for decimal strings."""
    with pytest.raises(ValueError, match="decimal string"):
        cost_units(bad)


def test_refuses_plans_that_cannot_be():
    """No rounds, no nodes, no budget and a budget beyond 64 bits are named."""
    for call, match in (
        (lambda: noise_multiplier_for(0, "1.0"), "rounds=0"),
        (lambda: noise_multiplier_for(2, "0.00000003"), "2 rounds"),
        (lambda: mu_max_string(1.0, 1e-6, 0), "max_nodes_per_user=0"),
        (lambda: mu_max_string(0.0, 1e-12), "mu >= 1e-9"),
        (lambda: limit_units("64"), "mu_max < 64"),
        (lambda: admit(np.zeros(1, np.int64), 0, 1), "0 < cost"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_admits_up_to_the_limit_exactly():
    """Who reaches the limit is admitted, who would pass it by one unit is not."""
    spent = np.array([0, 69, 70, 71, 100, 2**63 - 1], np.int64)
    assert admit(spent, 30, 100).tolist() == [True, True, True, False, False, False]


def test_admits_nobody_whose_state_is_broken():
    """A negative spend cannot be, so it buys nothing."""
    assert admit(np.array([-1, -(2**63)], np.int64), 1, 100).tolist() == [False, False]


@given(
    spent=st.lists(st.integers(0, 2**63 - 1), max_size=5),
    cost=st.integers(1, 400 * 2**50),
    limit=st.integers(0, 2**62),
)
def test_admit_is_exact_at_any_size(spent, cost, limit):
    """The comparison is the one of unbounded integers, whatever the magnitudes."""
    expected = [value + cost <= limit for value in spent]
    assert admit(np.array(spent, np.int64), cost, limit).tolist() == expected


@given(costs=st.lists(MULTIPLIERS, min_size=1, max_size=30), mu=LIMITS)
def test_a_filtered_sequence_stays_within_mu(costs, mu):
    """Whatever noise is chosen in turn, the exact sum of z^-2 of what was admitted is within mu_max²."""
    spent, total = np.zeros(1, np.int64), Fraction(0)
    for z in costs:
        if admit(spent, cost_units(z), limit_units(mu))[0]:
            spent = spent + cost_units(z)
            total += 1 / Fraction(z) ** 2
    assert total <= Fraction(mu) ** 2
