"""The second moments of a user's examples as a device store keeps them beside the posterior, if its owner wants that.

A record is the upper triangle of X'DX by rows, X'Dy, y'Dy and the sum of the weights, as little-endian float64.
"""

from collections.abc import Sequence

import numpy as np

from client.batches import Batch, Design, Gram, gram_of
from client.refolding import LARGEST_GRAM
from common.errors import StorageError, UmbelError
from common.linalg import symmetric, upper_triangle
from common.model import Array
from common.tables import BoolArray


def check_keep_gram(keep_gram: bool, dimension: int) -> None:
    """Refuse to keep moments of too many features.

    Raises:
        UmbelError: If `keep_gram` is set and there are more than `LARGEST_GRAM`.
    """
    if keep_gram and dimension > LARGEST_GRAM:
        raise UmbelError(
            f"Expected at most {LARGEST_GRAM} features for keep_gram, got {dimension=}. "
            "Set keep_gram = false in node.toml; events are then carried over without X'DX."
        )


def moments_of(batch: Batch) -> Gram:
    """The moments of a batch in either form, for squared loss."""
    if isinstance(batch, Gram):
        return batch
    if isinstance(batch, Design):
        return gram_of(batch)
    raise TypeError(f"Expected a Design or a Gram, got {type(batch).__name__}.")


def to_records(gram: Gram) -> list[bytes | None]:
    """One record a user; None where a number is not finite."""
    parts = (upper_triangle(gram.G), gram.v, gram.square[:, None], gram.count[:, None])
    packed: Array = np.concatenate(parts, axis=1).astype("<f8")
    finite: BoolArray = np.all(np.isfinite(packed), axis=1)
    return [row.tobytes() if good else None for row, good in zip(packed, finite, strict=True)]


def from_records(records: Sequence[bytes | None], dimension: int) -> tuple[BoolArray, Gram]:
    """`n` bool, who has a record, and the moments (of `dimension` features), zero where there is none.

    Raises:
        StorageError: If a record is of another number of features.
    """
    size = dimension * (dimension + 1) // 2
    width = size + dimension + 2
    if any(record is not None and len(record) != 8 * width for record in records):
        raise StorageError("Expected X'DX of the model's features in the device store, got others. Restore the file.")
    data = b"".join(bytes(8 * width) if record is None else record for record in records)
    packed = np.frombuffer(data, "<f8").reshape(-1, width)
    triangle, v, rest = np.split(packed, [size, width - 2], axis=1)
    found = np.array([record is not None for record in records], np.bool_)
    return found, Gram(G=symmetric(triangle, dimension), v=v, square=rest[:, 0], count=rest[:, 1])
