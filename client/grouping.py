"""Ragged events as batches of equal shape: how far an entity is padded depends on its own count and on nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from client.batches import padded_length
from common.model import IntArray
from common.tables import BoolArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Entities that are batched together.

    Attributes:
        entity: `n` int64.
        row: `n x m` int64, their events, in order; some event of the same entity where there is none.
        given: `n x m` bool, whether there is one.
    """

    entity: IntArray
    row: IntArray
    given: BoolArray


def groups(entity: IntArray, kind: IntArray, width: IntArray, *, chunk_bytes: int) -> Iterator[Group]:
    """All entities with events, those of one kind and one padded number of events together.

    Args:
        entity: `N` int64, whose each event is.
        kind: `n` int64 for each entity; others are never in one group.
        width: `n` int64, the same within a kind: numbers that an event takes in a group.
        chunk_bytes: For the events of a group.
    """
    counts = np.bincount(entity, minlength=kind.size)
    order = np.argsort(entity, kind="stable")
    start = np.cumsum(counts) - counts
    present = np.flatnonzero(counts)
    length = padded_length(counts[present])
    shape = np.stack([kind[present], length], axis=1)
    for of_kind, m in np.unique(shape, axis=0).tolist():
        members = present[(shape[:, 0] == of_kind) & (shape[:, 1] == m)]
        size = max(1, chunk_bytes // int(8 * m * max(1, width[members].max())))
        for first in range(0, members.size, size):
            chosen = members[first : first + size]
            place = np.arange(m)[None, :]
            given = place < counts[chosen][:, None]
            row = order[start[chosen][:, None] + np.where(given, place, 0)]
            yield Group(entity=chosen, row=row, given=given)
