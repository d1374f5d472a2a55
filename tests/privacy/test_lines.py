"""Lines of a ledger: one encoding, one chain, and what a node concludes from them."""

import json
from hashlib import sha256

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import LedgerCorrupt, Refused, VerificationError
from common.records import canonical_json
from privacy.keys import public_key_hex
from privacy.lines import ZERO_HEAD, chain, check_signature, parse_line, replay, signed_line

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = public_key_hex(KEY)
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "13.361200",
    "clipping_norm": "1.250000",
    "grid_scale": 65536,
    "groups": [
        {"name": "model", "size": 10, "share": "0.6"},
        {"name": "scalars", "size": 4, "share": "0.8"},
    ],
    "denominator": 3,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
DIGEST = "0f" * 32
BODIES = {
    "GENESIS": {
        "delta": "0.000001",
        "epsilon": "2",
        "format": 2,
        "ledger_id": "l",
        "max_nodes_per_user": 1,
        "mu_max": "0.4",
        "neighboring_relation": "zero-out",
        "population": "p",
        "public_key": OWNER,
        "recovery_key": "",
        "unit": "user",
    },
    "REGISTRY": {"digest": DIGEST, "population_size": 3, "users_per_node": 1},
    "START": {"configuration_digest": DIGEST, "run": "r", "schedule": {"rounds": 3}},
    "RESERVE": {"event": EVENT, "invited_users": 3, "round": 1, "run": "r"},
    "COMMIT": {"release_digest": DIGEST, "reserve": 3},
    "ABORT": {"code": "no_answer", "reserve": 3},
    "KEY": {"public_key": DIGEST},
    "RESTORE": {"lost": 3, "noise_multiplier": "1.5", "recovery_signature": DIGEST * 2},
}
FRAME = {"sequence": 7, "previous": ZERO_HEAD, "time": "2026-01-31T12:00:00Z", "key": KEY}


def verify_line(raw, public_key):
    """A line that this key must have signed."""
    line = parse_line(raw)
    check_signature(line, public_key)
    return line


def line_of(kind, body):
    return signed_line(kind=kind, body=body, **FRAME)


@pytest.mark.parametrize("kind", BODIES)
def test_every_type_round_trips(kind):
    """A line reads back as what was signed, and its signature holds for its key only."""
    line = verify_line(line_of(kind, BODIES[kind]), OWNER)
    assert (line.kind, line.body, line.sequence) == (kind, BODIES[kind], 7)
    assert (line.previous, line.time) == (ZERO_HEAD.hex(), FRAME["time"])
    with pytest.raises(VerificationError, match="signature"):
        check_signature(line, DIGEST)


def test_layout_and_hashes_are_as_written_down():
    """Line, signed bytes and head agree with the specification computed by hand."""
    raw = line_of("ABORT", BODIES["ABORT"])
    value = json.loads(raw)
    assert raw == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    signature = bytes.fromhex(value.pop("signature"))
    KEY.public_key().verify(signature, json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    assert parse_line(raw).head == sha256(bytes(32) + sha256(raw).digest()).digest()


@settings(max_examples=100, deadline=None)
@given(
    schedule=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_plain_schedule_round_trips(schedule):
    """Whatever plain values a schedule holds, its line reads back as the same bytes and the same values."""
    raw = line_of("START", {**BODIES["START"], "schedule": schedule})
    assert verify_line(raw, OWNER).body["schedule"] == schedule


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(BODIES)), position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_byte_is_refused(kind, position, change):
    """No byte of a line can be changed without its signature or its form being refused."""
    raw = bytearray(line_of(kind, BODIES[kind]))
    raw[position % len(raw)] ^= change
    with pytest.raises(VerificationError):
        verify_line(bytes(raw), OWNER)


RAW = line_of("RESERVE", BODIES["RESERVE"])
START = line_of("START", {**BODIES["START"], "schedule": {"note": "é", "rounds": 3, "zero": 0}})


@pytest.mark.parametrize(
    "raw",
    [
        RAW.replace(b":", b": "),
        RAW + b" ",
        b" " + RAW,
        RAW + b"\n",
        RAW.replace(b'"type"', b'\n"type"'),
        b"\xef\xbb\xbf" + RAW,
        RAW + RAW,
        RAW[:-1],
        b"",
        b"[]",
        b"{}",
        json.dumps(dict(reversed(json.loads(RAW).items())), separators=(",", ":")).encode(),
        RAW.replace(b'"invited_users":3,"round":1', b'"round":1,"invited_users":3'),
        RAW.replace(b'"round":1', b'"round":1,"round":1'),
        RAW.replace(b'"round":1', b'"round":1.0'),
        RAW.replace(b'"round":1', b'"round":1e0'),
        RAW.replace(b'"round":1', b'"round":01'),
        RAW.replace(b'"round":1', b'"round":true'),
        RAW.replace(b'"round":1', b'"round":"1"'),
        RAW.replace(b'"round":1', b'"round":-1'),
        RAW.replace(b'"round":1', b'"round":9223372036854775808'),
        RAW.replace(b'"round":1', b'"round":' + b"9" * 5000),
        RAW.replace(b'"sequence":7', b'"sequence":07'),
        RAW.replace(b'"sequence":7', b'"sequence":-7'),
        RAW.replace(b'"sequence":7', b'"sequence":7.0'),
        RAW.replace(b'"type":"RESERVE"', b'"type":"reserve"'),
        RAW.replace(b'"type":"RESERVE"', b'"type":"REFUND"'),
        RAW.replace(b'"type":"RESERVE"', b'"type":"COMMIT"'),
        RAW.replace(b"2026-01-31T12", b"2026-01-31 12"),
        RAW[:-1] + b',"zone":"UTC"}',
        START.replace(b'"zero":0', b'"zero":-0'),
        START.replace(b'"zero":0', b'"zero":NaN'),
        START.replace(b'"zero":0', b'"zero":0.5'),
        START.replace(b"\\u00e9", b"\\u00E9"),
        START.replace(b"\\u00e9", "é".encode()),
        START.replace(b'"zero":0', b'"zero":' + b"[" * 10_000 + b"]" * 10_000),
        START.replace(b'"zero":0', b'"zero":"' + b"x" * 2**20 + b'"'),
    ],
)
def test_other_encodings_are_refused(raw):
    """Spaces, order, duplicates, floats, other spellings of the same value: none is the canonical line."""
    assert raw not in (RAW, START)
    with pytest.raises(LedgerCorrupt):
        parse_line(raw)


@pytest.mark.parametrize("field", ["previous", "signature"])
def test_upper_case_hex_is_refused(field):
    """The same hash in upper case is another line."""
    value = json.loads(line_of("COMMIT", {**BODIES["COMMIT"], "release_digest": "ab" * 32}))
    assert parse_line(canonical_json(value))
    for changed in (
        {**value, field: "AB" + value[field][2:]},
        {**value, "body": {**value["body"], "release_digest": "AB" * 32}},
    ):
        with pytest.raises(LedgerCorrupt):
            parse_line(canonical_json(changed))


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_have_exactly_their_fields(kind):
    """A field missing, too many, or of another kind of value is refused."""
    body = BODIES[kind]
    assert parse_line(line_of(kind, body))
    changes = [{**body, "more": 1}] + [{**body, name: value} for name in body for value in (None, [], 1.5, -1)]
    changes += [{other: body[other] for other in body if other != name} for name in body]
    for changed in changes:
        with pytest.raises(LedgerCorrupt):
            parse_line(line_of(kind, changed))


@pytest.mark.parametrize(
    "change",
    [
        {"noise": "none"},
        {"noise_multiplier": "0"},
        {"noise_multiplier": "0.000"},
        {"noise_multiplier": "1e1"},
        {"noise_multiplier": "01.5"},
        {"noise_multiplier": "-1"},
        {"noise_multiplier": "nan"},
        {"noise_multiplier": "inf"},
        {"noise_multiplier": 13},
        {"noise": "numpy"},
        {"noise": "opendp"},
        {"noise": "opendp (discrete Gaussian) "},
        {"sampling": "poisson"},
        {"mechanism": "laplace"},
        {"clipping_norm": "inf"},
        {"initialization": 0},
        {"denominator": 0},
        {"grid_scale": True},
        {"groups": []},
        {"groups": [{"name": "model", "size": 10, "share": "1.1"}]},
        {"groups": [{"name": "model", "size": 0, "share": "1"}]},
        {"groups": [{"name": "model", "size": 1, "share": "1", "more": 1}]},
        {"groups": ["model"]},
        {"more": 1},
    ],
)
def test_events_that_cannot_be_charged_are_refused(change):
    """An event is refused where its noise, its sensitivity or its sampling is not what the charge assumes."""
    with pytest.raises(LedgerCorrupt):
        parse_line(line_of("RESERVE", {**BODIES["RESERVE"], "event": {**EVENT, **change}}))


@pytest.mark.parametrize("noise", ["aes-256-ctr", "opendp (discrete Gaussian)", "seeded (NOT PRIVATE)"])
def test_events_name_the_noise(noise):
    """An event says what its noise was, in one of the spellings that this version knows."""
    event = {**EVENT, "noise": noise}
    assert parse_line(line_of("RESERVE", {**BODIES["RESERVE"], "event": event})).body["event"] == event


def test_a_release_without_noise_says_so_twice():
    """Noise multiplier 0 and noise "none" go together, and only then may nothing be clipped."""
    event = {**EVENT, "noise_multiplier": "0", "noise": "none", "clipping_norm": "inf"}
    assert parse_line(line_of("RESERVE", {**BODIES["RESERVE"], "event": event})).body["event"] == event


def ledger_lines(count, salt=0):
    """Raw lines and heads of a chain of COMMIT lines, different for every salt."""
    lines, heads, head = [], [], ZERO_HEAD
    for sequence in range(count):
        body = {"release_digest": f"{salt:064x}", "reserve": sequence}
        frame = {"sequence": sequence, "previous": head, "time": FRAME["time"], "key": KEY}
        lines.append(signed_line(kind="COMMIT", body=body, **frame))
        head = parse_line(lines[-1]).head
        heads.append(head)
    return lines, heads


def digests_of(lines):
    return np.frombuffer(b"".join(sha256(line).digest() for line in lines), np.uint8).reshape(-1, 32)


LINES, HEADS = ledger_lines(8)


def test_chain_is_the_chain_of_the_lines():
    """Heads computed from digests alone are those of the lines, in one step or in several."""
    digests = digests_of(LINES)
    assert [chain(ZERO_HEAD, digests[: t + 1]) for t in range(8)] == HEADS
    assert chain(chain(ZERO_HEAD, digests[:3]), digests[3:]) == HEADS[-1]
    assert chain(HEADS[0], digests[:0]) == HEADS[0]


@settings(max_examples=200, deadline=None)
@given(st.integers(-1, 6), st.integers(0, 7), st.integers(0, 7), st.integers(1, 3))
def test_a_node_follows_exactly_the_complete_new_ends(acknowledged, start, last, shown):
    """A node accepts what covers all lines since its own and ends later, and refuses the rest by code."""
    digests, raw = digests_of(LINES[start : last + 1]), LINES[max(0, last + 1 - shown) : last + 1]
    head = HEADS[acknowledged] if acknowledged >= 0 else ZERO_HEAD
    if start > last or len(raw) > len(digests):
        code = "ledger_gap"
    elif last < acknowledged:
        code = "ledger_rollback"
    elif last == acknowledged:
        code = "replayed"
    else:
        code = "ledger_gap" if start > acknowledged + 1 else None
    if code is None:
        assert replay(acknowledged, head, start, digests, raw) == (last, HEADS[last])
    else:
        with pytest.raises(Refused) as refused:
            replay(acknowledged, head, start, digests, raw)
        assert refused.value.code == code


@pytest.mark.parametrize("acknowledged", range(7))
@pytest.mark.parametrize("start", range(7))
def test_a_fork_is_refused_wherever_it_began(acknowledged, start):
    """Lines that do not continue the acknowledged head are a fork, also at the very same sequence number."""
    other, _ = ledger_lines(8, salt=1)
    for last in range(max(acknowledged, start), 8):
        if start <= acknowledged + 1:
            with pytest.raises(Refused) as refused:
                replay(
                    acknowledged,
                    HEADS[acknowledged],
                    start,
                    digests_of(other[start : last + 1]),
                    [other[last]],
                )
            assert refused.value.code == "ledger_fork"


def test_one_changed_digest_is_a_fork():
    """Any changed digest since the acknowledged line is seen; those up to it are not looked at."""
    for position in range(8):
        digests = digests_of(LINES).copy()
        digests[position, 5] ^= 1
        if position <= 2:
            assert replay(2, HEADS[2], 0, digests, LINES[-1:]) == (7, HEADS[7])
        else:
            with pytest.raises(Refused) as refused:
                replay(2, HEADS[2], 0, digests, LINES[-1:])
            assert refused.value.code == "ledger_fork"


@pytest.mark.parametrize(
    ("start", "digests", "raw", "code"),
    [
        (0, digests_of(LINES), [], "ledger_gap"),
        (0, digests_of([]), [], "ledger_gap"),
        (0, digests_of(LINES), [LINES[6]], "ledger_fork"),
        (-1, digests_of([LINES[0], *LINES]), [LINES[7]], "ledger_gap"),
        (1, digests_of(LINES), [LINES[7]], "ledger_gap"),
        (0, digests_of([*LINES, b"{}"]), [b"{}"], "malformed"),
    ],
)
def test_digests_and_lines_must_fit(start, digests, raw, code):
    """Lines without digests, wrong offsets and things that are no lines are refused."""
    with pytest.raises(Refused) as refused:
        replay(-1, ZERO_HEAD, start, digests, raw)
    assert refused.value.code == code
