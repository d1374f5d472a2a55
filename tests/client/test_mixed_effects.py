"""Random effects of entities, updated from events that name several of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.entity_store import EntitySettings, EntityStore
from client.grouping import groups
from client.mixed_effects import Events, score_events, update_events

SQUARED = EntitySettings(
    entities=("user",), target="y", features=("p", "q"), family="squared", prior_precision=2.0, noise_variance=0.5
)


def draw(n: int, num: int, *, seed: int = 0, d: int = 3) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((num, d))
    X[:, 0] = 1
    return X, rng.standard_normal(num), rng.random(num) + 0.5, rng.integers(0, n, num)


def apply(store: EntityStore, *names: list[str], number: int = 1, forgetting: float = 1.0, **arrays: Any) -> Any:
    """Apply events; `names` has one list a type, one name an event."""
    tags, codes = [], []
    for kind, of_kind in enumerate(names):
        each, code = np.unique(of_kind, return_inverse=True)
        tags.append(store.tags(kind, each.tolist()))
        codes.append(code)
    events = Events(entity=tuple(codes), tags=tuple(tags), **arrays)
    with store.changing() as changes:
        return update_events(
            changes, events, settings=store.settings, fixed=store.fixed, forgetting=forgetting, number=number
        )


def made(folder: Path, settings: EntitySettings, fixed: Any = None, name: str = "s") -> EntityStore:
    EntityStore.create(folder / name, settings, fixed)
    return EntityStore.open(folder / name, update=True)


def kept(store: EntityStore, name: str, kind: int = 0) -> tuple[list[int], Any, Any]:
    (found,) = store.load(kind, store.tags(kind, [name]))
    return found.features[0].tolist(), found.posterior.mean[0], found.posterior.precision[0]


def test_pieces_one_after_the_other_are_all_events_at_once(tmp_path: Path) -> None:
    """Squared loss without forgetting: (X'WX/v + R)^-1 X'W(y - fixed'x)/v, of each entity, to 1e-10."""
    X, y, weight, user = draw(5, 80)
    fixed = np.array([0.5, -1.0, 2.0])
    with made(tmp_path, SQUARED, fixed) as store:
        for i, part in enumerate(np.array_split(np.arange(80), 4)):
            names = [f"u{u}" for u in user[part]]
            apply(store, names, X=X[part], y=y[part], weight=weight[part], number=i)
        for u in range(5):
            mine = user == u
            W = weight[mine, None] / 0.5
            H = X[mine].T @ (W * X[mine]) + 2.0 * np.eye(3)
            features, mean, precision = kept(store, f"u{u}")
            assert features == [0, 1, 2]
            np.testing.assert_allclose(precision, H, rtol=1e-10)
            expected = np.linalg.solve(H, X[mine].T @ (W[:, 0] * (y[mine] - X[mine] @ fixed)))
            np.testing.assert_allclose(mean, expected, rtol=1e-10, atol=1e-12)


def test_an_entitys_numbers_do_not_depend_on_who_else_is_there(tmp_path: Path) -> None:
    """The same bits alone and among others."""
    settings = EntitySettings(entities=("user",), target="y", features=("p", "q"))
    X, _, weight, user = draw(30, 400, seed=1)
    y = (np.random.default_rng(2).random(400) < 0.5).astype(float)
    X[user % 3 == 0, 2] = 0  # some lack a feature
    with made(tmp_path, settings, name="all") as store, made(tmp_path, settings, name="alone") as alone:
        apply(store, [f"u{u}" for u in user], X=X, y=y, weight=weight)
        for u in (0, 1, 5):
            mine = user == u
            apply(alone, [f"u{u}"] * mine.sum(), X=X[mine], y=y[mine], weight=weight[mine])
            features, mean, precision = kept(alone, f"u{u}")
            assert features == ([0, 1] if u % 3 == 0 else [0, 1, 2])
            assert kept(store, f"u{u}")[0] == features
            assert np.array_equal(kept(store, f"u{u}")[1], mean)
            assert np.array_equal(kept(store, f"u{u}")[2], precision)


def test_a_new_feature_starts_at_its_prior_and_an_absent_one_is_kept(tmp_path: Path) -> None:
    """An entity has the union of the features that it was seen with."""
    X, y, weight, _ = draw(1, 20, seed=3)
    first, second = X[:10].copy(), X[10:].copy()
    first[:, 2] = second[:, 1] = 0
    with made(tmp_path, SQUARED) as store:
        apply(store, ["ada"] * 10, X=first, y=y[:10], weight=weight[:10])
        assert kept(store, "ada")[0] == [0, 1]
        apply(store, ["ada"] * 10, X=second, y=y[10:], weight=weight[10:], number=2)
        features, mean, precision = kept(store, "ada")
    both = np.concatenate([first, second])
    H = both.T @ (weight[:, None] / 0.5 * both) + 2.0 * np.eye(3)
    assert features == [0, 1, 2]
    np.testing.assert_allclose(precision, H, rtol=1e-10)
    np.testing.assert_allclose(mean, np.linalg.solve(H, both.T @ (weight / 0.5 * y)), rtol=1e-10)


def test_the_past_is_discounted_once_a_batch_and_never_for_who_is_quiet(tmp_path: Path) -> None:
    """However many pieces a batch has; the intercept is left alone."""
    X, y, weight, _ = draw(1, 30, seed=4)
    with made(tmp_path, SQUARED) as store:
        apply(store, ["ada"] * 10 + ["ben"] * 20, X=X, y=y, weight=weight, number=1)
        _, _, past = kept(store, "ada")
        before = store._connection.execute("SELECT * FROM entities ORDER BY id").fetchall()
        for part in (slice(0, 7), slice(7, 20)):
            apply(store, ["ada"] * len(y[part]), X=X[part], y=y[part], weight=weight[part], number=2, forgetting=0.6)
        _, _, precision = kept(store, "ada")
        after = store._connection.execute("SELECT * FROM entities ORDER BY id").fetchall()
    new = X[:20].T @ (weight[:20, None] / 0.5 * X[:20])
    np.testing.assert_allclose(precision, 0.6 * past + new + 0.4 * np.diag([0, 2.0, 2.0]), rtol=1e-10)
    assert before[1] == after[1]  # ben
    assert before[0] != after[0]


def test_types_see_each_other_through_offsets(tmp_path: Path) -> None:
    """Users and items that act together are both found, and scores add up."""
    settings = EntitySettings(
        entities=("user", "item"), target="y", features=(), family="squared", prior_precision=0.1, noise_variance=0.01
    )
    rng = np.random.default_rng(5)
    of_user, of_item = rng.standard_normal(10), rng.standard_normal(8)
    user, item = rng.integers(0, 10, 2000), rng.integers(0, 8, 2000)
    y = of_user[user] + of_item[item]
    names = [f"n{u}" for u in user], [f"n{i}" for i in item]
    with made(tmp_path, settings) as store:
        for number, part in enumerate(np.array_split(np.arange(2000), 20)):
            parts = [[of[i] for i in part] for of in names]
            apply(store, *parts, X=np.ones((part.size, 1)), y=y[part], weight=np.ones(part.size), number=number)
        users, items = store.tags(0, [f"n{u}" for u in range(10)]), store.tags(1, [f"n{i}" for i in range(8)])
        asked = Events(X=np.ones((2000, 1)), y=y, weight=np.ones(2000), entity=(user, item), tags=(users, items))
        found = score_events(store.load, asked, settings=settings, fixed=store.fixed, spread=True)
        single = [store.load(0, users[:1])[0].posterior.precision, store.load(1, items[:1])[0].posterior.precision]
    assert np.abs(found.mean - y).max() < 0.1 * y.std()
    together = np.sqrt(1 / single[0][0, 0, 0] + 1 / single[1][0, 0, 0])
    assert found.stddev[(user == 0) & (item == 0)][0] == pytest.approx(together)


def test_who_is_unknown_is_the_prior(tmp_path: Path) -> None:
    """Mean of the fixed effect, variance x'x over the prior's precision."""
    with made(tmp_path, SQUARED, np.array([1.0, 2.0, 3.0])) as store:
        X = np.array([[1.0, 0.5, -1.0]])
        asked = Events(X=X, y=np.zeros(1), weight=np.ones(1), entity=(np.zeros(1, np.int64),), tags=([b"?" * 16],))
        found = score_events(store.load, asked, settings=SQUARED, fixed=store.fixed, spread=True, seed=b"s")
    assert found.mean.tolist() == [1.0 + 1.0 - 3.0]
    assert found.stddev[0] == pytest.approx(np.sqrt(2.25 / 2.0))
    assert not found.known[0]


def test_draws_have_the_posteriors_variance_and_are_one_for_each_entity(tmp_path: Path) -> None:
    """Variance as variance: 4000 seeds within 10 % (false failure rate below 1e-5), repeated by their seed."""
    X, y, weight, _ = draw(1, 12, seed=6)
    with made(tmp_path, SQUARED) as store:
        apply(store, ["ada"] * 12, X=X, y=y, weight=weight)
        tags = store.tags(0, ["ada"])
        asked = Events(X=X[:2], y=y[:2], weight=weight[:2], entity=(np.zeros(2, np.int64),), tags=(tags,))

        def drawn(seed: int) -> Any:
            options = {"settings": SQUARED, "fixed": store.fixed, "spread": True, "seed": b"%d" % seed}
            return score_events(store.load, asked, **options)

        found = np.array([drawn(seed).drawn for seed in range(4000)])
        stddev = drawn(0).stddev
        assert np.array_equal(found[3], drawn(3).drawn)
        _, mean, precision = kept(store, "ada")
    np.testing.assert_allclose(found.std(axis=0), stddev, rtol=0.1)
    np.testing.assert_allclose(
        np.cov(found.T), X[:2] @ np.linalg.inv(precision) @ X[:2].T, atol=0.1 * stddev.max() ** 2
    )
    np.testing.assert_allclose(found.mean(axis=0), X[:2] @ mean, atol=6 * stddev.max() / np.sqrt(4000))


def test_groups_hold_every_event_once_and_bound_their_size() -> None:
    """Padding repeats an event of the same entity."""
    rng = np.random.default_rng(7)
    entity = rng.integers(0, 50, 700)
    kind = np.arange(50) % 3
    seen = np.zeros(700, np.int64)
    for group in groups(entity, kind, np.full(50, 4), chunk_bytes=2000):
        assert np.unique(kind[group.entity]).size == 1
        assert (entity[group.row] == group.entity[:, None]).all()
        assert group.row.size * 32 <= 2000 or group.entity.size == 1
        np.add.at(seen, group.row[group.given], 1)
    assert (seen == 1).all()
