"""Records on the wire: one encoding each, and nothing else is read."""

import contextlib
import dataclasses
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from common import records
from common.errors import Refused
from common.model import PersonalState, SharedModel
from common.records import PROTOCOL_VERSION, Broadcast, Contribution, canonical_json, decode, encode


def broadcast(**changes):
    rng = np.random.default_rng(0)
    model = SharedModel(beta=rng.standard_normal(3), U=rng.standard_normal((3, 2)), b_variance=0.1, noise_variance=1.5)
    whole = Broadcast(
        ledger_id="ledger",
        run="run",
        server_round=3,
        purpose="train",
        lines=('{"a":1}',),
        digests_from=7,
        digests=np.arange(64, dtype=np.uint8).reshape(2, 32),
        deadline=1_800_000_000,
        task={"family": "squared", "sparsity": 2},
        model=model,
        schema="5c",
        metric=np.eye(3),
        sealing_key=bytes(range(32)),
    )
    return replace(whole, **changes)


def contribution(**changes):
    return replace(
        Contribution(ledger_id="ledger", sequence=4, acknowledged=4, total=np.array([1, -(2**62), 0])), **changes
    )


def test_canonical_json():
    """Sorted keys, no spaces, ASCII, and no number that JSON does not have."""
    assert canonical_json({"b": 1, "a": [1.5, "ü", None, True]}) == b'{"a":[1.5,"\\u00fc",null,true],"b":1}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json(value)


HEADERS = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        st.integers(),
        st.text(max_size=5),
        st.floats(allow_nan=False, allow_infinity=False),
        st.lists(st.integers(), max_size=3),
    ),
    max_size=3,
)
ARRAYS = st.sampled_from([np.float64, np.int64, np.uint8]).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3))
)


@given(header=HEADERS, arrays=st.dictionaries(st.text(max_size=4), ARRAYS, max_size=3))
def test_decode_is_the_inverse_of_encode(header, arrays):
    """Any header and arrays, NaN and empty ones too, come back bit for bit."""
    read, found = decode(encode(header, arrays))
    assert read == header
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes()


@given(data=st.binary(max_size=200))
@settings(max_examples=200)
def test_random_bytes_are_refused(data):
    """Bytes that are no record raise `Refused` with code malformed and nothing else."""
    with pytest.raises(Refused) as refused:
        decode(data)
    assert refused.value.code == "malformed"


@given(st.data())
@settings(max_examples=300)
def test_one_changed_byte_is_another_record_or_none(data):
    """Flip, cut or add: what is still read encodes to exactly the bytes it was read from."""
    whole = encode({"a": 1, "b": "text"}, {"x": np.arange(3.0), "y": np.arange(2)})
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                whole[:place],
                whole + bytes([place % 256]),
                whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            ]
        )
    )
    with contextlib.suppress(Refused):
        header, arrays = decode(changed)
        assert encode(header, arrays) == changed


@pytest.mark.parametrize(
    "text",
    [
        b'{"arrays":{},"header":{}} ',
        b'{"header":{},"arrays":{}}',
        b'{"arrays":{"x":["<f8",[-1]]},"header":{}}',
        b'{"arrays":{"x":["<f8",[1e3]]},"header":{}}',
        b'{"arrays":{"x":["<f8",[true]]},"header":{}}',
        b'{"arrays":{"x":["<f8",[4294967296,4294967296]]},"header":{}}',
        b'{"arrays":{"x":["<f8",[0,-1]]},"header":{}}',
        b'{"arrays":{"x":["O",[1]]},"header":{}}',
        b'{"arrays":{"x":[[],[1]]},"header":{}}',
        b'{"arrays":[],"header":{}}',
        b'{"arrays":{},"header":[]}',
        b"[" * 100_000,
        b"9" * 5000,
        b"null",
        b"\xff",
    ],
)
def test_hostile_headers_are_refused(text):
    """Other spellings, impossible shapes, foreign types and depths that would exhaust the reader."""
    data = encode({}, {})[:8] + struct.pack("<I", len(text)) + text + bytes(64)
    for candidate in (data, data[:-64]):
        with pytest.raises(Refused, match="Expected one canonical record"):
            decode(candidate)


def test_a_broadcast_comes_back():
    """Every field, and equal broadcasts have equal bytes."""
    sent = broadcast()
    read = Broadcast.decode(sent.encode())
    assert read.encode() == sent.encode()
    for field in dataclasses.fields(Broadcast):
        ours, theirs = getattr(sent, field.name), getattr(read, field.name)
        if field.name == "model":
            assert np.array_equal(ours.U, theirs.U)
            assert np.array_equal(ours.beta, theirs.beta)
            assert (ours.b_variance, ours.noise_variance) == (theirs.b_variance, theirs.noise_variance)
        elif isinstance(ours, np.ndarray):
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs


def test_memory_order_is_not_part_of_a_broadcast():
    """A Fortran-ordered U is sent as the same bytes, and read in C order."""
    sent = broadcast()
    other = broadcast(model=replace(sent.model, U=np.asfortranarray(sent.model.U)))
    assert other.encode() == sent.encode()
    assert Broadcast.decode(sent.encode()).model.U.flags.c_contiguous


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["beta", "U", "metric"])
def test_broadcasts_that_are_not_finite_are_refused(name, value):
    """NaN in the model would make every user's contribution zero; it is malformed."""
    sent = broadcast()
    if name == "metric":
        bad = broadcast(metric=np.full((3, 3), value))
    else:
        bad = broadcast(model=replace(sent.model, **{name: np.full_like(getattr(sent.model, name), value)}))
    with pytest.raises(Refused, match="finite"):
        Broadcast.decode(bad.encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": np.eye(2)},
        {"metric": np.ones(3)},
        {"digests": np.zeros((2, 31), np.uint8)},
        {"digests": np.zeros(32, np.uint8)},
        {"model": SharedModel(beta=np.zeros(3), U=np.zeros((2, 2)), b_variance=1.0, noise_variance=1.0)},
        {"model": SharedModel(beta=np.zeros(3), U=np.zeros(3), b_variance=1.0, noise_variance=1.0)},
    ],
)
def test_broadcasts_whose_shapes_do_not_fit_are_refused(changes):
    """Arrays of one broadcast agree on d."""
    with pytest.raises(Refused, match=r"matching shapes|all its fields"):
        Broadcast.decode(broadcast(**changes).encode())


def test_another_protocol_is_refused_as_that(monkeypatch):
    """A newer server gets a code that says so."""
    monkeypatch.setattr(records, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    data = broadcast().encode()
    monkeypatch.undo()
    with pytest.raises(Refused) as refused:
        Broadcast.decode(data)
    assert refused.value.code == "protocol"


@pytest.mark.parametrize("missing", ["ledger_id", "purpose", "deadline", "sealing_key", "task"])
def test_a_missing_field_is_malformed(missing):
    """A signed record without one of its fields is refused, not completed."""
    header, arrays = decode(broadcast().encode())
    del header[missing]
    with pytest.raises(Refused) as refused:
        Broadcast.decode(encode(header, arrays))
    assert refused.value.code == "malformed"


def test_a_contribution_comes_back():
    """Its four fields and no more."""
    read = Contribution.decode(contribution().encode())
    assert (read.ledger_id, read.sequence, read.acknowledged) == ("ledger", 4, 4)
    assert read.total.tolist() == [1, -(2**62), 0]
    assert read.total.dtype == np.int64
    with pytest.raises(Refused, match="all its fields"):
        Contribution.decode(encode({"protocol": 1, "ledger_id": "x", "sequence": 1, "acknowledged": 1}, {}))


def test_only_contributions_carry_user_data():
    """The fields that can leave a node, listed: a new one has to be put here by somebody who thinks about it."""
    assert [field.name for field in dataclasses.fields(Contribution)] == [
        "ledger_id",
        "sequence",
        "acknowledged",
        "total",
    ]
    assert not hasattr(PersonalState, "encode")
    assert not hasattr(records, "PersonalState")
    model_fields = {field.name for field in dataclasses.fields(SharedModel)}
    assert model_fields.isdisjoint({"w", "b", "support", "theta", "precision"})


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_a_contribution_of_another_protocol_is_refused(version):
    """What a node of another version says is not guessed at."""
    fields = {"ledger_id": "x", "sequence": 1, "acknowledged": 1}
    with pytest.raises(Refused) as refusal:
        Contribution.decode(encode(fields | {"protocol": version}, {"total": np.zeros(1, np.int64)}))
    assert refusal.value.code == "protocol"


@pytest.mark.parametrize(
    "text",
    [
        b'{"arrays":{"x":["<i8",[' + b",".join([b"9" * 4000] * 900) + b']]},"header":{}}',
        b'{"arrays":{},"header":{"x":[' + b",".join([b"[]"] * 3_000_000) + b"]}}",
    ],
    ids=["a product of long numbers", "a long header"],
)
def test_bytes_that_nobody_has_signed_cost_no_more_than_reading_them(text):
    """A shape that would take minutes to multiply, or a header that would fill the memory, is refused at once."""
    begun = time.process_time()
    with pytest.raises(Refused, match="canonical"):
        decode(encode({}, {})[:8] + struct.pack("<I", len(text)) + text)
    assert time.process_time() - begun < 1
