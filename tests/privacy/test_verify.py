"""Verification of a ledger file: every change is seen, and what cannot be seen is said."""

import dataclasses
import io
import math
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import UmbelError
from privacy.audit.verify import Anchor, recompute_epsilon, verify
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.ledger_state import read_lines
from privacy.lines import MAX_LINE, ZERO_HEAD, extend, parse_line, signed_line
from privacy.participation import mu_max_string
from privacy.rounds import Rounds

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
OWNER = public_key_hex(KEY)
DIGEST = "0f" * 32
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "10.000000",
    "clipping_norm": "1.250000",
    "grid_scale": 65536,
    "groups": [{"name": "model", "size": 10, "share": "1"}],
    "denominator": 3,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}


def create(path, key=KEY, epsilon=1.0, s=1):
    return PrivacyLedger.create(
        path,
        population="p",
        epsilon=epsilon,
        delta=1e-6,
        mu_max=mu_max_string(epsilon, 1e-6, s),
        max_nodes_per_user=s,
        key=key,
        ledger_id="ledger",
    )


def fill(ledger):
    """Three rounds: one committed, one aborted, one left open."""
    ledger.record_registry(3, 1, DIGEST)
    ledger.start("r", {"rounds": 3}, DIGEST)
    ledger.commit(ledger.reserve("r", 1, EVENT, 3).sequence, "1" * 64)
    ledger.abort(ledger.reserve("r", 2, EVENT, 3).sequence, "no_answer")
    ledger.reserve("r", 3, EVENT, 3)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    with create(path) as ledger:
        fill(ledger)
    return path


def read(data):
    return read_lines(io.BytesIO(data))


def forged(*bodies, key=KEY, last_key=None):
    """A file that the owner of the key signed line by line, whatever the lines say."""
    head, data = ZERO_HEAD, b""
    for sequence, (kind, body) in enumerate(bodies):
        signer = last_key if last_key and sequence == len(bodies) - 1 else key
        raw = signed_line(
            sequence=sequence, kind=kind, body=body, previous=head, time="2026-01-31T12:00:00Z", key=signer
        )
        head, data = extend(head, sha256(raw).digest()), data + raw + b"\n"
    return data


def test_the_verdict_needs_the_owner_to_be_complete(original):
    """A good ledger is "verified" against its owner's key, consistent without one, failed against another."""
    for all_signatures in (False, True):
        verification = verify(original, public_key=OWNER, all_signatures=all_signatures)
        assert (verification.status, verification.line, verification.reason) == ("verified", None, "")
    assert verify(original).status == "consistent, owner not verified"
    against = verify(original, public_key=public_key_hex(OTHER))
    assert against.status == "failed"
    assert "key" in against.reason


def test_the_verification_says_what_the_ledger_says(original):
    """Counts, runs, rounds, spend and head are those of the ledger that wrote the file."""
    verification, ledger = verify(original), PrivacyLedger.open(original)
    assert verification.counts == {
        "GENESIS": 1,
        "REGISTRY": 1,
        "START": 1,
        "RESERVE": 3,
        "COMMIT": 1,
        "ABORT": 1,
    }
    assert verification.sequence == ledger.sequence == 7
    assert verification.head == ledger.head.hex()
    assert tuple(verification.rounds) == ledger.rounds_of("r")
    assert [entry.release_digest for entry in verification.commits] == ["1" * 64]
    assert [entry.sequence for entry in verification.open_reservations] == [7]
    assert verification.events == ledger.events() == (EVENT,) * 3
    assert (verification.spent_units, verification.mu_spent) == (ledger.spent_units, ledger.mu_spent)
    assert verification.mu_spent == pytest.approx(math.sqrt(3) / 10)
    assert verification.runs == ledger.runs
    assert verification.registry == ledger.registry
    assert verification.genesis["public_key"] == OWNER == verification.public_keys[-1]
    assert (verification.torn_bytes, verification.is_private) == (0, True)


@pytest.fixture(scope="module")
def small():
    """The bytes of a ledger with one line of each kind that a run needs."""
    return forged(BEGIN[0], BEGIN[1], reserve(1), commit(2))


def test_every_truncation_point_is_a_torn_line_or_the_line_before(small):
    """Cut anywhere, a ledger says what its whole lines say, and how many bytes count for nothing."""
    for length in range(len(small)):
        reading, whole = read(small[:length]), small.count(b"\n", 0, length)
        assert reading.torn_bytes == length - (small.rfind(b"\n", 0, length) + 1)
        assert reading.state.sequence == whole - 1
        assert reading.line == (None if whole else 1)


def test_a_line_signed_again_by_another_key_is_seen(original):
    """Lines re-signed by a key that is not the ledger's fail: one alone breaks the chain, a whole end its signature."""
    parsed = [parse_line(raw) for raw in original.read_bytes().splitlines()]
    for first in range(len(parsed)):
        for last in (first, len(parsed) - 1):
            head, data = ZERO_HEAD, b""
            for line in parsed:
                if first <= line.sequence <= last:
                    raw = signed_line(
                        sequence=line.sequence, kind=line.kind, body=line.body, previous=head, time=line.time, key=OTHER
                    )
                else:
                    raw = line.raw
                head, data = extend(head, sha256(raw).digest()), data + raw + b"\n"
            assert read(data).line == (first + 2 if last == first < len(parsed) - 1 else len(parsed))
            assert read_lines(io.BytesIO(data), all_signatures=True).line == first + 1


def test_two_writers_of_one_ledger_cannot_be_one_ledger(original, tmp_path):
    """Two copies that were written apart are each in order; put together, or against the other's head, they fail."""
    forks = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for number, fork in enumerate(forks):
        fork.write_bytes(original.read_bytes())
        with PrivacyLedger.open(fork, key=KEY) as ledger:
            ledger.start(f"fork {number}", {}, DIGEST)
    first, second = (verify(fork, public_key=OWNER) for fork in forks)
    assert (first.status, second.status) == ("verified", "verified")
    against = verify(forks[1], public_key=OWNER, anchor=Anchor(sequence=first.sequence, head=first.head))
    assert (against.status, against.line) == ("failed", first.sequence + 1)
    lines = [fork.read_bytes().splitlines(keepends=True) for fork in forks]
    assert read(b"".join([*lines[0], lines[1][-1]])).line == len(lines[0]) + 1


def test_dropped_swapped_repeated_and_inserted_lines_are_seen(original):
    """Any line but the last that is dropped, and any that is moved, repeated or put in, breaks the chain."""
    lines = original.read_bytes().splitlines(keepends=True)
    count = len(lines)
    changed = [lines[:t] + lines[t + 1 :] for t in range(count - 1)]
    changed += [[*lines[:t], lines[u], *lines[t:]] for t in range(count + 1) for u in range(count)]
    for t in range(count):
        for u in range(t):
            swapped = list(lines)
            swapped[t], swapped[u] = swapped[u], swapped[t]
            changed.append(swapped)
    for candidate in changed:
        assert read(b"".join(candidate)).line is not None


def test_a_cut_off_end_is_seen_with_an_anchor_only(original, tmp_path):
    """A cut at the end of a line leaves nothing to see; an anchor shows it."""
    data = original.read_bytes()
    whole = verify(original)
    anchor = Anchor.parse(f"{whole.sequence}:{whole.head}")
    assert verify(original, public_key=OWNER, anchor=anchor).status == "verified"
    cut = tmp_path / "cut.jsonl"
    for newline in [position + 1 for position, byte in enumerate(data[:-1]) if byte == ord("\n")]:
        cut.write_bytes(data[:newline])
        assert verify(cut, public_key=OWNER).status == "verified"
        anchored = verify(cut, public_key=OWNER, anchor=anchor)
        assert anchored.status == "failed"
        assert "end is missing" in anchored.reason


def test_an_anchor_shows_a_rewritten_past(original, tmp_path):
    """A ledger rewritten by its own key is consistent, but not with a head that somebody remembers."""
    whole = verify(original)
    rewritten = tmp_path / "rewritten.jsonl"
    with create(rewritten) as ledger:
        ledger.record_registry(4, 1, DIGEST)
        fill(ledger)
    assert verify(rewritten, public_key=OWNER).status == "verified"
    anchored = verify(rewritten, public_key=OWNER, anchor=Anchor(sequence=whole.sequence, head=whole.head))
    assert (anchored.status, anchored.line) == ("failed", whole.sequence + 1)
    assert "rewritten" in anchored.reason


@pytest.mark.parametrize("text", ["", "7", "7:", "x:" + "0" * 64, "7:" + "0" * 63, "7:" + "G" * 64, "-1:" + "0" * 64])
def test_anchors_are_read_strictly(text):
    """An anchor is a sequence number, a colon and 64 hex digits."""
    with pytest.raises(UmbelError, match="anchor"):
        Anchor.parse(text)


def test_a_ledger_of_another_key_is_not_the_owners(tmp_path):
    """Whoever writes the same lines under a key of their own gets a consistent ledger, not a verified one."""
    path = tmp_path / "ledger.jsonl"
    with create(path, key=OTHER) as ledger:
        fill(ledger)
    assert verify(path).status == "consistent, owner not verified"
    assert verify(path, public_key=OWNER).status == "failed"


GENESIS = {
    "delta": "0.000001",
    "epsilon": "1",
    "format": 2,
    "ledger_id": "l",
    "max_nodes_per_user": 1,
    "mu_max": "0.2",
    "neighboring_relation": "zero-out",
    "population": "p",
    "public_key": OWNER,
    "recovery_key": "",
    "unit": "user",
}
RESTORED = {"lost": 1, "noise_multiplier": "10", "recovery_signature": DIGEST * 2}
BEGIN = (("GENESIS", GENESIS), ("START", {"configuration_digest": DIGEST, "run": "r", "schedule": {}}))


def start(run="s", **schedule):
    return "START", {"configuration_digest": DIGEST, "run": run, "schedule": schedule}


def reserve(server_round, noise_multiplier="10", run="r"):
    event = {**EVENT, "noise_multiplier": noise_multiplier}
    return "RESERVE", {"event": event, "invited_users": 3, "round": server_round, "run": run}


def commit(sequence):
    return "COMMIT", {"release_digest": DIGEST, "reserve": sequence}


def test_forging_keeps_what_is_in_order():
    """The helper of the next test makes valid ledgers from valid lines."""
    reading = read(forged(*BEGIN, reserve(1), reserve(2), commit(3), commit(2)))
    assert (reading.line, reading.reason, reading.state.sequence) == (None, "", 5)
    planned = [start(rounds=2, noise_multiplier="20"), reserve(1, "20", run="s"), reserve(2, "20", run="s"), reserve(1)]
    assert read(forged(*BEGIN, *planned)).line is None


@pytest.mark.parametrize(
    ("bodies", "line", "reason"),
    [
        ([BEGIN[1]], 1, "GENESIS"),
        ([BEGIN[0], BEGIN[0]], 2, "GENESIS"),
        ([("GENESIS", {**GENESIS, "mu_max": "0.5"})], 1, "mu_max"),
        ([("GENESIS", {**GENESIS, "epsilon": "inf"})], 1, "mu_max"),
        ([*BEGIN, BEGIN[1]], 3, "new run"),
        ([*BEGIN, reserve(1, run="s")], 3, "started"),
        ([*BEGIN, start(rounds=1), reserve(1, run="s"), reserve(2, run="s")], 5, "rounds=1"),
        ([*BEGIN, start(rounds=0), reserve(1, run="s")], 4, "rounds=0"),
        ([*BEGIN, start(noise_multiplier="20"), reserve(1, run="s")], 4, "noise_multiplier=20"),
        ([*BEGIN, start(noise_multiplier="20"), reserve(1, "20", run="s"), reserve(2, "50", run="s")], 5, "got 50"),
        ([*BEGIN, start(rounds="9")], 3, "rounds"),
        ([*BEGIN, start(rounds=True)], 3, "rounds"),
        ([*BEGIN, start(rounds=None)], 3, "rounds"),
        ([*BEGIN, start(noise_multiplier=None)], 3, "noise_multiplier"),
        ([("GENESIS", {**GENESIS, "unit": "example"})], 1, "unit"),
        ([("GENESIS", {**GENESIS, "neighboring_relation": "replace-one"})], 1, "neighboring_relation"),
        ([*BEGIN, reserve(1), reserve(1)], 4, "not reserved before"),
        ([*BEGIN, reserve(1, "5.1"), reserve(2)], 4, "epsilon=1"),
        ([*BEGIN, *(reserve(t) for t in range(4))], 6, "epsilon=1"),
        ([*BEGIN, reserve(1, "0.01")], 3, "0.05"),
        ([*BEGIN, commit(2)], 3, "still open"),
        ([*BEGIN, commit(1)], 3, "still open"),
        ([*BEGIN, reserve(1), commit(2), commit(2)], 5, "still open"),
        ([*BEGIN, reserve(1), ("ABORT", {"code": "late", "reserve": 2}), commit(2)], 5, "still open"),
        ([*BEGIN, commit(3), reserve(1)], 3, "still open"),
        ([*BEGIN, ("KEY", {"public_key": OWNER})], 3, "has not had"),
        ([*BEGIN, ("RESTORE", {**RESTORED, "lost": 1})], 3, "sequence=3"),
    ],
)
def test_the_owner_cannot_sign_what_the_rules_forbid(bodies, line, reason):
    """Signed and chained, a ledger that breaks a rule fails at that line, with the rule."""
    reading = read(forged(*bodies))
    assert reading.line == line
    assert reason in reading.reason
    assert reading.state.sequence == line - 2


def test_only_the_key_in_force_signs():
    """GENESIS is signed by its own key, KEY by the key before, and the last line by the last key."""
    rotation = ("KEY", {"public_key": public_key_hex(OTHER)})
    assert read(forged(BEGIN[0])).line is None
    assert read(forged(BEGIN[0], key=OTHER)).line == 1
    assert read(forged(*BEGIN, rotation)).line is None
    assert read(forged(*BEGIN, rotation, last_key=OTHER)).line == 3
    assert read(forged(*BEGIN, rotation, reserve(1), last_key=OTHER)).line is None
    assert read(forged(*BEGIN, rotation, reserve(1))).line == 4
    assert "signature" in read(forged(*BEGIN, rotation, reserve(1))).reason
    taken_over = forged(*BEGIN, rotation, reserve(1), key=OTHER)
    assert read(taken_over).line == 3


def test_a_wrong_signature_inside_is_seen_when_all_are_checked():
    """The chain carries lines that nobody signed if the last signature is right; checking all names the first."""
    head, data = ZERO_HEAD, b""
    for sequence, (kind, body) in enumerate([*BEGIN, reserve(1), commit(2)]):
        key = OTHER if kind == "RESERVE" else KEY
        raw = signed_line(sequence=sequence, kind=kind, body=body, previous=head, time="2026-01-31T12:00:00Z", key=key)
        head, data = parse_line(raw).head, data + raw + b"\n"
    assert read_lines(io.BytesIO(data)).line is None
    assert read_lines(io.BytesIO(data), all_signatures=True).line == 3


def test_rotated_keys_all_name_the_owner(tmp_path):
    """After a rotation the ledger verifies against the key it began with and the key it has."""
    path = tmp_path / "ledger.jsonl"
    with create(path) as ledger:
        ledger.start("r", {}, DIGEST)
        ledger.rotate_key(OTHER)
        ledger.reserve("r", 1, EVENT, 3)
    for key in (KEY, OTHER):
        assert verify(path, public_key=public_key_hex(key), all_signatures=True).status == "verified"
    assert verify(path).public_keys == (OWNER, public_key_hex(OTHER))


def test_releases_are_compared_with_what_is_found(original):
    """A committed release that is not where it should be fails the ledger at its RESERVE line."""
    asked = []
    verification = verify(original, public_key=OWNER, release_found=lambda entry: not asked.append(entry))
    assert verification.status == "verified"
    assert [(entry.run, entry.server_round, entry.release_digest) for entry in asked] == [("r", 1, "1" * 64)]
    missing = verify(original, public_key=OWNER, release_found=lambda entry: False)
    assert (missing.status, missing.line) == ("failed", 4)
    assert "round 1" in missing.reason


def test_seeded_noise_is_not_private(tmp_path):
    """A round whose noise could be drawn again is charged and marks the ledger as not private."""
    path = tmp_path / "ledger.jsonl"
    with create(path) as ledger:
        ledger.start("r", {}, DIGEST)
        ledger.reserve("r", 1, {**EVENT, "noise": "seeded (NOT PRIVATE)"}, 3)
    verification = verify(path, public_key=OWNER)
    assert verification.status == "verified"
    assert not verification.is_private
    assert verification.spent_units > 0


def test_no_file_is_an_error(tmp_path):
    """Verifying nothing is bad input, not a verdict; an empty file is a verdict."""
    with pytest.raises(UmbelError, match="missing"):
        verify(tmp_path / "missing")
    (tmp_path / "empty").touch()
    assert verify(tmp_path / "empty").status == "failed"


def test_a_newer_format_is_named(tmp_path):
    """A GENESIS of a later format, signed by its key, is said to be that; a number that was changed is a failure."""
    newer = {**GENESIS, "format": 3, "another_field": DIGEST}
    data, path = forged(("GENESIS", newer)), tmp_path / "newer.jsonl"
    path.write_bytes(data)
    with pytest.raises(UmbelError, match="format=3, of a newer version"):
        verify(path)
    with pytest.raises(UmbelError, match="format=3"):
        PrivacyLedger.open(path)
    path.write_bytes(data.replace(b'"format":3', b'"format":4'))
    assert (verify(path).status, verify(path).line) == ("failed", 1)
    path.write_bytes(forged(("GENESIS", {**GENESIS, "format": 0})))
    assert verify(path).status == "failed"


def test_a_line_without_end_is_not_read_whole(tmp_path):
    """A line longer than any line may be is a failure at that line, not a torn end."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(forged(*BEGIN) + b"x" * (3 * MAX_LINE))
    verification = verify(path)
    assert (verification.status, verification.line, verification.torn_bytes) == ("failed", 3, 0)


@pytest.mark.parametrize("s", [1, 3])
def test_epsilon_is_recomputed_from_the_events_alone(tmp_path, s):
    """Both accountants come to what the ledger says was spent, for users of one node and of several."""
    path = tmp_path / "ledger.jsonl"
    with create(path, epsilon=4.0, s=s) as ledger:
        fill(ledger)
        spent = ledger.epsilon_spent(1e-6)
    verification = verify(path)
    recomputed = recompute_epsilon(verification, 1e-6)
    assert recomputed["gdp"] == pytest.approx(spent, rel=1e-12)
    assert recomputed["pld"] == pytest.approx(spent, rel=2e-2)
    assert recompute_epsilon(dataclasses.replace(verification, rounds=Rounds()), 1e-6)["gdp"] == 0
