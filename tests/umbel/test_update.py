"""Stores are brought up to date with new events, once each, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel.update
from client.entity_store import EntityStore
from client.personal_update import from_state, released_prior, update_personal, with_slots
from client.refolding import refold
from client.settings import load_settings
from client.sources import forget
from client.store import DeviceStore
from common.errors import DataError, StorageError, UmbelError
from common.families import FAMILIES
from tests.asking import Asker, node
from tests.populations import design
from tests.reference import User
from tests.umbel.test_predict import MODEL, ROWS, settings, table
from umbel.entity_settings import make_store
from umbel.predict import predict
from umbel.update import update

HEADER = "user,item,click,x1,x2,when,id"


def rows(start: int, stop: int) -> list[str]:
    rng = np.random.default_rng(0)
    drawn = [
        f"u{rng.integers(9)},i{rng.integers(4)},{rng.integers(2)},{rng.normal():.3f},{rng.normal():.3f},{i},e{i}"
        for i in range(stop)
    ]
    return drawn[start:]


def write(path: Path, lines: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 20 rows."""
    monkeypatch.setattr(umbel.update, "_MOST_ROWS", 20)
    monkeypatch.setattr(umbel.update, "_FEWEST_ROWS", 20)


def entities(folder: Path, name: str = "s", **options: Any) -> Path:
    given = {"features": ("x1", "x2"), "entity": ["user", "item"], "target": "click"} | options
    make_store(folder / name, **given)
    return folder / name


def content(path: Path) -> list[Any]:
    """All that is known of every entity, in the order of their names."""
    found = []
    with EntityStore.open(path) as store:
        for kind, letter in enumerate(["u", "i"][: len(store.settings.entities)]):
            for number in range(10):
                for kept in store.load(kind, store.tags(kind, [f"{letter}{number}"])):
                    numbers = (kept.posterior.mean.tobytes(), kept.posterior.precision.tobytes())
                    found.append((letter, number, kept.features.tolist(), numbers))
    return found


def test_a_file_is_applied_once(tmp_path: Path, small: None) -> None:
    """The second time changes no byte of any entity, also under another name."""
    store, events = entities(tmp_path), write(tmp_path / "e.csv", rows(0, 70))
    first = update(store, events)
    before = content(store)
    again = update(store, events.rename(tmp_path / "moved.csv"), forgetting=0.5)
    assert (first["events"], first["bad_rows"], again["events"]) == (70, 0, 0)
    assert again["sources"][0]["status"] == "applied before"
    assert content(store) == before
    assert len(before) == 13


def test_a_file_that_has_grown_is_applied_from_where_it_ended(tmp_path: Path, small: None) -> None:
    """As if what is new had come in a file of its own."""
    store, other = entities(tmp_path), entities(tmp_path, "other")
    events = write(tmp_path / "e.csv", rows(0, 40))
    update(store, events, forgetting=0.7)
    write(events, rows(0, 60))
    assert update(store, events, forgetting=0.7)["events"] == 20
    for name, part in (("1.csv", rows(0, 40)), ("2.csv", rows(40, 60))):
        update(other, write(tmp_path / name, part), forgetting=0.7)
    assert content(store) == content(other)


def test_pieces_of_a_file_discount_the_past_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared loss: how a file is cut changes nothing beyond rounding; cutting it into batches does."""
    options = {"family": "squared", "entity": ["user"]}
    whole, cut, batches = (entities(tmp_path, name, **options) for name in ("whole", "cut", "batches"))
    for store in (whole, cut, batches):
        update(store, write(tmp_path / "past.csv", rows(0, 60)))
    events = write(tmp_path / "e.csv", rows(60, 160))
    update(whole, events, forgetting=0.5)
    monkeypatch.setattr(umbel.update, "_MOST_ROWS", 20)
    monkeypatch.setattr(umbel.update, "_FEWEST_ROWS", 20)
    update(cut, events, forgetting=0.5)
    update(batches, events, forgetting=0.5, batch_events=20)

    def precisions(path: Path) -> Any:
        return np.concatenate([np.frombuffer(numbers[1]) for _, _, _, numbers in content(path)])

    np.testing.assert_allclose(precisions(cut), precisions(whole), rtol=1e-9)
    assert (precisions(batches)[::9] < 0.9 * precisions(whole)[::9]).all()


def test_a_batch_is_known_by_its_id(tmp_path: Path, small: None) -> None:
    """Other bytes of a batch that was applied are not applied; of one that was begun they are an error."""
    store = entities(tmp_path)
    assert update(store, write(tmp_path / "e.csv", rows(0, 50)), batch_id="monday")["events"] == 50
    before = content(store)
    assert update(store, write(tmp_path / "e.csv", rows(20, 70)), batch_id="monday")["events"] == 0
    assert content(store) == before
    broken = write(tmp_path / "f.csv", [*rows(100, 145), 'u1,i1,1,"0'])
    with pytest.raises(DataError):
        update(store, broken, batch_id="tuesday")
    with pytest.raises(UmbelError, match="begun with, got others"):
        update(store, write(tmp_path / "f.csv", rows(101, 150)), batch_id="tuesday")
    assert update(store, write(tmp_path / "f.csv", rows(100, 150)), batch_id="tuesday")["events"] == 10


def test_a_folder_is_a_batch_a_file(tmp_path: Path) -> None:
    """A file that is added later is the only one that is applied."""
    store, folder = entities(tmp_path), tmp_path / "log"
    folder.mkdir()
    write(folder / "1.csv", rows(0, 20))
    write(folder / "2.csv", rows(20, 50))
    assert [source["rows"] for source in update(store, folder)["sources"]] == [20, 30]
    write(folder / "3.csv", rows(50, 60))
    assert [source["rows"] for source in update(store, folder)["sources"]] == [0, 0, 10]


def test_events_with_ids_count_once_wherever_they_come_from(tmp_path: Path, small: None) -> None:
    """In one file, in another, through a pipe."""
    store = entities(tmp_path, event_id="id")
    plain = entities(tmp_path, "plain")
    update(plain, write(tmp_path / "once.csv", rows(0, 20)))
    done = update(store, write(tmp_path / "twice.csv", [*rows(0, 20)[:10], *rows(0, 20)[:10], *rows(0, 20)[10:]]))
    assert (done["events"], done["already_applied"]) == (20, 10)
    again = update(store, write(tmp_path / "again.csv", rows(5, 30)))
    assert (again["events"], again["already_applied"]) == (10, 15)


def piped(store: Path, text: str, folder: Path, **options: Any) -> dict[str, Any]:
    path = folder / "pipe"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    try:
        return update(store, path, **options)
    finally:
        if writer.is_alive():  # nobody read
            with path.open("rb") as file:
                file.read()
        writer.join()


def test_a_pipe_needs_ids(tmp_path: Path, small: None) -> None:
    """Of the batch, or of its events: otherwise nobody could tell after a crash what was applied."""
    text = "\n".join([HEADER, *rows(0, 30)]) + "\n"
    store = entities(tmp_path)
    with pytest.raises(UmbelError, match="--batch-id"):
        piped(store, text, tmp_path)
    assert piped(store, text, tmp_path, batch_id="b")["events"] == 30
    assert piped(store, text, tmp_path, batch_id="b")["events"] == 0
    lines = [json.dumps(dict(zip(HEADER.split(","), row.split(","), strict=True))) for row in rows(0, 30)]
    other = entities(tmp_path, "other", event_id="id")
    assert piped(other, "\n".join(lines), tmp_path)["events"] == 30
    assert piped(other, "\n".join(lines[:20]), tmp_path)["already_applied"] == 20
    assert [entry[:3] for entry in content(other)] == [entry[:3] for entry in content(store)]


def test_a_pipe_that_broke_off_is_given_again_from_its_start(tmp_path: Path, small: None) -> None:
    """As `tail -n +1 -F` does: what was applied is passed over, also after the stream had ended; to the bit."""
    store, whole = entities(tmp_path), entities(tmp_path, "whole")
    lines = [HEADER, *rows(0, 100)]
    with pytest.raises(DataError):
        piped(store, "\n".join([*lines[:46], "u1,i1,7,0,0,1,e\n"]), tmp_path, batch_id="log", strict=True)
    resumed = piped(store, "\n".join(lines[:61]) + "\n", tmp_path, batch_id="log")
    assert (resumed["events"], resumed["sources"][0]["resumed_at_row"]) == (20, 41)
    assert piped(store, "\n".join(lines) + "\n", tmp_path, batch_id="log")["events"] == 40
    update(whole, write(tmp_path / "e.csv", rows(0, 100)))
    assert content(store) == content(whole)


KILLED = """
import os, sys
from pathlib import Path
import umbel.update as u
u._MOST_ROWS = u._FEWEST_ROWS = 20
calls, (store, events, point, nth) = [], sys.argv[1:]
def around(owner, name, before):
    wrapped = getattr(owner, name)
    def call(*arguments, **options):
        calls.append(name)
        if before and len(calls) == int(nth):
            os.kill(os.getpid(), 9)
        result = wrapped(*arguments, **options)
        if not before and len(calls) == int(nth):
            os.kill(os.getpid(), 9)
        return result
    setattr(owner, name, call)
{"begin": lambda: around(u, "begin", False), "applied": lambda: around(u, "update_events", False),
 "recorded": lambda: around(u, "advance", False), "next": lambda: around(u._Run, "_piece", True),
 "users": lambda: around(u, "update_users", False)}[point]()
u.update(Path(store), Path(events), forgetting=0.6)
"""


def killed(store: Path, events: Path, point: str, nth: int) -> None:
    command = [sys.executable, "-c", KILLED, str(store), str(events), point, str(nth)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "nth"), [("begin", 1), ("applied", 2), ("recorded", 1), ("recorded", 3), ("recorded", 5), ("next", 3)]
)
def test_a_killed_update_goes_on_where_it_was(tmp_path: Path, small: None, point: str, nth: int) -> None:
    """kill -9 inside a transaction, between two, at the last: nothing is lost and nothing applied twice, to the bit."""
    store, whole = entities(tmp_path, event_id="id"), entities(tmp_path, "whole", event_id="id")
    for path in (store, whole):
        update(path, write(tmp_path / "past.csv", rows(0, 30)))
    events = write(tmp_path / "e.csv", rows(30, 110))  # four pieces
    killed(store, events, point, nth)
    done = update(store, events, forgetting=0.6)
    once = update(whole, events, forgetting=0.6)
    assert done["already_applied"] == 0
    assert done["events"] + 20 * (nth - 1 if point != "begin" else 0) == once["events"] == 80
    assert content(store) == content(whole)
    assert update(store, events)["events"] == 0


@pytest.mark.parametrize(
    ("changed", "column"),
    [
        ("u1,i1,2,0,0,1,e", "click"),
        ("u1,i1,,0,0,1,e", "click"),
        ("u1,i1,1,zz,0,1,e", "x1"),
        ("u1,i1,1,inf,0,1,e", "x1"),
        (",i1,1,0,0,1,e", "user"),
        ("u1,,1,0,0,1,e", "item"),
        ("u1,i1,1,0,0,never,e", "when"),
        ("u1,i1,1,0,0,1,", "id"),
        ("u1,i1,1,0,0", ""),
    ],
)
def test_a_bad_row_is_left_out_and_named_without_its_value(tmp_path: Path, changed: str, column: str) -> None:
    """All others count; with --strict nothing of its piece does."""
    options = {"timestamp": "when", "event_id": "id"}
    store, other = entities(tmp_path, **options), entities(tmp_path, "other", **options)
    events = write(tmp_path / "e.csv", [*rows(0, 10), changed, *rows(10, 12)])
    with pytest.raises(DataError, match=r"^e\.csv, row 12"):
        update(store, events, strict=True)
    assert content(store) == []
    done = update(store, events)
    named = f", column '{column}'" if column else ""
    assert (done["events"], done["bad_rows"]) == (12, 1)
    assert done["problems"][0].startswith(f"e.csv, row 12{named}: Expected ")
    assert all(value not in done["problems"][0] for value in ("zz", "never", "inf"))
    update(other, write(tmp_path / "good.csv", rows(0, 12)))
    assert content(store) == content(other)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", ""])
def test_a_weight_that_is_not_positive_is_a_bad_row(tmp_path: Path, weight: str) -> None:
    """It says nothing about its entity."""
    store = entities(tmp_path, entity=["user"], weight="when")
    done = update(store, write(tmp_path / "e.csv", ["u1,i,1,0,0,2,e", f"u2,i,1,0,0,{weight},e"]))
    assert (done["events"], done["bad_rows"]) == (1, 1)
    assert [name for _, name, _, _ in content(store)] == [1]


def test_what_is_missing_counts_as_zero_and_new_features_are_asked_for(tmp_path: Path) -> None:
    """Empty cells and absent columns; columns that the store does not have are not read."""
    store = entities(tmp_path, entity=["user"])
    done = update(store, write(tmp_path / "e.csv", ["u1,1,,7,3", "u2,0,0.5,7,3"], "user,click,x1,z,item"))
    assert done["events"] == 2
    assert any("1 features have no column" in problem for problem in done["problems"])
    assert any("2 columns are none of the store's" in problem for problem in done["problems"])
    assert [features for _, _, features, _ in content(store)] == [[[0]], [[0, 1]]]
    update(store, write(tmp_path / "f.csv", ["u2,0,1,7,3"], "user,click,x1,z,item"), features=("z",))
    assert [features for _, _, features, _ in content(store)] == [[[0]], [[0, 1, 3]]]
    with pytest.raises(DataError, match="'click'"):
        update(store, write(tmp_path / "g.csv", ["u2,0"], "user,x1"))


def test_late_events_count_and_are_counted(tmp_path: Path, small: None) -> None:
    """Order is that of arrival, across pieces and files; --since leaves out what is earlier."""
    store = entities(tmp_path, entity=["user"], timestamp="when")
    lines = [f"u1,i,1,0,0,{when},e" for when in (5, 9, 7, "1970-01-01T00:00:20", 8)]
    assert update(store, write(tmp_path / "e.csv", lines))["late"] == 2
    assert update(store, write(tmp_path / "f.csv", ["u1,i,1,0,0,19,e", "u1,i,1,0,0,21,e"]))["late"] == 1
    done = update(store, write(tmp_path / "g.csv", ["u1,i,1,0,0,3,e", "u1,i,1,0,0,30,e"]), since=21.0)
    assert (done["before_since"], done["events"], done["late"]) == (1, 1, 0)
    with pytest.raises(UmbelError, match="column of times"):
        update(entities(tmp_path, "plain"), tmp_path / "g.csv", since=21.0)


def test_an_entitys_events_change_nobody_else(tmp_path: Path) -> None:
    """Quiet entities are the same to the bit."""
    store = entities(tmp_path, entity=["user"])
    update(store, write(tmp_path / "e.csv", rows(0, 60)))
    before = {entry[1]: entry for entry in content(store)}
    update(store, write(tmp_path / "f.csv", ["u3,i,1,1,1,1,e"]), forgetting=0.3)
    after = {entry[1]: entry for entry in content(store)}
    assert [number for number in before if before[number] != after[number]] == [3]


def test_a_store_in_use_is_an_error(tmp_path: Path) -> None:
    """And nothing is applied."""
    store, events = entities(tmp_path), write(tmp_path / "e.csv", rows(0, 5))
    with EntityStore.open(store, update=True), pytest.raises(StorageError, match="alone"):
        update(store, events)
    with pytest.raises(UmbelError, match="forgetting"):
        update(store, events, forgetting=1.5)
    with pytest.raises(UmbelError, match="which is not there"):
        update(tmp_path / "nothing", events)
    assert update(store, events)["events"] == 5


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The settings of a node of three places that has folded a model in, as `umbel provision` lays it out."""
    folder = tmp_path / "edge-1"
    folder.mkdir()
    (folder / "table.csv").write_text("\n".join(["user,a,b,y", *ROWS]) + "\n")
    data = table(folder)
    service = node(data, store=str(folder / "node.sqlite"), users=3)
    service.fold_in(*Asker(MODEL, data).fold_in())
    service.close()
    return settings(folder, data)


def states(device: Path, *users: str) -> Any:
    with DeviceStore.open(device.parent / "node.sqlite", ()) as store:
        known = store.known(list(users))
        return [store.load_states([user]) if there else None for user, there in zip(users, known, strict=True)]


def test_a_nodes_users_are_updated_from_its_store_or_its_settings(device: Path) -> None:
    """As `update_personal` says, from what was kept and the new rows, with the declared columns."""
    (before,) = states(device, "ada")
    new = write(device.parent / "new.csv", ["0.3,ada,5,-0.4", "-0.5,ada,1,0.9"], "a,user,y,b")
    done = update(device.parent / "node.sqlite", new, forgetting=0.9)
    assert (done["events"], done["unit"]) == (2, "user")
    examples = User(X=np.array([[0.3, -0.4, 1.0], [-0.5, 0.9, 1.0]]), y=np.array([2.0, -2.0]), weight=np.ones(2))
    personal = from_state(before.with_model(MODEL), MODEL, share=before.share)
    expected = update_personal(personal, design([examples]), MODEL, family=FAMILIES["squared"], forgetting=0.9).personal
    (after,) = states(device, "ada")
    np.testing.assert_allclose(after.w, expected.posterior.mean[:, :1], rtol=1e-12)
    np.testing.assert_allclose(after.precision, expected.posterior.precision, rtol=1e-12)
    np.testing.assert_allclose(after.share, expected.share(MODEL), rtol=1e-12)
    assert not np.array_equal(after.w, before.w)
    assert update(device, new)["events"] == 0  # by its settings it is the same store
    assert predict(device, "ada", new)["scores"] != predict(device, "ben", new)["scores"]


def test_a_nodes_other_users_stay_and_new_ones_take_free_places(device: Path) -> None:
    """Three places, two taken: the first stranger starts from the released prior, the second is left out."""
    before = states(device, "ada", "ben")
    new = write(device.parent / "new.csv", ["cid,.1,.2,5", "dan,.1,.2,5", "ada,2,.2,9"], "user,a,b,y")
    with DeviceStore.open(device.parent / "node.sqlite", ()) as store:
        store.forget("ada")
    done = update(device, new)
    assert (done["events"], done["no_place"], done["clipped"]) == (1, 2, 2)
    ada, ben, cid, dan = states(device, "ada", "ben", "cid", "dan")
    assert (ada.found[0], cid.found[0], dan) == (False, True, None)
    assert np.array_equal(ben.precision, before[1].precision)
    assert np.array_equal(ben.w, before[1].w)


def test_a_nodes_events_are_forgotten_with_their_user(tmp_path: Path) -> None:
    """Ids of events count once for their user, and are erased with the user."""
    (tmp_path / "table.csv").write_text("user,a,b,y,id\nada,0.5,-0.2,4,e1\nben,-0.9,0.3,2,e1\n")
    data = table(tmp_path, event_id="id")
    service = node(data, store=str(tmp_path / "node.sqlite"), users=3)
    service.fold_in(*Asker(MODEL, data).fold_in())
    service.close()
    device = settings(tmp_path, data)
    new = write(tmp_path / "new.csv", ["ada,.1,.2,5,n1", "ben,.1,.2,5,n1", "ada,.1,.2,5,n1"], "user,a,b,y,id")
    done = update(device, new)
    assert (done["events"], done["already_applied"]) == (2, 1)
    with DeviceStore.open(tmp_path / "node.sqlite", ()) as store:
        ((count,),) = store._connection.execute("SELECT count(*) FROM events").fetchall()
        store.forget("ada")
        ((left,),) = store._connection.execute("SELECT count(*) FROM events").fetchall()
    assert (count, left) == (2, 1)


def test_pieces_of_a_nodes_batch_discount_the_past_once(device: Path, small: None) -> None:
    """Sixty rows in three pieces tell more than in three batches, each of which discounts those before."""
    lines = [f"ada,{np.sin(i):.3f},{np.cos(i):.3f},{3 + np.sin(2 * i):.3f}" for i in range(60)]
    new = write(device.parent / "new.csv", lines, "user,a,b,y")
    kept = (device.parent / "node.sqlite").read_bytes()
    found = []
    for batch_events in (None, 20):
        (device.parent / "node.sqlite").write_bytes(kept)
        assert update(device, new, forgetting=0.5, batch_events=batch_events)["events"] == 60
        found.append(states(device, "ada")[0].precision[0, 0, 0])
    assert found[1] < 0.75 * found[0]


@pytest.mark.parametrize(("point", "nth"), [("users", 1), ("recorded", 1), ("next", 3)])
def test_a_killed_update_of_a_node_goes_on(device: Path, small: None, point: str, nth: int) -> None:
    """States and the record of what they were updated with are one transaction."""
    lines = [f"{'ada' if i % 3 else 'ben'},{np.sin(i):.3f},{np.cos(i):.3f},{3 + np.sin(2 * i):.3f}" for i in range(60)]
    new = write(device.parent / "new.csv", lines, "user,a,b,y")
    copy = device.parent / "copy.sqlite"
    copy.write_bytes((device.parent / "node.sqlite").read_bytes())
    killed(device, new, point, nth)
    update(device, new, forgetting=0.6)
    found = states(device, "ada", "ben")
    os.replace(copy, device.parent / "node.sqlite")
    assert update(device, new, forgetting=0.6)["events"] == 60
    for once, resumed in zip(states(device, "ada", "ben"), found, strict=True):
        assert np.array_equal(once.precision, resumed.precision)
        assert np.array_equal(once.w, resumed.w)
        assert np.array_equal(once.b, resumed.b)


def test_a_nodes_store_is_found_by_its_settings_only(device: Path, tmp_path: Path) -> None:
    """Its features are declared there; without them a column has no meaning, and other columns are refused."""
    new = write(device.parent / "new.csv", ["ada,.1,.2,5"], "user,a,b,y")
    lonely = tmp_path / "alone.sqlite"
    lonely.write_bytes((device.parent / "node.sqlite").read_bytes())
    with pytest.raises(UmbelError, match=r"Name the node\.toml"):
        update(lonely, new)
    other = settings(device.parent, table(device.parent, target_range=(0.0, 10.0)))
    with pytest.raises(UmbelError, match="columns and the target's range"):
        update(other, new)
    with pytest.raises(UmbelError, match="--feature"):
        update(device, new, features=("z",))
    with pytest.raises(DataError, match="target"):
        update(device, write(device.parent / "bad.csv", ["ada,.1,.2"], "user,a,b"))


def test_a_new_release_carries_events_over(device: Path) -> None:
    """A user with events goes on from that posterior under the new prior; one without is fitted to the data again."""
    data, other = load_settings(device).data, replace(MODEL, beta=MODEL.beta + 0.1, U=MODEL.U * 0.8)
    new = write(device.parent / "new.csv", ["ada,0.3,-0.4,5", "ada,-0.5,0.9,1"], "user,a,b,y")
    update(device, new)
    (before,) = states(device, "ada")
    service = node(data, store=str(device.parent / "node.sqlite"), users=3)
    message = Asker(other, data).fold_in()
    service.fold_in(*message)
    service.fold_in(*message)  # it came twice
    service.close()
    expected = refold(
        from_state(before.with_model(MODEL), MODEL, share=before.share), MODEL, other, family=FAMILIES["squared"]
    )
    ada, ben = states(device, "ada", "ben")
    np.testing.assert_allclose(ada.w, expected.posterior.mean[:, :1], rtol=1e-12)
    np.testing.assert_allclose(ada.precision, expected.posterior.precision, rtol=1e-12)
    assert (ada.batch[0], ben.batch[0]) == (before.batch[0], 0)
    alone = node(data, store=str(device.parent / "alone.sqlite"), users=3)
    alone.fold_in(*Asker(other, data).fold_in())
    alone.close()
    with DeviceStore.open(device.parent / "alone.sqlite", ()) as store:
        assert store.known(["ada", "ben"]).all()
        assert np.array_equal(store.load_states(["ben"]).w, ben.w)
        assert not np.array_equal(store.load_states(["ada"]).w, ada.w)
    assert update(device, new)["events"] == 0


def fitted(folder: Path, model: Any, lines: list[str]) -> Any:
    """The states of a node that reads these rows and folds the model in."""
    folder.mkdir()
    write(folder / "table.csv", lines, "user,a,b,y")
    data = table(folder)
    service = node(data, store=str(folder / "node.sqlite"), users=3)
    service.fold_in(*Asker(model, data, sparsity=2).fold_in())
    service.close()
    return states(folder / "node.toml", "ada", "ben", "cid")


def grams(device: Path) -> list[bytes | None]:
    with DeviceStore.open(device.parent / "node.sqlite", ()) as store:
        users = [user for user in ("ada", "ben", "cid") if store.known([user])[0]]
        with store.changing() as changes:
            return changes.grams(users)


def drawn(user: str, start: int, stop: int) -> list[str]:
    """Rows within the declared ranges, for which a feature of b matters."""
    rng = np.random.default_rng(len(user) + ord(user[0]) + start)
    at = rng.uniform(-1, 1, (stop - start, 2))
    y = np.clip(3 + 1.5 * at[:, 0] - 0.5 * at[:, 1] + 0.1 * rng.standard_normal(stop - start), 1, 5)
    return [f"{user},{a!r},{b!r},{t!r}" for (a, b), t in zip(at.tolist(), y.tolist(), strict=True)]


@pytest.fixture
def keeping(tmp_path: Path) -> Path:
    """The settings of a node that keeps moments and has folded a model in for ada and ben."""
    folder = tmp_path / "keeping"
    folder.mkdir()
    write(folder / "table.csv", [*drawn("ada", 0, 2), *drawn("ben", 0, 9)], "user,a,b,y")
    data = table(folder)
    service = node(data, store=str(folder / "node.sqlite"), users=3, keep_gram=True)
    service.fold_in(*Asker(MODEL, data, sparsity=1).fold_in())
    service.close()
    path = settings(folder, data)
    path.write_text("keep_gram = true\n" + path.read_text())
    return path


OTHER = replace(MODEL, beta=MODEL.beta + np.array([0.3, -0.2, 0.1]), U=np.array([[0.1], [1.0], [-0.7]]))


@pytest.mark.parametrize("batch_events", [None, 3])
def test_with_moments_a_new_release_is_fitted_to_rows_and_events(
    keeping: Path, tmp_path: Path, small: None, batch_events: int | None
) -> None:
    """As a node that learns all from its data, to 1e-8, and again; what is in both counts once."""
    parts = {"1.csv": ["ada", "cid"], "2.csv": ["ada", "ben"], "3.csv": ["cid", "ada"]}
    data, lines = load_settings(keeping).data, (keeping.parent / "table.csv").read_text().splitlines()[1:]
    for number, (name, users) in enumerate(parts.items()):
        new = [line for user in users for line in drawn(user, 10 * (number + 1), 10 * (number + 1) + 7)]
        update(keeping, write(tmp_path / name, new, "user,a,b,y"), keep_gram=True, batch_events=batch_events)
        lines += new
    write(keeping.parent / "table.csv", lines, "user,a,b,y")
    for number, model in enumerate([OTHER, replace(OTHER, U=OTHER.U[::-1])]):
        before = states(keeping, "ada", "ben", "cid")
        service = node(data, store=str(keeping.parent / "node.sqlite"), users=3, keep_gram=True)
        service.fold_in(*Asker(model, data, sparsity=2).fold_in())
        service.close()
        expected = fitted(tmp_path / f"all-{number}", model, lines)
        for found, all_at_once, old in zip(states(keeping, "ada", "ben", "cid"), expected, before, strict=True):
            assert found.batch[0] == old.batch[0] > 0
            assert np.array_equal(found.support, all_at_once.support)
            theta, wanted = found.with_model(model).theta, all_at_once.with_model(model).theta
            np.testing.assert_allclose(theta, wanted, rtol=1e-8)
            np.testing.assert_allclose(found.precision, all_at_once.precision, rtol=1e-8, atol=1e-9)


def test_moments_discount_the_past_once_in_each_batch(keeping: Path, tmp_path: Path, small: None) -> None:
    """Two pieces of a batch halve ada's two rows once; others' moments stay to the bit."""
    before = grams(keeping)
    update(keeping, write(tmp_path / "e.csv", drawn("ada", 0, 30), "user,a,b,y"), forgetting=0.5)
    after = grams(keeping)
    assert np.frombuffer(after[0] or b"")[-1] == 31.0
    assert after[1:] == before[1:]


def test_moments_of_a_part_are_never_kept(keeping: Path, tmp_path: Path) -> None:
    """An update without the setting drops them, and one with it adds none to a state that came without."""
    rest = keeping.read_text().split("\n", 1)[1]
    keeping.write_text(rest)
    update(keeping, write(tmp_path / "1.csv", drawn("ada", 20, 23), "user,a,b,y"))
    assert [gram is not None for gram in grams(keeping)] == [False, True]
    keeping.write_text("keep_gram = true\n" + rest)
    update(keeping, write(tmp_path / "2.csv", drawn("ada", 30, 33) + drawn("cid", 0, 3), "user,a,b,y"))
    assert [gram is not None for gram in grams(keeping)] == [False, True, True]
    data = load_settings(keeping).data
    service = node(data, store=str(keeping.parent / "node.sqlite"), users=3, keep_gram=True)
    service.fold_in(*Asker(OTHER, data).fold_in())
    service.close()
    assert [gram is not None for gram in grams(keeping)] == [False, True, True]


def test_moments_are_refused_where_they_would_not_be_kept(keeping: Path, device: Path, tmp_path: Path) -> None:
    """Too many features, a node without the setting, a store of entities: errors that name the remedy."""
    new = write(tmp_path / "new.csv", ["ada,.1,.2,5"], "user,a,b,y")
    for store in (device, entities(tmp_path)):
        with pytest.raises(UmbelError, match="keep_gram = true"):
            update(store, new, keep_gram=True)
    names = tuple({"name": f"x{i}"} for i in range(64))  # and the intercept
    data = table(keeping.parent, features=names)
    with pytest.raises(UmbelError, match=r"at most 64 features.*dimension=65.*keep_gram = false"):
        node(data, users=3, keep_gram=True)
    path = settings(keeping.parent, data)
    path.write_text("keep_gram = true\n" + path.read_text())
    with pytest.raises(UmbelError, match="at most 64 features"):
        update(path, new)


def test_room_for_more_entries_of_b_changes_nothing_else() -> None:
    """New slots are free and as uncertain as the prior."""
    narrow = released_prior(MODEL, 2, sparsity=1)
    wide = with_slots(narrow, MODEL, 3)
    assert np.array_equal(wide.posterior.precision, released_prior(MODEL, 2, sparsity=3).posterior.precision)
    assert np.array_equal(wide.support, np.full((2, 3), -1))
    assert np.array_equal(wide.theta(MODEL), narrow.theta(MODEL))
