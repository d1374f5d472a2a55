"""What travels between server and nodes, as canonical bytes; no Flower type in sight.

A record is a header of plain values and a few arrays. Its encoding is unique: a decoder that would not
encode to the very same bytes refuses, so a signature over the bytes is a signature over the meaning.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import Refused
from common.model import Array, IntArray, SharedModel

PROTOCOL_VERSION = 1
_MAGIC = b"umbel\x00\x00\x01"
_LONGEST_HEADER = 2**22  # two ledger lines at their longest, and thousands of KEY lines
_MOST_DIMENSIONS = 4
_DTYPES: dict[str, np.dtype[Any]] = {"<f8": np.dtype("<f8"), "<i8": np.dtype("<i8"), "|u1": np.dtype("|u1")}


def canonical_json(value: Any) -> bytes:
    """The one encoding of a JSON value that counts: sorted keys, no spaces, ASCII, no floats that are not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def encode(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Magic, header length, canonical JSON header, then the arrays' bytes in the order of their names."""
    packed = {
        name: np.ascontiguousarray(value, value.dtype.newbyteorder("<")) for name, value in sorted(arrays.items())
    }
    described = {name: [value.dtype.str, list(value.shape)] for name, value in packed.items()}
    text = canonical_json({"arrays": described, "header": dict(header)})
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, *(value.tobytes() for value in packed.values())])


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Inverse of `encode`.

    Raises:
        Refused: With code `malformed`, if `data` is not the canonical encoding of a record.
    """
    try:
        (length,) = struct.unpack_from("<I", data, len(_MAGIC))
        if length > _LONGEST_HEADER:  # of bytes that nobody may have signed yet
            raise ValueError(f"Expected a header of at most {_LONGEST_HEADER} bytes, got {length}.")
        start = len(_MAGIC) + 4
        text = data[start : start + length]
        parsed = json.loads(text)
        arrays: dict[str, npt.NDArray[Any]] = {}
        position = start + length
        for name, (dtype, shape) in parsed["arrays"].items():
            count = _entries(shape, len(data))
            values: npt.NDArray[Any] = np.frombuffer(data, _DTYPES[str(dtype)], count, position)
            arrays[str(name)] = values.reshape(shape)
            position += values.nbytes
        header = parsed["header"]
        if isinstance(header, dict) and position == len(data) and encode(header, arrays) == data:
            return header, arrays
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, OverflowError):
        pass
    raise Refused("malformed", f"Expected one canonical record, got {len(data)} bytes that are not.")


def _entries(shape: Any, most: int) -> int:
    """How many numbers an array of this shape has; a product of many long integers would take hours.

    Raises:
        ValueError: If it is no shape of an array that fits into `most` bytes.
    """
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"Expected a shape of at most {_MOST_DIMENSIONS} sides.")
    if not all(type(side) is int and 0 <= side <= most for side in shape):
        raise ValueError(f"Expected sides of at most {most}.")
    return math.prod(shape)


def check_protocol(header: Mapping[str, Any]) -> None:
    """Check the version that every message states.

    Raises:
        Refused: With code `protocol`, if it is another.
    """
    if header.get("protocol") != PROTOCOL_VERSION:
        raise Refused("protocol", f"Expected protocol={PROTOCOL_VERSION}, got {header.get('protocol')!r}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Broadcast:
    """What the server says to every invited node in one round; signed as a whole with the ledger's key.

    Attributes:
        ledger_id: Which population's ledger is charged.
        run: Which run of that ledger.
        server_round: Number of the round within the run, from 1; 0 for `fold_in`.
        purpose: `train` asks for a contribution, `fold_in` asks only that users personalize and keep it.
        lines: Raw ledger lines: every KEY line; the last RESTORE line where a node may have seen what was lost; for a
            sampled run its START line; for `train` the RESERVE line, which alone says noise, clipping norm, shares
            and grid.
        digests_from: Sequence number of the first line in `digests`.
        digests: `t x 32` uint8, SHA-256 of each raw ledger line from `digests_from` up to the head.
        deadline: Unix time in seconds after which a reply no longer counts.
        task: Public settings of the computation (family, sparsity, ...), plain values.
        model: The prior of this round.
        metric: `d x d` lower triangular R, the public metric in which gradients are clipped; `0 x 0` for none.
        schema: `DataSchema.digest` of the data that the model is for, hex.
        sealing_key: X25519 public key of this release (32 bytes), or empty where contributions are not sealed.
    """

    ledger_id: str
    run: str
    server_round: int
    purpose: str
    lines: tuple[str, ...]
    digests_from: int
    digests: npt.NDArray[np.uint8]
    deadline: int
    task: Mapping[str, Any]
    model: SharedModel
    metric: Array
    schema: str
    sealing_key: bytes = b""

    def encode(self) -> bytes:
        """The bytes that are signed."""
        header = {
            "protocol": PROTOCOL_VERSION,
            "ledger_id": self.ledger_id,
            "run": self.run,
            "server_round": self.server_round,
            "purpose": self.purpose,
            "lines": list(self.lines),
            "digests_from": self.digests_from,
            "deadline": self.deadline,
            "task": dict(self.task),
            "b_variance": self.model.b_variance,
            "noise_variance": self.model.noise_variance,
            "schema": self.schema,
            "sealing_key": self.sealing_key.hex(),
        }
        arrays: dict[str, npt.NDArray[Any]] = {
            "beta": self.model.beta,
            "U": self.model.U,
            "metric": self.metric,
            "digests": self.digests,
        }
        return encode(header, arrays)

    @classmethod
    def decode(cls, data: bytes) -> "Broadcast":
        """Inverse of `encode`; `Refused` with code `malformed` or `protocol` where it has none."""
        header, arrays = decode(data)
        check_protocol(header)
        try:
            model = SharedModel(
                beta=arrays["beta"],
                U=arrays["U"],
                b_variance=float(header["b_variance"]),
                noise_variance=float(header["noise_variance"]),
            )
            broadcast = cls(
                ledger_id=str(header["ledger_id"]),
                run=str(header["run"]),
                server_round=int(header["server_round"]),
                purpose=str(header["purpose"]),
                lines=tuple(str(line) for line in header["lines"]),
                digests_from=int(header["digests_from"]),
                digests=arrays["digests"],
                deadline=int(header["deadline"]),
                task=dict(header["task"]),
                model=model,
                metric=arrays["metric"],
                schema=str(header["schema"]),
                sealing_key=bytes.fromhex(header["sealing_key"]),
            )
            d = broadcast.model.beta.size
            shapes_fit = broadcast.model.U.ndim == 2 and broadcast.model.U.shape[0] == d
            shapes_fit &= broadcast.metric.shape in ((d, d), (0, 0)) and broadcast.digests.shape[1:] == (32,)
            finite = all(np.isfinite(a).all() for a in (broadcast.model.beta, broadcast.model.U, broadcast.metric))
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("malformed", "Expected a broadcast with all its fields.") from error
        if not (shapes_fit and finite):
            raise Refused("malformed", "Expected finite arrays of matching shapes in a broadcast.")
        return broadcast


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """The only record with user data in it that leaves a node: an integer sum, clipped per user.

    Attributes:
        ledger_id: Ledger that was charged.
        sequence: Sequence number of the RESERVE line that is answered.
        acknowledged: Last ledger line this node has verified and stored.
        total: `D` int64, the sum over the node's users of their clipped vectors on the grid.
    """

    ledger_id: str
    sequence: int
    acknowledged: int
    total: IntArray

    def encode(self) -> bytes:
        """Canonical bytes."""
        header = {
            "protocol": PROTOCOL_VERSION,
            "ledger_id": self.ledger_id,
            "sequence": self.sequence,
            "acknowledged": self.acknowledged,
        }
        return encode(header, {"total": self.total})

    @classmethod
    def decode(cls, data: bytes) -> "Contribution":
        """Inverse of `encode`; `Refused` with code `malformed` or `protocol` where it has none."""
        header, arrays = decode(data)
        check_protocol(header)
        try:
            return cls(
                ledger_id=str(header["ledger_id"]),
                sequence=int(header["sequence"]),
                acknowledged=int(header["acknowledged"]),
                total=arrays["total"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("malformed", "Expected a contribution with all its fields.") from error
