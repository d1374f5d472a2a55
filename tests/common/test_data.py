"""The flat arrays, their restrictions and the split by rule."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data import (
    DenseFeatures,
    ItemFeatures,
    Population,
    example_keys,
    held_out,
    limit_examples,
    partition,
    row_hashes,
    select,
    shared_keys,
    split,
    splitmix64,
    take_examples,
    text_hashes,
)

COUNTS = [3, 0, 2, 4]
PINNED_KEYS = [18177389058527431675, 2278098680705613515, 568736983198367480]
PINNED_SPLITS = [[True, False, False], [False, False, True], [False, False, False]]
PINNED_SHARED_KEYS = [2430437247610845364, 8028781119823111052, 2430437247610845364]


def small_population(counts: list[int] = COUNTS, *, items: bool = False, names: str = "abcdefgh") -> Population:
    """Users a, b, ... whose example j of all has y = j and features (j, -j), or those of item j mod 3."""
    total = sum(counts)
    y = np.arange(total, dtype=np.float64)
    users = tuple(names[: len(counts)])
    features = (
        ItemFeatures((np.arange(total) % 3).astype(np.int32), np.arange(6.0).reshape(3, 2))
        if items
        else DenseFeatures(np.stack([y, -y], axis=1).astype(np.float32))
    )
    return Population(
        users=users,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        y=y,
        weight=y + 1,
        features=features,
        key=example_keys(np.repeat(text_hashes(users, kind="user"), counts), row_hashes(np.array(counts))),
    )


def examples_of(population: Population) -> dict[str, list[float]]:
    """Every user's targets, after checking that the other columns moved with them."""
    rows = population.features.rows(slice(None))
    assert rows.dtype == np.float64
    assert rows.shape == (population.num_examples, population.dimension)
    assert population.weight is not None
    assert np.array_equal(population.weight, population.y + 1)
    bounds = population.offsets
    return {user: population.y[bounds[i] : bounds[i + 1]].tolist() for i, user in enumerate(population.users)}


def test_splitmix64_matches_the_published_generator() -> None:
    """The first outputs of SplitMix64 seeded with 0 are those of the reference implementation."""
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_keys_are_pinned() -> None:
    """Keys must never change, or every published split would (numbers from our own code)."""
    users = text_hashes(["alice", "alice", "bob"], kind="user")
    keys = example_keys(users, text_hashes(["1", "2", "1"], kind="item"))
    assert keys.tolist() == PINNED_KEYS
    assert [held_out(keys, seed, 0.5).tolist() for seed in (0, 1, 2)] == PINNED_SPLITS


def test_shared_keys_are_pinned() -> None:
    """A key by a value alone must never change either (numbers from our own code)."""
    keys = shared_keys(text_hashes(["1", "2", "1"], kind="split column"))
    assert keys.tolist() == PINNED_SHARED_KEYS
    assert keys[0] != text_hashes(["1"], kind="split column")[0]


def test_a_name_hashes_differently_as_user_and_as_item() -> None:
    """Users, items and events live in separate domains."""
    assert text_hashes(["1"], kind="user")[0] != text_hashes(["1"], kind="item")[0]
    assert text_hashes([], kind="user").shape == (0,)


def test_row_hashes_restart_with_each_user() -> None:
    """The second example of one user hashes as the second of any other."""
    hashes = row_hashes(np.array([2, 0, 2]))
    assert hashes[:2].tolist() == hashes[2:].tolist()
    assert hashes[0] != hashes[1]


def test_the_split_holds_out_the_declared_fraction() -> None:
    """Of 100,000 examples a fifth is held out, within 5 sd (fails by chance with probability 6e-7)."""
    keys = example_keys(text_hashes(["u"] * 100_000, kind="user"), row_hashes(np.array([100_000])))
    for fraction in (0.2, 0.5):
        spread = math.sqrt(fraction * (1 - fraction) / keys.size)
        assert abs(held_out(keys, 3, fraction).mean() - fraction) < 5 * spread


def test_two_seeds_split_independently() -> None:
    """Being held out under one seed says nothing about another (5 sd, fails by chance with 6e-7)."""
    keys = example_keys(text_hashes(["u"] * 100_000, kind="user"), row_hashes(np.array([100_000])))
    both = (held_out(keys, 0, 0.5) & held_out(keys, 1, 0.5)).mean()
    assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / keys.size)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_a_fraction_outside_its_range_is_named(fraction: float) -> None:
    """Holding out everything, or less than nothing, is an error."""
    with pytest.raises(ValueError, match=r"Expected 0 <= test_fraction < 1, got test_fraction="):
        held_out(small_population().key, 0, fraction)


def test_nothing_is_held_out_at_fraction_zero() -> None:
    """The smallest key is not below zero."""
    assert not held_out(np.zeros(3, dtype=np.uint64), 0, 0.0).any()


@pytest.mark.parametrize("items", [False, True])
def test_both_parts_of_a_split_keep_all_users_and_lose_no_example(items: bool) -> None:
    """Training and test examples of a user make up the user's examples."""
    population = small_population(items=items)
    train, test = (examples_of(part) for part in split(population, 0, 0.4))
    whole = examples_of(population)
    assert list(train) == list(test) == list(whole)
    assert {user: sorted(train[user] + test[user]) for user in whole} == whole
    assert any(train.values())
    assert any(test.values())


def test_a_users_split_does_not_depend_on_other_users() -> None:
    """Alone or among others, in any order, the same examples of a user are held out."""
    population = small_population([40, 30, 50])
    _, test = split(population, 7)
    for order in ([1], [2, 1], [1, 0, 2]):
        _, other = split(select(population, order), 7)
        assert examples_of(other)["b"] == examples_of(test)["b"]
    renamed = small_population([40, 30, 50], names="xbz")
    assert examples_of(split(renamed, 7)[1])["b"] == examples_of(test)["b"]


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 2], [3, 0], [2, 2], [1], []])
def test_select_moves_users_with_their_examples(order: list[int], items: bool) -> None:
    """Selected users keep their examples, features included, in the given order."""
    population = small_population(items=items)
    chosen = select(population, order)
    names = [population.users[i] for i in order]
    assert list(chosen.users) == names
    assert examples_of(chosen) == {name: examples_of(population)[name] for name in names}
    assert chosen.counts.tolist() == [COUNTS[i] for i in order]
    rows = population.features.rows(slice(None))[chosen.y.astype(int)]
    assert np.array_equal(chosen.features.rows(slice(None)), rows)


def test_a_contiguous_selection_copies_nothing() -> None:
    """A block of users is a view of the arrays it came from."""
    population = small_population()
    block = select(population, [1, 2])
    assert np.shares_memory(block.y, population.y)
    assert isinstance(block.features, DenseFeatures)
    assert isinstance(population.features, DenseFeatures)
    assert np.shares_memory(block.features.X, population.features.X)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_partition_is_every_user_once_in_order(counts: list[int], data: st.DataObject) -> None:
    """The nodes' users, put together, are the population; sizes differ by at most one."""
    population = small_population(counts)
    num_nodes = data.draw(st.integers(1, len(counts)))
    parts = [partition(population, num_nodes, index) for index in range(num_nodes)]
    assert tuple(user for part in parts for user in part.users) == population.users
    assert np.concatenate([part.y for part in parts]).tolist() == population.y.tolist()
    sizes = [part.num_users for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("num_nodes", "index"), [(0, 0), (5, 0), (2, 2), (2, -1)])
def test_partition_names_what_does_not_fit(num_nodes: int, index: int) -> None:
    """More nodes than users, or a node that is not there, is an error."""
    with pytest.raises(ValueError, match="Expected"):
        partition(small_population(), num_nodes, index)


def test_take_examples_keeps_users_without_examples() -> None:
    """A user who loses every example stays, with none."""
    kept = take_examples(small_population(), np.array([1, 0, 1, 0, 0, 1, 1, 0, 0], dtype=bool))
    assert examples_of(kept) == {"a": [0.0, 2.0], "b": [], "c": [], "d": [5.0, 6.0]}
    assert kept.user_of_example.tolist() == [0, 0, 3, 3]


def test_limit_examples_keeps_the_smallest_keys_in_their_order() -> None:
    """Beyond the limit a fixed sample of each user's examples is kept; other users are untouched."""
    population = small_population([5, 2])
    limited = limit_examples(population, 3)
    smallest = np.sort(np.argsort(population.key[:5])[:3])
    assert examples_of(limited) == {"a": smallest.tolist(), "b": [5.0, 6.0]}
    assert limit_examples(population, 5) is population
    other = np.arange(7, dtype=np.uint64)[::-1]
    assert examples_of(limit_examples(population, 3, drawn_by=other)) == {"a": [2.0, 3.0, 4.0], "b": [5.0, 6.0]}
    with pytest.raises(ValueError, match="Expected max_examples >= 1, got max_examples=0"):
        limit_examples(population, 0)


def test_features_may_be_a_memory_map(tmp_path: Path) -> None:
    """Rows of a float32 memory map come out as float64, by slice, mask or positions."""
    X = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "x.npy", X)
    features = DenseFeatures(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert len(features) == 6
    assert features.dimension == 2
    for index in (slice(1, 3), np.array([1, 2]), np.arange(6) % 5 == 1):
        assert features.rows(index).dtype == np.float64
        assert features.rows(index).tolist() == features.take(index).rows(slice(None)).tolist()
    assert features.rows(slice(1, 3)).tolist() == [[2.0, 3.0], [4.0, 5.0]]
