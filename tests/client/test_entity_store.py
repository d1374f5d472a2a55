"""Entities of the plain GLMix form in one file."""

import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from client.applied import advance, begin
from client.entity_store import EntitySettings, EntityStore, is_entity_store
from client.incremental import Posterior
from client.store import DeviceStore
from common.errors import StorageError, UmbelError
from common.streaming import Position

SETTINGS = EntitySettings(entities=("user", "item"), target="y", features=("p", "q"), event_id="id")
NAMES = ["ada", "ben", "cid"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "s.umbel"
    EntityStore.create(found, SETTINGS)
    return found


def random_posterior(n: int, p: int, *, diagonal: bool = False) -> Posterior:
    rng = np.random.default_rng(n * 10 + p)
    A = rng.standard_normal((n, p, p))
    precision = rng.random((n, p)) if diagonal else A @ np.swapaxes(A, 1, 2)
    return Posterior(mean=rng.standard_normal((n, p)), precision=precision)


def save(store: EntityStore, kind: int, names: Sequence[str], features: list[int], posterior: Posterior) -> None:
    with store.changing() as changes:
        changes.save(kind, store.tags(kind, names), np.array([features] * len(names)), posterior, 7)


@pytest.mark.parametrize("curvature", ["full", "diagonal"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, curvature: str) -> None:
    """Entities of different widths come in groups, each with its place among those that were asked for."""
    settings = EntitySettings(entities=("user",), target="y", features=("p", "q"), curvature=curvature)
    EntityStore.create(tmp_path / "s", settings)
    diagonal = curvature == "diagonal"
    two, one = random_posterior(2, 3, diagonal=diagonal), random_posterior(1, 1, diagonal=diagonal)
    with EntityStore.open(tmp_path / "s", update=True) as store:
        save(store, 0, ["ada", "cid"], [0, 1, 2], two)
        save(store, 0, ["ben"], [2], one)
    with EntityStore.open(tmp_path / "s") as store:
        narrow, wide = store.load(0, store.tags(0, [*NAMES, "stranger"]))
    assert (narrow.place.tolist(), narrow.features.tolist(), narrow.batch.tolist()) == ([1], [[2]], [7])
    assert (wide.place.tolist(), wide.features.tolist()) == ([0, 2], [[0, 1, 2], [0, 1, 2]])
    for found, given in ((narrow.posterior, one), (wide.posterior, two)):
        upper = given.precision if diagonal else np.triu(given.precision)
        assert np.array_equal(found.mean, given.mean)
        assert np.array_equal(found.precision if diagonal else np.triu(found.precision), upper)
        assert np.array_equal(found.full_precision, np.swapaxes(found.full_precision, 1, 2))


def test_types_are_told_apart(path: Path) -> None:
    """A user and an item of one name are two entities."""
    with EntityStore.open(path, update=True) as store:
        save(store, 0, ["ada"], [0], random_posterior(1, 1))
        assert store.load(1, store.tags(1, ["ada"])) == []
        assert store.tags(0, ["ada"]) != store.tags(1, ["ada"])


def test_no_name_is_in_the_file_and_nobody_else_may_read_it(path: Path) -> None:
    """Names and the ids of events are keyed hashes."""
    with EntityStore.open(path, update=True) as store:
        save(store, 0, ["a-very-long-name"], [0], random_posterior(1, 1))
        with store.changing() as changes:
            changes.add_events(0, store.tags(0, ["a-very-long-name"]), np.array([0]), ["a-very-long-event"])
        for file in path.parent.iterdir():
            assert b"a-very-long" not in file.read_bytes()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_event_counts_once_for_its_entity(path: Path) -> None:
    """The first of equal ones is new; another entity's event may have the same id."""
    with EntityStore.open(path, update=True) as store:
        tags = store.tags(0, ["ada", "ben"])
        with store.changing() as changes:
            found = changes.add_events(0, tags, np.array([0, 0, 1]), ["e", "e", "e"])
        assert found.tolist() == [True, False, True]
        with store.changing() as changes:
            assert changes.add_events(0, tags, np.array([1, 1]), ["e", "f"]).tolist() == [False, True]


def test_what_fails_in_the_middle_leaves_nothing(path: Path) -> None:
    """Entities, events and batches are one transaction."""

    def fail(store: EntityStore) -> None:
        with store.changing() as changes:
            begin(changes.connection, "b", Position())
            changes.save(0, store.tags(0, ["ada"]), np.array([[0]]), random_posterior(1, 1), 1)
            changes.add_events(0, store.tags(0, ["ada"]), np.array([0]), ["e"])
            raise ZeroDivisionError

    with EntityStore.open(path, update=True) as store:
        with pytest.raises(ZeroDivisionError):
            fail(store)
        assert (store.load(0, store.tags(0, ["ada"])), store.batches()) == ([], [])
        with store.changing() as changes:
            assert changes.add_events(0, store.tags(0, ["ada"]), np.array([0]), ["e"]).tolist() == [True]


def test_two_who_apply_one_batch_are_stopped(path: Path) -> None:
    """A batch goes on from where it was, or not at all."""
    with EntityStore.open(path, update=True) as store, store.changing() as changes:
        batch = begin(changes.connection, "b", Position())
        advance(changes.connection, batch, batch)
        moved = type(batch)(**vars(batch) | {"position": Position(offset=5, row=1, digest=bytes(32))})
        advance(changes.connection, batch, moved)
        with pytest.raises(UmbelError, match="alone"):
            advance(changes.connection, batch, moved)
        with pytest.raises(UmbelError, match="alone"):
            begin(changes.connection, "b", Position())


def test_features_are_added_at_the_end(path: Path) -> None:
    """Known ones stay what and where they are."""
    with EntityStore.open(path, update=True) as store:
        store.add_features(["q", "z", "z"])
    with EntityStore.open(path) as store:
        assert store.settings.features == ("p", "q", "z")
        assert store.fixed.tolist() == [0.0] * 4


def test_only_one_process_updates_and_anybody_reads(path: Path) -> None:
    """The second one is told at once."""
    with EntityStore.open(path, update=True):
        with pytest.raises(StorageError, match="alone"):
            EntityStore.open(path, update=True)
        EntityStore.open(path).close()
    EntityStore.open(path, update=True).close()


def test_a_store_that_another_program_locks_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written."""
    monkeypatch.setattr("client.entity_store._LOCK_TIMEOUT", 0.01)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with EntityStore.open(path, update=True) as store, pytest.raises(StorageError, match="free"):
        save(store, 0, ["ada"], [0], random_posterior(1, 1))
    other.close()


def test_making_it_again_changes_nothing_and_other_settings_are_refused(path: Path) -> None:
    """A store keeps what it was made with."""
    before = path.read_bytes()
    EntityStore.create(path, SETTINGS)
    assert path.read_bytes() == before
    with pytest.raises(UmbelError, match="other settings"):
        EntityStore.create(path, EntitySettings(entities=("user",), target="y", features=("p", "q")))


def test_other_files_and_versions_are_refused_and_left_alone(tmp_path: Path, path: Path) -> None:
    """A node's store, a text, an empty file, a newer version, a torn file."""
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    DeviceStore.open(tmp_path / "node", ["ada"]).close()
    for name in ("text", "empty", "node", "absent"):
        assert not is_entity_store(tmp_path / name)
        with pytest.raises(UmbelError, match="Expected a store"):
            EntityStore.open(tmp_path / name)
    assert is_entity_store(path)
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(StorageError):
        EntityStore.open(torn).batches()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(UmbelError, match="version=2"):
        EntityStore.open(path)
