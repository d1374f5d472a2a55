"""A node works for a broadcast only if everything about it is right, and says no with a code otherwise."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client.guard import Policy, check
from client.store import NOTHING_ACKNOWLEDGED
from common.errors import REFUSALS, Refused
from common.model import SharedModel
from common.records import Broadcast, canonical_json, encode
from privacy.keys import public_key_hex
from privacy.layout import SCALARS, group_sizes
from privacy.lines import ZERO_HEAD, chain, extend, signed_line

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
NOW = 1_800_000_000
D, R, S = 3, 2, len(SCALARS)
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "4.000000",
    "clipping_norm": "1.5",
    "grid_scale": 2**16,
    "groups": [
        {"name": "model", "size": D * (R + 1), "share": "0.980000"},
        {"name": "scalars", "size": S, "share": "0.198000"},
    ],
    "denominator": 10,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
POLICY = Policy(public_key=bytes.fromhex(public_key_hex(KEY)), ledger_id="L", mu_max="1.000000")
MODEL = SharedModel(beta=np.arange(3.0), U=np.ones((D, R)), b_variance=0.1, noise_variance=1.0)


def with_event(**changes):
    """An event with other fields."""
    return EVENT | changes


def with_groups(*groups):
    """An event with other groups, given as (name, size, share)."""
    return with_event(groups=[{"name": name, "size": size, "share": share} for name, size, share in groups])


def ledger_lines(event=EVENT, *, count=4, kind="RESERVE", key=KEY, run="run", server_round=2):
    """Raw lines 0 to count - 1, of which only the last has to be a real one."""
    raw, head = [], ZERO_HEAD
    for sequence in range(count - 1):
        raw.append(b"line %d" % sequence)
        head = extend(head, hashlib.sha256(raw[-1]).digest())
    body = {"run": run, "round": server_round, "event": event, "invited_users": 10}
    if kind == "COMMIT":
        body = {"reserve": 2, "release_digest": "00" * 32}
    line = signed_line(sequence=count - 1, kind=kind, body=body, previous=head, time="2026-11-20T09:00:00Z", key=key)
    return [*raw, line]


def digests_of(lines):
    """Their SHA-256, `t x 32`."""
    packed = b"".join(hashlib.sha256(line).digest() for line in lines)
    return np.frombuffer(packed, np.uint8).reshape(-1, 32)


def broadcast(ledger=None, /, **changes):
    """A broadcast that a new node accepts, but for `changes`."""
    ledger = ledger_lines() if ledger is None else ledger
    fields = {
        "ledger_id": "L",
        "run": "run",
        "server_round": 2,
        "purpose": "train",
        "lines": (ledger[-1].decode(),),
        "digests_from": 0,
        "digests": digests_of(ledger),
        "deadline": NOW + 60,
        "task": {"family": "squared", "sparsity": 2},
        "model": MODEL,
        "metric": np.eye(D),
        "schema": "",
    }
    return Broadcast(**(fields | changes))


def fold_in(lines, digests_from=0, **changes):
    """A message that asks for no contribution."""
    return broadcast(
        lines,
        purpose="fold_in",
        digests_from=digests_from,
        digests=digests_of(lines[digests_from:]),
        **changes,
    )


def ask(message, policy=POLICY, *, acknowledged=NOTHING_ACKNOWLEDGED, key=KEY, now=NOW, users=10):
    """Sign a broadcast, or bytes, and check it."""
    payload = message if isinstance(message, bytes) else message.encode()
    return check(payload, key.sign(payload), policy, acknowledged=acknowledged, now=now, users=users)


def code_of(*arguments, **options):
    """The code with which it is refused."""
    with pytest.raises(Refused) as refusal:
        ask(*arguments, **options)
    return refusal.value.code


def head_of(lines):
    """The ledger's head after these lines."""
    return chain(ZERO_HEAD, digests_of(lines))


def test_a_good_broadcast_is_accepted_with_its_event_and_head():
    """A new node gets the message, the mechanism event and the head to store."""
    lines = ledger_lines()
    accepted = ask(broadcast(lines))
    assert accepted.event == EVENT
    assert (accepted.sequence, accepted.head) == (3, head_of(lines))
    assert accepted.broadcast.server_round == 2
    assert accepted.broadcast.encode() == broadcast(lines).encode()


def test_a_node_that_acknowledged_earlier_lines_goes_on_from_there():
    """Digests since then are enough, and earlier ones do no harm."""
    lines = ledger_lines()
    for first in (0, 1, 2):
        message = broadcast(lines, digests_from=first, digests=digests_of(lines[first:]))
        accepted = ask(message, acknowledged=(1, head_of(lines[:2])))
        assert (accepted.sequence, accepted.head) == (3, head_of(lines))


def test_without_a_pinned_ledger_the_first_is_trusted():
    """Trust on first use: the caller pins what was accepted."""
    policy = dataclasses.replace(POLICY, ledger_id=None)
    assert ask(broadcast(ledger_id="M"), policy).broadcast.ledger_id == "M"
    assert code_of(broadcast(ledger_id="M")) == "ledger_unknown"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"purpose": "evaluate"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"deadline": NOW - 1}, "deadline"),
        ({"deadline": NOW + 86_401}, "deadline"),
        ({"deadline": 10**400}, "deadline"),
        ({"run": "other"}, "malformed"),
        ({"server_round": 3}, "malformed"),
        ({"lines": ()}, "malformed"),
        ({"lines": ("{}",)}, "malformed"),
        ({"lines": ("é",)}, "malformed"),
        ({"sealing_key": b"short"}, "malformed"),
        ({"task": {"family": "cubic"}}, "policy_shape"),
        ({"task": {"family": ["squared"]}}, "policy_shape"),
        ({"task": {}}, "policy_shape"),
        ({"task": {"family": "squared", "sparsity": D + 1}}, "policy_shape"),
        ({"task": {"family": "squared", "sparsity": -1}}, "policy_shape"),
        ({"task": {"family": "squared", "sparsity": True}}, "policy_shape"),
        ({"model": dataclasses.replace(MODEL, noise_variance=0.0)}, "malformed"),
        ({"model": dataclasses.replace(MODEL, b_variance=-1.0)}, "malformed"),
        ({"model": dataclasses.replace(MODEL, beta=np.full(3, np.nan))}, "malformed"),
        ({"model": dataclasses.replace(MODEL, U=np.full((D, R), np.inf))}, "malformed"),
        ({"model": dataclasses.replace(MODEL, U=np.ones((D, R), np.int64))}, "malformed"),
        ({"model": dataclasses.replace(MODEL, beta=np.ones((3, 1)))}, "malformed"),
        ({"model": dataclasses.replace(MODEL, U=np.ones((D, D + 1)))}, "policy_shape"),
        ({"model": dataclasses.replace(MODEL, U=np.ones((D, 1)))}, "policy_shape"),
        ({"metric": np.ones((D, D + 1))}, "malformed"),
        ({"digests": np.zeros((4, 31), np.uint8)}, "malformed"),
        ({"digests": np.zeros((4, 32), np.int64)}, "malformed"),
        ({"digests": np.zeros((4, 32), np.uint8)}, "ledger_fork"),
        ({"digests": np.zeros((0, 32), np.uint8)}, "ledger_gap"),
        ({"digests_from": 1}, "ledger_gap"),
        ({"digests_from": -1}, "ledger_gap"),
        ({"digests_from": 10**30}, "ledger_gap"),
    ],
)
def test_a_signed_broadcast_with_a_wrong_field_is_refused(change, code):
    """Whoever holds the key still gets a code for every field that is not right."""
    assert code_of(broadcast(**change)) == code


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (with_event(noise_multiplier="0.04"), "policy_noise"),
        (with_event(noise_multiplier="0.999999"), "policy_noise"),  # one contribution would exceed mu_max = 1
        (with_event(noise="none", noise_multiplier="0"), "policy_not_private"),
        (with_event(noise="seeded (NOT PRIVATE)"), "policy_not_private"),
        (with_event(clipping_norm="0.0000001"), "policy_clipping"),
        (with_event(clipping_norm="100000000001"), "policy_clipping"),
        (with_event(clipping_norm="0"), "policy_clipping"),
        (with_event(grid_scale=2**17), "policy_shape"),
        (with_event(initialization=True), "policy_shape"),
        (with_groups(("model", 8, "0.9"), ("scalars", S, "0.1")), "policy_shape"),
        (with_groups(("model", 9, "0.9"), ("scalars", S + 1, "0.1")), "policy_shape"),
        (with_groups(("scalars", S, "0.1"), ("model", 9, "0.9")), "policy_shape"),
        (with_groups(("model", 9, "0.9")), "policy_shape"),
        (with_groups(("model", 9, "0.9"), ("scalars", S, "0")), "policy_shape"),
        (with_groups(("model", 9, "0.5"), ("scalars", S, "0.1"), ("scalars", S, "0.1")), "policy_shape"),
        (with_groups(("model", 9, "1"), ("scalars", S, "1")), "malformed"),
        (with_event(mechanism="laplace"), "malformed"),
        (with_event(sampling="poisson"), "malformed"),
        (with_event(noise_multiplier="-4"), "malformed"),
        (with_event(noise_multiplier="nan"), "malformed"),
        (with_event(extra=1), "malformed"),
    ],
)
def test_a_release_that_the_policy_does_not_allow_is_refused(event, code):
    """Noise, clipping, layout and grid are held against the node's own limits."""
    assert code_of(broadcast(ledger_lines(event))) == code


@pytest.mark.parametrize(
    "event",
    [
        with_event(noise_multiplier="1"),
        with_event(noise_multiplier="1.000000"),
        with_event(clipping_norm="0.000001"),
        with_event(clipping_norm="100000000000"),
        with_event(grid_scale=2**20),
        with_groups(("model", 9, "0.6"), ("scalars", S, "0.8")),
        with_groups(("model", 9, "0.707106782"), ("scalars", S, "0.707106781")),  # 1 + 8e-10
    ],
)
def test_releases_at_the_edge_of_the_policy_are_accepted(event):
    """Bounds are included, and rounded shares are borne."""
    assert ask(broadcast(ledger_lines(event))).event == event


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"min_noise_multiplier": "4.000001"}, "policy_noise"),
        ({"mu_max": "0.249999"}, "policy_noise"),
        ({"max_users_per_node": 9}, "policy_users"),
        ({"max_dimension": 2}, "policy_shape"),
        ({"max_rank": 1}, "policy_shape"),
        ({"works": frozenset({"moment"})}, "policy_work"),
        ({"families": frozenset({"logistic"})}, "policy_shape"),
        ({"min_clipping_norm": 1.6}, "policy_clipping"),
        ({"max_clipping_norm": 1.4}, "policy_clipping"),
        ({"max_deadline_ahead": 59}, "deadline"),
        ({"max_grid_scale": 2**15}, "policy_shape"),
        ({"public_key": bytes.fromhex(public_key_hex(STRANGER))}, "signature"),
    ],
)
def test_every_limit_of_the_policy_is_looked_at(changes, code):
    """A good broadcast is refused as soon as one limit is a little tighter."""
    assert code_of(broadcast(), dataclasses.replace(POLICY, **changes)) == code


def test_both_cryptographic_noises_are_accepted():
    """A node that insists on a promise answers to rounded and to discrete Gaussians."""
    for noise in ("aes-256-ctr", "opendp (discrete Gaussian)"):
        event = with_event(noise=noise)
        assert ask(broadcast(ledger_lines(event))).event == event


@pytest.mark.parametrize(
    "event",
    [
        with_event(noise="none", noise_multiplier="0", grid_scale=2**30),
        with_event(noise="seeded (NOT PRIVATE)"),
    ],
)
def test_a_simulation_may_allow_what_is_not_private(event):
    """Absent and seeded noise are accepted where the node's own policy says so, and nowhere else."""
    policy = dataclasses.replace(POLICY, allow_not_private=True, mu_max="inf")
    assert ask(broadcast(ledger_lines(event)), policy).event == event
    assert code_of(broadcast(ledger_lines(event))) == "policy_not_private"


@pytest.mark.parametrize("work", ["moment", "statistics"])
def test_second_moments_are_given_only_where_the_operator_allows_them(work):
    """Of a user who is alone on the node they hold examples or their second moments."""
    sizes = group_sizes(work, D, R)
    event = with_groups(*((name, size, "0.5") for name, size in sizes.items()))
    event |= {"initialization": work == "moment"}
    fitting = {"fitting": {}} if work == "statistics" else {}
    asked = broadcast(ledger_lines(event), task={"family": "squared", "sparsity": 2, "work": work} | fitting)
    assert code_of(asked) == "policy_work"
    assert ask(asked, dataclasses.replace(POLICY, works=frozenset({work}))).task.work == work


def test_memory_per_user_is_bounded_whatever_the_task():
    """A solver keeps (r + sparsity) d numbers of a user, also where nothing is contributed."""
    policy = dataclasses.replace(POLICY, max_coordinates=(R + 3) * D - 1)
    for message in (broadcast, fold_in):
        assert ask(message(ledger_lines(), task={"family": "squared", "sparsity": 2}), policy).task.sparsity == 2
        assert code_of(message(ledger_lines(), task={"family": "squared", "sparsity": 3}), policy) == "policy_shape"


def test_the_reserve_line_must_be_signed_and_be_one():
    """A line by another key, or a signed line of another type, charges nothing."""
    assert code_of(broadcast(ledger_lines(key=STRANGER))) == "signature"
    assert code_of(broadcast(ledger_lines(kind="COMMIT"))) == "malformed"
    lines = ledger_lines()
    assert code_of(broadcast(lines, lines=(lines[-1].decode(),) * 2)) == "malformed"
    assert code_of(broadcast(lines, purpose="fold_in", lines=(lines[-1].decode(),) * 2)) == "malformed"
    cheaper = lines[-1].replace(b'"4.000000"', b'"9.000000"')
    assert code_of(broadcast([*lines[:-1], cheaper])) == "signature"


def test_a_ledger_that_does_not_follow_what_was_acknowledged_is_refused():
    """Rollback, replay, fork and gap each have their code."""
    lines = ledger_lines()
    head = head_of(lines)
    message = broadcast(lines)
    late = broadcast(lines, digests_from=2, digests=digests_of(lines[2:]))
    assert code_of(message, acknowledged=(9, bytes(32))) == "ledger_rollback"
    assert code_of(message, acknowledged=(3, head)) == "replayed"
    assert code_of(message, acknowledged=(3, bytes(32))) == "ledger_fork"
    assert code_of(message, acknowledged=(1, bytes(32))) == "ledger_fork"
    assert code_of(late, acknowledged=(0, head_of(lines[:1]))) == "ledger_gap"
    assert code_of(late) == "ledger_gap"


def test_fold_in_moves_the_head_and_may_bring_nothing_new():
    """It follows the digests from what was acknowledged to the ledger's last line, which the key has signed."""
    lines = ledger_lines()
    head = head_of(lines)
    for known in (0, 2, 3, 4):
        acknowledged = (known - 1, head_of(lines[:known]))
        for first in range(known + 1):
            accepted = ask(fold_in(lines, first), acknowledged=acknowledged)
            assert (accepted.sequence, accepted.head, accepted.event) == (3, head, None)


def test_fold_in_is_held_to_key_ledger_and_head():
    """No contribution is asked for, yet a node follows one ledger of one key only."""
    lines = ledger_lines()
    assert code_of(fold_in(lines), key=STRANGER) == "signature"
    assert code_of(fold_in(lines, ledger_id="M")) == "ledger_unknown"
    assert code_of(fold_in(lines, 1)) == "ledger_gap"
    assert code_of(fold_in(lines), acknowledged=(4, bytes(32))) == "ledger_rollback"
    assert code_of(fold_in(lines), acknowledged=(1, bytes(32))) == "ledger_fork"
    message = fold_in(lines)
    assert code_of(dataclasses.replace(message, lines=("{}",))) == "malformed"
    assert code_of(dataclasses.replace(message, lines=())) == "malformed"
    assert code_of(dataclasses.replace(message, digests_from=-1)) == "ledger_gap"
    assert code_of(fold_in(ledger_lines(key=STRANGER))) == "signature"


def test_a_head_moves_to_signed_lines_only():
    """Digests without the line that they end in lead nowhere, however well they are chained."""
    lines = ledger_lines()
    beyond = np.concatenate([digests_of(lines), np.full((1, 32), 7, np.uint8)])
    for first in (0, 2):
        message = fold_in(lines, first)
        assert code_of(dataclasses.replace(message, digests=beyond[first:]), acknowledged=(2, head_of(lines[:3]))) in (
            "ledger_gap",
            "ledger_fork",
        )


def test_a_node_can_insist_on_sealing():
    """Without a key to seal to it gives nothing."""
    policy = dataclasses.replace(POLICY, require_sealing=True)
    assert code_of(broadcast(), policy) == "policy_sealing"
    assert ask(broadcast(sealing_key=bytes(range(32))), policy).event == EVENT
    assert ask(fold_in(ledger_lines()), policy).sequence == 3  # nothing is to be sealed there


PAYLOAD = broadcast().encode()
SIGNATURE = KEY.sign(PAYLOAD)


def header_of(payload):
    """The JSON object at the beginning of an encoded record, and what follows it."""
    length = int.from_bytes(payload[8:12], "little")
    return json.loads(payload[12 : 12 + length]), payload[12 + length :]


HOSTILE = [None, True, -1, 10**400, 1.5, "", "é", [], {}, [[]], "9" * 5000, [1, "x"], {"a": []}]


@pytest.mark.parametrize("field", sorted(header_of(PAYLOAD)[0]["header"]))
def test_any_value_in_any_field_of_a_signed_message_gives_a_code_or_is_accepted(field):
    """A holder of the key may sign anything; what comes back is never another exception."""
    message = broadcast()
    header = header_of(message.encode())[0]["header"]
    arrays = {"beta": MODEL.beta, "U": MODEL.U, "metric": message.metric, "digests": message.digests}
    assert all(outcome(encode(header | {field: value}, arrays)) for value in HOSTILE)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_signed_bytes_give_a_code(data, with_magic):
    """Bytes that are no message are refused even when they are signed."""
    payload = b"umbel\x00\x00\x01" + data if with_magic else data
    with pytest.raises(Refused) as refusal:
        ask(payload)
    assert refusal.value.code in ("malformed", "protocol")


@pytest.mark.parametrize("array", ["beta", "U", "metric", "digests"])
@pytest.mark.parametrize("shape", [[10**30], [-1], [0], [], [2**62, 4], ["x"], None, [[3]]])
def test_hostile_shapes_give_a_code(array, shape):
    """A signed header may claim any shape for its arrays."""
    parsed, rest = header_of(PAYLOAD)
    parsed["arrays"][array][1] = shape
    text = canonical_json(parsed)
    assert code_of(PAYLOAD[:8] + len(text).to_bytes(4, "little") + text + rest) == "malformed"


def outcome(payload):
    """A known code, or "accepted": all that may come of signed bytes."""
    try:
        ask(payload)
    except Refused as refusal:
        return refusal.code if refusal.code in REFUSALS else None
    return "accepted"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * (len(PAYLOAD) + 64) - 1))
def test_every_flipped_bit_of_payload_or_signature_is_refused(position):
    """One bit anywhere, and the signature does not verify."""
    flipped = bytearray(PAYLOAD + SIGNATURE)
    flipped[position // 8] ^= 1 << position % 8
    payload, signature = bytes(flipped[: len(PAYLOAD)]), bytes(flipped[len(PAYLOAD) :])
    with pytest.raises(Refused) as refusal:
        check(payload, signature, POLICY, acknowledged=NOTHING_ACKNOWLEDGED, now=NOW)
    assert refusal.value.code == "signature"


def test_flipped_bits_that_were_signed_are_refused_or_harmless():
    """The decoder alone, with a good signature over the damage: a code or an accepted message."""
    moments = np.random.default_rng(7)
    for _ in range(2000):
        flipped = bytearray(PAYLOAD)
        for position in moments.integers(8 * len(PAYLOAD), size=moments.choice([1, 2, 8])):
            flipped[position // 8] ^= 1 << position % 8
        assert outcome(bytes(flipped))


@pytest.mark.parametrize("signature", [b"", b"x", bytes(64), bytes(65), SIGNATURE[:-1], SIGNATURE + b"x"])
def test_signatures_of_any_length_are_refused(signature):
    """Neither missing nor longer signatures pass."""
    with pytest.raises(Refused) as refusal:
        check(PAYLOAD, signature, POLICY, acknowledged=NOTHING_ACKNOWLEDGED, now=NOW)
    assert refusal.value.code == "signature"


def test_another_protocol_version_has_its_own_code():
    """An old node says that it is old."""
    assert code_of(encode({"protocol": 2}, {})) == "protocol"


def test_every_code_has_a_meaning():
    """The vocabulary is fixed, and each code is explained in one line."""
    assert {
        "malformed", "protocol", "signature", "ledger_unknown", "ledger_gap", "ledger_fork",
        "ledger_rollback", "replayed", "policy_noise", "policy_sampling", "policy_clipping", "policy_shape",
        "policy_work", "policy_not_private", "policy_users", "deadline", "purpose", "storage", "busy", "error",
        "unavailable", "client_error", "ledger_restore", "sealing", "node_signature", "node_unknown", "policy_columns",
        "policy_sealing", "policy_bundle",
    } == REFUSALS.keys()  # fmt: skip
    assert all("\n" not in meaning and meaning.endswith(".") for meaning in REFUSALS.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"public_key": b"short"},
        {"min_noise_multiplier": "0.01"},
        {"min_noise_multiplier": "lots"},
        {"mu_max": "lots"},
        {"mu_max": "64"},
        {"min_clipping_norm": 0.0},
        {"max_clipping_norm": float("inf")},
        {"min_clipping_norm": 2.0, "max_clipping_norm": 1.0},
    ],
)
def test_a_policy_that_limits_nothing_is_an_error(changes):
    """The node's own configuration is checked when it is read."""
    with pytest.raises(ValueError, match="Expected"):
        dataclasses.replace(POLICY, **changes)


SAMPLED = with_event(sampling={"poisson": "0.1"})
SCHEDULE = {
    "rounds": 3,
    "noise_multiplier": "4.000000",
    "sampling": {"poisson": "0.1"},
    "capped_mu_max": "0",
    "amplified_epsilon": "1",
}


def sampled_lines(event=SAMPLED, *, run="run", server_round=2, start_kind="START", **changes):
    """Raw lines of a ledger with a sampled run: three that are none, START, one more, RESERVE."""
    raw, head = [], ZERO_HEAD

    def add(line):
        nonlocal head
        raw.append(line)
        head = extend(head, hashlib.sha256(line).digest())

    def add_line(kind, body):
        signed = {"sequence": len(raw), "previous": head, "time": "2026-11-20T09:00:00Z", "key": KEY}
        add(signed_line(kind=kind, body=body, **signed))

    for sequence in range(3):
        add(b"line %d" % sequence)
    start = {"run": run, "schedule": SCHEDULE | changes, "configuration_digest": "00" * 32}
    add_line(start_kind, start if start_kind == "START" else {"reserve": 2, "code": "no_answer"})
    add(b"line 4")
    add_line("RESERVE", {"run": "run", "round": server_round, "event": event, "invited_users": 10})
    return raw


def sampled(lines=None, /, **changes):
    """A broadcast of a sampled release that a new node accepts, but for `changes`."""
    lines = sampled_lines() if lines is None else lines
    return broadcast(lines, **({"lines": (lines[3].decode(), lines[5].decode())} | changes))


@pytest.mark.parametrize("acknowledged", [-1, 1, 3, 4])
def test_a_sampled_release_is_accepted_with_its_start_line(acknowledged):
    """Wherever the node is in the ledger, as long as the digests begin at START or before."""
    lines = sampled_lines()
    known = (acknowledged, head_of(lines[: acknowledged + 1]))
    for first in range(min(acknowledged + 1, 3) + 1):
        message = sampled(lines, digests_from=first, digests=digests_of(lines[first:]))
        accepted = ask(message, acknowledged=known)
        assert accepted.event["sampling"] == {"poisson": "0.1"}
        assert (accepted.sequence, accepted.head) == (5, head_of(lines))


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (sampled_lines(sampling={"poisson": "0.2"}), "policy_sampling"),
        (sampled_lines(sampling={"poisson": "0.10"}), "policy_sampling"),
        (sampled_lines(noise_multiplier="4.5"), "policy_sampling"),
        (sampled_lines(run="another"), "policy_sampling"),
        (sampled_lines(rounds=1), "policy_sampling"),
        (sampled_lines(sampling="none"), "policy_sampling"),
        (sampled_lines(start_kind="ABORT"), "malformed"),
        (sampled_lines(rounds="3"), "malformed"),
        (sampled_lines(capped_mu_max=None), "malformed"),
        (sampled_lines(with_event(sampling={"poisson": "1"})), "malformed"),
        (sampled_lines(with_event(sampling={"poisson": "0.0"})), "malformed"),
        (sampled_lines(with_event(sampling={"poisson": ".1"})), "malformed"),
        (sampled_lines(with_event(sampling={"poisson": "0.1", "x": 1})), "malformed"),
        (sampled_lines(with_event(sampling={"poisson": "0.1"}, noise_multiplier="0", noise="none")), "policy_sampling"),
    ],
)
def test_a_sampled_release_that_is_not_of_its_schedule_is_refused(lines, code):
    """Another q, z or run than at START, a round beyond its rounds, or a START line of no sampled run."""
    policy = dataclasses.replace(POLICY, allow_not_private=True)
    assert code_of(sampled(lines, server_round=2), policy) == code


def test_a_sampled_release_needs_its_start_line_and_others_have_none():
    """One line too few and one too many are malformed, and so is a START line in another place."""
    lines = sampled_lines()
    start, reserve = lines[3].decode(), lines[5].decode()
    for wrong in ((reserve,), (start, start, reserve), (reserve, start), (reserve, reserve)):
        assert code_of(sampled(lines, lines=wrong)) == "malformed"
    plain = ledger_lines()
    assert code_of(broadcast(plain, lines=(start, plain[-1].decode()))) == "malformed"


def test_a_start_line_of_another_past_is_refused():
    """One that the ledger's key has signed, but that does not lead to this release; or too far back to be seen to."""
    lines, others = sampled_lines(), sampled_lines(rounds=1000)
    start, reserve = others[3].decode(), lines[5].decode()
    assert code_of(sampled(lines, lines=(start, reserve))) == "ledger_fork"
    known = (4, head_of(lines[:5]))
    assert code_of(sampled(lines, lines=(start, reserve)), acknowledged=known) == "ledger_fork"
    for first in (4, 5):
        late = sampled(lines, digests_from=first, digests=digests_of(lines[first:]))
        assert code_of(late, acknowledged=known) == "ledger_gap"


def test_a_node_decides_whether_and_how_it_is_sampled():
    """Its policy can forbid it, and bound q on both sides."""
    for changes, refused in (
        ({"allow_sampling": False}, True),
        ({"min_sampling_probability": "0.11"}, True),
        ({"max_sampling_probability": "0.09"}, True),
        ({"min_sampling_probability": "0.1", "max_sampling_probability": "0.1"}, False),
    ):
        policy = dataclasses.replace(POLICY, **changes)
        if refused:
            assert code_of(sampled(), policy) == "policy_sampling"
        else:
            ask(sampled(), policy)
    for bounds in (("0.2", "0.1"), ("0", "1.1"), ("-1", "1")):
        with pytest.raises(ValueError, match="sampling_probability"):
            dataclasses.replace(POLICY, min_sampling_probability=bounds[0], max_sampling_probability=bounds[1])
