"""What a sequence of Gaussian releases has cost, by accountants that must agree.

For server and auditor; devices have `privacy.participation`.

Releases are data: their noise multipliers, as the ledger spells them. All numbers are for the worst-case
user, who contributed to each of them from each of up to s nodes, under the zero-out relation (the same as
add/remove) unless a name says replace-one. The exact Gaussian formula decides; dp_accounting's PLD and RDP and
opacus' PRV stand beside it, and whoever they contradict is refused.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from common.errors import UmbelError
from privacy.gaussian import epsilon_of_mu, replace_one
from privacy.participation import (
    UNITS,
    checked_noise_multiplier,
    cost_units,
    is_noiseless,
)
from privacy.prv import FOURIER_ERROR, PRV_ERROR, Sampled, prv_bounds

SMALLEST_DELTA = 1e-12
# dp_accounting composes 200 distinct noise multipliers in half a minute; one Gaussian is as exact.
_MOST_DISTINCT = 20
_PLD_INTERVAL = 1e-4
_TOLERANCE = 1e-3
_MOST_PRV_RELEASES = 10_000
_FELT = 1e-3  # of delta
_LARGEST_PRV_MU = 20.0  # exponentials of losses overflow in opacus, beyond 30 or so


@dataclass(frozen=True, kw_only=True)
class PrivacySpent:
    """The worst-case user's loss; everything is inf after a release without noise.

    Attributes:
        epsilon: Exact, rounded up, at `delta`.
        delta: What epsilon is for.
        mu: The same loss as mu-GDP: s·sqrt(Σ z_t^-2), rounded up.
        rho: The same loss as rho-zCDP: mu²/2.
        replace_one_epsilon: Exact epsilon where neighbours swap one user's data.
        pld_epsilon: By dp_accounting's privacy-loss distributions.
        rdp_epsilon: By dp_accounting's Rényi accountant, which is looser.
        prv_epsilon: By opacus' privacy random variables, an upper bound; None where there is none.
    """

    epsilon: float
    delta: float
    mu: float
    rho: float
    replace_one_epsilon: float
    pld_epsilon: float
    rdp_epsilon: float
    prv_epsilon: float | None = None


def total_mu(noise_multipliers: Sequence[str], s: int = 1) -> float:
    """mu of all releases together: s·sqrt(Σ z_t^-2), from the integers that the filters count, rounded up.

    Raises:
        ValueError: If a noise multiplier is not a decimal string, "0" or at least 0.05, or s is not an
            integer of at least 1.
    """
    return _mu(sum(_costs(noise_multipliers, s))) if noise_multipliers else 0.0


def mu_curve(noise_multipliers: Sequence[str], s: int = 1) -> tuple[float, ...]:
    """`total_mu` after each release."""
    return tuple(map(_mu, accumulate(_costs(noise_multipliers, s))))


def _costs(noise_multipliers: Sequence[str], s: int) -> Iterator[float]:
    """Of each release, one by one: a ledger may have a million."""
    _check_count("max_nodes_per_user", s)
    return (math.inf if is_noiseless(z) else s * s * cost_units(z) for z in noise_multipliers)


def _mu(units: float) -> float:
    return math.nextafter(math.sqrt(units / UNITS), math.inf)


def gdp_epsilon(noise_multipliers: Sequence[str], delta: float, s: int = 1) -> float:
    """Epsilon by the exact Gaussian formula, rounded up."""
    _check_delta(delta)
    return epsilon_of_mu(total_mu(noise_multipliers, s), delta)


def pld_epsilon(noise_multipliers: Sequence[str], delta: float, s: int = 1) -> float:
    """Epsilon by dp_accounting's privacy-loss distributions.

    Beyond 20 distinct noise multipliers it is asked for the one Gaussian that equals them all. Its grid
    widens with mu², so that time and memory stay bounded down to z = 0.05 (at 1e-3 it would ask for 38 GiB).
    """
    mu = _checked_mu(noise_multipliers, delta, s)
    if not 0 < mu < math.inf:
        return mu
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415 (slow to import, not needed to verify a ledger)

    distinct = len(set(noise_multipliers)) <= _MOST_DISTINCT
    events = _events(noise_multipliers, s) if distinct else _gaussian(1 / mu)
    accountant = PLDAccountant(value_discretization_interval=_PLD_INTERVAL * max(1.0, mu * mu))
    return float(accountant.compose(events).get_epsilon(delta))


def rdp_epsilon(noise_multipliers: Sequence[str], delta: float, s: int = 1) -> float:
    """Epsilon by dp_accounting's Rényi accountant."""
    mu = _checked_mu(noise_multipliers, delta, s)
    if not 0 < mu < math.inf:
        return mu
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415 (slow to import, not needed to verify a ledger)

    return float(RdpAccountant().compose(_events(noise_multipliers, s)).get_epsilon(delta))


def prv_epsilon(noise_multipliers: Sequence[str], delta: float, s: int = 1) -> float | None:
    """Epsilon by opacus' PRV accountant, its upper bound: 0.01 to 0.02 above the exact one.

    It composes equal releases one by one; beyond 20 distinct noise multipliers or 10,000 releases, or where the
    rounding of its Fourier transform is felt at this delta, it is asked for the one Gaussian that equals them all.

    Returns:
        None where opacus is not installed, and for mu > 20, where it overflows.

    Raises:
        UmbelError: If opacus fails, warns, or returns what is no number.
    """
    mu = _checked_mu(noise_multipliers, delta, s)
    if not 0 < mu < math.inf:
        return mu
    if mu > _LARGEST_PRV_MU or find_spec("opacus") is None:
        return None
    counts = Counter(checked_noise_multiplier(z) for z in noise_multipliers)
    releases = [Sampled(noise_multiplier=float(z / s), count=count) for z, count in counts.items()]
    most = min(_MOST_PRV_RELEASES, _FELT * delta / FOURIER_ERROR)
    if len(counts) > _MOST_DISTINCT or len(noise_multipliers) > most:
        releases = [Sampled(noise_multiplier=1 / mu)]
    try:
        return prv_bounds(releases, delta)[1]
    except Exception as error:
        raise UmbelError(f"Expected epsilon from opacus' PRV, got none for {mu=}, {delta=}: {error}") from error


def spent(noise_multipliers: Sequence[str], delta: float, s: int = 1, *, with_prv: bool = True) -> PrivacySpent:
    """All numbers of a report, once the accountants are seen to agree.

    Args:
        noise_multipliers: Of all releases.
        delta: What epsilon is for.
        s: On how many nodes a user may be.
        with_prv: Whether to ask opacus' PRV, whose libraries take some 200 MB.

    Raises:
        ValueError: If a noise multiplier, delta or s is out of range.
        UmbelError: If PLD, RDP or PRV contradicts the exact formula.
    """
    mu = _checked_mu(noise_multipliers, delta, s)
    result = PrivacySpent(
        epsilon=epsilon_of_mu(mu, delta),
        delta=delta,
        mu=mu,
        rho=mu * mu / 2,
        replace_one_epsilon=replace_one(mu, delta),
        pld_epsilon=pld_epsilon(noise_multipliers, delta, s),
        rdp_epsilon=rdp_epsilon(noise_multipliers, delta, s),
        prv_epsilon=prv_epsilon(noise_multipliers, delta, s) if with_prv else None,
    )
    check_agreement(result)
    return result


def check_agreement(result: PrivacySpent) -> None:
    """Refuse numbers that cannot all be right.

    PLD must equal the exact epsilon, RDP must not be below it, and PRV, where there is one, must be above it by no
    more than its estimate and its bound can be off together.

    Raises:
        UmbelError: Naming them.
    """
    exact, tolerance, prv = result.epsilon, _TOLERANCE * (1 + result.epsilon), result.prv_epsilon
    agree = abs(result.pld_epsilon - exact) <= tolerance and result.rdp_epsilon >= exact - 1e-6
    agree = agree and (prv is None or -tolerance <= prv - exact <= 2 * PRV_ERROR + tolerance)
    if exact != math.inf and not agree:
        raise UmbelError(
            f"Expected accountants to agree, got epsilon={exact}, pld_epsilon={result.pld_epsilon}, "
            f"rdp_epsilon={result.rdp_epsilon}, prv_epsilon={prv}. Install the pinned dp-accounting and opacus."
        )


def _checked_mu(noise_multipliers: Sequence[str], delta: float, s: int) -> float:
    _check_delta(delta)
    return total_mu(noise_multipliers, s)


def _check_delta(delta: float) -> None:
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(f"Expected {SMALLEST_DELTA} <= delta < 1, got {delta=}.")


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"Expected {name} to be an integer of at least 1, got {name}={value!r}.")


def _events(noise_multipliers: Sequence[str], s: int) -> Any:
    """The releases as a dp_accounting event, equal ones together.

    Noise multipliers are Python floats and nothing is nested in a sampling event: given int or float32,
    dp_accounting 0.6.0 counts a composition inside one as a single release.
    """
    from dp_accounting import ComposedDpEvent, SelfComposedDpEvent  # noqa: PLC0415 (as above)

    counts = Counter(checked_noise_multiplier(z) for z in noise_multipliers)
    return ComposedDpEvent([SelfComposedDpEvent(_gaussian(float(z / s)), count) for z, count in counts.items()])


def _gaussian(noise_multiplier: float) -> Any:
    from dp_accounting import GaussianDpEvent  # noqa: PLC0415 (as above)

    return GaussianDpEvent(float(noise_multiplier))
