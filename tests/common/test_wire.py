"""Canonical bytes survive Flower, and nothing else gets through."""

import ast
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.errors import REFUSALS, Refused

SIGNATURE = bytes(range(64))


@pytest.fixture(autouse=True)
def _in_a_task() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def asked(payload: bytes = b"hello") -> Message:
    return wire.request(payload, SIGNATURE, node_id=7, action="train.contribute", ttl=60.0)


def raw(data: bytes, **fields: Any) -> Array:
    return Array(**({"dtype": "uint8", "shape": (len(data),), "stype": "bytes", "data": data} | fields))


def carrying(content: RecordDict) -> Message:
    """A message with any content, as a hostile peer could make it."""
    return Message(content, 7, "train.contribute")


def through_flower(message: Message) -> Message:
    """The message after Flower has taken it apart and put it together again, as between two machines."""
    objects = get_all_nested_objects(message)
    contents = {object_id: part.deflate() for object_id, part in objects.items()}
    received = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(received, Message)
    return received


@pytest.mark.parametrize("size", [0, 1, 1000, 6 * 2**20])
def test_a_request_arrives_as_it_was_signed(size: int) -> None:
    """Payload and signature come back byte for byte, also when empty or cut into chunks by Flower."""
    payload = np.random.default_rng(0).bytes(size)
    received = through_flower(asked(payload))
    assert wire.read_request(received) == (payload, SIGNATURE)


@pytest.mark.parametrize("action", ["train.contribute", "train.fold_in"])
def test_a_request_names_its_node_action_and_lifetime(action: str) -> None:
    """What Flower routes by is what the caller said."""
    metadata = wire.request(b"", SIGNATURE, node_id=7, action=action, ttl=12.5).metadata
    assert (metadata.dst_node_id, metadata.message_type, metadata.ttl) == (7, action, 12.5)


def test_a_message_is_one_array() -> None:
    """A request is five Flower objects: message, record dict, record, array, chunk."""
    assert len(get_all_nested_objects(asked())) == 5


def test_an_answer_arrives() -> None:
    """The bytes of an answer come back, addressed to whoever asked."""
    reply = wire.answer(b"sealed", asked())
    assert wire.read_answer(through_flower(reply)) == b"sealed"
    assert reply.metadata.dst_node_id == 1


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_refusal_arrives(code: str) -> None:
    """Every public code survives the way."""
    assert wire.read_answer(through_flower(wire.refusal(code, asked()))) == wire.Refusal(code=code)


def test_a_private_code_does_not_travel() -> None:
    """A code outside the vocabulary leaves a node as `error`."""
    reply = wire.refusal("user 17 has 3 examples", asked())
    assert "user 17" not in repr(reply)
    assert wire.read_answer(reply) == wire.Refusal(code="error")


def test_a_private_code_is_not_read() -> None:
    """A code outside the vocabulary that arrives all the same is read as `error`."""
    reply = carrying(RecordDict({"refusal": ConfigRecord({"code": "user 17"})}))
    assert wire.read_answer(reply) == wire.Refusal(code="error")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, "client_error"),
        (2, "client_error"),
        (8, "client_error"),
        (99, "client_error"),
        (3, "unavailable"),
        (4, "unavailable"),
        (5, "unavailable"),
    ],
)
def test_an_error_of_flower_is_a_refusal_without_its_text(code: int, expected: str) -> None:
    """Flower's errors become one of two codes; the reason, which a node writes, is not copied."""
    refusal = wire.read_answer(Message(Error(code=code, reason="row 3 of user 17"), reply_to=asked()))
    assert refusal == wire.Refusal(code=expected)
    assert "17" not in repr(refusal)


MALFORMED = {
    "nothing": RecordDict(),
    "a config record": RecordDict({"payload": ConfigRecord({"payload": b"x" * 99})}),
    "a metric record": RecordDict({"payload": MetricRecord({"payload": 1})}),
    "another name": RecordDict({"other": ArrayRecord({"payload": raw(b"x" * 99)})}),
    "an empty record": RecordDict({"payload": ArrayRecord()}),
    "another array": RecordDict({"payload": ArrayRecord({"other": raw(b"x" * 99)})}),
    "two arrays": RecordDict({"payload": ArrayRecord({"payload": raw(b"x" * 99), "more": raw(b"")})}),
    "two records": RecordDict({"payload": ArrayRecord({"payload": raw(b"x" * 99)}), "more": MetricRecord()}),
    "another dtype": RecordDict({"payload": ArrayRecord({"payload": raw(b"x" * 99, dtype="float64")})}),
    "a huge shape": RecordDict({"payload": ArrayRecord({"payload": raw(b"x" * 99, shape=(2**62, 2**62))})}),
    "a negative shape": RecordDict({"payload": ArrayRecord({"payload": raw(b"x" * 99, shape=(-1,))})}),
    "a NumPy file": RecordDict({"payload": ArrayRecord({"payload": Array(np.zeros(99, np.uint8))})}),
    "pickles": RecordDict({"payload": ArrayRecord({"payload": raw(b"\x80\x04." * 33, stype="pickle")})}),
    "a refusal of a number": RecordDict({"refusal": ConfigRecord({"code": 5})}),
    "a refusal with more": RecordDict({"refusal": ConfigRecord({"code": "replayed", "why": "user 17"})}),
    "a refusal of an array": RecordDict({"refusal": ArrayRecord({"code": raw(b"replayed")})}),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_not_ours_is_malformed(content: RecordDict) -> None:
    """Wrong records, keys, dtypes and shapes are refused by both readers with one code."""
    for reader in (wire.read_request, wire.read_answer):
        with pytest.raises(Refused) as caught:
            reader(carrying(content))
        assert caught.value.code == "malformed"


def test_a_request_shorter_than_a_signature_is_malformed() -> None:
    """Sixty-three bytes cannot hold a signature."""
    with pytest.raises(Refused) as caught:
        wire.read_request(wire.answer(b"x" * 63, asked()))
    assert caught.value.code == "malformed"


def test_an_error_is_no_request() -> None:
    """A message that carries an error of Flower instead of content is refused by the node."""
    with pytest.raises(Refused) as caught:
        wire.read_request(Message(Error(code=2), reply_to=asked()))
    assert caught.value.code == "malformed"


def test_content_that_is_no_record_dict_is_malformed() -> None:
    """Flower inflates any object as a message's content; ours must be a record dict."""
    message = asked()
    message.__dict__["_content"] = ArrayRecord({"payload": raw(b"x" * 99)})
    for reader in (wire.read_request, wire.read_answer):
        with pytest.raises(Refused) as caught:
            reader(message)
        assert caught.value.code == "malformed"


names = st.sampled_from(["payload", "refusal", "code", "x"])
arrays = st.builds(
    lambda data, dtype, shape, stype: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    st.binary(max_size=80),
    st.sampled_from(["uint8", "float64", "O", ""]),
    st.lists(st.integers(-(2**70), 2**70), max_size=3).map(tuple),
    st.sampled_from(["bytes", "numpy.ndarray", ""]),
)
values = st.one_of(st.text(max_size=5), st.integers(-9, 9), st.binary(max_size=9), st.booleans())
records = st.one_of(
    st.dictionaries(names, arrays, max_size=2).map(ArrayRecord),
    st.dictionaries(names, values, max_size=2).map(ConfigRecord),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, records, max_size=2).map(RecordDict))
def test_nothing_but_refused_is_raised(content: RecordDict) -> None:
    """Whatever records arrive, a reader returns what it promises or raises `Refused`."""
    with contextlib.suppress(Refused):
        assert isinstance(wire.read_answer(carrying(content)), bytes | wire.Refusal)
    with contextlib.suppress(Refused):
        payload, signature = wire.read_request(carrying(content))
        assert isinstance(payload, bytes)
        assert len(signature) == 64


def test_a_caller_cannot_send_a_wrong_signature_or_lifetime() -> None:
    """A signature of another length, or a lifetime that Flower would read as twelve hours, is a mistake."""
    with pytest.raises(ValueError, match="64 bytes"):
        wire.request(b"", b"short", node_id=7, action="train.contribute", ttl=1.0)
    with pytest.raises(ValueError, match="ttl > 0"):
        wire.request(b"", SIGNATURE, node_id=7, action="train.contribute", ttl=0.0)


def test_every_code_a_node_can_raise_is_public() -> None:
    """Each literal code of a `Refused` in what a client imports is in the vocabulary."""
    root = Path(wire.__file__).parents[1]
    found = {
        call.args[0].value
        for folder in ("common", "privacy", "client")
        for path in sorted((root / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) in ("Refused", "_refuse")
        if call.args and isinstance(call.args[0], ast.Constant)
    }
    assert "malformed" in found
    assert found <= REFUSALS.keys()
