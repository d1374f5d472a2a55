"""What a sampled run costs, asked of the accountants before its START line is written."""

import math
from decimal import ROUND_CEILING, Decimal

from common.errors import BudgetExhausted, UmbelError
from privacy.amplification import Schedule, amplified
from privacy.ledger import PrivacyLedger
from privacy.participation import is_unlimited

_LAST_PLACE = Decimal("1e-9")


def charge_of(ledger: PrivacyLedger, schedule: Schedule, capped_mu_max: str) -> dict[str, str]:
    """What START says of the cost of a sampled run: all of its rounds, and all that capped runs may ever spend.

    Args:
        ledger: Where it will be charged.
        schedule: The run's.
        capped_mu_max: What the ledger's runs without sampling may cost one (user, node).

    Raises:
        BudgetExhausted: If it is more than the ledger's budget.
        UmbelError: If the ledger has charges, or the accountants refuse.
    """
    check_unused(ledger)
    genesis = ledger.genesis
    if is_unlimited(genesis["mu_max"]):
        return {"capped_mu_max": "inf", "amplified_epsilon": "inf"}
    s = int(genesis["max_nodes_per_user"])
    cost = amplified([schedule], float(genesis["delta"]), capped_mu_max=capped_mu_max, s=s).epsilon
    charged = Decimal(cost).quantize(_LAST_PLACE, ROUND_CEILING)
    if charged > Decimal(genesis["epsilon"]):
        raise BudgetExhausted(
            f"Expected a sampled run within epsilon={genesis['epsilon']} at delta={genesis['delta']}, got {charged} "
            f"for rounds={schedule.rounds}, noise_multiplier={schedule.noise_multiplier}, "
            f"sampling_probability={schedule.sampling_probability}. Lower --epsilon or --rounds."
        )
    return {"capped_mu_max": capped_mu_max, "amplified_epsilon": format(charged, "f")}


def check_unused(ledger: PrivacyLedger) -> None:
    """Refuse a ledger for a sampled run if anything was charged to it.

    Raises:
        UmbelError: If it was.
    """
    if not is_unused(ledger):
        raise UmbelError(
            f"Expected a ledger without charges for a sampled run, whose schedule has to be fixed before the first "
            f"release, got {ledger.path} with some. Run it without privacy.sampling_probability, or name a new ledger."
        )


def is_unused(ledger: PrivacyLedger) -> bool:
    """Whether a ledger has neither charges nor a sampled run."""
    return ledger.sampled is None and not ledger.spent_units


def expected_users(users: int, sampling_probability: str | None) -> int:
    """The denominator of a step: users of the nodes invited, times q, rounded up; a public number."""
    if sampling_probability is None:
        return users
    return max(1, math.ceil(users * Decimal(sampling_probability)))
