"""The users' examples as flat arrays with offsets, the public facts about them, and the split by rule.

A population is ragged: user i owns the examples `offsets[i]:offsets[i + 1]`, possibly none. Every function
here is pure and keeps the users' order.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from common.model import Array, IntArray

KeyArray: TypeAlias = npt.NDArray[np.uint64]
Rows: TypeAlias = slice | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSchema:
    """What everybody may know about the data: declared in the configuration or read from a public item table.

    Attributes:
        feature_names: `d` names.
        feature_second_moment: `d x d` matrix S, the second moment of x over the public item table or under
            the declared ranges; never pooled from users' examples.
        target_range: Lowest and highest y after `target_offset` is taken off; values outside are clipped.
        target_offset: What was subtracted from the target, in its own units.
        feature_bound: Largest |x_j|; values outside are clipped.
    """

    feature_names: tuple[str, ...]
    feature_second_moment: Array
    target_range: tuple[float, float]
    target_offset: float = 0.0
    feature_bound: float = 1.0

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return len(self.feature_names)

    @property
    def digest(self) -> str:
        """SHA-256, hex, of what server and nodes have to agree on: all but the metric, which the server sends."""
        agreed = [list(self.feature_names), list(self.target_range), self.target_offset, self.feature_bound]
        return hashlib.sha256(json.dumps(agreed).encode()).hexdigest()


class Features(Protocol):
    """The features of N examples, however they are stored."""

    @property
    def dimension(self) -> int:
        """Number of features d."""

    def __len__(self) -> int:
        """Number of examples N."""

    def rows(self, index: Rows) -> Array:
        """`len(index) x d` float64, the examples at `index`: positions, a mask or a slice."""

    def take(self, index: Rows) -> "Features":
        """The same features restricted to `index`; a slice copies nothing."""


@dataclass(frozen=True, eq=False)
class DenseFeatures:
    """Features written out, one row an example.

    Attributes:
        X: `N x d`, float64 or float32; may be a memory map.
    """

    X: npt.NDArray[np.floating[Any]]

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return int(self.X.shape[1])

    def __len__(self) -> int:
        return int(self.X.shape[0])

    def rows(self, index: Rows) -> Array:
        """`len(index) x d` float64."""
        return np.asarray(self.X[index], dtype=np.float64)

    def take(self, index: Rows) -> "DenseFeatures":
        """The same features restricted to `index`."""
        return DenseFeatures(self.X[index])


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Features looked up in a table of items, x = table[item]; never written out as a whole.

    Attributes:
        item: `N` int32, rows of the table.
        table: `I x d` float64, the public features of every item.
    """

    item: npt.NDArray[np.int32]
    table: Array

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return int(self.table.shape[1])

    def __len__(self) -> int:
        return int(self.item.shape[0])

    def rows(self, index: Rows) -> Array:
        """`len(index) x d` float64."""
        return np.asarray(self.table[self.item[index]], dtype=np.float64)

    def take(self, index: Rows) -> "ItemFeatures":
        """The same features restricted to `index`; the table is shared."""
        return ItemFeatures(self.item[index], self.table)


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """The examples of n users.

    Attributes:
        users: `n` names, in a fixed order.
        offsets: `n + 1` int64; user i owns the examples `offsets[i]:offsets[i + 1]`.
        y: `N` float64, targets with the offset removed and clipped to the declared range.
        weight: `N` float64 at least 0, or None where every example weighs 1.
        features: `N x d`, dense or through an item table.
        key: `N` uint64, what the split goes by: `example_keys` of user and item, event or row, or `shared_keys`.
    """

    users: tuple[str, ...]
    offsets: IntArray
    y: Array
    weight: Array | None
    features: Features
    key: KeyArray

    @property
    def num_users(self) -> int:
        """Number of users n, those without examples included."""
        return len(self.users)

    @property
    def num_examples(self) -> int:
        """Number of examples N."""
        return int(self.y.shape[0])

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return self.features.dimension

    @property
    def counts(self) -> IntArray:
        """`n` int64, how many examples each user has."""
        return np.diff(self.offsets)

    @property
    def user_of_example(self) -> IntArray:
        """`N` int64, the position of each example's user in `users`."""
        return np.repeat(np.arange(self.num_users), self.counts)


def text_hashes(texts: Iterable[str], *, kind: str) -> KeyArray:
    """BLAKE2b with an 8-byte digest, read little-endian; `kind` separates users from items and rows."""
    person = kind.encode()
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest() for text in texts
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def splitmix64(values: KeyArray) -> KeyArray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) after adding its constant: a bijection."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def example_keys(user_hash: KeyArray, example_hash: KeyArray) -> KeyArray:
    """One key an example: splitmix64(splitmix64(hash of user) ^ hash of item, event or row).

    It depends on nothing but the two names, so a user's split stays when others come or go.
    """
    return splitmix64(splitmix64(user_hash) ^ example_hash)


def shared_keys(value_hash: KeyArray) -> KeyArray:
    """One key a value, whoever's examples have it: splitmix64(hash of the value)."""
    return splitmix64(value_hash)


def row_hashes(counts: IntArray) -> KeyArray:
    """Hashes 0, 1, 2, ... within each user, for examples that have neither item nor event id."""
    starts = np.cumsum(counts) - counts
    return splitmix64((np.arange(int(counts.sum())) - np.repeat(starts, counts)).astype(np.uint64))


def held_out(key: KeyArray, split_seed: int, test_fraction: float) -> npt.NDArray[np.bool_]:
    """`N` bool: splitmix64(key ^ hash of the seed) / 2^64 < test_fraction.

    Raises:
        ValueError: If `test_fraction` is not in [0, 1).
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"Expected 0 <= test_fraction < 1, got test_fraction={test_fraction}.")
    seed = text_hashes([str(int(split_seed))], kind="split seed")
    return splitmix64(key ^ seed) < np.uint64(math.ceil(test_fraction * 2**64))


def split(population: Population, split_seed: int, test_fraction: float = 0.2) -> tuple[Population, Population]:
    """Training and test part by the rule of `held_out`; both keep all users in the same order."""
    test = held_out(population.key, split_seed, test_fraction)
    train = take_examples(population, ~test) if test.any() else population
    return train, take_examples(population, test)


def take_examples(population: Population, mask: npt.NDArray[np.bool_]) -> Population:
    """The examples where `mask` (`N` bool) is true, with all users kept."""
    kept_before = np.concatenate([[0], np.cumsum(mask)])
    return _take(population, np.flatnonzero(mask), population.users, kept_before[population.offsets])


def fold(population: Population, index: int, folds: int) -> Population:
    """Part `index` of each user's examples, dealt in turn into `folds` parts; all users are kept.

    Raises:
        ValueError: If not 0 <= index < folds.
    """
    if not 0 <= index < folds:
        raise ValueError(f"Expected 0 <= index < folds, got index={index}, folds={folds}.")
    place = np.arange(population.num_examples) - np.repeat(population.offsets[:-1], population.counts)
    return population if folds == 1 else take_examples(population, place % folds == index)


def select(population: Population, user_indices: IntArray | Sequence[int]) -> Population:
    """The users at `user_indices`, in that order; a contiguous range of them copies nothing."""
    indices = np.asarray(user_indices, dtype=np.int64)
    counts = population.counts[indices]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    users = tuple(population.users[i] for i in indices)
    starts = population.offsets[indices]
    if indices.size and np.array_equal(indices, np.arange(indices[0], indices[0] + indices.size)):
        return _take(population, slice(int(starts[0]), int(starts[0] + offsets[-1])), users, offsets)
    gathered = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
    return _take(population, gathered, users, offsets)


def partition(population: Population, num_nodes: int, index: int) -> Population:
    """Block `index` of the users in `num_nodes` contiguous blocks whose sizes differ by at most one.

    Raises:
        ValueError: If a node would have no user, or `index` is not one of the nodes.
    """
    n = population.num_users
    if not 1 <= num_nodes <= n:
        raise ValueError(f"Expected 1 <= num_nodes <= {n} users, got num_nodes={num_nodes}. Use fewer nodes.")
    if not 0 <= index < num_nodes:
        raise ValueError(f"Expected 0 <= index < {num_nodes}, got index={index}.")
    return select(population, np.arange(index * n // num_nodes, (index + 1) * n // num_nodes))


def limit_examples(population: Population, max_examples: int, *, drawn_by: KeyArray | None = None) -> Population:
    """At most `max_examples` of each user: those with the smallest keys, which is a fixed random sample.

    Args:
        population: The users and all their examples.
        max_examples: The limit.
        drawn_by: `N` uint64, the keys; by default those of the split. `example_keys` where users share those: by the
            smallest of shared keys everybody would keep the same values, and none of the others.

    Raises:
        ValueError: If `max_examples` is not positive.
    """
    if max_examples < 1:
        raise ValueError(f"Expected max_examples >= 1, got max_examples={max_examples}.")
    long_users = np.flatnonzero(population.counts > max_examples)
    if not long_users.size:
        return population
    keys = population.key if drawn_by is None else drawn_by
    mask = np.ones(population.num_examples, dtype=np.bool_)
    for i in long_users:
        start, stop = population.offsets[i : i + 2]
        beyond = np.argsort(keys[start:stop], kind="stable")[max_examples:]
        mask[start + beyond] = False
    return take_examples(population, mask)


def _take(population: Population, index: Rows, users: tuple[str, ...], offsets: IntArray) -> Population:
    weight = None if population.weight is None else population.weight[index]
    return replace(
        population,
        users=users,
        offsets=offsets.astype(np.int64),
        y=population.y[index],
        weight=weight,
        features=population.features.take(index),
        key=population.key[index],
    )
