"""A ledger whose newest lines were lost goes on by the recovery key: charged, numbered on, and followed by nodes."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.guard import Policy, check
from common.errors import BudgetExhausted, Refused, UmbelError
from common.model import SharedModel
from common.records import Broadcast
from privacy import lines as ledger_lines
from privacy.accounting import mu_curve
from privacy.audit.composition import audit_together
from privacy.audit.findings import audit
from privacy.audit.verify import verify
from privacy.gaussian import epsilon_of_mu
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.lines import ZERO_HEAD, chain
from privacy.participation import cost_units, mu_max_string
from privacy.report import report_of_ledger
from umbel.auditing import ledger_contents

OWNER, RECOVERY, NEXT, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in range(1, 5))
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "8",
    "clipping_norm": "1.5",
    "grid_scale": 2**16,
    "groups": [{"name": "model", "share": "0.9", "size": 4}, {"name": "scalars", "share": "0.1", "size": 5}],
    "denominator": 10,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
DELTA = 1e-6
MODEL = SharedModel(beta=np.ones(2), U=np.ones((2, 1)), b_variance=0.1, noise_variance=1.0)


def make(path, *, epsilon=2.0, recovery_key=RECOVERY):
    ledger = PrivacyLedger.create(
        path,
        population="p",
        epsilon=epsilon,
        delta=DELTA,
        mu_max=mu_max_string(epsilon, DELTA),
        max_nodes_per_user=1,
        key=OWNER,
        recovery_key="" if recovery_key is None else public_key_hex(recovery_key),
        ledger_id="L",
    )
    ledger.start("run", {"rounds": 50, "noise_multiplier": "8"}, "0" * 64)
    return ledger


def release(ledger, server_round):
    reservation = ledger.reserve("run", server_round, EVENT, 10)
    ledger.commit(reservation.sequence, "0" * 64)
    return reservation


def lose(path, lines):
    """What is left after a backup without the last lines was put back."""
    kept = path.read_bytes().splitlines(keepends=True)[:-lines]
    path.write_bytes(b"".join(kept))


@pytest.fixture
def lost(tmp_path):
    """A ledger of 5 releases whose last 4 lines are gone, and what a node remembers of it."""
    path = tmp_path / "ledger.jsonl"
    with make(path) as ledger:
        for server_round in range(1, 6):
            release(ledger, server_round)
        remembered = ledger.sequence, ledger.head
    lose(path, 4)
    return path, remembered


def test_every_lost_line_is_charged_and_no_number_is_used_twice(lost):
    """The numbers go on behind all that anybody can have seen, and so does the spending."""
    path, (seen, _) = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        before = ledger.spent_units
        assert ledger.restore(up_to=seen + 3, noise_multiplier=None, recovery_key=RECOVERY) == seen + 3 - 7
        assert ledger.sequence == seen + 4
        assert ledger.spent_units == before + 7 * cost_units("8")
        assert release(ledger, 6).sequence == seen + 5
        epsilon = ledger.epsilon_spent(DELTA)
    found = verify(path, public_key=public_key_hex(OWNER), all_signatures=True)
    assert (found.status, found.counts["RESTORE"]) == ("verified", 1)
    assert found.noise_multipliers == ["8"] * (3 + 1 + 7)
    assert epsilon_of_mu(found.mu_spent, DELTA) == epsilon


def test_a_restore_can_exhaust_the_budget_and_is_written_all_the_same(tmp_path):
    """What is lost may have been spent: nothing more is released, and the ledger says so."""
    path = tmp_path / "ledger.jsonl"
    with make(path, epsilon=0.5) as ledger:
        ledger.restore(up_to=30, noise_multiplier="1", recovery_key=RECOVERY)
        with pytest.raises(BudgetExhausted):
            ledger.reserve("run", 1, EVENT, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_to": 1}, "Nothing is lost"),
        ({"up_to": 9, "recovery_key": STRANGER}, "got another"),
        ({"up_to": 9, "noise_multiplier": "8.1"}, "noise_multiplier <= 8"),
        ({"up_to": 9, "noise_multiplier": "0"}, "noise_multiplier"),
        ({"up_to": 9, "noise_multiplier": "-1"}, "noise_multiplier"),
    ],
)
def test_a_restore_that_would_charge_too_little_is_refused(tmp_path, arguments, message):
    """Nothing is written, and the error says what was expected."""
    with make(tmp_path / "ledger.jsonl") as ledger:
        before = ledger.head
        with pytest.raises((UmbelError, ValueError), match=message):
            ledger.restore(**({"noise_multiplier": None, "recovery_key": RECOVERY} | arguments))
        assert ledger.head == before


def test_a_ledger_without_a_recovery_key_stays_as_it_is(tmp_path):
    """Nobody can restore it, whoever owns it."""
    with (
        make(tmp_path / "ledger.jsonl", recovery_key=None) as ledger,
        pytest.raises(UmbelError, match="this ledger has none"),
    ):
        ledger.restore(up_to=9, noise_multiplier=None, recovery_key=RECOVERY)


def ask(ledger, acknowledged, *, reservation=None, policy=None, since=None):
    """Check what the server would send to a node that remembers this."""
    lines = list(ledger.key_lines)
    since = acknowledged[0] if since is None else since
    if ledger.restored is not None and since < ledger.restored.sequence:
        since = ledger.restored.sequence - 1
        lines.append(ledger.restored.raw)
    payload = Broadcast(
        ledger_id="L",
        run="run",
        server_round=0 if reservation is None else 6,
        purpose="fold_in" if reservation is None else "train",
        lines=tuple(raw.decode() for raw in (*lines, ledger.last.raw)),
        digests_from=since + 1,
        digests=ledger.digests_since(since),
        deadline=60,
        task={"family": "squared", "sparsity": 1},
        model=MODEL,
        metric=np.eye(2),
        schema="",
    ).encode()
    key = NEXT if ledger.public_key == public_key_hex(NEXT) else OWNER
    return check(payload, key.sign(payload), policy or POLICY, acknowledged=acknowledged, now=0)


POLICY = Policy(
    public_key=bytes.fromhex(public_key_hex(OWNER)),
    recovery_key=bytes.fromhex(public_key_hex(RECOVERY)),
    ledger_id="L",
    mu_max="2",
)


def heads(path, count):
    """What a node remembers after each of the first lines."""
    raw = path.read_bytes().splitlines()[:count]
    digests = [np.frombuffer(hashlib.sha256(line).digest(), np.uint8) for line in raw]
    return [(t - 1, chain(ZERO_HEAD, np.array(digests[:t], np.uint8).reshape(-1, 32))) for t in range(len(raw) + 1)]


def test_nodes_follow_a_restored_ledger_from_wherever_they_were(lost):
    """One that has seen lost lines, one that has not, and a new one: all go on, and remember the new head."""
    path, (seen, head) = lost
    remembered = [(seen, head), (seen - 1, bytes(32)), *heads(path, 8)]
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=seen + 2, noise_multiplier=None, recovery_key=RECOVERY)
        for acknowledged in remembered:
            accepted = ask(ledger, acknowledged)
            assert (accepted.sequence, accepted.head) == (ledger.sequence, ledger.head)
        reservation = release(ledger, 6)
        with pytest.raises(Refused):  # its last line is a COMMIT
            ask(ledger, (seen, head), reservation=reservation)
        folded = ask(ledger, (seen, head))
        assert ask(ledger, (folded.sequence, folded.head)).sequence == ledger.sequence


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (Policy(public_key=POLICY.public_key, ledger_id="L", mu_max="2"), "ledger_restore"),
        (Policy(public_key=POLICY.public_key, recovery_key=bytes(32), ledger_id="L", mu_max="2"), "ledger_restore"),
    ],
)
def test_only_the_recovery_key_lets_a_node_forget_what_it_has_seen(lost, policy, code):
    """A server whose disk was put back, or whose key was stolen, gets no further than before."""
    path, acknowledged = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=acknowledged[0], noise_multiplier=None, recovery_key=RECOVERY)
        with pytest.raises(Refused) as refusal:
            ask(ledger, acknowledged, policy=policy)
    assert refusal.value.code == code


def test_a_node_that_has_seen_more_than_was_charged_goes_on_refusing(lost):
    """The operator has to charge all that anybody has seen."""
    path, (seen, head) = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=seen - 2, noise_multiplier=None, recovery_key=RECOVERY)
        with pytest.raises(Refused) as refusal:
            ask(ledger, (seen, head), since=ledger.sequence - 1)
    assert refusal.value.code == "ledger_rollback"


def test_nodes_follow_from_key_to_key(tmp_path):
    """A KEY line signed by the trusted key is enough, from whichever key on; the old key is then trusted no more."""
    keys = [OWNER, STRANGER, NEXT]
    with make(tmp_path / "ledger.jsonl") as ledger:
        acknowledged = ledger.sequence, ledger.head
        for key in keys[1:]:
            ledger.rotate_key(key)
        for trusted in keys:
            policy = Policy(public_key=bytes.fromhex(public_key_hex(trusted)), ledger_id="L", mu_max="2")
            accepted = ask(ledger, acknowledged, policy=policy)
            assert accepted.public_key.hex() == public_key_hex(NEXT)
        release(ledger, 1)
        assert ask(ledger, acknowledged).sequence == ledger.sequence
    other = Policy(public_key=bytes.fromhex(public_key_hex(RECOVERY)), ledger_id="L", mu_max="2")
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger, pytest.raises(Refused) as refusal:
        ask(ledger, acknowledged, policy=other)
    assert refusal.value.code == "signature"


def test_the_key_before_is_refused_by_who_has_followed(tmp_path):
    """A stolen old key is of no use against a node that has heard of the new one."""
    with make(tmp_path / "ledger.jsonl") as ledger:
        acknowledged = ledger.sequence, ledger.head
        policy = Policy(public_key=bytes.fromhex(public_key_hex(NEXT)), ledger_id="L", mu_max="2")
        with pytest.raises(Refused) as refusal:
            ask(ledger, acknowledged, policy=policy)
    assert refusal.value.code == "signature"


def test_a_sampled_run_leaves_no_room_for_what_is_lost(tmp_path):
    """Its epsilon is fixed with what other runs may spend: a restore beyond that, or its next round, is refused."""
    for capped, refused in (("0", True), ("0.5", False)):
        path = tmp_path / f"{capped}.jsonl"
        schedule = {"rounds": 9, "noise_multiplier": "8", "sampling": {"poisson": "0.5"}}
        with PrivacyLedger.create(
            path, population="p", epsilon=4, delta=DELTA, mu_max=mu_max_string(4, DELTA), max_nodes_per_user=1,
            key=OWNER, recovery_key=public_key_hex(RECOVERY), ledger_id="L",
        ) as ledger:  # fmt: skip
            ledger.start("run", schedule | {"capped_mu_max": capped, "amplified_epsilon": "1"}, "0" * 64)
            if refused:
                with pytest.raises(ValueError, match="room beside the sampled run"):
                    ledger.restore(up_to=5, noise_multiplier=None, recovery_key=RECOVERY)
                continue
            ledger.restore(up_to=5, noise_multiplier=None, recovery_key=RECOVERY)
            with pytest.raises(ValueError, match="after a RESTORE line"):
                ledger.reserve("run", 1, EVENT | {"sampling": {"poisson": "0.5"}}, 10)


def test_what_was_lost_is_in_every_account(lost):
    """Report, curve, list of rounds, audit and promise count lost lines, where they were charged."""
    path, (seen, _) = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=seen, noise_multiplier=None, recovery_key=RECOVERY)
        release(ledger, 6)
        spent = ledger.epsilon_spent(DELTA)
    with path.open("ab") as file:
        file.write(b'{"body":{"torn')
    report = report_of_ledger(path)
    assert (report.num_rounds, report.num_lost) == (4, 4)
    assert report.spent.epsilon == report.curve[-1].epsilon == spent
    assert report.curve[2].epsilon == epsilon_of_mu(mu_curve(["8"] * 3)[-1], DELTA)
    assert "4 charged rounds of 1 run and 4 lost lines" in report.statement
    assert [round(entry["mu_after"] ** 2 * 64) for entry in ledger_contents(path)["rounds"]] == [1, 2, 3, 8]
    audited = audit(path)
    assert (audited["lines"], audited["exit_code"]) == (2 + 2 * 3 + 1 + 2, 5)
    assert "4 lost lines" in audited["privacy"]["promise"]


def test_copies_of_a_restored_ledger_are_one_ledger(lost, tmp_path):
    """The copy of a run that ended before is the beginning of the one that went on: no fork."""
    path, (seen, _) = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=seen, noise_multiplier=None, recovery_key=RECOVERY)
        earlier = tmp_path / "earlier.jsonl"
        ledger.copy_to(earlier)
        release(ledger, 6)
    together = audit_together([earlier, path])
    assert (together["ledgers"][0]["rounds"], together["ledgers"][0]["lines"]) == (4, 11)
    assert "4 lost lines" in together["privacy"]["promise"]


def test_a_ledger_that_has_lost_all_its_rounds_does_not_say_that_nothing_was_released(tmp_path):
    """What was lost is taken to have been released."""
    path = tmp_path / "ledger.jsonl"
    with make(path) as ledger:
        ledger.restore(up_to=4, noise_multiplier=None, recovery_key=RECOVERY)
    assert "Nothing has been released" not in report_of_ledger(path).statement
    assert "3 lost lines" in audit(path)["privacy"]["promise"]


def test_a_restore_beyond_the_budget_is_over_budget_for_an_audit(tmp_path):
    """Every line is right, and yet more was spent than the ledger promised: that is a verdict of its own."""
    path = tmp_path / "ledger.jsonl"
    with make(path, epsilon=0.5) as ledger:
        ledger.restore(up_to=30, noise_multiplier="1", recovery_key=RECOVERY)
    found = audit(path, public_key=public_key_hex(OWNER))
    assert (found["status"], found["exit_code"]) == ("over budget", 3)
    assert "29 lost lines" in found["reason"]


@pytest.mark.parametrize("arguments", [{"noise_multiplier": "0.04"}, {"up_to": 2_000_000, "noise_multiplier": "1"}])
def test_a_restore_that_no_accountant_could_count_is_not_written(tmp_path, arguments):
    """It would leave a ledger that nobody can read: too little noise to count, or more lines than fit in memory."""
    path = tmp_path / "ledger.jsonl"
    make(path).close()
    lines = path.read_bytes().splitlines(keepends=True)[:1]
    path.write_bytes(lines[0])
    with PrivacyLedger.open(path, key=OWNER) as ledger, pytest.raises(ValueError, match=r"noise_multiplier|valid lost"):
        ledger.restore(**{"up_to": 9, "recovery_key": RECOVERY} | arguments)
    assert path.read_bytes() == lines[0]


def test_a_head_after_a_restore_is_found_again(lost):
    """Numbers of lines are not their places in the file any more; what was lost has no head."""
    path, (seen, _) = lost
    with PrivacyLedger.open(path, key=OWNER) as ledger:
        ledger.restore(up_to=seen, noise_multiplier=None, recovery_key=RECOVERY)
        reservation = release(ledger, 6)
        wanted = {n: ledger.head_at(n) for n in (0, 7, seen + 1, reservation.sequence)}
    with path.open("rb") as lines:
        found = dict(ledger_lines.heads(lines))
    assert {n: found[n] for n in wanted} == wanted
    assert seen not in found
