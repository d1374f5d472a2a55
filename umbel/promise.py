"""What a privacy budget promises, in one sentence for people."""

import math
from decimal import ROUND_CEILING, Context

_FOUR_DIGITS_UP = Context(prec=4, rounding=ROUND_CEILING)
NOTHING_PROMISED = "NOT PRIVATE: nothing is promised to anybody. Publish nothing of this run."


def rounded_up(value: float | None) -> str:
    """A loss to four digits, never less than it is; "inf" without noise."""
    if value is None or math.isinf(value):
        return "inf"
    return f"{float(_FOUR_DIGITS_UP.create_decimal(repr(value))):.4g}"


def rounded_down(value: float) -> str:
    """What is left of a budget to four decimals, never more than it is."""
    return f"{max(0, math.floor(value * 1e4)) / 1e4:.4f}"


def promise(
    epsilon: float | None,
    delta: float,
    *,
    max_nodes_per_user: int = 1,
    private: bool = True,
    releases: str = "all releases of this ledger",
) -> str:
    """The statement for one user under the zero-out relation.

    Args:
        epsilon: Spent by all releases; None or inf without noise.
        delta: What epsilon is for.
        max_nodes_per_user: On how many nodes one user's data may be.
        private: False if any release drew its noise from a seed.
        releases: What epsilon counts.
    """
    if not private or epsilon is None or math.isinf(epsilon):
        return NOTHING_PROMISED
    place = "" if max_nodes_per_user == 1 else f", on up to {max_nodes_per_user} nodes"
    return (
        f"Each user is promised: {releases} together are "
        f"({rounded_up(epsilon)}, {delta:g})-differentially private against leaving out all of that user's "
        f"examples{place}; seeing them changes the odds that the examples were used by a factor of at most "
        f"{_factor(epsilon)}, but for a chance of {delta:g}."
    )


def _factor(epsilon: float) -> str:
    return f"e^{rounded_up(epsilon)}" if epsilon > math.log(1000) else rounded_up(math.exp(epsilon))
