"""Between mu and epsilon: the exact privacy of Gaussian releases, with the standard library alone.

A release of sensitivity 1 with Gaussian noise of standard deviation z is mu-GDP with mu = 1/z; releases
compose to mu² = Σ z_t^-2, also when each is chosen after seeing the earlier ones. mu and delta determine
epsilon without slack (Balle & Wang 2018, arXiv:1805.06530, Theorem 8; Dong et al. 2019, arXiv:1905.02383,
Corollary 1):

    delta(epsilon) = Φ(mu/2 − epsilon/mu) − e^epsilon · Φ(−mu/2 − epsilon/mu).

All numbers here are rounded against us: delta and epsilon up, mu down, each by about 1e-12 of itself, so
that what is printed is never less than what was spent.
"""

import math
from collections.abc import Callable

# Ten times the largest relative error of `_delta` against mpmath (a test measures it), so results are bounds.
_RELATIVE_MARGIN = 1e-12
_BRACKET = 1e-14
_SQRT_2PI = math.sqrt(2 * math.pi)
# Gauss–Legendre on [-1, 1] with 8 nodes: exact to float64 for this integrand on an interval of length 1/2.
_NODES = (0.18343464249564980, 0.52553240991632899, 0.79666647741362674, 0.96028985649753623)
_WEIGHTS = (0.36268378337836198, 0.31370664587788729, 0.22238103445337447, 0.10122853629037626)


def delta_of_epsilon(epsilon: float, mu: float) -> float:
    """The smallest delta at which a mu-GDP Gaussian release is (epsilon, delta)-DP, rounded up.

    Raises:
        ValueError: If not 0 <= epsilon or not 0 <= mu.
    """
    _require(epsilon >= 0, "0 <= epsilon", "epsilon", epsilon)
    _require(mu >= 0, "0 <= mu", "mu", mu)
    if mu == 0 or math.isinf(epsilon):
        return 0.0
    if math.isinf(mu):
        return 1.0
    return min(1.0, _delta(epsilon, mu) * (1 + _RELATIVE_MARGIN))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The smallest epsilon at which mu-GDP Gaussian releases are (epsilon, delta)-DP, rounded up.

    For the add/remove (zero-out) relation; inf for mu = inf, which is a release without noise.

    Raises:
        ValueError: If not 0 <= mu or not 0 < delta < 1.
    """
    _require(mu >= 0, "0 <= mu", "mu", mu)
    _require(0 < delta < 1, "0 < delta < 1", "delta", delta)
    if math.isinf(mu):
        return math.inf
    if delta_of_epsilon(0.0, mu) <= delta:
        return 0.0
    return _bisect(lambda epsilon: delta_of_epsilon(epsilon, mu) > delta)[1]


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian releases are (epsilon, delta)-DP, rounded down.

    Raises:
        ValueError: If not 0 <= epsilon or not 0 < delta < 1.
    """
    _require(epsilon >= 0, "0 <= epsilon", "epsilon", epsilon)
    _require(0 < delta < 1, "0 < delta < 1", "delta", delta)
    if math.isinf(epsilon):
        return math.inf
    return _bisect(lambda mu: delta_of_epsilon(epsilon, mu) <= delta)[0]


def replace_one(mu: float, delta: float) -> float:
    """Epsilon under the replace-one relation: a swapped user moves the sum twice as far, so mu doubles."""
    return epsilon_of_mu(2 * mu, delta)


def _require(holds: bool, expectation: str, name: str, value: float) -> None:
    if not holds:
        raise ValueError(f"Expected {expectation}, got {name}={value}.")


def _bisect(below: Callable[[float], bool]) -> tuple[float, float]:
    """Both ends of a bracket around the positive number up to which `below` holds."""
    low, high = 0.0, 1.0
    while below(high):
        low, high = high, 2 * high
    while low == 0.0 and high > 1e-300 and not below(high / 2):
        high /= 2
    while high - low > _BRACKET * high:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def _delta(epsilon: float, mu: float) -> float:
    """delta(epsilon) to about 1e-13 of itself wherever it does not underflow.

    With a = epsilon/mu − mu/2 and b = a + mu, e^epsilon φ(b) = φ(a), so delta = φ(a)·(R(a) − R(b)), R
    being Mills' ratio: nothing overflows. Where the difference would cancel, its derivative is integrated.
    """
    a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    if mu <= 0.5:
        return _density(a) * _integral_of_slope(epsilon / mu, mu / 2)
    if a <= 0:
        return math.erfc(a / math.sqrt(2)) / 2 - _density(a) * _mills(b)[0]
    return _density(a) * (_mills(a)[0] - _mills(b)[0])


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / _SQRT_2PI


def _integral_of_slope(middle: float, half: float) -> float:
    """R(middle − half) − R(middle + half) as the integral of −R' in between, a sum of positive terms."""
    return half * math.fsum(
        weight * (_mills(middle - half * node)[1] + _mills(middle + half * node)[1])
        for node, weight in zip(_NODES, _WEIGHTS, strict=True)
    )


def _mills(x: float) -> tuple[float, float]:
    """Mills' ratio R(x) = Φ(−x)/φ(x) and −R'(x) = 1 − x·R(x), for x > −1/2 or so."""
    if x < 3:
        ratio = math.erfc(x / math.sqrt(2)) / 2 / _density(x)
        return ratio, 1 - x * ratio
    # Laplace's continued fraction R = 1/(x + k), k = 1/(x + 2/(x + 3/(x + …))), from the inside out.
    k = 0.0
    for n in range(120 if x < 6 else 40, 0, -1):
        k = n / (x + k)
    return 1 / (x + k), k / (x + k)
