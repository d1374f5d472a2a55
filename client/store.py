"""What a node keeps: privacy filters, answered sequences and personal states, in one SQLite file.

Every charge is one transaction, on disk before a reply may leave. A filter belongs to the (user, node) and
counts what was spent on every ledger this store has answered: it never goes down, which the schema itself
checks, and it outlives `forget`. User names are not stored: a user is the HMAC of the name under the store's
own random key, so what is left of a forgotten user is that tag and its filter.
"""

import hmac
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from client.applied import AppliedBatch, add_events, batches, event_tags
from client.store_file import FULL, MEMORY, connect, shred_set_aside_files, storage_errors, transaction
from client.stored_states import StoredStates, load_states, save_states
from common.errors import Refused, StorageError, UmbelError
from common.model import Array, IntArray, PersonalState

NOTHING_ACKNOWLEDGED = (-1, bytes(32))
"""The sequence and head before a node has verified any line of a ledger."""
BoolArray = npt.NDArray[np.bool_]


class DeviceStore:
    """The durable memory of one node. Open it with `DeviceStore.open`; it is also a context manager.

    A forgotten user has a full filter and no state, until `remember` is called for that user.

    Several threads may use one store, and several processes one file: transactions are serialised, and one
    that has to wait for more than ten seconds raises `StorageError`. No filter is cached, so what failed to
    reach the disk is not charged in memory either.
    """

    def __init__(self, path: str, users: Sequence[str]) -> None:
        """Not for callers: see `open`."""
        self._path = path
        self._lock = threading.RLock()
        self._connection, self._file_lock = connect(path)
        try:
            with self._transaction(write=False) as connection:
                ((self._key, erasing),) = connection.execute("SELECT key, erasing FROM device")
            self._ids: dict[str, int] = {}
            self._version: int | None = None
            if users:
                self.enrol(users)
            if erasing:
                self._erase()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path, users: Sequence[str]) -> Self:
        """Open or make the store at `path` (or ":memory:") and enrol those of `users` it does not know.

        Users already in the store stay; those who were forgotten stay forgotten.

        Raises:
            StorageError: If the disk fails or another process keeps the store locked.
            UmbelError: If the file is a database of something else, or of a newer version of this program.
            ValueError: If a user is named twice.
        """
        if len(set(users)) != len(users):
            raise ValueError("Expected each user once, got a repeated name. Merge the user's rows.")
        return cls(str(path), users)

    def close(self) -> None:
        """Close the file; the store is of no use afterwards."""
        with self._lock, storage_errors():
            self._connection.close()
            if self._file_lock is not None:
                os.close(self._file_lock)
                self._file_lock = None

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self.close()

    def enrol(self, users: Sequence[str], *, slots: int | None = None) -> BoolArray:
        """Give a place to those of `users` who have none, in their order, while there are free places.

        A place is never given up: not by users whose data are gone, nor by users who were forgotten.

        Args:
            users: Each once.
            slots: How many places there are, or None for as many as are wanted.

        Returns:
            `n` bool, who has one of the first `slots` places, forgotten or not.

        Raises:
            ValueError: If a user is named twice.
        """
        tags = [self._tag(user) for user in users]
        if len(set(tags)) != len(tags):
            raise ValueError("Expected each user once, got a repeated name. Merge the user's rows.")
        with self._transaction(write=True) as connection:
            ((new_user_spent,),) = connection.execute("SELECT new_user_spent FROM device")
            known = dict(connection.execute("SELECT tag, id FROM users").fetchall())
            new = [tag for tag in tags if tag not in known]
            free = len(new) if slots is None else max(0, slots - len(known))
            connection.executemany(
                "INSERT INTO users (tag, spent) VALUES (?, ?)", [(tag, new_user_spent) for tag in new[:free]]
            )
            rows = connection.execute("SELECT tag, id FROM users ORDER BY id").fetchall()
        ids, served = dict(rows), {tag for tag, _ in rows[:slots]}
        # No row is ever removed or numbered anew, so these stay right whatever other processes do.
        with self._lock:
            self._ids |= {user: ids[tag] for user, tag in zip(users, tags, strict=True) if tag in ids}
        return np.array([tag in served for tag in tags], np.bool_)

    def known(self, users: Sequence[str]) -> BoolArray:
        """`n` bool, who has a place; other methods may then be asked about them. Nobody is enrolled by this."""
        tags = [self._tag(user) for user in users]
        with self._transaction(write=False) as connection:
            ids = dict(connection.execute("SELECT tag, id FROM users").fetchall())
        with self._lock:
            self._ids |= {user: ids[tag] for user, tag in zip(users, tags, strict=True) if tag in ids}
        return np.array([tag in ids for tag in tags], np.bool_)

    def forgotten(self, users: Sequence[str]) -> BoolArray:
        """`n` bool, who was forgotten and not enrolled again."""
        with self._transaction(write=False) as connection:
            gone = {i for (i,) in connection.execute("SELECT id FROM users WHERE forgotten")}
        if not gone:
            return np.zeros(len(users), np.bool_)
        return np.array([i in gone for i in self._ids_of(users)], np.bool_)

    def num_places(self) -> int:
        """How many users were ever enrolled."""
        with self._transaction(write=False) as connection:
            ((count,),) = connection.execute("SELECT count(*) FROM users")
        return int(count)

    def changed_elsewhere(self) -> bool:
        """Whether another process, or another object on this file, has written to it since this was last asked."""
        with self._transaction(write=False) as connection:
            ((version,),) = connection.execute("PRAGMA data_version")
        before, self._version = self._version, version
        return before not in (None, version)

    def remember(self, user: str) -> None:
        """Serve a forgotten user again, who keeps the place, the filter and the count; no state comes back.

        Raises:
            UmbelError: If the store does not know this user.
        """
        with self._transaction(write=True) as connection:
            changed = connection.execute("UPDATE users SET forgotten = 0 WHERE tag = ?", (self._tag(user),))
            if changed.rowcount == 0:
                raise _unknown_user()

    def spent(self, users: Sequence[str]) -> IntArray:
        """What each user has been charged so far on this node.

        Returns:
            `n` int64 in units of 2^-50, in the order of `users`; `FULL` where a filter was lost with a
            damaged file or the user is forgotten.
        """
        with self._transaction(write=False) as connection:
            ids = self._ids_of(users)
            found = connection.execute(
                "SELECT users.id, iif(forgotten, ?, spent) FROM json_each(?) CROSS JOIN users ON users.id = value",
                (FULL, json.dumps(ids)),
            )
            spent = dict(found.fetchall())
        return np.array([spent[i] for i in ids], np.int64)

    def contributions(self, users: Sequence[str]) -> IntArray:
        """`n` int64, to how many releases each user has contributed on this node, over all ledgers."""
        with self._transaction(write=False) as connection:
            ids = self._ids_of(users)
            counts = dict(
                connection.execute(
                    "SELECT users.id, contributions FROM json_each(?) CROSS JOIN users ON users.id = value",
                    (json.dumps(ids),),
                ).fetchall()
            )
        return np.array([counts[i] for i in ids], np.int64)

    def acknowledged(self, ledger_id: str) -> tuple[int, bytes]:
        """Sequence and head of the last line of this ledger that the node verified and stored."""
        with self._transaction(write=False) as connection:
            return _acknowledged(connection, ledger_id)

    def pinned_ledger(self) -> str | None:
        """The first ledger this store acknowledged: a node without a configured ledger trusts no other."""
        with self._transaction(write=False) as connection:
            row = connection.execute("SELECT ledger_id FROM ledgers ORDER BY id LIMIT 1").fetchone()
        return None if row is None else str(row[0])

    def trusted_key(self, ledger_id: str) -> bytes | None:
        """The key that signs this ledger as of the last line that was acknowledged, if one was ever stored."""
        with self._transaction(write=False) as connection:
            row = connection.execute("SELECT public_key FROM ledgers WHERE ledger_id = ?", (ledger_id,)).fetchone()
        return None if row is None else row[0]

    def acknowledge(self, ledger_id: str, sequence: int, head: bytes, *, public_key: bytes | None = None) -> None:
        """Store that the ledger was verified up to `sequence`, for a message that asks for no contribution.

        Args:
            ledger_id: Of the message.
            sequence: Its last line.
            head: The ledger's head after that line.
            public_key: The key in force there, 32 bytes; None leaves the one that is stored.

        Raises:
            Refused: With code `ledger_rollback` or `ledger_fork`, if more or something else was acknowledged.
        """
        with self._transaction(write=True) as connection:
            _advance(connection, ledger_id, sequence, head, public_key)

    def charge(  # noqa: PLR0917 -- one answer is one fact: where, what line, who, how much
        self,
        ledger_id: str,
        sequence: int,
        head: bytes,
        users: Sequence[str],
        mask: BoolArray,
        cost: int,
        *,
        limit: int = FULL,
        max_contributions: int | None = None,
        public_key: bytes | None = None,
    ) -> None:
        """Record an answer, all of it or nothing; only after this returned may the reply leave.

        Args:
            ledger_id: Ledger of the release.
            sequence: Sequence number of its RESERVE line.
            head: The ledger's head after that line.
            users: The users the node computed for.
            mask: `n` bool, whose contribution is in the reply; of a sampled release those whose coin showed heads.
            cost: What each of them is charged, in units of 2^-50; `FULL` or more for a release without noise.
            limit: No filter may exceed it. Below `FULL` it is checked again here, under the write lock.
            max_contributions: Nor may a user contribute more often than that; checked likewise.
            public_key: The key in force after that line, 32 bytes; None leaves the one that is stored.

        Raises:
            Refused: With code `replayed` if this sequence was answered before, `ledger_rollback` or
                `ledger_fork`
                if more or something else was acknowledged.
            StorageError: If the disk fails; nothing was charged.
            ValueError: If an argument is out of range, or a charged user has too little left or was forgotten.
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (len(users),):
            raise ValueError(f"Expected {len(users)} booleans, got mask of {mask.dtype} and shape {mask.shape}.")
        if cost <= 0:
            raise ValueError(f"Expected 0 < cost, got {cost=}.")
        cost = min(cost, FULL)
        with self._transaction(write=True) as connection:
            if connection.execute(
                "SELECT 1 FROM charges WHERE ledger_id = ? AND sequence = ?", (ledger_id, sequence)
            ).fetchone():
                raise Refused("replayed", "Expected a sequence that was not answered before, got an answered one.")
            _advance(connection, ledger_id, sequence, head, public_key)
            ids = np.array(self._ids_of(users), np.int64)
            size = int(ids.max(initial=-1)) + 1  # of all, so that nobody's coin shows in how much is written
            connection.execute(
                "INSERT INTO charges (ledger_id, sequence, cost, charged) VALUES (?, ?, ?, ?)",
                (ledger_id, sequence, cost, _to_bitmap(ids[mask], size)),
            )
            _check_limits(connection, ids[mask], limit - cost if limit < FULL else FULL, max_contributions)
            _raise_filters(connection, ids, mask, cost)

    def charged(self, ledger_id: str, sequence: int, users: Sequence[str]) -> BoolArray | None:
        """Who was charged when this sequence was answered, in the order of `users`; None if it was not."""
        with self._transaction(write=False) as connection:
            ids = np.array(self._ids_of(users), np.int64)
            row = connection.execute(
                "SELECT charged FROM charges WHERE ledger_id = ? AND sequence = ?", (ledger_id, sequence)
            ).fetchone()
        return None if row is None else np.isin(ids, _from_bitmap(row[0]))

    def save_states(
        self,
        users: Sequence[str],
        state: PersonalState,
        model_digest: bytes,
        *,
        grams: Sequence[bytes | None] | None = None,
    ) -> None:
        """Keep the posteriors of `users`, all of them or none, in place of earlier ones.

        Those of forgotten users are dropped.

        Args:
            users: In the order of the state's rows.
            state: r + 2k numbers, the scale and the precision are kept as float64, theta is not.
            model_digest: 32 bytes that name the model the state was computed with.
            grams: For each user what `client.kept_gram` makes of the moments of all examples behind the state, or
                None; by default none are kept.
        """
        if len(model_digest) != 32 or len(state.w) != len(users):
            raise ValueError(
                f"Expected a state of {len(users)} users and a digest of 32 bytes, "
                f"got {len(state.w)} users and {len(model_digest)} bytes."
            )
        with self._transaction(write=True) as connection:
            save_states(connection, self._ids_of(users), state, model_digest, share=None, batch=0, grams=grams)

    def load_states(self, users: Sequence[str], layout: tuple[int, int] | None = None) -> StoredStates:
        """The posteriors of `users`, in their order.

        Args:
            users: Any users of this store.
            layout: Rank and sparsity to look for, by default those of the first user with a state; users with
                a state of another layout are not found.
        """
        with self._transaction(write=False) as connection:
            return load_states(connection, self._ids_of(users), layout)

    def batches(self) -> list[AppliedBatch]:
        """The batches of events that states were updated with."""
        with self._transaction(write=False) as connection:
            return batches(connection)

    @contextmanager
    def changing(self) -> Iterator["StateChanges"]:
        """One transaction in which states are read, changed and saved together with the events that changed them.

        Nobody else writes to the file meanwhile, so it has to be short.
        """
        with self._transaction(write=True) as connection:
            yield StateChanges(connection, self._key, self._ids_of)

    def save_model(self, digest: bytes, record: bytes) -> None:
        """Keep a released model beside the states; others that no state was computed with are dropped.

        Args:
            digest: 32 bytes, as in `save_states`.
            record: Whatever `load_model` shall return.
        """
        with self._transaction(write=True) as connection:
            connection.execute("INSERT OR REPLACE INTO models (digest, record) VALUES (?, ?)", (digest, record))
            connection.execute(
                "DELETE FROM models WHERE digest != ? AND digest NOT IN (SELECT model_digest FROM states)", (digest,)
            )

    def load_model(self, digest: bytes | None = None) -> bytes | None:
        """The model of this digest, or the one saved last; None where there is none."""
        chosen, given = ("1", ()) if digest is None else ("digest = ?", (digest,))
        query = f"SELECT record FROM models WHERE {chosen} ORDER BY id DESC LIMIT 1"  # noqa: S608
        with self._transaction(write=False) as connection:
            row = connection.execute(query, given).fetchone()
        return None if row is None else bytes(row[0])

    def forget(self, user: str) -> None:
        """Erase a user's states and charge records from the file, its log and every file set aside from it.

        What stays is the tag and the filter. If this fails or the process dies, the next `open` finishes the
        erasure.

        Raises:
            StorageError: If the disk fails or another process reads the store and so keeps its log alive.
            UmbelError: If the store does not know this user.
        """
        with self._transaction(write=True) as connection:
            row = connection.execute("SELECT id FROM users WHERE tag = ?", (self._tag(user),)).fetchone()
            if row is None:
                raise _unknown_user()
            connection.execute("DELETE FROM states WHERE user = ?", row)
            connection.execute("DELETE FROM events WHERE owner = ?", row)
            connection.execute("UPDATE users SET forgotten = 1 WHERE id = ?", row)
            connection.execute("UPDATE device SET erasing = 1")
            for rowid, charged in connection.execute("SELECT rowid, charged FROM charges").fetchall():
                others = _to_bitmap(np.setdiff1d(_from_bitmap(charged), row), 8 * len(charged))
                connection.execute("UPDATE charges SET charged = ? WHERE rowid = ?", (others, rowid))
        self._erase()

    def _erase(self) -> None:
        """Leave no copy of deleted bytes.

        `secure_delete` overwrites what is deleted, but not what a b-tree page left behind when it was split
        (seen for about one deleted row in a hundred), so the file is written anew and its log emptied.
        """
        with self._lock, storage_errors():
            self._connection.execute("VACUUM")
            ((busy, _, _),) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if busy:
                raise StorageError(
                    "Expected to be alone with the device store, got another reader; the state is deleted, "
                    "but a copy is still in the log. Stop the other process and forget the user again."
                )
            if self._path != MEMORY:
                shred_set_aside_files(Path(self._path))
            self._connection.execute("UPDATE device SET erasing = 0")

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._connection, write=write) as connection:
            yield connection

    def _tag(self, user: str) -> bytes:
        return hmac.digest(self._key, user.encode(), "sha256")

    def _ids_of(self, users: Sequence[str]) -> list[int]:
        try:
            ids = [self._ids[user] for user in users]
        except KeyError:
            raise ValueError("Expected users that were enrolled, got an unknown one. Name it in `open`.") from None
        if len(set(ids)) != len(ids):
            raise ValueError("Expected each user once, got a repeated one.")
        return ids


class StateChanges:
    """What may be done to states and events inside `DeviceStore.changing`."""

    def __init__(
        self, connection: sqlite3.Connection, key: bytes, ids_of: Callable[[Sequence[str]], list[int]]
    ) -> None:
        """Not for callers."""
        self.connection = connection
        self._key, self._ids_of = key, ids_of

    def forgotten(self, users: Sequence[str]) -> BoolArray:
        """`n` bool, who was forgotten and not enrolled again."""
        gone = {i for (i,) in self.connection.execute("SELECT id FROM users WHERE forgotten")}
        return np.array([i in gone for i in self._ids_of(users)], np.bool_)

    def add_events(self, users: Sequence[str], user: IntArray, events: Sequence[str]) -> BoolArray:
        """Enter events by their ids; returns which were not known of their user, the first of equal ones being so.

        Args:
            users: Each once.
            user: `N` int64, whose each event is, as a place in `users`.
            events: `N` ids.
        """
        ids = np.array(self._ids_of(users), np.int64)
        return add_events(self.connection, ids[user], event_tags(self._key, events))

    def model_digests(self, users: Sequence[str]) -> list[bytes | None]:
        """Which model each user's state was computed with, None where there is no state."""
        query = "SELECT model_digest FROM states WHERE user = ?"
        rows = (self.connection.execute(query, (i,)).fetchone() for i in self._ids_of(users))
        return [None if row is None else bytes(row[0]) for row in rows]

    def models(self) -> list[tuple[bytes, bytes, int | None]]:
        """Digest, record and the sparsity of the states of each model that is kept, the one saved last at the end."""
        query = "SELECT digest, record, (SELECT max(sparsity) FROM states WHERE model_digest = digest) FROM models"
        return [(bytes(d), bytes(r), sparsity) for d, r, sparsity in self.connection.execute(f"{query} ORDER BY id")]

    def load(self, users: Sequence[str], layout: tuple[int, int]) -> StoredStates:
        """As `DeviceStore.load_states`."""
        return load_states(self.connection, self._ids_of(users), layout)

    def grams(self, users: Sequence[str]) -> list[bytes | None]:
        """What was saved of each user's moments, None where there is nothing."""
        query = "SELECT gram FROM states WHERE user = ?"
        rows = (self.connection.execute(query, (i,)).fetchone() for i in self._ids_of(users))
        return [None if row is None or row[0] is None else bytes(row[0]) for row in rows]

    def save(
        self,
        users: Sequence[str],
        state: PersonalState,
        model_digest: bytes,
        *,
        share: Array,
        batch: int,
        grams: Sequence[bytes | None] | None = None,
    ) -> None:
        """As `DeviceStore.save_states`, with the shares of b's variance and the number of the batch of events."""
        save_states(self.connection, self._ids_of(users), state, model_digest, share=share, batch=batch, grams=grams)


def _acknowledged(connection: sqlite3.Connection, ledger_id: str) -> tuple[int, bytes]:
    row = connection.execute("SELECT sequence, head FROM ledgers WHERE ledger_id = ?", (ledger_id,)).fetchone()
    return NOTHING_ACKNOWLEDGED if row is None else (row[0], row[1])


def _unknown_user() -> UmbelError:
    return UmbelError("Expected a user of this store, got one it does not know. Check the name.")


def _advance(
    connection: sqlite3.Connection, ledger_id: str, sequence: int, head: bytes, public_key: bytes | None
) -> None:
    if sequence < 0 or len(head) != 32:
        raise ValueError(f"Expected 0 <= sequence and a head of 32 bytes, got {sequence=} and {len(head)} bytes.")
    moved = connection.execute(
        "INSERT INTO ledgers (ledger_id, sequence, head, public_key) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (ledger_id) DO UPDATE SET sequence = excluded.sequence, head = excluded.head, "
        "public_key = coalesce(excluded.public_key, public_key) "
        "WHERE excluded.sequence > sequence OR (excluded.sequence = sequence AND excluded.head = head)",
        (ledger_id, sequence, head, public_key),
    )
    if moved.rowcount == 0:
        known, _ = _acknowledged(connection, ledger_id)
        raise Refused(
            "ledger_rollback" if sequence < known else "ledger_fork",
            f"Expected the ledger to go on from sequence {known}, got {sequence=}.",
        )


def _check_limits(connection: sqlite3.Connection, charged: IntArray, most: int, max_contributions: int | None) -> None:
    """Raise where somebody who is to be charged was forgotten, has spent more than `most`, or contributed enough."""
    ((barred,),) = connection.execute(
        "SELECT EXISTS (SELECT 1 FROM json_each(?) CROSS JOIN users ON users.id = value "
        "WHERE forgotten OR spent > ? OR contributions >= ?)",
        (json.dumps(charged.tolist()), most, FULL if max_contributions is None else max_contributions),
    )
    if barred:
        raise ValueError("Expected only users that stay within their limits in `mask`, got another. Admit them first.")


def _raise_filters(connection: sqlite3.Connection, ids: IntArray, mask: BoolArray, cost: int) -> None:
    """Add the cost to the filters of those in `mask`; the others' are written as they are, which takes as long."""
    # Saturating, because SQLite would turn a sum beyond 2^63 into a float.
    for added, times, some in ((cost, 1, ids[mask]), (0, 0, ids[~mask])):
        connection.execute(
            "UPDATE users SET spent = iif(spent > ?1 - ?2, ?1, spent + ?2), contributions = contributions + ?3 "
            "WHERE id IN (SELECT value FROM json_each(?4))",
            (FULL, added, times, json.dumps(some.tolist())),
        )


def _to_bitmap(ids: IntArray, size: int) -> bytes:
    """Bit i < size for row id i, the lowest bit of each byte first."""
    bits = np.zeros(size, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _from_bitmap(bitmap: bytes) -> IntArray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))
