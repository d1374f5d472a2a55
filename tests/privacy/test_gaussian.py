"""mu and epsilon against published tables, mpmath, dp_accounting and themselves."""

import math

import mpmath
import pytest
from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.gaussian import delta_of_epsilon, epsilon_of_mu, mu_of_epsilon, replace_one

MUS = st.floats(1e-8, 200)
DELTAS = st.floats(-15, -1).map(lambda exponent: 10.0**exponent)


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (1, (4.887, 12.595, 19.42, 57.85)),
        (2, (2.254, 5.551, 8.306, 22.43)),
        (4, (1.061, 2.549, 3.747, 9.482)),
        (8, (0.504, 1.197, 1.743, 4.249)),
    ],
)
def test_epsilon_of_contributions(z, expected):
    """Epsilon of 1, 5, 10 and 50 contributions at delta 1e-6 is the exact Gaussian one."""
    actual = [epsilon_of_mu(math.sqrt(k) / z, 1e-6) for k in (1, 5, 10, 50)]
    assert expected == pytest.approx(actual, rel=5e-4)


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (1, (4.23, 9.45, 13.36, 29.87)),
        (2, (2.23, 4.99, 7.05, 15.77)),
        (4, (1.19, 2.67, 3.77, 8.44)),
        (8, (0.65, 1.46, 2.07, 4.62)),
    ],
)
def test_noise_for_epsilon(epsilon, expected):
    """The noise that 1, 5, 10 and 50 contributions need at delta 1e-6 is the table's and dp_accounting's."""
    sigma = get_sigma_gaussian(epsilon, 1e-6)
    actual = [math.sqrt(k) / mu_of_epsilon(epsilon, 1e-6) for k in (1, 5, 10, 50)]
    # The table was rounded by hand, its last digit sometimes up.
    assert expected == pytest.approx(actual, abs=6e-3)
    assert actual == pytest.approx([sigma * math.sqrt(k) for k in (1, 5, 10, 50)], rel=1e-9)


def test_mu_of_epsilon_at_1e_5():
    """The mu of five budgets at delta 1e-5 is the table's."""
    actual = [mu_of_epsilon(epsilon, 1e-5) for epsilon in (0.5, 1, 2, 4, 8)]
    assert actual == pytest.approx([0.1422, 0.2681, 0.5016, 0.9249, 1.6660], abs=5e-5)


@pytest.mark.parametrize("z", [2, 4, 8])
def test_replace_one_is_the_table_at_half_the_noise(z):
    """Replace-one at z costs what zero-out costs at z/2."""
    assert replace_one(1 / z, 1e-6) == epsilon_of_mu(2 / z, 1e-6)
    assert replace_one(1 / 2, 1e-6) == pytest.approx(4.887, abs=5e-4)


@pytest.mark.parametrize("mu", [1e-8, 1e-4, 0.01, 0.499, 0.5, 0.501, 1.0, 3.0, 10.0, 60.0, 141.4, 200.0])
def test_delta_bounds_mpmath_from_above(mu):
    """From the centre to tails of 1e-200, delta is above the true one, by less than 2e-12 of it."""
    with mpmath.workdps(80):
        for tail in (-mu / 2, -1.0, -1e-9, 0.0, 0.7, 2.9, 3.1, 5.9, 6.1, 9.0, 30.0):
            epsilon = mu * (tail + mu / 2)
            if epsilon < 0:
                continue
            e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
            expected = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
            excess = mpmath.mpf(delta_of_epsilon(epsilon, mu)) / expected - 1
            assert 0 <= excess < 2e-12 or delta_of_epsilon(epsilon, mu) == 1.0


@given(mu=st.floats(1e-3, 50), delta=st.floats(-12, -1).map(lambda x: 10.0**x))
@settings(max_examples=60, deadline=None)
def test_agrees_with_dp_accounting(mu, delta):
    """dp_accounting's exact Gaussian epsilon is ours."""
    assert epsilon_of_mu(mu, delta) == pytest.approx(get_epsilon_gaussian(1 / mu, delta), rel=1e-6, abs=1e-9)


@given(mu=MUS, delta=DELTAS)
@settings(max_examples=100, deadline=None)
def test_epsilon_is_never_under_reported(mu, delta):
    """What is reported holds at delta, and a little less would not."""
    epsilon = epsilon_of_mu(mu, delta)
    assert delta_of_epsilon(epsilon, mu) <= delta
    assert epsilon == 0 or delta_of_epsilon(epsilon * (1 - 1e-9), mu) > delta


@given(epsilon=st.floats(1e-3, 1e4), delta=DELTAS)
@settings(max_examples=100, deadline=None)
def test_epsilon_to_mu_and_back(epsilon, delta):
    """The mu of a budget spends the budget, and never more."""
    mu = mu_of_epsilon(epsilon, delta)
    assert epsilon * (1 - 1e-6) <= epsilon_of_mu(mu, delta) <= epsilon * (1 + 1e-13)


@given(mu=st.floats(1e-6, 100), factor=st.floats(1.0001, 10), delta=DELTAS)
@settings(max_examples=50, deadline=None)
def test_more_mu_costs_more(mu, factor, delta):
    """Epsilon never falls where mu grows."""
    assert epsilon_of_mu(mu, delta) <= epsilon_of_mu(mu * factor, delta)


def test_ends_of_the_range():
    """Nothing released costs nothing, a release without noise costs everything."""
    assert epsilon_of_mu(0.0, 1e-6) == 0.0
    assert epsilon_of_mu(math.inf, 1e-6) == math.inf
    assert mu_of_epsilon(math.inf, 1e-6) == math.inf
    assert delta_of_epsilon(1.0, math.inf) == 1.0
    assert delta_of_epsilon(1.0, 0.0) == delta_of_epsilon(math.inf, 3.0) == 0.0
    assert delta_of_epsilon(0.0, mu_of_epsilon(0.0, 1e-6)) <= 1e-6
    assert epsilon_of_mu(1e-8, 0.1) == 0.0


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_refuses_what_is_not_a_budget(bad):
    """Negative numbers and NaN are errors that name the argument, not an epsilon of 0."""
    for call in (
        lambda: epsilon_of_mu(bad, 1e-6),
        lambda: epsilon_of_mu(1.0, bad),
        lambda: mu_of_epsilon(bad, 1e-6),
        lambda: mu_of_epsilon(1.0, bad),
        lambda: delta_of_epsilon(bad, 1.0),
        lambda: delta_of_epsilon(1.0, bad),
    ):
        with pytest.raises(ValueError, match=r"Expected .* (mu|epsilon|delta)="):
            call()
