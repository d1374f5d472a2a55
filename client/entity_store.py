"""Coefficients of large numbers of entities in one SQLite file: the plain GLMix form, without U.

An event's score is fixed'x plus, for each entity type, theta'x of the entity that it names. Kept of an entity are the
features it was ever seen with, their means and precision, and nothing of its events but the ids of those that have
one. Entities are not stored by name: each is a keyed hash of it, under the store's own random key.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from client.applied import TABLES, AppliedBatch, add_events, batches, event_tags
from client.incremental import Curvature, Posterior
from client.store_file import storage_errors, transaction
from common.errors import StorageError, UmbelError
from common.files import sync_directory
from common.linalg import symmetric, upper_triangle
from common.model import Array, IntArray
from common.tables import BoolArray

SCHEMA_VERSION = 1
APPLICATION_ID = 0x756D6265  # "umbe"
INTERCEPT = "intercept"
_LOCK_TIMEOUT = 10.0
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE store (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    key BLOB NOT NULL CHECK (length(key) = 32),
    settings TEXT NOT NULL,
    fixed BLOB NOT NULL,
    latest REAL
);
CREATE TABLE entities (
    id INTEGER PRIMARY KEY,
    type INTEGER NOT NULL,
    tag BLOB NOT NULL CHECK (length(tag) = 16),
    features BLOB NOT NULL,
    record BLOB NOT NULL,
    batch INTEGER NOT NULL,
    UNIQUE (type, tag)
);
{TABLES}"""


@dataclass(frozen=True, kw_only=True)
class EntitySettings:
    """What a store is of; all but `features` stays as it was made.

    Attributes:
        entities: The columns that name the entities, one for each type.
        target: The column of the target.
        features: Columns; the intercept comes before them.
        family: Loss family.
        prior_precision: Of a coefficient of which nothing is known.
        noise_variance: Of an example, for the squared family.
        curvature: What is kept of an entity's precision.
        weight: The column of weights, if any.
        timestamp: The column of times, if any.
        event_id: The column of the events' ids, if any.
    """

    entities: tuple[str, ...]
    target: str
    features: tuple[str, ...]
    family: str = "logistic"
    prior_precision: float = 1.0
    noise_variance: float = 1.0
    curvature: Curvature = "full"
    weight: str | None = None
    timestamp: str | None = None
    event_id: str | None = None

    @property
    def dimension(self) -> int:
        """Number of features, the intercept included."""
        return 1 + len(self.features)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Entities of one store that have the same number of features.

    Attributes:
        place: `n` int64, where each stands among those that were asked for.
        features: `n x p` int64, ascending; 0 is the intercept.
        posterior: Over them.
        batch: `n` int64, the last batch of events that each was updated with.
    """

    place: IntArray
    features: IntArray
    posterior: Posterior
    batch: IntArray


class EntityStore:
    """One file of entities. Make it with `create`, open it with `open`; it is also a context manager.

    Reading waits for no writer. Only one process at a time may have it open for updates.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        """Not for callers."""
        self._path, self._connection, self._lock = path, connection, lock
        self._reload()

    @classmethod
    def create(cls, path: Path, settings: EntitySettings, fixed: Array | None = None) -> None:
        """Make a store; one that is there stays, if it was made with the same settings.

        Args:
            path: The file.
            settings: What it is of.
            fixed: `d` coefficients of the fixed effect, the intercept's first; None for zeros.

        Raises:
            UmbelError: If something else is there.
            StorageError: If the disk fails.
        """
        coefficients = np.zeros(settings.dimension) if fixed is None else fixed
        with storage_errors():
            if path.exists():
                with cls.open(path) as store:
                    if store.settings != settings or not np.array_equal(store.fixed, coefficients):
                        raise UmbelError(
                            f"Expected a new store, got {path}, which was made with other settings. "
                            "Choose another path, or leave --init out to update it."
                        )
                return
            temporary = path.with_name(f"{path.name}.new")
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
                connection.executescript(_SCHEMA)
                row = (os.urandom(32), json.dumps(asdict(settings)), coefficients.astype("<f8").tobytes())
                connection.execute("INSERT INTO store (id, key, settings, fixed) VALUES (1, ?, ?, ?)", row)
            os.link(temporary, path)  # fails where somebody else was faster, which a rename would not
            temporary.unlink()
            sync_directory(path.parent)

    @classmethod
    def open(cls, path: Path, *, update: bool = False) -> Self:
        """Open a store.

        Args:
            path: The file.
            update: Whether it will be written to.

        Raises:
            UmbelError: If it is no such store, of a newer version, or another process updates it.
            StorageError: If it cannot be read.
        """
        if not path.is_file():
            raise UmbelError(f"Expected a store, got {path}, which is not there. Make one with umbel update --init.")
        lock = _locked(path) if update else None
        try:
            with storage_errors():
                connection = _connected(path)
            try:
                with storage_errors():
                    return cls(path, connection, lock)
            except BaseException:
                connection.close()
                raise
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise

    def close(self) -> None:
        """Close the file; the store is of no use afterwards."""
        with storage_errors():
            self._connection.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def batches(self) -> list[AppliedBatch]:
        """The batches of events that were applied."""
        with self._transaction(write=False) as connection:
            return batches(connection)

    def latest(self) -> float | None:
        """The latest time of an event that was applied."""
        with self._transaction(write=False) as connection:
            return _latest(connection)

    def add_features(self, names: Sequence[str]) -> None:
        """Features for all entities from now on: mean 0, the prior's precision, no fixed effect."""
        new = [name for name in dict.fromkeys(names) if name not in self.settings.features]
        if not new:
            return
        settings = replace(self.settings, features=(*self.settings.features, *new))
        fixed = np.concatenate([self.fixed, np.zeros(len(new))])
        with self._transaction(write=True) as connection:
            row = (json.dumps(asdict(settings)), fixed.astype("<f8").tobytes())
            connection.execute("UPDATE store SET settings = ?, fixed = ?", row)
        self._reload()

    def tags(self, kind: int, names: Sequence[str]) -> list[bytes]:
        """16 bytes that stand for each name of an entity of this type."""
        person = kind.to_bytes(8, "little")
        return [blake2b(name.encode(), digest_size=16, key=self._key, person=person).digest() for name in names]

    def load(self, kind: int, tags: Sequence[bytes]) -> list[Kept]:
        """Those of some entities of one type that are kept, by their number of features."""
        with self._transaction(write=False) as connection:
            return _load(connection, kind, tags, diagonal=self._diagonal)

    @contextmanager
    def changing(self) -> Iterator["EntityChanges"]:
        """One transaction in which entities are read, changed and saved together with the events that changed them."""
        with self._transaction(write=True) as connection:
            yield EntityChanges(connection, self._key, diagonal=self._diagonal)

    def _reload(self) -> None:
        ((key, settings, fixed),) = self._connection.execute("SELECT key, settings, fixed FROM store").fetchall()
        try:
            plain = json.loads(settings)
            lists = {name: tuple(plain[name]) for name in ("entities", "features")}
            self.settings = EntitySettings(**plain | lists)
            self.fixed: Array = np.frombuffer(fixed, "<f8").astype(np.float64)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"Expected settings in {self._path}, got something else. Restore the file.") from error
        self._key, self._diagonal = bytes(key), self.settings.curvature != "full"

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        with transaction(self._connection, write=write) as connection:
            yield connection


class EntityChanges:
    """What may be done to entities and events inside `EntityStore.changing`."""

    def __init__(self, connection: sqlite3.Connection, key: bytes, *, diagonal: bool) -> None:
        """Not for callers."""
        self.connection = connection
        self._key, self._diagonal = key, diagonal

    def add_events(self, kind: int, tags: Sequence[bytes], entity: IntArray, events: Sequence[str]) -> BoolArray:
        """Enter events by their ids; returns which were not known of their entity, the first of equal ones being so.

        Args:
            kind: The type of entity that ids are unique within.
            tags: Of its entities.
            entity: `N` int64, whose each event is, as a place in `tags`.
            events: `N` ids.
        """
        # the owner may not be kept yet: the first half of its tag is as good a number
        owner = np.array([int.from_bytes(tag[:8], "little", signed=True) for tag in tags], np.int64)
        prefixed = [f"{kind}:{event}" for event in events]
        return add_events(self.connection, owner[entity], event_tags(self._key, prefixed))

    def load(self, kind: int, tags: Sequence[bytes]) -> list[Kept]:
        """As `EntityStore.load`."""
        return _load(self.connection, kind, tags, diagonal=self._diagonal)

    def save(self, kind: int, tags: Sequence[bytes], features: IntArray, posterior: Posterior, batch: int) -> None:
        """Keep entities with the same number of features, in place of what was kept of them.

        Args:
            kind: Their type.
            tags: `n`.
            features: `n x p` int64, ascending.
            posterior: Over them.
            batch: The number of the batch of events.
        """
        columns = features.astype("<i4")
        records = _pack(posterior)
        self.connection.executemany(
            "INSERT INTO entities (type, tag, features, record, batch) VALUES (?, ?, ?, ?, ?) ON CONFLICT (type, tag) "
            "DO UPDATE SET features = excluded.features, record = excluded.record, batch = excluded.batch",
            ((kind, tag, columns[i].tobytes(), records[i].tobytes(), batch) for i, tag in enumerate(tags)),
        )

    def latest(self) -> float | None:
        """As `EntityStore.latest`."""
        return _latest(self.connection)

    def set_latest(self, time: float) -> None:
        """Remember the latest time of an event."""
        self.connection.execute("UPDATE store SET latest = ?", (time,))


def is_entity_store(path: Path) -> bool:
    """Whether a file says that it is one."""
    try:
        with path.open("rb") as file:
            head = file.read(72)
    except OSError:
        return False
    # the header of a SQLite file; the application's number is at byte 68
    return head.startswith(b"SQLite format 3\0") and int.from_bytes(head[68:72], "big") == APPLICATION_ID


def _latest(connection: sqlite3.Connection) -> float | None:
    ((latest,),) = connection.execute("SELECT latest FROM store")
    return None if latest is None else float(latest)


def _locked(path: Path) -> int:
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StorageError(
            f"Expected to be alone in updating {path}, got another process that does. Let it end first."
        ) from None
    return lock


def _connected(path: Path) -> sqlite3.Connection:
    if not is_entity_store(path):
        raise UmbelError(f"Expected a store of umbel, got {path}, which is something else. Choose another path.")
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT, isolation_level=None)
    try:
        for pragma in (
            "synchronous = FULL",
            "secure_delete = ON",
            "temp_store = MEMORY",  # what is personal is in no other file
            "cache_size = -65536",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        ((version,),) = connection.execute("PRAGMA user_version")
    except BaseException:
        connection.close()
        raise
    if version != SCHEMA_VERSION:
        connection.close()
        raise UmbelError(f"Expected a store of version {SCHEMA_VERSION} or older, got {version=}. Upgrade umbel.")
    return connection


def _pack(posterior: Posterior) -> Array:
    """One row an entity: means, then the precision's diagonal or its upper triangle, as little-endian float64."""
    precision = posterior.precision
    if not posterior.is_diagonal:
        precision = upper_triangle(precision)
    return np.ascontiguousarray(np.concatenate([posterior.mean, precision], axis=1), "<f8")


def _load(connection: sqlite3.Connection, kind: int, tags: Sequence[bytes], *, diagonal: bool) -> list[Kept]:
    cursor = connection.cursor()
    cursor.row_factory = None
    query = "SELECT features, record, batch FROM entities WHERE type = ? AND tag = ?"
    by_width: dict[int, list[tuple[int, bytes, bytes, int]]] = {}
    for place, tag in enumerate(tags):
        row: Any = cursor.execute(query, (kind, tag)).fetchone()
        if row is not None:
            by_width.setdefault(len(row[0]) // 4, []).append((place, *row))
    return [_unpack(p, rows, diagonal=diagonal) for p, rows in sorted(by_width.items())]


def _unpack(p: int, rows: list[tuple[int, bytes, bytes, int]], *, diagonal: bool) -> Kept:
    n = len(rows)
    try:
        records = np.frombuffer(b"".join(row[2] for row in rows), "<f8").reshape(
            n, p + (p if diagonal else p * (p + 1) // 2)
        )
    except ValueError as error:
        raise StorageError("Expected coefficients in the store, got something else. Restore the file.") from error
    precision = records[:, p:]
    if not diagonal:
        precision = symmetric(precision, p)
    return Kept(
        place=np.array([row[0] for row in rows], np.int64),
        features=np.frombuffer(b"".join(row[1] for row in rows), "<i4").reshape(n, p).astype(np.int64),
        posterior=Posterior(mean=records[:, :p].copy(), precision=np.array(precision)),
        batch=np.array([row[3] for row in rows], np.int64),
    )
