"""Going on with an older copy of a ledger: what the operator does after the server's disk was lost."""

import math
from pathlib import Path
from typing import Any

from common.errors import UmbelError
from privacy.keys import load_key
from privacy.ledger import PrivacyLedger
from server.settings import LedgerPlace


def lost_lines(path: Path, up_to: int) -> int:
    """How many lines would be charged.

    Raises:
        UmbelError: If the ledger cannot be read, or goes beyond `up_to`.
    """
    with PrivacyLedger.open(path) as ledger:
        if up_to <= ledger.sequence:
            raise UmbelError(f"Expected --up-to beyond line {ledger.sequence}, the ledger's last, got {up_to}.")
        return up_to - ledger.sequence


def restore(path: Path, *, up_to: int, noise_multiplier: str | None, recovery_key: Path) -> dict[str, Any]:
    """Append a RESTORE line.

    Args:
        path: The ledger; its own key lies beside it.
        up_to: The last line that anybody can have seen.
        noise_multiplier: z that each lost line is charged with; None for the least of any known run.
        recovery_key: File of the recovery key.

    Returns:
        As documented for `--format json`.

    Raises:
        UmbelError: If there is nothing to restore, or a key is not the ledger's.
    """
    with PrivacyLedger.open(path, key=load_key(LedgerPlace(ledger=path).key)) as ledger:
        delta = float(ledger.genesis["delta"])
        before = ledger.epsilon_spent(delta)
        try:
            lost = ledger.restore(up_to=up_to, noise_multiplier=noise_multiplier, recovery_key=load_key(recovery_key))
        except ValueError as error:
            raise UmbelError(f"{error} Correct --noise-multiplier or --up-to.") from error
        restored = ledger.restored
        return {
            "ledger": str(path),
            "head": f"{ledger.sequence}:{ledger.head.hex()}",
            "lost": lost,
            "noise_multiplier": restored.body["noise_multiplier"] if restored else None,
            "epsilon_before": _finite(before),
            "epsilon_spent": _finite(ledger.epsilon_spent(delta)),
            "epsilon_budget": _finite(float(ledger.genesis["epsilon"])),
            "delta": delta,
            "exhausted": ledger.capped_units >= ledger.limit_units,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
