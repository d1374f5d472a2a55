"""The posteriors in a device store, as rows of one table: their layout, and nothing of who may change them."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.linalg import symmetric, upper_triangle
from common.model import Array, IntArray, PersonalState, SharedModel
from common.tables import BoolArray


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredStates:
    """What is kept of the posteriors of n users; theta is not, as it follows from the model.

    Attributes:
        found: `n` bool; the other fields are zero, and -1 in `support`, where there is no state.
        model_digest: `n x 32` uint8, which model each state was computed with.
        w: `n x r`.
        support: `n x k` int64.
        b: `n x k`.
        scale: `n`.
        precision: `n x (r+k) x (r+k)`.
        share: `n x k`, the share of b's variance in each slot's prior; 0 where it was not kept.
        batch: `n` int64, the last batch of events that each state was updated with; 0 for none.
    """

    found: BoolArray
    model_digest: npt.NDArray[np.uint8]
    w: Array
    support: IntArray
    b: Array
    scale: Array
    precision: Array
    share: Array
    batch: IntArray

    def with_model(self, model: SharedModel) -> PersonalState:
        """The states as posteriors under the model they came from; the prior where none was found."""
        columns = np.maximum(self.support, 0)
        theta = model.beta + self.w @ model.U.T
        np.add.at(theta, (np.arange(len(theta))[:, None], columns), np.where(self.support >= 0, self.b, 0.0))
        rank, sparsity = self.w.shape[1], self.b.shape[1]
        prior = np.diag([1.0] * rank + [1 / model.b_variance] * sparsity)
        return PersonalState(
            w=self.w,
            support=self.support,
            b=self.b,
            scale=np.where(self.found, self.scale, 1.0),
            precision=np.where(self.found[:, None, None], self.precision, prior),
            theta=theta,
        )


def save_states(
    connection: sqlite3.Connection,
    ids: Sequence[int],
    state: PersonalState,
    model_digest: bytes,
    *,
    share: Array | None,
    batch: int,
    grams: Sequence[bytes | None] | None,
) -> None:
    """Keep posteriors in place of earlier ones, but for users who were forgotten.

    Args:
        connection: In a transaction.
        ids: Rows of the table of users.
        state: In their order.
        model_digest: 32 bytes that name the model it was computed with.
        share: `n x k`, the shares of b's variance, or None.
        batch: Number of the last batch of events in it; 0 for none.
        grams: What `client.kept_gram` makes of each user's moments, or None.
    """
    records = _pack(state)
    width, data = records.shape[1] * 8, records.tobytes()
    rank, sparsity = state.w.shape[1], state.b.shape[1]
    shares = [None] * len(ids) if share is None else [row.astype("<f8").tobytes() for row in share]
    moments = [None] * len(ids) if grams is None else grams
    connection.executemany(
        "INSERT OR REPLACE INTO states (user, rank, sparsity, model_digest, record, share, batch, gram) "
        "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 FROM users WHERE id = ?1 AND NOT forgotten",
        (
            (user, rank, sparsity, model_digest, data[i * width : (i + 1) * width], shares[i], batch, moments[i])
            for i, user in enumerate(ids)
        ),
    )


def load_states(connection: sqlite3.Connection, ids: list[int], layout: tuple[int, int] | None) -> StoredStates:
    """The posteriors of some rows of the table of users; `layout` as in `DeviceStore.load_states`."""
    rows = connection.execute(
        "SELECT user, rank, sparsity, model_digest, record, share, batch "
        "FROM json_each(?) CROSS JOIN states ON user = value",
        (json.dumps(ids),),
    ).fetchall()
    rank, sparsity = layout or next(((row[1], row[2]) for row in rows), (0, 0))
    return _unpack(ids, [row for row in rows if row[1:3] == (rank, sparsity)], rank, sparsity)


def _pack(state: PersonalState) -> Array:
    """One row a user: w, support, b, scale, upper triangle of the precision, as little-endian float64."""
    parts = (state.w, state.support, state.b, state.scale[:, None], upper_triangle(state.precision))
    return np.concatenate(parts, axis=1).astype("<f8")


def _unpack(ids: list[int], rows: list[tuple[Any, ...]], rank: int, sparsity: int) -> StoredStates:
    size = rank + sparsity
    width = rank + 2 * sparsity + 1 + size * (size + 1) // 2
    records = np.zeros((len(ids), width))
    records[:, rank : rank + sparsity] = -1
    digests = np.zeros((len(ids), 32), np.uint8)
    found = np.zeros(len(ids), np.bool_)
    share, batch = np.zeros((len(ids), sparsity)), np.zeros(len(ids), np.int64)
    if rows:
        place = {user: position for position, user in enumerate(ids)}
        index = [place[row[0]] for row in rows]
        records[index] = np.frombuffer(b"".join(row[4] for row in rows), "<f8").reshape(-1, width)
        digests[index] = np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, 32)
        found[index] = True
        batch[index] = [row[6] for row in rows]
        for place_of, row in zip(index, rows, strict=True):
            if row[5] is not None:
                share[place_of] = np.frombuffer(row[5], "<f8")
    w, support, b, scale, triangle = np.split(records, np.cumsum([rank, sparsity, sparsity, 1]).tolist(), axis=1)
    return StoredStates(
        found=found,
        model_digest=digests,
        w=w,
        support=support.astype(np.int64),
        b=b,
        scale=scale[:, 0],
        precision=symmetric(triangle, size),
        share=share,
        batch=batch,
    )
