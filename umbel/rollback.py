"""Whether a ledger is older than what is remembered of it on this machine: by run folders, and by nodes at trial.

Devices elsewhere remember too, and refuse; but by then a round is charged for nothing.
"""

from collections.abc import Iterator
from pathlib import Path

from client.settings import load_settings
from client.status_file import read_status
from common.errors import UmbelError, VerificationError
from privacy.ledger import PrivacyLedger
from server.settings import RunFolder
from umbel.federation import FederationFolder

_COPY = RunFolder(root=Path()).ledger_copy
_REMEDY = "Put the newest ledger back; if its last lines are lost, see `umbel ledger restore --help`."


def check_not_rolled_back(folder: FederationFolder, ledger: PrivacyLedger) -> int:
    """Compare a federation's ledger with every memory of it in its own folder.

    Returns:
        The last line that is remembered; -1 where there is no memory.

    Raises:
        VerificationError: If the ledger ends before a line that is remembered, or has another in its place.
    """
    newest = -1
    for sequence, head, where in _memories(folder, ledger.ledger_id):
        newest = max(newest, sequence)
        if sequence > ledger.sequence:
            raise VerificationError(
                f"Expected {ledger.path} up to line {sequence} or beyond, which {where} remembers, got it up to line "
                f"{ledger.sequence}: it is an older copy. {_REMEDY}"
            )
        lost = ledger.restored is not None and sequence < ledger.restored.sequence
        if head is not None and not lost and ledger.head_at(sequence) != head:
            raise VerificationError(
                f"Expected line {sequence} of {ledger.path} as {where} remembers it, got another: two copies of one "
                f"ledger were continued. {_REMEDY}"
            )
    return newest


def _memories(folder: FederationFolder, ledger_id: str) -> Iterator[tuple[int, bytes | None, Path]]:
    """Sequence, head where it is known, and who remembers; what cannot be read remembers nothing."""
    for copy in sorted(folder.runs.glob(f"*/{_COPY}")):
        try:
            with PrivacyLedger.open(copy) as old:
                if old.ledger_id == ledger_id:
                    yield old.sequence, old.head, copy
        except UmbelError:
            continue
    for path in sorted((folder.root / "nodes").glob("*/node.toml")):
        try:
            settings = load_settings(path)
            status = read_status(settings.store.format(partition=settings.partition))
        except UmbelError:
            continue
        if status is not None and status.get("ledger_id") == ledger_id:
            acknowledged = status.get("acknowledged")
            if isinstance(acknowledged, int):
                yield acknowledged, None, path.parent
