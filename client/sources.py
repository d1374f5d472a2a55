"""The device's own data: read once in a process and cut to the part that trains."""

from dataclasses import dataclass
from functools import lru_cache

from common.config import DataConfig, Family
from common.data import DataSchema, Population, partition, split
from common.loading import load
from common.synthetic import SyntheticTruth


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


@lru_cache(maxsize=2)
def read(data: DataConfig, family: Family) -> Source:
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


def node_data(data: DataConfig, family: Family, index: int, num_nodes: int) -> tuple[Population, DataSchema]:
    """The training data of one node's users, and the public facts about them."""
    source = read(data, family)
    return partition(source.train, num_nodes, index), source.schema


def forget() -> None:
    """Drop what is cached."""
    read.cache_clear()
