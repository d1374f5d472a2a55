"""One line of a privacy ledger: its bytes, its signature, and its place in the chain. Pure functions.

A ledger is a file of lines, each one canonical JSON object (sorted keys, no spaces, ASCII, no floats, hex in
lower case) followed by a newline that belongs to no hash and no signature:

    {"body":{...},"previous":"<h_(t-1)>","sequence":t,"signature":"...","time":"2026-01-31T12:00:00Z","type":"RESERVE"}

    h_t = SHA-256(h_(t-1) || SHA-256(line)),   h_(-1) = 32 zero bytes.

The Ed25519 signature is over the canonical encoding of the same object without its signature, which begins
with `{"body"` and so is never the beginning of anything else that the same key signs. A line carries h_(t-1),
so the signature of the last line authenticates all lines before it. A line is valid only if it equals its
canonical encoding and its body has exactly the fields of its type.

    GENESIS   ledger_id, population, unit, neighboring_relation, max_nodes_per_user, epsilon, delta, mu_max,
              public_key, recovery_key ("" for a ledger that nobody can restore), format; mu_max is the limit of one
              (user, node), numbers are decimal strings, unit is "user" and neighboring_relation "zero-out"
    REGISTRY  population_size, users_per_node (the most users that one node hosts), digest (of the registry)
    START     run, schedule (its "rounds", "noise_multiplier" and "sampling" bind the run, if they are there),
              configuration_digest
    RESERVE   run, round, event, invited_users: charged from here on, for ever
    COMMIT    reserve (the sequence of its RESERVE), release_digest
    ABORT     reserve, code: nothing came of it; informative, no refund
    KEY       public_key, which signs from the next line on; the line itself is signed by the key before
    RESTORE   lost, noise_multiplier, recovery_signature: after the server's disk was lost, the ledger goes on behind
              `lost` lines that are gone, as many as any node can have seen; each is charged as a release with that
              noise; its own number is behind theirs, so no number is ever used twice. The operator's recovery key
              of GENESIS signs it besides
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json import JSONDecoder
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import LedgerCorrupt, Refused, VerificationError
from common.records import canonical_json
from privacy.sampling import is_sampling

FORMAT = 2
UNIT = "user"
NEIGHBORING_RELATION = "zero-out"
"""The one unit and the one relation that this version's accounting and its promise speak of."""
SYSTEM_NOISE = "aes-256-ctr"
DISCRETE_NOISE = "opendp (discrete Gaussian)"
NOISES = {"rounded": SYSTEM_NOISE, "discrete": DISCRETE_NOISE}
"""How events spell what the configuration's `privacy.noise` calls so: `privacy.entropy`, `privacy.discrete`."""
CRYPTOGRAPHIC_NOISE = tuple(NOISES.values())
"""Noise that protects."""
SEEDED_NOISE = "seeded (NOT PRIVATE)"
"""How events spell noise that a seed repeats."""
ZERO_HEAD = bytes(32)
MAX_LINE = 2**20
MOST_LOST = 1_000_000
"""Lines that one RESTORE line may stand for: each is counted one by one wherever a ledger is read."""
_SHARE_SLACK = 1e-9  # shares are decimal strings of square roots; a user's norm is checked in integers anyway

Fields = Mapping[str, Callable[[Any], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line that is canonical and complete; nothing is said about its signature or its place in a chain.

    Attributes:
        sequence: Number of the line in its ledger, from 0.
        kind: Its type, GENESIS to RESTORE.
        body: The fields of that type.
        previous: h_(t-1), lower-case hex.
        time: UTC, to the second.
        signature: Ed25519, lower-case hex.
        raw: The bytes of the line, without newline.
    """

    sequence: int
    kind: str
    body: Mapping[str, Any]
    previous: str
    time: str
    signature: str
    raw: bytes

    @property
    def head(self) -> bytes:
        """h_t, if `previous` is right."""
        return extend(bytes.fromhex(self.previous), sha256(self.raw).digest())


def signed_line(
    *, sequence: int, kind: str, body: Mapping[str, Any], previous: bytes, time: str, key: Ed25519PrivateKey
) -> bytes:
    """The bytes of a new line, without newline."""
    unsigned = {
        "body": dict(body),
        "previous": previous.hex(),
        "sequence": sequence,
        "time": time,
        "type": kind,
    }
    return canonical_json({**unsigned, "signature": key.sign(canonical_json(unsigned)).hex()})


def parse_line(raw: bytes) -> Line:
    """Read a line, without newline.

    Raises:
        LedgerCorrupt: If it is not canonical, or not a line with exactly the fields of its type.
    """
    found = _FRAME.fullmatch(raw) if len(raw) <= MAX_LINE else None
    if found is None:
        raise LedgerCorrupt("Expected the canonical frame of body, previous, sequence, signature, time, type.")
    packed, previous, sequence, signature, time, kind = found.groups()
    try:
        body, _ = _DECODER.raw_decode(packed.decode("ascii"))
        canonical = canonical_json(body) == packed
    except (ValueError, RecursionError) as error:
        raise LedgerCorrupt("Expected a body of plain values, in ASCII and without floats.") from error
    if not canonical:
        raise LedgerCorrupt("Expected a canonical body: sorted keys, no spaces, nothing twice.")
    name = kind.decode("ascii")
    _check(body, _BODIES[name], name)
    return Line(
        sequence=int(sequence),
        kind=name,
        body=body,
        previous=previous.decode("ascii"),
        time=time.decode("ascii"),
        signature=signature.decode("ascii"),
        raw=raw,
    )


def check_signature(line: Line, public_key: str) -> None:
    """Check that `public_key` (hex) signed this line.

    Raises:
        VerificationError: If it did not.
    """
    before, _, after = line.raw.rpartition(b'"signature":"')
    signed = before + after[len(line.signature) + len('",') :]
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(line.signature), signed)
    except (InvalidSignature, ValueError) as error:
        raise VerificationError(f"Expected a signature by key {public_key[:16]}….") from error


def recovery_statement(*, ledger_id: str, sequence: int, previous: bytes, lost: int, noise_multiplier: str) -> bytes:
    """What the recovery key signs to let a ledger go on without its last lines."""
    fields = {
        "ledger_id": ledger_id,
        "lost": lost,
        "noise_multiplier": noise_multiplier,
        "previous": previous.hex(),
        "sequence": sequence,
    }
    return b"umbel restore 1\n" + canonical_json(fields)


def check_recovery(line: Line, ledger_id: str, recovery_key: str) -> None:
    """Check that `recovery_key` (hex) allows this RESTORE line in this ledger.

    Raises:
        VerificationError: If it does not.
    """
    statement = recovery_statement(
        ledger_id=ledger_id,
        sequence=line.sequence,
        previous=bytes.fromhex(line.previous),
        lost=line.body["lost"],
        noise_multiplier=line.body["noise_multiplier"],
    )
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(recovery_key))
        key.verify(bytes.fromhex(line.body["recovery_signature"]), statement)
    except (InvalidSignature, ValueError) as error:
        raise VerificationError(f"Expected a recovery signature by key {recovery_key[:16]}….") from error


def extend(head: bytes, digest: bytes) -> bytes:
    """h_t from h_(t-1) and the digest of line t."""
    return sha256(head + digest).digest()


def heads(raw_lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number of each line of a ledger that was verified, and the head after it, without reading the lines again."""
    head = ZERO_HEAD
    for raw in raw_lines:
        line = raw.removesuffix(b"\n")
        head = extend(head, sha256(line).digest())
        yield int(line.rpartition(b',"sequence":')[2].partition(b",")[0]), head


def chain(head: bytes, digests: npt.NDArray[np.uint8]) -> bytes:
    """The head after further lines, given their digests, `t x 32`."""
    packed = digests.tobytes()
    for start in range(0, len(packed), 32):
        head = extend(head, packed[start : start + 32])
    return head


def replay(
    acknowledged_sequence: int,
    acknowledged_head: bytes,
    digests_from: int,
    digests: npt.NDArray[np.uint8],
    raw_lines: Sequence[bytes],
) -> tuple[int, bytes]:
    """Follow the ledger from the last line this node has acknowledged to the one it is asked to answer.

    A chain cannot show that its end was cut off and rewritten; whoever remembers an earlier head can. The
    node remembers one, so the digests since then must lead from it to the `previous` that the last line,
    whose signature the caller has checked, carries. Digests at or before the acknowledged line are not looked
    at.

    Args:
        acknowledged_sequence: Sequence of that line, -1 for a node that has seen none.
        acknowledged_head: The head there, `ZERO_HEAD` for a node that has seen none.
        digests_from: Sequence of the line that `digests` begins with.
        digests: `t x 32`, SHA-256 of each line up to the head.
        raw_lines: The last of these lines themselves, at least one.

    Returns:
        Sequence and head to store before anything is answered.

    Raises:
        Refused: `ledger_gap`, if lines since the acknowledged one are missing; `ledger_rollback`, if the
            ledger ends before it; `replayed`, if it ends exactly there; `ledger_fork`, if the digests lead
            elsewhere; `malformed`, if the last line is not one.
    """
    last = digests_from + len(digests) - 1
    line = _last_line(digests, raw_lines)
    if line.sequence != last or digests_from < 0:
        raise Refused("ledger_gap", f"Expected digests up to line {line.sequence}, got them up to {last}.")
    if last < acknowledged_sequence:
        raise Refused("ledger_rollback", f"Expected a line after {acknowledged_sequence}, got line {last}.")
    if last == acknowledged_sequence:
        if line.head == acknowledged_head:
            raise Refused("replayed", f"Expected a new line, got line {last} again.")
        raise Refused("ledger_fork", f"Expected line {last} as it was acknowledged, got another.")
    if digests_from > acknowledged_sequence + 1:
        raise Refused("ledger_gap", f"Expected digests from line {acknowledged_sequence + 1}, got {digests_from=}.")
    before = chain(acknowledged_head, digests[acknowledged_sequence + 1 - digests_from : -1])
    if before.hex() != line.previous:
        raise Refused("ledger_fork", f"Expected lines that follow line {acknowledged_sequence}, got others.")
    return last, line.head


def _last_line(digests: npt.NDArray[np.uint8], raw_lines: Sequence[bytes]) -> Line:
    if not 0 < len(raw_lines) <= len(digests):
        raise Refused("ledger_gap", f"Expected lines with their digests, got {len(raw_lines)} lines.")
    if b"".join(sha256(raw).digest() for raw in raw_lines) != digests[-len(raw_lines) :].tobytes():
        raise Refused("ledger_fork", "Expected lines that have the digests beside them, got others.")
    try:
        return parse_line(raw_lines[-1])
    except LedgerCorrupt as error:
        raise Refused("malformed", str(error)) from error


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"Expected numbers that are not integers as decimal strings, got {text}.")


_DECODER = JSONDecoder(parse_float=_refuse_number, parse_constant=_refuse_number)


def _check(value: Any, fields: Fields, name: str) -> None:
    """Whether `value` is an object of exactly these fields; a TypeError of a check is a no."""
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise LedgerCorrupt(f"Expected in {name} exactly the fields {', '.join(fields)}.")
    for field, holds in fields.items():
        try:
            if holds(value[field]):
                continue
        except TypeError:
            pass
        raise LedgerCorrupt(f"Expected a valid {field} in {name}, got {str(value[field])[:100]!r}.")


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**63


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return 0 < len(value) <= 200 and str.isprintable(value)


def _is_decimal_or_inf(value: Any) -> bool:
    return value == "inf" or _is_decimal(value) is not None


def _is_groups(value: Any) -> bool:
    if not (isinstance(value, list) and value):
        return False
    for group in value:
        _check(group, _GROUP, "group")
    return sum(float(group["share"]) ** 2 for group in value) <= 1 + _SHARE_SLACK


def _is_event(value: Any) -> bool:
    _check(value, _EVENT, "event")
    noiseless = float(value["noise_multiplier"]) == 0
    return (value["noise"] == "none") is noiseless and (noiseless or value["clipping_norm"] != "inf")


_is_count = _at_least(0)
_is_positive = _at_least(1)
_is_hex = re.compile(r"[0-9a-f]{64}").fullmatch
_is_decimal = re.compile(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,18})?").fullmatch
_is_code = re.compile(r"[a-z][a-z0-9_]{0,63}").fullmatch

_GROUP: Fields = {"name": _is_text, "share": _is_decimal, "size": _is_positive}
_EVENT: Fields = {
    "clipping_norm": _is_decimal_or_inf,
    "denominator": _is_positive,
    "grid_scale": _is_positive,
    "groups": _is_groups,
    "initialization": lambda value: isinstance(value, bool),
    "mechanism": lambda value: value == "gaussian",
    "noise": lambda value: value in (*CRYPTOGRAPHIC_NOISE, "none", SEEDED_NOISE),
    "noise_multiplier": _is_decimal,
    "sampling": is_sampling,
}
_BODIES: Mapping[str, Fields] = {
    "GENESIS": {
        "delta": _is_decimal,
        "epsilon": _is_decimal_or_inf,
        "format": lambda value: type(value) is int and value == FORMAT,
        "ledger_id": _is_text,
        "max_nodes_per_user": _is_positive,
        "mu_max": _is_decimal_or_inf,
        "neighboring_relation": lambda value: value == NEIGHBORING_RELATION,
        "population": _is_text,
        "public_key": _is_hex,
        "recovery_key": lambda value: value == "" or _is_hex(value),
        "unit": lambda value: value == UNIT,
    },
    "REGISTRY": {"digest": _is_hex, "population_size": _is_count, "users_per_node": _is_count},
    "START": {"configuration_digest": _is_hex, "run": _is_text, "schedule": _is_object},
    "RESERVE": {"event": _is_event, "invited_users": _is_count, "round": _is_count, "run": _is_text},
    "COMMIT": {"release_digest": _is_hex, "reserve": _is_count},
    "ABORT": {"code": _is_code, "reserve": _is_count},
    "KEY": {"public_key": _is_hex},
    "RESTORE": {
        "lost": lambda value: _is_positive(value) and value <= MOST_LOST,
        "noise_multiplier": lambda value: _is_decimal(value) and float(value) > 0,
        "recovery_signature": re.compile(r"[0-9a-f]{128}").fullmatch,
    },
}
# Around a canonical body this is the canonical encoding of the whole line.
_FRAME = re.compile(
    rb'\{"body":(\{.*\}),"previous":"([0-9a-f]{64})","sequence":(0|[1-9][0-9]{0,18}),'
    rb'"signature":"([0-9a-f]{128})","time":"([0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z)",'
    rb'"type":"(%s)"\}' % "|".join(_BODIES).encode()
)
