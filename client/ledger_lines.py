"""What a node reads from the ledger lines in a broadcast: which key is in force, and how far the ledger has come.

A node trusts one key and remembers one head. Everything else follows from lines that a trusted key has signed: a KEY
line hands over to the next key, a RESTORE line, signed by the operator's recovery key besides, goes on beyond lines
that were lost with the server's disk, and the last line, chained to what the node remembers, is where the ledger is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import LedgerCorrupt, Refused, VerificationError
from common.records import Broadcast
from privacy.lines import Line, check_recovery, check_signature, parse_line, replay

_BEFORE = ("KEY", "RESTORE", "START")  # what may stand before the last line, in this order


@dataclass(frozen=True, kw_only=True)
class LedgerLines:
    """The lines of a broadcast, none of which is trusted yet.

    Attributes:
        keys: KEY lines in the order of the ledger.
        restore: The last RESTORE line, where it was sent along.
        start: The START line of a sampled run.
        last: The last line of the ledger.
    """

    keys: tuple[Line, ...]
    restore: Line | None
    start: Line | None
    last: Line


def parse_lines(texts: Sequence[str]) -> LedgerLines:
    """Read the lines of a broadcast.

    Raises:
        Refused: With code `malformed`, if they are none or in another order.
    """
    try:
        *before, last = (parse_line(text.encode("ascii")) for text in texts)
    except (LedgerCorrupt, ValueError) as error:
        raise Refused("malformed", "Expected ledger lines in a broadcast, got others.") from error
    ranks = [_BEFORE.index(line.kind) if line.kind in _BEFORE else len(_BEFORE) for line in before]
    if ranks != sorted(ranks) or max(ranks, default=0) == len(_BEFORE) or ranks.count(1) > 1 or ranks.count(2) > 1:
        raise Refused("malformed", "Expected KEY, RESTORE and START lines before the last one, got others.")
    by_rank = dict(zip(ranks, before, strict=True))
    keys = tuple(line for line in before if line.kind == "KEY")
    return LedgerLines(keys=keys, restore=by_rank.get(1), start=by_rank.get(2), last=last)


def key_in_force(payload: bytes, signature: bytes, trusted: bytes) -> bytes:
    """The key that has signed a broadcast: the trusted one, or one that it has handed over to.

    Raises:
        Refused: With code `signature`, if it is neither.
    """
    if _has_signed(trusted, signature, payload):
        return trusted
    try:
        key = handed_over(parse_lines(Broadcast.decode(payload).lines).keys, trusted)
    except Exception as error:  # nobody has vouched for these bytes
        raise _unsigned() from error
    if not _has_signed(key, signature, payload):
        raise _unsigned()
    return key


def handed_over(keys: Sequence[Line], trusted: bytes) -> bytes:
    """The last of the keys to which the trusted one has handed over, from KEY line to KEY line."""
    for line in keys:
        try:
            check_signature(line, trusted.hex())
        except VerificationError:
            continue  # from before this node was told its key
        trusted = bytes.fromhex(line.body["public_key"])
    return trusted


def check_last_line(lines: LedgerLines, key: bytes) -> Line:
    """The last line, which the key in force has signed; a KEY line was signed by the key before.

    Raises:
        Refused: With code `signature`.
    """
    if lines.last.kind == "KEY" and lines.last.body["public_key"] == key.hex():
        return lines.last
    try:
        check_signature(lines.last, key.hex())
    except VerificationError as error:
        raise Refused("signature", "Expected a ledger line signed by the ledger's key, got another.") from error
    return lines.last


def restored(
    lines: LedgerLines, broadcast: Broadcast, acknowledged: tuple[int, bytes], recovery_key: bytes | None
) -> tuple[int, bytes]:
    """What a node remembers, after a RESTORE line that it has not seen: that line.

    Raises:
        Refused: With code `ledger_restore`, if the recovery key that this node trusts has not signed it.
    """
    line = lines.restore
    if line is None or line.sequence <= acknowledged[0]:
        return acknowledged
    if recovery_key is None or line.sequence != broadcast.digests_from or not len(broadcast.digests):
        raise Refused("ledger_restore", "Expected a ledger that this node can follow, got a restored one.")
    try:
        check_recovery(line, broadcast.ledger_id, recovery_key.hex())
    except VerificationError as error:
        raise Refused("ledger_restore", "Expected a RESTORE line of the recovery key, got another.") from error
    if broadcast.digests[0].tobytes() != sha256(line.raw).digest():
        raise Refused("ledger_fork", "Expected the RESTORE line as the ledger has it, got another.")
    return line.sequence, line.head


def follow(line: Line, broadcast: Broadcast, acknowledged: tuple[int, bytes]) -> tuple[int, bytes]:
    """Sequence and head of the last line of a message that asks for no contribution, which may bring nothing new.

    Raises:
        Refused: As `privacy.lines.replay`.
    """
    if (line.sequence, line.head) == acknowledged:
        return acknowledged
    return replay(*acknowledged, broadcast.digests_from, broadcast.digests, [line.raw])


def _has_signed(key: bytes, signature: bytes, payload: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, payload)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _unsigned() -> Refused:
    return Refused("signature", "Expected a broadcast signed by the ledger's key, got another signature.")
