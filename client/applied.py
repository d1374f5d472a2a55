"""Which events a store has been updated with, in the same file and the same transaction as what they changed.

A batch is a file, or what came through a pipe. It is known by the position it was read to, so that a killed update
goes on where it was, and a batch that was applied is not applied again. Single events are known where they have ids.
Batches are numbered, so that the past is discounted once for each of them, however many pieces they were read in.
"""

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import StorageError, UmbelError
from common.model import IntArray
from common.streaming import Position
from common.tables import BoolArray

TABLES = """
CREATE TABLE batches (
    id INTEGER PRIMARY KEY,
    name TEXT UNIQUE,
    byte_offset INTEGER NOT NULL,
    last_row INTEGER NOT NULL,
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    number INTEGER NOT NULL,
    events INTEGER NOT NULL,
    done INTEGER NOT NULL
);
CREATE TABLE events (
    owner INTEGER NOT NULL,
    tag BLOB NOT NULL CHECK (length(tag) = 16),
    PRIMARY KEY (owner, tag)
) WITHOUT ROWID;
"""
_COLUMNS = "id, name, byte_offset, last_row, digest, number, events, done"


@dataclass(frozen=True, kw_only=True)
class AppliedBatch:
    """A batch as far as it was applied.

    Attributes:
        id: Row of the table.
        name: Its id as given; None where it is known by its bytes only.
        position: How far it was read.
        number: Of the batch; the past is discounted where this is new to an entity.
        events: How many rows were read since the number changed.
        done: Whether its end was reached.
    """

    id: int
    name: str | None
    position: Position
    number: int
    events: int
    done: bool


def batches(connection: sqlite3.Connection) -> list[AppliedBatch]:
    """All of them, oldest first."""
    return [_batch(row) for row in connection.execute(f"SELECT {_COLUMNS} FROM batches ORDER BY id")]  # noqa: S608


def begin(connection: sqlite3.Connection, name: str | None, position: Position) -> AppliedBatch:
    """Enter a new batch, of which `position` was read."""
    number = next_number(connection)
    try:
        done = connection.execute(
            "INSERT INTO batches (name, byte_offset, last_row, digest, number, events, done) "
            "VALUES (?, ?, ?, ?, ?, 0, 0)",
            (name, position.offset, position.row, position.digest, number),
        )
    except sqlite3.IntegrityError:
        raise _elsewhere() from None
    return AppliedBatch(id=int(done.lastrowid or 0), name=name, position=position, number=number, events=0, done=False)


def next_number(connection: sqlite3.Connection) -> int:
    """One that no batch has had."""
    ((last,),) = connection.execute("SELECT coalesce(max(number), 0) FROM batches")
    return int(last) + 1


def advance(connection: sqlite3.Connection, before: AppliedBatch, after: AppliedBatch) -> None:
    """Record that a batch was applied from `before` to `after`.

    Raises:
        UmbelError: If it is not at `before` any more: somebody else applies it too.
    """
    position = after.position
    changed = connection.execute(
        "UPDATE batches SET byte_offset = ?, last_row = ?, digest = ?, number = ?, events = ?, done = ? "
        "WHERE id = ? AND byte_offset = ? AND number = ?",
        (
            *(position.offset, position.row, position.digest, after.number, after.events, after.done),
            *(before.id, before.position.offset, before.number),
        ),
    )
    if changed.rowcount != 1:
        raise _elsewhere()


def event_tags(key: bytes, events: Sequence[str]) -> list[bytes]:
    """16 bytes that stand for an event's id, under the store's own key."""
    return [hashlib.blake2b(event.encode(), digest_size=16, key=key).digest() for event in events]


def add_events(connection: sqlite3.Connection, owners: IntArray, tags: Sequence[bytes]) -> BoolArray:
    """Enter events of the store's owners; returns which were new, the first of equal ones being so."""
    insert = "INSERT OR IGNORE INTO events (owner, tag) VALUES (?, ?)"
    execute = connection.execute
    pairs = zip(owners.tolist(), tags, strict=True)
    return np.fromiter((execute(insert, pair).rowcount == 1 for pair in pairs), np.bool_, count=len(tags))


def _batch(row: tuple[int, str | None, int, int, bytes, int, int, int]) -> AppliedBatch:
    id_, name, offset, last_row, digest, number, events, done = row
    if offset < 0 or last_row < 0:
        raise StorageError("Expected batches of events in the store, got something else. Restore the file.")
    return AppliedBatch(
        id=id_,
        name=name,
        position=Position(offset=offset, row=last_row, digest=digest),
        number=number,
        events=events,
        done=bool(done),
    )


def _elsewhere() -> UmbelError:
    return UmbelError("Expected to be alone in applying these events, got another update of them. Let it end first.")
