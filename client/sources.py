"""The device's own data: read when they have changed, and cut to the part that trains.

A node drops bad rows and keeps their users, whatever the configuration says: were one user's row an error, it would
silence all users of the node. Only a simulation, whose operator sees all data, may stop at one.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from common.config import DataConfig, Family
from common.data import DataSchema, Population, partition, split
from common.errors import DataError
from common.loading import load, refuse_bad_rows
from common.synthetic import SyntheticTruth
from common.tables import files_of

Fingerprint: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A source that was read.

    Attributes:
        train: The part that trains.
        test: The part held out by rule; the same users in the same order.
        schema: What is public about both.
        bad_rows: One line for each of the first bad rows that were dropped.
        num_bad_rows: How many rows were dropped.
        num_clipped: How many values lay outside their declared range and were clipped to it.
        truth: The parameters behind a synthetic population.
    """

    train: Population
    test: Population
    schema: DataSchema
    bad_rows: tuple[str, ...]
    num_bad_rows: int
    num_clipped: int
    truth: SyntheticTruth | None


def read(data: DataConfig, family: Family) -> Source:
    """Read and split a source, as `data.on_bad_rows` says; for whoever may see all of it.

    Raises:
        DataError: If it cannot be read, or a row is bad and `on_bad_rows` is "error".
    """
    source = _read_usable(data, family)
    if data.on_bad_rows == "error":
        refuse_bad_rows(source.bad_rows, source.num_bad_rows)
    return source


def node_data(data: DataConfig, family: Family, index: int, num_nodes: int) -> tuple[Population, DataSchema]:
    """The training data of one node's users, and the public facts about them; bad rows are always dropped.

    Raises:
        DataError: If the source as a whole cannot be read.
    """
    source = _read_usable(data, family)
    return partition(source.train, num_nodes, index), source.schema


def fingerprint(data: DataConfig) -> Fingerprint:
    """What changes when somebody writes to the source: of each file its number, size and time, without reading it.

    A SQLite database in use keeps new rows in a log beside it, which counts too. Public files do not: the model's
    features are what they were when the process started.
    """
    if data.source == "synthetic":
        return ()
    path = Path(data.source)
    try:
        files = files_of(path)
    except (DataError, OSError):  # also of a folder that this user may not look into
        return ()
    beside = [file.with_name(file.name + "-wal") for file in files]
    found = []
    for file in (*files, *beside):
        with suppress(OSError):
            status = file.stat()
            found.append((file.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def forget() -> None:
    """Drop what is cached."""
    _read_skipping.cache_clear()


def _read_usable(data: DataConfig, family: Family) -> Source:
    """The source without its bad rows: the same entry of the cache for those who stop at them and those who do not."""
    return _read_skipping(data.model_copy(update={"on_bad_rows": "skip"}), family, fingerprint(data))


@lru_cache(maxsize=1)
def _read_skipping(data: DataConfig, family: Family, _: Fingerprint) -> Source:
    """Read and split a source; cached, since the nodes of a simulation share one process."""
    loaded = load(data, family)
    train, test = split(loaded.population, data.split_seed, data.test_fraction)
    return Source(
        train=train,
        test=test,
        schema=loaded.schema,
        bad_rows=loaded.bad_rows,
        num_bad_rows=loaded.num_bad_rows,
        num_clipped=loaded.num_clipped,
        truth=loaded.truth,
    )
