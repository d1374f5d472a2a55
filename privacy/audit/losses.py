"""What releases have cost at several deltas, by each accountant that is installed, side by side."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any

from common.errors import UmbelError
from privacy.accounting import (
    SMALLEST_DELTA,
    spent,
)
from privacy.amplification import Schedule, amplified
from privacy.gaussian import epsilon_of_mu, replace_one
from privacy.participation import is_unlimited
from privacy.sampling import SampledRun

LOSSES = ("epsilon", "replace_one_epsilon", "pld_epsilon", "prv_epsilon", "rdp_epsilon")
MOST_PRV_ROUNDS = 100_000
"""Up to which PRV is asked: importing it takes 300 MB."""


def checked_deltas(deltas: Iterable[float], *, default: float | None = None) -> tuple[float, ...]:
    """Each delta once, in the order given; the default where none is given.

    Raises:
        UmbelError: If one is out of range.
    """
    wanted = tuple(dict.fromkeys(deltas)) or (() if default is None else (default,))
    for delta in wanted:
        if not SMALLEST_DELTA <= delta < 1:
            raise UmbelError(f"Expected {SMALLEST_DELTA} <= delta < 1, got {delta=}. Correct --delta, or leave it out.")
    return wanted


def losses_at(
    deltas: Sequence[float],
    *,
    mu: float,
    noise_multipliers: Sequence[str] | None,
    s: int,
    sampled: SampledRun | None = None,
) -> dict[str, Any]:
    """`mu`, and the worst-case user's epsilon at each delta by each accountant.

    Args:
        deltas: At least one.
        mu: Of all releases together, rounded up.
        noise_multipliers: Of each release, as the ledgers spell them; None where they are not of one s, which leaves
            the exact formula alone.
        s: On how many nodes one user's data may be.
        sampled: The ledger's sampled run, with which epsilon is amplified: of its whole schedule and of all that other
            runs may spend besides it. `mu` is then what holds whatever the coins have shown.

    Returns:
        `mu`; the losses at the first delta by name; `at_deltas`, with a mapping for every delta. None is infinite, or
        was not computed: PLD and RDP without dp-accounting, PRV without opacus or for more than 100,000 rounds.

    Raises:
        UmbelError: If accountants contradict each other, or a number is out of range.
    """
    rows = [
        {
            "delta": delta,
            **(_losses(delta, mu, noise_multipliers, s) if sampled is None else _amplified(delta, sampled, s)),
        }
        for delta in deltas
    ]
    return {**rows[0], "mu": _finite(mu), "at_deltas": rows}


def amplified_epsilon(sampled: SampledRun, delta: float, s: int) -> float:
    """Epsilon of a ledger with a sampled run, found anew; inf where it has no budget.

    Raises:
        UmbelError: If the accountants refuse, or are not installed.
    """
    found = _amplified(delta, sampled, s, with_replace_one=False)["epsilon"]
    return inf if found is None else found


def _amplified(delta: float, sampled: SampledRun, s: int, *, with_replace_one: bool = True) -> dict[str, float | None]:
    if is_unlimited(sampled.capped_mu_max):
        return dict.fromkeys(LOSSES)
    schedule = Schedule(
        noise_multiplier=sampled.noise_multiplier,
        sampling_probability=sampled.sampling_probability,
        rounds=sampled.rounds,
    )
    try:
        found = amplified(
            [schedule], delta, capped_mu_max=sampled.capped_mu_max, s=s, with_replace_one=with_replace_one
        )
    except ValueError as error:
        raise UmbelError(str(error)) from error
    return {
        "epsilon": found.epsilon,
        "replace_one_epsilon": found.replace_one_epsilon,
        "pld_epsilon": found.epsilon,
        "prv_epsilon": found.prv_upper,
        "rdp_epsilon": found.rdp_epsilon,
    }


def void(losses: Mapping[str, Any]) -> dict[str, Any]:
    """The same without a number, for releases that promise nothing."""
    rows = [dict.fromkeys(LOSSES) | {"delta": row["delta"]} for row in losses["at_deltas"]]
    return {**losses, **dict.fromkeys((*LOSSES, "mu")), "at_deltas": rows}


def _losses(delta: float, mu: float, noise_multipliers: Sequence[str] | None, s: int) -> dict[str, float | None]:
    exact: dict[str, float | None] = {
        "epsilon": _finite(epsilon_of_mu(mu, delta)),
        "replace_one_epsilon": _finite(replace_one(mu, delta)),
    }
    others: dict[str, float | None] = dict.fromkeys(LOSSES[2:])
    if noise_multipliers is not None and find_spec("dp_accounting") is not None:
        try:
            # for a ledger that long PRV's libraries would be most of the memory
            found = spent(noise_multipliers, delta, s, with_prv=len(noise_multipliers) <= MOST_PRV_ROUNDS)
        except ValueError as error:
            raise UmbelError(str(error)) from error
        others = {name: _finite(getattr(found, name, None)) for name in others}
    return exact | others


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
