"""Accountants against each other over a grid, and the exact formula against the definition to fifty digits."""

import math
from itertools import pairwise

import mpmath
import pytest

from privacy.accounting import spent
from privacy.amplification import Schedule, amplified
from privacy.gaussian import delta_of_epsilon, epsilon_of_mu, mu_of_epsilon

# Four factors of three levels in nine points: every two levels of any two factors meet (orthogonal array L9).
L9 = [(0, 0, 0, 0), (0, 1, 1, 2), (0, 2, 2, 1), (1, 0, 1, 1), (1, 1, 2, 0), (1, 2, 0, 2), (2, 0, 2, 2), (2, 1, 0, 1),
      (2, 2, 1, 0)]  # fmt: skip
NOISE, PROBABILITIES, ROUNDS, DELTAS = ("1.5", "4", "20"), ("0.001", "0.03", "0.4"), (1, 30, 400), (1e-9, 1e-6, 1e-4)


@pytest.mark.parametrize(("z", "q", "rounds", "delta"), L9)
def test_sampled_rounds(z, q, rounds, delta):
    """PLD is between PRV's lower bound and RDP, and within PRV's bounds on both sides, all over the grid.

    It is also no more than without sampling, and no less than one of its rounds alone costs by the exact formula.
    """
    z, q, rounds, delta = NOISE[z], PROBABILITIES[q], ROUNDS[rounds], DELTAS[delta]
    found = amplified([Schedule(noise_multiplier=z, sampling_probability=q, rounds=rounds)], delta)
    assert found.prv_lower - 0.01 <= found.epsilon <= found.rdp_epsilon + 1e-6
    assert found.epsilon <= 1.02 * found.prv_upper
    assert found.prv_lower <= found.rdp_epsilon
    assert found.epsilon <= epsilon_of_mu(math.sqrt(rounds) / float(z), delta)
    assert found.epsilon >= alone(float(z), float(q), delta) * (1 - 1e-9)


def alone(z: float, q: float, delta: float) -> float:
    """Epsilon of one sampled release: delta is q·delta_Gauss(ln(1 + (e^epsilon − 1)/q))."""
    within = epsilon_of_mu(1 / z, delta / q) if delta < q else 0.0
    return math.log1p(q * math.expm1(within))


@pytest.mark.parametrize(("z", "rounds", "delta"), [(a, b, c) for a, b, c, _ in L9])
def test_rounds_without_sampling(z, rounds, delta):
    """PLD is the exact epsilon within 1e-3 and never below; PRV is above by 0.01 to 0.021; RDP is never below."""
    z, rounds, delta = NOISE[z], (1, 10, 100)[rounds], DELTAS[delta]
    found = spent([z] * rounds, delta)
    assert found.epsilon == epsilon_of_mu(found.mu, delta)
    assert -1e-9 <= found.pld_epsilon - found.epsilon < 1e-3 * (1 + found.epsilon)
    assert found.prv_epsilon is None or 0.0099 <= found.prv_epsilon - found.epsilon <= 0.021
    assert found.prv_epsilon is not None or found.mu > 20
    assert found.epsilon - 1e-9 <= found.rdp_epsilon


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 25.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1e-2])
def test_the_exact_epsilon_to_fifty_digits(mu, delta):
    """Epsilon is the root of delta(epsilon) = delta of 50 digits, rounded up by less than 1e-10 of itself."""
    with mpmath.workdps(50):
        m = mpmath.mpf(mu)

        def excess(e):
            return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m) - mpmath.mpf(delta)

        epsilon = epsilon_of_mu(mu, delta)
        if excess(mpmath.mpf(0)) <= 0:
            assert epsilon == 0
            return
        root = mpmath.findroot(excess, (epsilon * (1 - 1e-6), epsilon * (1 + 1e-6)), solver="anderson", tol=1e-40)
        assert 0 <= mpmath.mpf(epsilon) / root - 1 < 1e-10
        assert 0 <= 1 - mpmath.mpf(mu_of_epsilon(float(root), delta)) / m < 1e-10


@pytest.mark.parametrize(("epsilon", "mu"), [(0.0, 0.1), (0.5, 0.3), (1.0, 1.0), (6.0, 2.5), (1.0, 0.2)])
def test_delta_is_the_integral_that_defines_it(epsilon, mu):
    """delta is the integral of (p − e^epsilon q)+ for N(mu, 1) and N(0, 1): the definition, not its closed form."""
    with mpmath.workdps(30):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        start = e / m + m / 2  # from here on p > e^epsilon q
        integral = mpmath.quad(
            lambda x: mpmath.npdf(x - m) - mpmath.exp(e) * mpmath.npdf(x), [start, start + 2, start + 6, start + 40]
        )
        assert delta_of_epsilon(epsilon, mu) == pytest.approx(float(integral), rel=3e-12)


def test_monotone_all_over_the_grid():
    """The exact epsilon rises with mu and falls with delta, strictly wherever it is not zero, to the last bit."""
    mus = [10 ** (e / 40) for e in range(-120, 90, 12)]
    deltas = [10 ** (e / 2) for e in range(-24, -1)]
    table = [[epsilon_of_mu(mu, delta) for delta in deltas] for mu in mus]
    for row in table:
        assert all(more > less or more == less == 0 for more, less in pairwise(row))
    for low, high in pairwise(table):
        assert all(less < more or more == less == 0 for less, more in zip(low, high, strict=True))
