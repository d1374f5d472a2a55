"""The filter of one user: exact integers that say whether one more contribution fits the budget.

A contribution to a release with noise multiplier z costs z^-2, and a user's filter admits it while
Σ z_t^-2 <= mu_max². Gaussian filters of this kind are exact under fully adaptive choice of the z_t and of
when to stop (arXiv:2210.17520). They hold per (user, node), under the zero-out relation, for all releases
ever charged to one ledger.

Costs and limits are integers in units of 2^-50, costs rounded up and limits down, computed from the ledger's
decimal strings with exact fractions: device, server and auditor come to the same number on every machine.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from common.model import IntArray
from privacy.gaussian import mu_of_epsilon

UNITS = 2**50
SMALLEST_NOISE_MULTIPLIER = Fraction(5, 100)
# limit + cost stays below 2^63: 2^62 for the limit, at most 400·2^50 for one cost.
_LARGEST_LIMIT = 2**62
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,18})?", re.ASCII)


def is_noiseless(noise_multiplier: str) -> bool:
    """Whether this noise multiplier says "no noise", whose cost is infinite."""
    return _decimal("noise_multiplier", noise_multiplier) == 0


def is_unlimited(mu_max: str) -> bool:
    """Whether the ledger promises nothing ("inf"): the only kind that accepts a release without noise."""
    return mu_max == "inf"


@lru_cache(maxsize=4096)
def cost_units(noise_multiplier: str) -> int:
    """What one contribution at this noise multiplier costs: ceil(2^50 / z²).

    Raises:
        ValueError: If `noise_multiplier` is not a decimal string of at least 0.05. "0" has no finite cost:
            ask `is_noiseless` first.
    """
    z = checked_noise_multiplier(noise_multiplier)
    return math.ceil(UNITS / z**2)


def checked_noise_multiplier(noise_multiplier: str) -> Fraction:
    """The noise multiplier as an exact fraction.

    Raises:
        ValueError: If it is not a decimal string of at least 0.05, the least that the accountants can bear.
    """
    z = _decimal("noise_multiplier", noise_multiplier)
    if z < SMALLEST_NOISE_MULTIPLIER:
        raise ValueError(f"Expected 0.05 <= noise_multiplier, got noise_multiplier={noise_multiplier!r}. Add noise.")
    return z


def limit_units(mu_max: str) -> int:
    """What all contributions of one user may cost together: floor(2^50 · mu_max²).

    Raises:
        ValueError: If `mu_max` is not a decimal string below 64. "inf" has no finite limit: ask
            `is_unlimited` first.
    """
    limit = math.floor(UNITS * _decimal("mu_max", mu_max) ** 2)
    if limit >= _LARGEST_LIMIT:
        raise ValueError(f"Expected mu_max < 64, got mu_max={mu_max!r}. Choose a smaller epsilon, or none at all.")
    return limit


def max_contributions(mu_max: str, noise_multiplier: str) -> int:
    """How often one user may contribute when every release has the same noise multiplier."""
    return limit_units(mu_max) // cost_units(noise_multiplier)


def noise_multiplier_for(rounds: int, mu_max: str) -> str:
    """The smallest noise multiplier of six decimals at which a user can contribute `rounds` times.

    Raises:
        ValueError: If `rounds` is not positive or the limit cannot be divided among so many.
    """
    if rounds < 1:
        raise ValueError(f"Expected 1 <= rounds, got {rounds=}.")
    affordable = limit_units(mu_max) // rounds
    if affordable == 0:
        raise ValueError(f"Expected a budget that {rounds} rounds can share, got mu_max={mu_max!r}. Plan fewer rounds.")
    # ceil(2^50/z²) <= affordable  ⟺  z² >= 2^50/affordable, in millionths.
    square = -(-UNITS * 10**12 // affordable)
    millionths = max(math.isqrt(square - 1) + 1, int(SMALLEST_NOISE_MULTIPLIER * 10**6))
    return f"{millionths // 10**6}.{millionths % 10**6:06d}"


def mu_max_string(epsilon: float, delta: float, max_nodes_per_user: int = 1) -> str:
    """The limit of one (user, node) for a budget of (epsilon, delta) per user, rounded down to nine decimals.

    A user of up to s nodes is served by s filters that know nothing of each other, so each gets mu/s.

    Raises:
        ValueError: If the budget is not one, or too small for nine decimals.
    """
    if max_nodes_per_user < 1:
        raise ValueError(f"Expected 1 <= max_nodes_per_user, got {max_nodes_per_user=}.")
    mu = mu_of_epsilon(epsilon, delta)
    if math.isinf(mu):
        return "inf"
    billionths = math.floor(Fraction(mu) * 10**9 / max_nodes_per_user)
    if billionths == 0:
        raise ValueError(f"Expected a budget of mu >= 1e-9, got epsilon={epsilon} at delta={delta}. Raise epsilon.")
    return f"{billionths // 10**9}.{billionths % 10**9:09d}"


def admit(spent: IntArray, cost: int, limit: int) -> npt.NDArray[np.bool_]:
    """Which users may contribute once more at `cost`: those that stay within `limit`.

    It never overflows: nothing is added to `spent`.

    Args:
        spent: `n` int64, what each user has been charged so far, in units of 2^-50.
        cost: From `cost_units`.
        limit: From `limit_units`.

    Returns:
        `n` bool. Whoever is admitted must be charged before the contribution leaves the device.
    """
    if cost <= 0:
        raise ValueError(f"Expected 0 < cost, got {cost=}.")
    admitted: npt.NDArray[np.bool_] = (spent >= 0) & (spent <= limit - cost)
    return admitted


@lru_cache(maxsize=4096)
def _decimal(name: str, value: str) -> Fraction:
    if not isinstance(value, str) or _DECIMAL.fullmatch(value) is None:
        raise ValueError(f"Expected {name} to be a decimal string such as '1.250000', got {name}={value!r}.")
    return Fraction(value)
