"""What can be done to a ledger's bytes, one thing after the other: each is found at its line and said by name."""

import io
import subprocess
import sys
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerCorrupt
from privacy.audit.verify import Anchor, verify
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.ledger_state import read_lines
from privacy.lines import ZERO_HEAD, extend, parse_line, signed_line
from privacy.participation import mu_max_string

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
OWNER = public_key_hex(KEY)
DIGEST = "0f" * 32
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "50.000000",
    "clipping_norm": "1.250000",
    "grid_scale": 65536,
    "groups": [{"name": "model", "size": 10, "share": "1"}],
    "denominator": 3,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
CHAIN, SEQUENCE = "head of the lines before", "Expected sequence="
# What a changed byte can break in a line: its form, a field by name, a rule, the order, the chain, the signature.
NAMED = ("canonical", "plain values", "exactly the fields", "valid ", CHAIN, SEQUENCE, "signature by key")
RULES = ("run that was started", "RESERVE that is still open", "round not reserved before", "within the budget", "0 < ")


def create(path: Path) -> PrivacyLedger:
    return PrivacyLedger.create(
        path,
        population="p",
        epsilon=1.0,
        delta=1e-6,
        mu_max=mu_max_string(1.0, 1e-6, 1),
        max_nodes_per_user=1,
        key=KEY,
        ledger_id="ledger",
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a line of every kind that this version writes, a change of key among them."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    with create(path) as ledger:
        ledger.record_registry(3, 1, DIGEST)
        ledger.start("r", {"rounds": 3}, DIGEST)
        ledger.commit(ledger.reserve("r", 1, EVENT, 3).sequence, "1" * 64)
        ledger.rotate_key(OTHER)
        ledger.abort(ledger.reserve("r", 2, EVENT, 3).sequence, "no_answer")
    return path


@pytest.fixture(scope="module")
def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def failure(lines: list[bytes], *, all_signatures: bool = False) -> tuple[int | None, str]:
    """Line and reason."""
    reading = read_lines(lines, all_signatures=all_signatures)
    return reading.line, reading.reason


def kind(line: bytes) -> str:
    return parse_line(line[:-1]).kind


def test_every_flipped_bit_is_found_at_its_line_and_named(lines):
    """No bit of a line of any kind can change, also where that only spells a hex digit in upper case.

    Each line is read as the last one, whose signature is checked. Where nothing but the signature shows the change and
    other lines follow, the chain shows it at the next one.
    """
    first_of_kind = {kind(line): number for number, line in reversed([*enumerate(lines)])}
    assert set(first_of_kind) == {"GENESIS", "REGISTRY", "START", "RESERVE", "COMMIT", "ABORT", "KEY"}
    upper_case = 0
    for number in first_of_kind.values():
        before, line, after = lines[:number], lines[number], lines[number + 1 :]
        for position in range(len(line) - 1):
            for bit in range(8):
                changed = bytearray(line)
                changed[position] ^= 1 << bit
                upper_case += bit == 5 and chr(line[position]) in "abcdef"
                where = f"line {number + 1}, byte {position}, bit {bit}"
                # what is no line is no line wherever it stands; one bit of each byte shows that a ledger says so too
                reason = form_failure(bytes(changed)) if bit != position % 8 else ""
                if not reason:
                    found, reason = failure([*before, bytes(changed)])
                    assert found == number + 1, where
                assert any(name in reason for name in (*NAMED, *RULES)), f"{where}: {reason}"
                if "signature by key" in reason and after and kind(line) != "KEY":
                    found, reason = failure([*before, bytes(changed), *after])
                    assert (found, CHAIN in reason) == (number + 2, True), where
    assert upper_case > 300


def form_failure(raw: bytes) -> str:
    """Why these bytes are no line; empty if they are one."""
    try:
        parse_line(raw[:-1])
    except LedgerCorrupt as error:
        return str(error)
    return ""


def test_a_flipped_newline_is_named(lines):
    """Two lines in one are no line, one line in two either; at the end of the file it is a torn line."""
    for number, line in enumerate(lines):
        for bit in range(8):
            joined = b"".join([*lines[:number], line[:-1], bytes([ord("\n") ^ 1 << bit]), *lines[number + 1 :]])
            reading = read_lines(io.BytesIO(joined))
            if number < len(lines) - 1:
                assert reading.line == number + 1
                assert any(name in reading.reason for name in NAMED)
            else:
                assert (reading.line, reading.torn_bytes) == (None, len(line))


def test_a_ledger_cut_anywhere_is_recovered_by_the_writer(path, lines, tmp_path):
    """Cut behind the first line, the whole lines count, the torn one is cut off, and the ledger goes on."""
    data, copy = path.read_bytes(), tmp_path / "ledger.jsonl"
    last_two = len(data) - len(lines[-1]) - len(lines[-2])
    newlines = [sum(map(len, lines[: t + 1])) for t in range(len(lines))]
    cuts = {newline + step for newline in newlines for step in (-1, 0, 1)} | set(range(last_two, len(data), 7))
    for length in sorted(cut for cut in cuts if len(lines[0]) <= cut <= len(data)):
        copy.write_bytes(data[:length])
        whole = data.count(b"\n", 0, length)
        torn = length - newlines[whole - 1]
        verification = verify(copy, public_key=OWNER)
        assert (verification.status, verification.sequence, verification.torn_bytes) == ("verified", whole - 1, torn)
        with PrivacyLedger.open(copy, key=KEY if whole <= 5 else OTHER) as ledger:
            assert copy.stat().st_size == newlines[whole - 1]
            ledger.start("again", {}, DIGEST)
        assert verify(copy, public_key=OWNER, all_signatures=True).sequence == whole


def test_swapped_repeated_and_removed_lines_are_named(lines):
    """The first line that is not where it was is named with what was expected there."""
    count = len(lines)
    for t, u in combinations(range(count), 2):
        swapped = list(lines)
        swapped[t], swapped[u] = swapped[u], swapped[t]
        found, reason = failure(swapped)
        assert found == t + 1
        assert SEQUENCE in reason
    for t in range(count):
        found, reason = failure([*lines[: t + 1], *lines[t:]])
        assert found == t + 2
        assert SEQUENCE in reason
    for t in range(count - 1):
        found, reason = failure(lines[:t] + lines[t + 1 :])
        assert found == t + 1
        assert SEQUENCE in reason


def test_a_line_signed_again_by_another_key_is_named(lines):
    """Checking all signatures names that line and the key that should have signed; the chain alone the next one."""
    for t, line in enumerate(lines):
        parsed = parse_line(line[:-1])
        owner = KEY if t <= 5 else OTHER
        stranger = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))
        again = signed_line(
            sequence=t,
            kind=parsed.kind,
            body=parsed.body,
            previous=bytes.fromhex(parsed.previous),
            time=parsed.time,
            key=stranger,
        )
        changed = [*lines[:t], again + b"\n", *lines[t + 1 :]]
        named = f"signature by key {public_key_hex(owner)[:16]}"
        found, reason = failure(changed, all_signatures=True)
        assert (found, named in reason) == (t + 1, True)
        found, reason = failure(changed)
        by_chain = t < len(lines) - 1 and parsed.kind != "KEY"
        assert (found, (CHAIN if by_chain else named) in reason) == (t + 1 + by_chain, True)


def test_lines_of_two_writers_are_named_however_they_are_mixed(path, lines, tmp_path):
    """Two copies that were written apart cannot be put together: the first line of the second writer is named."""
    ends = []
    for name in ("one", "two"):
        fork = tmp_path / name
        fork.write_bytes(path.read_bytes())
        with PrivacyLedger.open(fork, key=OTHER) as ledger:
            for number in range(2):
                ledger.start(f"{name} {number}", {}, DIGEST)
        ends.append(fork.read_bytes().splitlines(keepends=True)[len(lines) :])
    for places in combinations(range(4), 2):
        first, second = iter(ends[0]), iter(ends[1])
        writers = [place in places for place in range(4)]
        mixed = [next(first if writer else second) for writer in writers]
        change = next(place for place, (one, other) in enumerate(pairwise(writers), 1) if one != other)
        found, reason = failure([*lines, *mixed])
        assert found == len(lines) + change + 1
        assert SEQUENCE in reason or CHAIN in reason


def test_rollback_and_fork_are_named_against_an_anchor(path, lines, tmp_path):
    """Neither shows in the file; a remembered head tells an end that is missing from a past that was rewritten."""
    whole = verify(path)
    anchor = Anchor(sequence=whole.sequence, head=whole.head)
    copy = tmp_path / "ledger.jsonl"
    for kept in range(1, len(lines)):
        copy.write_bytes(b"".join(lines[:kept]))
        assert verify(copy, public_key=OWNER).status == "verified"
        rolled_back = verify(copy, public_key=OWNER, anchor=anchor)
        assert rolled_back.status == "failed"
        assert f"up to {kept - 1}: the end is missing" in rolled_back.reason
        with PrivacyLedger.open(copy, key=KEY if kept <= 5 else OTHER) as ledger:
            while ledger.sequence < anchor.sequence:
                ledger.start(f"run {ledger.sequence}", {}, DIGEST)
        forked = verify(copy, public_key=OWNER, anchor=anchor)
        assert (forked.status, forked.line) == ("failed", anchor.sequence + 1)
        assert "the past was rewritten" in forked.reason


WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from common.errors import UmbelError
from privacy.ledger import PrivacyLedger

path, name, done = Path(sys.argv[1]), sys.argv[2], 0
print("ready", flush=True)
sys.stdin.readline()
while done < 90:
    try:
        with PrivacyLedger.open(path, key=Ed25519PrivateKey.from_private_bytes(bytes(range(32)))) as ledger:
            for _ in range(3):
                ledger.start(f"{name} {done}", {}, "0f" * 32)
                done += 1
    except UmbelError as error:
        if "only writer" not in str(error):
            raise
"""


def test_two_processes_that_write_at_once_take_turns(tmp_path):
    """Whoever does not hold the lock is told so and writes nothing: every line of both is in one chain."""
    path = tmp_path / "ledger.jsonl"
    create(path).close()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    verification = verify(path, public_key=OWNER, all_signatures=True)
    assert (verification.status, verification.sequence) == ("verified", 180)
    assert set(verification.runs) == {f"{name} {number}" for name in ("one", "two") for number in range(90)}


def test_a_chain_made_anew_from_any_line_needs_the_key(lines):
    """Whoever changes a line and mends all heads after it, but has no key, is found at the line that was changed."""
    for t in range(len(lines)):
        head, forged = ZERO_HEAD, []
        for line in lines:
            parsed = parse_line(line[:-1])
            time = "2020-01-01T00:00:00Z" if parsed.sequence == t else parsed.time
            raw = signed_line(
                sequence=parsed.sequence, kind=parsed.kind, body=parsed.body, previous=head, time=time, key=KEY
            )
            fake = raw.replace(parse_line(raw).signature.encode(), parsed.signature.encode())
            kept = line[:-1] if parsed.sequence < t else fake
            head = extend(head, sha256(kept).digest())
            forged.append(kept + b"\n")
        found, reason = failure(forged, all_signatures=True)
        assert (found, "signature by key" in reason) == (t + 1, True)
        assert failure(forged)[0] is not None
