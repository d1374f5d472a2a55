"""The ledger on disk: what it charges, what it refuses, and what is left after a failure."""

import errno
import math
import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BudgetExhausted, LedgerCorrupt, StorageError, UmbelError, VerificationError
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.lines import ZERO_HEAD, chain, check_signature, parse_line, replay
from privacy.participation import cost_units, limit_units, mu_max_string, noise_multiplier_for

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = "0f" * 32
DELTA = 1e-6


def event(noise_multiplier="13.361200", **changes):
    return {
        "mechanism": "gaussian",
        "noise_multiplier": noise_multiplier,
        "clipping_norm": "1.250000",
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 10, "share": "1"}],
        "denominator": 3,
        "noise": "aes-256-ctr",
        "sampling": "none",
        "initialization": False,
        **changes,
    }


def create(path, epsilon=2.0, s=1):
    mu_max = mu_max_string(epsilon, DELTA, s)
    return PrivacyLedger.create(
        path, population="p", epsilon=epsilon, delta=DELTA, mu_max=mu_max, max_nodes_per_user=s, key=KEY
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    with create(path) as ledger:
        ledger.record_registry(3, 1, DIGEST)
        ledger.start("r", {"rounds": 10}, DIGEST)
        yield ledger


def test_a_round_is_reserved_and_committed(ledger, path):
    """RESERVE is on disk, signed and at the head when it returns; COMMIT closes it; a reopened ledger agrees."""
    reservation = ledger.reserve("r", 1, event(), 3)
    assert path.read_bytes().endswith(reservation.raw_line + b"\n")
    line = parse_line(reservation.raw_line)
    check_signature(line, public_key_hex(KEY))
    assert line.head == reservation.head == ledger.head
    assert [entry.sequence for entry in ledger.open_reservations()] == [reservation.sequence] == [3]
    ledger.commit(3, DIGEST)
    again = PrivacyLedger.open(path)
    for one in (ledger, again):
        assert (one.sequence, one.head, one.open_reservations()) == (4, ledger.head, ())
        assert one.events() == (event(),)
        (entry,) = one.rounds_of("r")
        assert (entry.server_round, entry.sequence, entry.release_digest) == (1, 3, DIGEST)
        assert (entry.invited_users, entry.is_open, one.rounds_of("s")) == (3, False, ())
        assert one.runs["r"]["schedule"] == {"rounds": 10}
        assert one.registry == {"digest": DIGEST, "population_size": 3, "users_per_node": 1}
        assert one.genesis["epsilon"] == "2.0"
        assert one.genesis["delta"] == "0.000001"
        assert one.spent_units == cost_units("13.361200")


def test_a_planned_budget_lasts_exactly_as_long_as_planned(ledger, path):
    """Ten planned rounds fit, the eleventh is refused before anything is written, one with more noise too."""
    z = noise_multiplier_for(10, ledger.genesis["mu_max"])
    for server_round in range(1, 11):
        assert not ledger.would_exceed(event(z))
        ledger.reserve("r", server_round, event(z), 3)
    before = path.read_bytes()
    for refused in (z, "1000.000000", "0.050000"):
        assert ledger.would_exceed(event(refused))
        with pytest.raises(BudgetExhausted, match=r"epsilon=2\.0"):
            ledger.reserve("r", 11, event(refused), 3)
    assert path.read_bytes() == before
    assert 1.999 < ledger.epsilon_spent(DELTA) <= 2
    # PRIVACY reference: epsilon 2 at delta 1e-6 for 10 contributions needs z = 7.05
    assert float(z) == pytest.approx(7.05, abs=0.005)


def test_a_run_keeps_to_its_schedule(ledger, path):
    """More rounds than START says, aborted ones among them, or another noise multiplier, are not written."""
    ledger.start("s", {"rounds": 2, "noise_multiplier": "20.000000"}, DIGEST)
    ledger.abort(ledger.reserve("s", 1, event("20.000000"), 3).sequence, "no_answer")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"noise_multiplier=20\.000000 as run='s'"):
        ledger.reserve("s", 2, event("30.000000"), 3)
    assert path.read_bytes() == before
    ledger.reserve("s", 2, event("20.000000"), 3)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="rounds=2 as run='s'"):
        ledger.reserve("s", 3, event("20.000000"), 3)
    assert path.read_bytes() == before
    ledger.reserve("r", 1, event("30.000000"), 3)


def test_nothing_is_ever_given_back(ledger, path):
    """ABORT, a reservation left open and reopening leave what was spent as it is."""
    spent = 0
    for server_round in range(1, 4):
        reservation = ledger.reserve("r", server_round, event(), 3)
        spent += cost_units("13.361200")
        if server_round == 1:
            ledger.abort(reservation.sequence, "no_answer")
    assert ledger.spent_units == PrivacyLedger.open(path).spent_units == spent
    assert ledger.rounds_of("r")[0].abort_code == "no_answer"


@pytest.mark.parametrize("s", [1, 2, 5])
def test_a_user_of_several_nodes_is_counted_on_each(path, s):
    """mu of the worst-case user is s times that of one node, and the budget is theirs."""
    with create(path, epsilon=1.0, s=s) as ledger:
        ledger.start("r", {}, DIGEST)
        z = noise_multiplier_for(4, ledger.genesis["mu_max"])
        assert ledger.mu_spent == ledger.epsilon_spent(DELTA) == 0
        for server_round in range(4):
            ledger.reserve("r", server_round, event(z), 3)
        assert ledger.mu_spent == pytest.approx(s * 2 / float(z), rel=1e-12)
        assert 0.999 < ledger.epsilon_spent(DELTA) <= 1
        with pytest.raises(BudgetExhausted):
            ledger.reserve("r", 4, event(z), 3)


def test_no_noise_is_infinite_and_needs_a_ledger_that_promises_nothing(ledger, tmp_path):
    """A release without noise is refused by every finite budget and makes an unlimited one's epsilon infinite."""
    clear = event("0", noise="none", clipping_norm="inf")
    with pytest.raises(BudgetExhausted):
        ledger.reserve("r", 1, clear, 3)
    with create(tmp_path / "open.jsonl", epsilon=math.inf) as unlimited:
        unlimited.start("r", {}, DIGEST)
        unlimited.reserve("r", 1, event("0.050000"), 3)
        assert unlimited.epsilon_spent(DELTA) < math.inf
        unlimited.reserve("r", 2, clear, 3)
        unlimited.reserve("r", 3, clear, 3)
        assert unlimited.genesis["epsilon"] == unlimited.genesis["mu_max"] == "inf"
        assert unlimited.mu_spent == unlimited.epsilon_spent(DELTA) == unlimited.spent_units == math.inf
        assert len(unlimited.events()) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.decimals("0.05", "30", places=3), max_size=12))
def test_the_budget_is_never_exceeded(tmp_path_factory, multipliers):
    """Whatever is asked for, in any order, the exact sum of the admitted z^-2 is within mu_max squared."""
    with create(tmp_path_factory.mktemp("ledger") / "ledger.jsonl") as ledger:
        ledger.start("r", {}, DIGEST)
        admitted = []
        for server_round, multiplier in enumerate(map(str, multipliers)):
            fits = sum(map(cost_units, [*admitted, multiplier])) <= limit_units(ledger.genesis["mu_max"])
            assert ledger.would_exceed(event(multiplier)) is not fits
            if fits:
                ledger.reserve("r", server_round, event(multiplier), 3)
                admitted.append(multiplier)
        assert sum(1 / Fraction(z) ** 2 for z in admitted) <= Fraction(ledger.genesis["mu_max"]) ** 2
        assert [entry["noise_multiplier"] for entry in ledger.events()] == admitted


def test_what_is_out_of_order_is_refused_and_not_written(ledger, path):
    """Repeated rounds, unknown runs, second outcomes and malformed values leave the file as it is."""
    ledger.reserve("r", 1, event(), 3)
    ledger.reserve("r", 2, event(), 3)
    ledger.reserve("r", 3, event(), 3)
    ledger.commit(3, DIGEST)
    ledger.abort(4, "no_answer")
    before, head = path.read_bytes(), ledger.head
    for refused in (
        lambda: ledger.start("r", {}, DIGEST),
        lambda: ledger.start("s", {"learning_rate": 0.5}, DIGEST),
        lambda: ledger.start("s", {}, "digest"),
        lambda: ledger.start("", {}, DIGEST),
        lambda: ledger.reserve("s", 1, event(), 3),
        lambda: ledger.reserve("r", 1, event(), 3),
        lambda: ledger.reserve("r", 2, event(), 3),
        lambda: ledger.reserve("r", -1, event(), 3),
        lambda: ledger.reserve("r", 4, event("0.049"), 3),
        lambda: ledger.reserve("r", 4, event(noise="none"), 3),
        lambda: ledger.reserve("r", 4, event(), 1.5),
        lambda: ledger.commit(3, DIGEST),
        lambda: ledger.commit(4, DIGEST),
        lambda: ledger.commit(2, DIGEST),
        lambda: ledger.commit(99, DIGEST),
        lambda: ledger.commit(5, DIGEST.upper()),
        lambda: ledger.abort(3, "late"),
        lambda: ledger.abort(5, "User 7 failed!"),
        lambda: ledger.record_registry(-1, 1, DIGEST),
        lambda: ledger.rotate_key(KEY),
    ):
        with pytest.raises(ValueError, match="Expected"):
            refused()
    assert (path.read_bytes(), ledger.head) == (before, head)
    ledger.commit(5, DIGEST)
    assert PrivacyLedger.open(path).sequence == ledger.sequence


@pytest.mark.parametrize(
    "change",
    [
        {"mu_max": "0.6"},
        {"mu_max": "0"},
        {"mu_max": "inf"},
        {"epsilon": "0"},
        {"epsilon": math.inf},
        {"delta": "0"},
        {"delta": "1"},
        {"max_nodes_per_user": 2},
        {"max_nodes_per_user": 0},
        {"population": ""},
        {"epsilon": math.nan},
    ],
)
def test_a_budget_that_does_not_hold_is_refused(path, change):
    """mu_max must be within epsilon and delta for a user of all its nodes; nothing is left on disk."""
    arguments = {
        "population": "p",
        "epsilon": 2.0,
        "delta": 1e-6,
        "mu_max": mu_max_string(2.0, 1e-6),
        "max_nodes_per_user": 1,
    }
    with pytest.raises(ValueError, match="Expected"):
        PrivacyLedger.create(path, **{**arguments, **change}, key=KEY)
    PrivacyLedger.create(path, **arguments, key=KEY).close()


def test_digests_lead_a_node_from_what_it_knows_to_the_head(ledger):
    """A node that acknowledged any line reaches the head from the digests since then."""
    heads = [chain(ZERO_HEAD, ledger.digests_since(-1)[:t]) for t in range(4)]
    assert heads[-1] == ledger.head
    reservation = ledger.reserve("r", 1, event(), 3)
    for known in range(-1, 3):
        digests = ledger.digests_since(known)
        assert digests.dtype == np.uint8
        assert replay(known, heads[known + 1], known + 1, digests, [reservation.raw_line]) == (3, ledger.head)
    assert ledger.digests_since(3).shape == (0, 32)
    for outside in (-2, 4):
        with pytest.raises(ValueError, match="sequence"):
            ledger.digests_since(outside)


def test_one_writer_at_a_time(ledger, path):
    """A second writer is turned away while the first is open; readers are not, and closing frees the lock."""
    for attempt in (lambda: PrivacyLedger.open(path, key=KEY), lambda: create(path)):
        with pytest.raises(UmbelError, match="only writer"):
            attempt()
    assert PrivacyLedger.open(path).head == ledger.head
    ledger.close()
    PrivacyLedger.open(path, key=KEY).close()


def test_the_lock_ends_with_the_process(path):
    """A writer that was killed leaves no lock behind."""
    create(path).close()
    script = (
        "import os, sys; from pathlib import Path; from privacy.ledger import _open_locked;"
        "_open_locked(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script, path], check=False, cwd=root)
    assert killed.returncode == -9
    PrivacyLedger.open(path, key=KEY).close()


def test_reading_needs_no_key_and_writes_nothing(path):
    """Without the key every number is there and nothing can be appended."""
    create(path).close()
    path.chmod(0o400)
    with PrivacyLedger.open(path) as reader:
        assert reader.ledger_id == reader.genesis["ledger_id"]
        with pytest.raises(UmbelError, match="open for writing"):
            reader.start("r", {}, DIGEST)


def test_another_key_cannot_write(path):
    """The ledger is written with the key in force only, before and after a rotation."""
    other = Ed25519PrivateKey.generate()
    with create(path) as ledger:
        ledger.rotate_key(other)
        ledger.start("r", {}, DIGEST)
        assert ledger.public_key == public_key_hex(other)
    with pytest.raises(VerificationError, match="to write"):
        PrivacyLedger.open(path, key=KEY)
    PrivacyLedger.open(path, key=other).close()


def test_a_ledger_is_created_once(path):
    """A file that holds anything is not overwritten, except a first line torn by a crash."""
    create(path).close()
    whole = path.read_bytes()
    for content in (whole, b"notes", b"\n"):
        path.write_bytes(content)
        with pytest.raises(UmbelError, match="no ledger yet"):
            create(path)
        assert path.read_bytes() == content
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        if length:
            with pytest.raises(LedgerCorrupt, match="line 1"):
                PrivacyLedger.open(path)
        create(path).close()
        assert PrivacyLedger.open(path).sequence == 0


def test_a_torn_last_line_is_cut_off_by_the_writer_only(ledger, path):
    """Bytes without a newline at the end count for nothing: readers report them, the writer removes them."""
    ledger.reserve("r", 1, event(), 3)
    ledger.close()
    whole = path.read_bytes()
    for torn in (b"{", whole.splitlines()[-1], bytes(4096)):
        path.write_bytes(whole + torn)
        reader = PrivacyLedger.open(path)
        assert (reader.sequence, reader.torn_bytes) == (3, len(torn))
        assert path.read_bytes() == whole + torn
        with PrivacyLedger.open(path, key=KEY) as writer:
            assert path.read_bytes() == whole
            assert writer.sequence == 3


def test_an_invalid_line_is_named(ledger, path):
    """Anything unreadable other than a torn end stops reader and writer, and names line and reason."""
    ledger.close()
    lines = path.read_bytes().splitlines(keepends=True)
    for broken, reason in (
        ([lines[0], b"\n", *lines[1:]], "line 2: .*canonical"),
        ([lines[0], lines[2]], "line 2: .*sequence=1"),
        ([*lines, lines[-1]], "line 4: .*sequence=3"),
        ([lines[1]], "line 1: .*sequence=0"),
        ([], "line 1: .*GENESIS"),
    ):
        path.write_bytes(b"".join(broken))
        for key in (None, KEY):
            with pytest.raises(LedgerCorrupt, match=reason):
                PrivacyLedger.open(path, key=key)
        assert path.read_bytes() == b"".join(broken)


def test_no_ledger_is_an_error_with_its_path(tmp_path):
    """Opening what is not there names it."""
    for key in (None, KEY):
        with pytest.raises(UmbelError, match="missing"):
            PrivacyLedger.open(tmp_path / "missing", key=key)


def test_a_file_changed_by_others_is_not_written_to(ledger, path):
    """A writer that finds its file longer or gone does not append to it."""
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(LedgerCorrupt, match="changed"):
        ledger.reserve("r", 1, event(), 3)
    os.truncate(path, path.stat().st_size - 1)
    ledger.reserve("r", 1, event(), 3)
    path.unlink()
    with pytest.raises(LedgerCorrupt, match="changed"):
        ledger.reserve("r", 2, event(), 3)


def fail_once(function, error, partly=False):
    """`function`, but its first call raises, after doing a part of its work if it is a write."""
    failed = []

    def failing(descriptor, *data):
        if failed:
            return function(descriptor, *data)
        failed.append(True)
        if partly:
            function(descriptor, data[0][:50])
        raise error

    return failing


@pytest.mark.parametrize(("name", "partly"), [("write", False), ("write", True), ("fsync", False)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_charges_nothing_and_stops(ledger, path, monkeypatch, name, partly, code):  # noqa: PLR0917 (fixtures)
    """A failed write or fsync cuts the file back to its last good line, and this writer writes no more."""
    before, head, spent = path.read_bytes(), ledger.head, ledger.spent_units
    failing = fail_once(getattr(os, name), OSError(code, "failed"), partly)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(StorageError, match="RESERVE"):
            ledger.reserve("r", 1, event(), 3)
    assert path.read_bytes() == before
    assert (ledger.head, ledger.spent_units) == (head, spent)
    with pytest.raises(StorageError, match="Open it again"):
        ledger.reserve("r", 1, event(), 3)
    assert path.read_bytes() == before
    ledger.close()
    with PrivacyLedger.open(path, key=KEY) as again:
        again.reserve("r", 1, event(), 3)


def test_a_disk_that_is_really_full_is_survived(ledger, path):
    """A write that the kernel cuts short in the middle of a line leaves the last good line as the end."""
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(StorageError):
            ledger.reserve("r", 1, event(), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_a_disk_that_fails_altogether_may_charge_but_never_forgets(ledger, path, monkeypatch):
    """Where the line can neither be synced nor cut off, it stays, and whoever opens the ledger counts it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once(os.fsync, OSError(errno.EIO, "failed")))
        patch.setattr(os, "ftruncate", fail_once(os.ftruncate, OSError(errno.EIO, "failed")))
        with pytest.raises(StorageError):
            ledger.reserve("r", 1, event(), 3)
    ledger.close()
    again = PrivacyLedger.open(path)
    assert again.spent_units == cost_units("13.361200")
    assert [entry.sequence for entry in again.open_reservations()] == [3]


def test_an_interrupt_while_writing_stops_the_writer(ledger, path, monkeypatch):
    """Ctrl-C between write and fsync leaves no half-known line: the writer has stopped and the file is good."""
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once(os.fsync, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve("r", 1, event(), 3)
    with pytest.raises(StorageError):
        ledger.abort(3, "interrupted")
    assert path.read_bytes() == before


def test_every_append_is_synced_before_it_returns(ledger, monkeypatch):
    """RESERVE and COMMIT are written and then synced, in this order, before the call is over."""
    calls = []
    for name in ("write", "fsync"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, f=function: (calls.append(name), f(*a))[1])
    ledger.reserve("r", 1, event(), 3)
    ledger.commit(3, DIGEST)
    assert calls == ["write", "fsync"] * 2


def test_a_copy_holds_every_line_so_far(ledger, tmp_path):
    """The copy is a ledger with the same head, replaces an older copy, and is not the ledger itself."""
    copy = tmp_path / "copy.jsonl"
    for server_round in (1, 2):
        ledger.reserve("r", server_round, event(), 3)
        ledger.copy_to(copy)
        assert PrivacyLedger.open(copy).head == ledger.head
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy.jsonl", "ledger.jsonl"]
    with pytest.raises(StorageError, match="copy"):
        ledger.copy_to(tmp_path / "nowhere" / "copy.jsonl")
