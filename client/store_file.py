"""The file of a device store: made whole or not at all, checked when opened, set aside and salvaged when
damaged.

A file that SQLite cannot read, or whose integrity check fails, is renamed to `FILE.corrupt-<n>`. Its filters
are carried into a new file where they can be read; a filter that cannot be read is taken to be full, so that
its user contributes nothing. Personal states are not carried over: users start again from the prior.
"""

import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.applied import TABLES
from common.errors import StorageError, UmbelError
from common.files import sync_directory
from common.model import IntArray

MEMORY = ":memory:"
FULL = 2**62
"""The filter of a user who can contribute no more: above every limit, and no cost changes it."""
SCHEMA_VERSION = 4  # 2 and 3 were never released
_APPLICATION_ID = 0x756D6231  # "umb1"
_LOCK_TIMEOUT = 10.0
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_logger = logging.getLogger(__name__)

_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE device (
    key BLOB NOT NULL CHECK (length(key) = 32),
    new_user_spent INTEGER NOT NULL,
    erasing INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE users (
    id INTEGER PRIMARY KEY,
    tag BLOB NOT NULL UNIQUE CHECK (length(tag) = 32),
    spent INTEGER NOT NULL CHECK (typeof(spent) = 'integer' AND spent BETWEEN 0 AND {FULL}),
    forgotten INTEGER NOT NULL DEFAULT 0,
    contributions INTEGER NOT NULL DEFAULT 0 CHECK (typeof(contributions) = 'integer' AND contributions >= 0)
);
CREATE TRIGGER a_filter_never_goes_down BEFORE UPDATE OF spent ON users WHEN NEW.spent < OLD.spent
BEGIN SELECT RAISE(ABORT, 'a filter never goes down'); END;
CREATE TRIGGER a_filter_outlives_its_user BEFORE DELETE ON users
BEGIN SELECT RAISE(ABORT, 'a filter outlives its user'); END;
CREATE TRIGGER a_count_never_goes_down BEFORE UPDATE OF contributions ON users
WHEN NEW.contributions < OLD.contributions
BEGIN SELECT RAISE(ABORT, 'a count never goes down'); END;
CREATE TABLE ledgers (
    id INTEGER PRIMARY KEY,
    ledger_id TEXT NOT NULL UNIQUE,
    sequence INTEGER NOT NULL CHECK (sequence >= 0),
    head BLOB NOT NULL CHECK (length(head) = 32),
    public_key BLOB CHECK (public_key IS NULL OR length(public_key) = 32)
);
CREATE TABLE charges (
    ledger_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    cost INTEGER NOT NULL CHECK (cost > 0),
    charged BLOB NOT NULL,
    PRIMARY KEY (ledger_id, sequence)
);
CREATE TABLE states (
    user INTEGER PRIMARY KEY REFERENCES users (id),
    rank INTEGER NOT NULL,
    sparsity INTEGER NOT NULL,
    model_digest BLOB NOT NULL,
    record BLOB NOT NULL,
    share BLOB,
    batch INTEGER NOT NULL DEFAULT 0,
    gram BLOB
);
CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    record BLOB NOT NULL
);
{TABLES}"""

_FROM_VERSION_1 = f"""
ALTER TABLE users ADD COLUMN contributions INTEGER NOT NULL DEFAULT 0
    CHECK (typeof(contributions) = 'integer' AND contributions >= 0);
CREATE TRIGGER a_count_never_goes_down BEFORE UPDATE OF contributions ON users
WHEN NEW.contributions < OLD.contributions
BEGIN SELECT RAISE(ABORT, 'a count never goes down'); END;
ALTER TABLE ledgers ADD COLUMN public_key BLOB CHECK (public_key IS NULL OR length(public_key) = 32);
CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    record BLOB NOT NULL
);
ALTER TABLE states ADD COLUMN share BLOB;
ALTER TABLE states ADD COLUMN batch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE states ADD COLUMN gram BLOB;
{TABLES}"""


@dataclass(frozen=True, kw_only=True)
class _Salvage:
    """The rows that a new file starts with.

    Attributes:
        device: Columns `key` and `new_user_spent`.
        users: Columns `id`, `tag`, `spent`, `forgotten`, `contributions`.
        ledgers: Columns of the table.
        charges: Columns of the table.
    """

    device: tuple[bytes, int]
    users: list[tuple[int, bytes, int, int, int]]
    ledgers: list[tuple[Any, ...]]
    charges: list[tuple[Any, ...]]


def _nothing(new_user_spent: int) -> _Salvage:
    return _Salvage(device=(os.urandom(32), new_user_spent), users=[], ledgers=[], charges=[])


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what SQLite or the file system raises into `StorageError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StorageError(
                f"Expected the device store to be free within {_LOCK_TIMEOUT:.0f} s, got a lock held "
                "elsewhere. Stop the other process that uses it."
            ) from error
        raise _failed(error) from error
    except (sqlite3.Error, OSError) as error:
        raise _failed(error) from error


@contextmanager
def transaction(connection: sqlite3.Connection, *, write: bool) -> Iterator[sqlite3.Connection]:
    """All of what is done in here, or nothing.

    Raises:
        StorageError: What SQLite or the file system raises.
    """
    with storage_errors():
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _failed(error: Exception) -> StorageError:
    return StorageError(
        f"Expected the device store to be readable and writable, got error='{error}'. Nothing was recorded. "
        "Check the disk's space, health and permissions."
    )


def connect(path: str) -> tuple[sqlite3.Connection, int | None]:
    """Open the store at `path`, or in memory, after whatever has to happen to make it a sound one.

    Every process that has the store open shares a lock on `FILE.lock`: a damaged file is set aside only where
    nobody else could still write charges into it.

    Returns:
        The connection, and the descriptor of the lock, to be closed after it.

    Raises:
        StorageError: If the disk fails, or another process keeps the store locked or uses a damaged one.
        UmbelError: If the file is a database of something else, or of a newer version of this program.
    """
    with storage_errors():
        if path == MEMORY:
            connection = _configured(path)
            _fill(connection, _nothing(0))
            return connection, None
        file = Path(path)
        if file.exists() and not file.is_file():
            raise UmbelError(f"Expected the path of a file, got path='{path}'. Choose another path.")
        lock = os.open(_with_suffix(file, ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if _locked_alone(lock):
                _make_sound(file)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (file.exists() and _is_sound(file)):
                raise StorageError(
                    f"Expected a sound device store, got path='{path}', damaged and in use by another process. "
                    "Stop that process and start again."
                )
            connection = _configured(path)
            if (version := _version(connection)) != SCHEMA_VERSION:
                connection.close()
                raise StorageError(
                    f"Expected a device store of version {SCHEMA_VERSION}, got {version=} and an older program that "
                    "uses it. Stop that process and start again."
                )
            return connection, lock
        except BaseException:
            os.close(lock)
            raise


def set_aside_files(path: Path) -> list[Path]:
    """The damaged files set aside from this store, oldest first; a `-wal` and `-shm` may be beside each."""
    pattern = re.compile(re.escape(path.name) + r"\.corrupt-(\d+)")
    found = [(match, entry) for entry in path.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found, key=lambda pair: int(pair[0][1]))]


def shred_set_aside_files(path: Path) -> None:
    """Overwrite with zeros and remove what was set aside from this store: personal states are in there."""
    for damaged in set_aside_files(path):
        for entry in _with_companions(damaged)[::-1]:
            with entry.open("r+b") as file:
                file.write(bytes(entry.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            entry.unlink()


def _configured(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "secure_delete = ON",
        "foreign_keys = ON",
        "temp_store = MEMORY",  # what is personal is in no other file
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


def _locked_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_sound(path: Path) -> None:
    if path.exists():
        _restrict(path)
        if _is_sound(path):
            _migrate(path)
            return
        _set_aside(path)
    # A crash between setting aside and making the new file leaves only set-aside files: take up from there.
    _set_aside_log(path)
    damaged = set_aside_files(path)
    if damaged:
        _logger.warning(
            "Expected a sound device store at %s, got a damaged file, now %s. Personal states start again "
            "from the prior; users whose filter could not be read contribute nothing.",
            path,
            damaged[-1],
        )
    _create(path, _salvage(damaged[-1]) if damaged else _nothing(0))


def _is_sound(path: Path) -> bool:
    if path.stat().st_size == 0 and not _with_suffix(path, "-wal").exists():
        return False  # `_create` never leaves an empty file, so it was cut
    try:
        with closing(sqlite3.connect(path, timeout=_LOCK_TIMEOUT)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            ((application_id,),) = connection.execute("PRAGMA application_id")
            if application_id != _APPLICATION_ID and not {"users", "charges"} <= tables:
                raise UmbelError(
                    f"Expected a device store, got path='{path}', a database of something else. Choose another path."
                )
            version = _version(connection)
            if version > SCHEMA_VERSION:
                raise UmbelError(
                    f"Expected a device store of version {SCHEMA_VERSION} or older, got {version=}. Upgrade umbel."
                )
            report = connection.execute("PRAGMA integrity_check").fetchall()
            ((devices,),) = connection.execute("SELECT count(*) FROM device")
            return application_id == _APPLICATION_ID and version > 0 and report == [("ok",)] and devices == 1
    except sqlite3.Error as error:
        if _primary_code(error) in _DAMAGED or "no such table" in str(error):
            return False
        raise


def _version(connection: sqlite3.Connection) -> int:
    ((version,),) = connection.execute("PRAGMA user_version")
    return int(version)


def _migrate(path: Path) -> None:
    """Bring a sound file of an earlier version to this one, in one transaction."""
    with closing(_configured(str(path))) as connection:
        if _version(connection) == SCHEMA_VERSION:
            return
        with transaction(connection, write=True):
            for statement in _statements(_FROM_VERSION_1):
                connection.execute(statement)
            _count_contributions(connection)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _count_contributions(connection: sqlite3.Connection) -> None:
    charges = connection.execute("SELECT ledger_id, sequence, cost, charged FROM charges").fetchall()
    counted = _recount(charges)[1]
    rows = connection.execute("SELECT id, forgotten FROM users").fetchall()
    # a forgotten user is in no record any more, and may have been in all of them
    counts = [(len(charges) if gone else int(counted[i]) if i < counted.size else 0, i) for i, gone in rows]
    connection.executemany("UPDATE users SET contributions = ? WHERE id = ?", counts)


def _statements(script: str) -> Iterator[str]:
    """Its statements one by one: `executescript` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _set_aside(path: Path) -> None:
    numbers = [int(entry.name.rsplit("-", 1)[1]) for entry in set_aside_files(path)]
    path.rename(_with_suffix(path, f".corrupt-{max(numbers, default=0) + 1}"))
    sync_directory(path.parent)


def _set_aside_log(path: Path) -> None:
    """Move a write-ahead log after its damaged file: beside a new file it would be replayed into it."""
    log = _with_suffix(path, "-wal")
    if not log.exists():
        return
    if not set_aside_files(path):
        path.touch(mode=0o600)  # the main file was removed from beside its log
        _set_aside(path)
    log.rename(_with_suffix(set_aside_files(path)[-1], "-wal"))
    _with_suffix(path, "-shm").unlink(missing_ok=True)
    sync_directory(path.parent)


def _create(path: Path, salvage: _Salvage) -> None:
    """Write the file under another name, then rename it: no crash leaves half a store."""
    temporary = _with_suffix(path, ".new")
    for leftover in (temporary, _with_suffix(temporary, "-journal")):
        leftover.unlink(missing_ok=True)
    # Made by us with its mode, whatever the umask; SQLite gives -wal and -shm the mode of the main file.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
        _fill(connection, salvage)
    temporary.rename(path)
    sync_directory(path.parent)


def _fill(connection: sqlite3.Connection, salvage: _Salvage) -> None:
    connection.executescript(_SCHEMA)
    connection.execute("BEGIN")
    connection.execute("INSERT INTO device (key, new_user_spent) VALUES (?, ?)", salvage.device)
    connection.executemany(
        "INSERT INTO users (id, tag, spent, forgotten, contributions) VALUES (?, ?, ?, ?, ?)", salvage.users
    )
    connection.executemany(
        "INSERT INTO ledgers (ledger_id, sequence, head, public_key) VALUES (?, ?, ?, ?)", salvage.ledgers
    )
    connection.executemany(
        "INSERT INTO charges (ledger_id, sequence, cost, charged) VALUES (?, ?, ?, ?)", salvage.charges
    )
    connection.execute("COMMIT")


def _salvage(damaged: Path) -> _Salvage:
    """What a damaged file still says about filters.

    Without the key no filter finds its user, and without all ledgers and charges a sequence could be answered
    twice: then every filter is full. Users are read from both ends; if some row is lost, whoever has none is
    full.
    """
    try:
        with closing(sqlite3.connect(damaged.absolute().as_uri() + "?mode=ro", uri=True)) as connection:
            ((key, new_user_spent),) = connection.execute("SELECT key, new_user_spent FROM device").fetchall()
            # what version 1 does not have yet
            count, key_in_force = ("contributions", "public_key") if _version(connection) > 1 else ("0", "NULL")
            ledgers = connection.execute(
                f"SELECT ledger_id, sequence, head, {key_in_force} FROM ledgers NOT INDEXED ORDER BY id"  # noqa: S608
            ).fetchall()
            charges = connection.execute(
                "SELECT ledger_id, sequence, cost, charged FROM charges NOT INDEXED"
            ).fetchall()
            users, complete = _readable_users(connection, count)
        recounted = _recount(charges)
        raised = []
        for i, tag, spent, gone, contributions in users:
            least, times = (int(seen[i]) if 0 <= i < seen.size else 0 for seen in recounted)
            raised.append((i, tag, max(spent, least), gone, max(contributions, times)))
        salvage = _Salvage(
            device=(key, new_user_spent if complete else FULL), users=raised, ledgers=ledgers, charges=charges
        )
        with closing(sqlite3.connect(MEMORY, isolation_level=None)) as trial:
            _fill(trial, salvage)  # the schema's own checks say whether these rows can be a store
    except (sqlite3.Error, ValueError, TypeError):
        return _nothing(FULL)
    return salvage


def _readable_users(connection: sqlite3.Connection, count: str) -> tuple[list[tuple[int, bytes, int, int, int]], bool]:
    rows: dict[int, tuple[int, bytes, int, int, int]] = {}
    complete = True
    for order in ("ASC", "DESC"):
        try:
            query = f"SELECT id, tag, spent, forgotten, {count} FROM users NOT INDEXED ORDER BY id {order}"  # noqa: S608
            for row in connection.execute(query):
                rows[row[0]] = row
        except sqlite3.Error:
            complete = False
    return list(rows.values()), complete


def _recount(charges: list[tuple[Any, ...]]) -> tuple[IntArray, IntArray]:
    """Spending and contributions by row id from the charges alone, a second witness beside a file's damaged rows."""
    bitmaps = [np.unpackbits(np.frombuffer(charged, np.uint8), bitorder="little") for *_, charged in charges]
    size = max((bits.size for bits in bitmaps), default=0)
    spent, times = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for (_, _, cost, _), bits in zip(charges, bitmaps, strict=True):
        known = spent[: bits.size]
        known[:] = np.where(bits == 0, known, np.where(known > FULL - cost, FULL, known + cost))
        times[: bits.size] += bits
    return spent, times


def _restrict(path: Path) -> None:
    for entry in _with_companions(path):
        entry.chmod(0o600)


def _with_companions(path: Path) -> list[Path]:
    """The main file, its write-ahead log and the log's index, as far as they exist."""
    return [entry for suffix in ("", "-wal", "-shm") if (entry := _with_suffix(path, suffix)).exists()]


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
