"""The only place where our canonical bytes become Flower messages and come back.

A request or an answer is one array of bytes in one record, nothing else; a refusal is one public code. One
array keeps a message at the fewest objects that Flower can move. Its bytes are ours as they are, not NumPy's
file format, whose reader allocates what a header asks for before anybody has checked the header.
"""

from dataclasses import dataclass
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from common.errors import REFUSALS, Refused
from common.sealing import SIGNATURE_BYTES

# All that a node may say about why it does not answer, and what Flower's errors are read as.
_RECORD = "payload"
_STYPE = "bytes"
_CODE = "code"
_UNREACHED = frozenset({ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """That a node did not answer, and why, as one of `common.errors.REFUSALS`."""

    code: str


def request(payload: bytes, signature: bytes, *, node_id: int, action: str, ttl: float) -> Message:
    """A signed broadcast on its way to one node.

    Args:
        payload: Canonical bytes of the broadcast.
        signature: Ed25519 signature over `payload`, 64 bytes.
        node_id: Flower's number of the node.
        action: Which function of the ClientApp is called, for instance `train.contribute`.
        ttl: Seconds after which Flower drops the message and any reply to it.
    """
    if len(signature) != SIGNATURE_BYTES:
        raise ValueError(f"Expected a signature of {SIGNATURE_BYTES} bytes, got len(signature)={len(signature)}.")
    if not ttl > 0:  # Flower reads 0 as "twelve hours"
        raise ValueError(f"Expected ttl > 0 seconds, got ttl={ttl}.")
    return Message(_pack(payload + signature), node_id, action, ttl=ttl)


def read_request(message: Message) -> tuple[bytes, bytes]:
    """The payload and the signature of a request; neither is verified here.

    Raises:
        Refused: With code `malformed`, whatever else the message holds.
    """
    data = _unpack(message)
    if len(data) < SIGNATURE_BYTES:
        raise _malformed()
    return data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


def answer(payload: bytes, reply_to: Message) -> Message:
    """A node's reply to a request: canonical or sealed bytes."""
    return Message(_pack(payload), reply_to=reply_to)


def refusal(code: str, reply_to: Message) -> Message:
    """A node's refusal of a request. A code outside the public vocabulary travels as `error`."""
    return Message(RecordDict({"refusal": ConfigRecord({_CODE: _public(code)})}), reply_to=reply_to)


def read_answer(message: Message) -> bytes | Refusal:
    """What a node sent back. Flower's errors are refusals too; their text, which a node writes, is not read.

    Raises:
        Refused: With code `malformed`, if the reply is neither an answer nor a refusal.
    """
    if message.has_error():
        return Refusal(code="unavailable" if message.error.code in _UNREACHED else "client_error")
    record = _only_record(message, "refusal")
    if record is None:
        return _unpack(message)
    code = record.get(_CODE) if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(code, str):
        raise _malformed()
    return Refusal(code=_public(code))


def _pack(data: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    return RecordDict({_RECORD: ArrayRecord({_RECORD: array})})


def _unpack(message: Message) -> bytes:
    record = _only_record(message, _RECORD)
    array = record.get(_RECORD) if isinstance(record, ArrayRecord) and len(record) == 1 else None
    if not isinstance(array, Array) or not isinstance(array.data, bytes):
        raise _malformed()
    if (array.dtype, array.shape, array.stype) != ("uint8", (len(array.data),), _STYPE):
        raise _malformed()
    return array.data


def _only_record(message: Message, name: str) -> object:
    # Flower does not check the type of what it inflates as a message's content.
    content = cast(object, message.content) if message.has_content() else None
    return content.get(name) if isinstance(content, RecordDict) and len(content) == 1 else None


def _public(code: str) -> str:
    return code if code in REFUSALS else "error"


def _malformed() -> Refused:
    return Refused("malformed", "Expected one array of bytes or one refusal code in a Flower message.")
