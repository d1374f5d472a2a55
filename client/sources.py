"""The device's own data: read once in a process, limited per user, and cut to the part that trains."""

from functools import lru_cache

from common.config import DataConfig, Family
from common.data import DataSchema, Population, partition, split
from common.loading import Loaded, load


@lru_cache(maxsize=4)
def loaded(data: DataConfig, family: Family) -> Loaded:
    """The whole source; cached, since the nodes of a simulation share one process."""
    return load(data, family)


@lru_cache(maxsize=4)
def train_and_test(data: DataConfig, family: Family) -> tuple[Population, Population]:
    """The part that trains and the part held out by rule."""
    return split(loaded(data, family).population, data.split_seed, data.test_fraction)


def node_data(data: DataConfig, family: Family, index: int, num_nodes: int) -> tuple[Population, DataSchema]:
    """The training data of one node's users, and the public facts about them."""
    train, _ = train_and_test(data, family)
    return partition(train, num_nodes, index), loaded(data, family).schema


def forget() -> None:
    """Drop what is cached."""
    train_and_test.cache_clear()
    loaded.cache_clear()
