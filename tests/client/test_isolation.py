"""Isolation: a user's integers are a function of that user's data, the broadcast and public numbers only.

Every comparison is of integers, bit by bit, through the shard that a node uses.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.shard import CHUNK_BYTES, Shard
from common.data import partition, select
from common.families import FAMILIES, LINEAR_FAMILIES
from common.model import SharedModel
from privacy.layout import Group, Layout
from server.layout import contribution_layout
from tests.populations import draw_model, draw_users, gradient_total, population_of, schema_of
from tests.reference import User, squared_norm

D, R, K = 12, 3, 3
LAYOUTS = {
    "private": contribution_layout(D, R, private=True),
    # the finest grid shows the least difference in a float
    "without noise": contribution_layout(D, R, private=False),
}
BOUND = 4.0
COUNTS = (5, 16, 17, 0, 1, 5, 30, 18, 16, 1, 5, 64, 3)


def prior(family: str) -> SharedModel:
    return draw_model(np.random.default_rng(3), D, R, noise_variance=0.3 if family == "squared" else 1.0, spread=0.4)


def users_of(family: str, seed: int = 0, counts=COUNTS, weighted: bool = False) -> list[User]:
    return draw_users(np.random.default_rng(seed), prior(family), counts, sparsity=2, family=family, weighted=weighted)


def total(population, family, layout, chunk_bytes=CHUNK_BYTES, *, cache_bytes=2**28, bound=BOUND):
    model = prior(family)
    target_range = (-20.0, 20.0) if family == "squared" else (0.0, 1.0)
    schema = schema_of(D, bound=bound, target_range=target_range)
    return gradient_total(
        Shard(population, schema, FAMILIES[family], chunk_bytes=chunk_bytes, cache_bytes=cache_bytes),
        model,
        np.linalg.cholesky(model.U @ model.U.T + 0.2 * np.eye(D)),
        sparsity=K,
        clipping_norm=3.0,
        layout=layout,
        admitted=np.ones(population.num_users, np.bool_),
    )


def replacements(user: User) -> dict[str, User]:
    """What user j may turn into, by name."""
    m = max(len(user.y), 3)
    rng = np.random.default_rng(9)
    X, y, ones = rng.standard_normal((m, D)), (rng.random(m) < 0.5) * 1.0, np.ones(m)
    many = rng.standard_normal((100_000, D))
    return {
        "NaN": User(X=np.full((m, D), np.nan), y=np.full(m, np.nan), weight=ones),
        "some NaN": User(X=np.where(rng.random((m, D)) < 0.1, np.nan, X), y=y, weight=ones),
        "zeros": User(X=np.zeros((m, D)), y=np.zeros(m), weight=ones),
        "infinity": User(X=np.full((m, D), np.inf), y=np.full(m, -np.inf), weight=ones),
        "1e300": User(X=np.full((m, D), 1e300), y=np.full(m, -1e300), weight=ones),
        "denormal": User(X=np.full((m, D), 5e-324), y=np.full(m, 5e-324), weight=ones),
        "singular": User(X=np.tile(X[:1], (m, 1)), y=y, weight=ones),
        "empty": User(X=np.zeros((0, D)), y=np.zeros(0), weight=np.zeros(0)),
        "one row": User(X=X[:1], y=y[:1], weight=ones[:1]),
        "1e5 rows": User(X=many, y=(many[:, 0] > 0) * 1.0, weight=np.ones(len(many))),
        "huge weights": User(X=X, y=y, weight=np.full(m, 1e300)),
        "no weights": User(X=X, y=y, weight=np.zeros(m)),
        "bad weights": User(X=X, y=y, weight=np.where(np.arange(m) % 2 == 0, np.nan, -1.0)),
        "separable": User(X=X, y=(X[:, 0] > 0) * 1.0, weight=np.full(m, 1e6)),
    }


REPLACEMENTS = tuple(replacements(User(X=np.zeros((0, D)), y=np.zeros(0), weight=np.zeros(0))))


def check_others_do_not_move(family: str, name: str, j: int, layout: Layout) -> None:
    """With user j replaced, the sum changes by exactly what j itself contributes, now and before."""
    users = users_of(family)
    changed = [*users[:j], replacements(users[j])[name], *users[j + 1 :]]
    before, after = (total(population_of(people), family, layout) for people in (users, changed))
    own_before, own_after = (total(select(population_of(people), [j]), family, layout) for people in (users, changed))
    assert np.array_equal(before - own_before, after - own_after)
    assert squared_norm(own_after) <= layout.norm_limit()
    assert (before - own_before).any()


@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_nobody_moves_when_one_user_turns_bad(family, name):
    """Every other user's integers are the same bits, whatever one user's data turn into."""
    for j in (0, 6) if name == "1e5 rows" else (0, 1, 6, 10):
        check_others_do_not_move(family, name, j, LAYOUTS["without noise"])


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_nobody_moves_on_the_private_grid(family):
    """The same on the grid of private releases."""
    for name in ("NaN", "empty", "1e300"):
        check_others_do_not_move(family, name, 0, LAYOUTS["private"])


@pytest.mark.parametrize("bound", [1e3, 1e160, np.inf])
@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_padding_is_nobodys_data(family, bound):
    """Whatever the declared bound lets in, one user's examples do not stand in for another's missing ones."""
    users = users_of(family, counts=(5, 17, 17, 18, 9))
    huge = User(X=np.full((5, D), 1e200), y=np.ones(5), weight=np.ones(5))
    layout = LAYOUTS["without noise"]
    before, after = (population_of([first, *users[1:]]) for first in (users[0], huge))
    own_before, own_after = (total(select(p, [0]), family, layout, bound=bound) for p in (before, after))
    others_before = total(before, family, layout, bound=bound) - own_before
    assert np.array_equal(total(after, family, layout, bound=bound) - own_after, others_before)


@pytest.mark.parametrize("name", ["NaN", "infinity", "empty", "no weights", "bad weights"])
@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_a_user_without_usable_examples_adds_zeros(family, name):
    """Nothing usable is absence: not even the clip bit is sent."""
    users = users_of(family)
    population = population_of([replacements(users[0])[name]])
    assert not total(population, family, LAYOUTS["without noise"]).any()


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_do_not_matter(family, weighted):
    """One user a chunk or all in one, cached or not: the same integers."""
    population = population_of(users_of(family, seed=1, counts=COUNTS * 3, weighted=weighted))
    layout = LAYOUTS["without noise"]
    expected = total(population, family, layout)
    for chunk_bytes in (1, 1000, 5000, 20_000, 10**9):
        assert np.array_equal(total(population, family, layout, chunk_bytes), expected)
    assert np.array_equal(total(population, family, layout, 5000, cache_bytes=0), expected)


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_nodes_and_order_do_not_matter(family):
    """Users on one node or on many, in any order: the same sum."""
    population = population_of(users_of(family, seed=2, counts=COUNTS * 2))
    layout = LAYOUTS["without noise"]
    expected = total(population, family, layout)
    for nodes in (2, 3, 7, population.num_users):
        parts = [total(partition(population, nodes, i), family, layout) for i in range(nodes)]
        assert np.array_equal(np.sum(parts, axis=0), expected)
    order = np.random.default_rng(0).permutation(population.num_users)
    assert np.array_equal(total(select(population, order), family, layout), expected)


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_weights_of_one_are_no_weights(family):
    """Whether anybody's examples are weighted is not seen in the others: 1 written out is 1 left out."""
    population = population_of(users_of(family, seed=3, counts=(16, 16, 16, 12, 12)))
    without = population.__class__(**{**vars(population), "weight": None})
    layout = LAYOUTS["without noise"]
    assert np.array_equal(total(population, family, layout), total(without, family, layout))


@given(data=st.data(), family=st.sampled_from(sorted(LINEAR_FAMILIES)))
@settings(max_examples=40, deadline=None)
def test_a_users_integers_are_its_own(data, family):
    """For drawn populations, the sum over all is the sum of each alone, on the finest grid."""
    counts = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=8))
    population = population_of(users_of(family, data.draw(st.integers(0, 2**32)), counts, data.draw(st.booleans())))
    layout = LAYOUTS["without noise"]
    alone = [total(select(population, [i]), family, layout) for i in range(len(counts))]
    assert np.array_equal(total(population, family, layout), np.sum(alone, axis=0))


def test_the_layouts_are_what_a_run_uses():
    """Both grids, both groups."""
    for layout in LAYOUTS.values():
        assert [group.name for group in layout.groups] == ["model", "scalars"]
        assert isinstance(layout.groups[0], Group)
