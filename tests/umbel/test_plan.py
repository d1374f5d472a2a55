"""Planned noise spends the budget and no more."""

import math

import pytest

from privacy.accounting import gdp_epsilon
from privacy.participation import max_contributions, mu_max_string
from umbel.plan import forecast, least_noise


@pytest.mark.parametrize("s", [1, 3])
def test_the_plan_spends_the_budget(s):
    """The last round comes to the budget and not beyond; the filter admits just the planned rounds."""
    z = least_noise(2.0, 1e-6, 20, s)
    assert 2.0 * (1 - 1e-6) < gdp_epsilon([z] * 20, 1e-6, s) <= 2.0
    assert max_contributions(mu_max_string(2.0, 1e-6, s), z) == 20
    assert float(z) == pytest.approx(s * 7.0487 * math.sqrt(2), rel=1e-3)


def test_the_curve_rises_to_the_budget():
    """A forecast's curve is increasing and ends at what the plan costs."""
    plan = forecast(epsilon=2.0, noise_multiplier=None, delta=1e-6, rounds=20)
    curve = [point["epsilon"] for point in plan["curve"]]
    assert curve == sorted(curve)
    assert curve[-1] == plan["epsilon"] <= 2.0


@pytest.mark.parametrize(
    ("epsilon", "rounds"), [(0.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0)], ids=["zero", "inf", "nan", "no rounds"]
)
def test_what_is_no_budget_is_refused(epsilon, rounds):
    """Zero, infinite or NaN budgets and counts that are none are named."""
    with pytest.raises(ValueError, match="Expected"):
        least_noise(epsilon, 1e-6, rounds, 1)
