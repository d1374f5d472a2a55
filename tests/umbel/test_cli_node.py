"""The commands on a device: what they print, and with which code they end."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.loop import NotAdmitted
from client.sources import forget
from client.store import DeviceStore
from tests.asking import Asker, node
from tests.umbel.test_predict import MODEL, ROWS, settings, table
from umbel.cli import run


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def asker(tmp_path: Path) -> Asker:
    """The server of the node."""
    (tmp_path / "table.csv").write_text("\n".join(["user,a,b,y", *ROWS]) + "\n")
    return Asker(MODEL, table(tmp_path))


@pytest.fixture
def device(tmp_path: Path, asker: Asker) -> Path:
    """The settings of a node that has contributed once and folded a model in."""
    (tmp_path / "new.csv").write_text("b,a\n0.2,0.1\nmuch,0\n")
    service = node(table(tmp_path), store=str(tmp_path / "node.sqlite"), users=3)
    service.contribute(*asker.train())
    service.fold_in(*asker.fold_in())
    service.close()
    return settings(tmp_path, table(tmp_path))


def found(device: Path, user: str) -> tuple[bool, bool]:
    """Whether a user has a state, and is forgotten."""
    with DeviceStore.open(device.parent / "node.sqlite", ()) as store:
        store.known([user])
        return bool(store.load_states([user]).found[0]), bool(store.forgotten([user])[0])


def test_predict_prints_a_score_a_row(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV for people and programs; what could not be answered stands on stderr."""
    assert run(["predict", str(device), "--user", "ada", "--input", str(device.parent / "new.csv")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "row,score"
    assert lines[1].startswith("2,")
    assert lines[2] == "3,"
    assert "row 3, column 'b'" in err
    assert (
        run(["predict", str(device), "--user", "eve", "--input", str(device.parent / "new.csv"), "--format=json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["source"] == "prior"


def test_forget_erases_and_a_running_node_does_not_bring_it_back(
    device: Path, asker: Asker, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows are still in the data: neither the next round, nor a restart, takes the user in again."""
    data = table(device.parent)
    running = node(data, store=str(device.parent / "node.sqlite"), users=3)
    assert run(["forget", str(device), "ada", "--yes", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"user": "ada", "forgotten": True}
    assert found(device, "ada") == (False, True)
    running.contribute(*asker.train())
    running.fold_in(*asker.fold_in())
    assert found(device, "ada") == (False, True)
    assert found(device, "ben") == (True, False)
    running.close()
    forget()
    node(data, store=str(device.parent / "node.sqlite"), users=3).close()
    assert found(device, "ada") == (False, True)
    assert run(["forget", str(device), "ada", "--enrol"]) == 0
    assert found(device, "ada") == (False, False)
    with DeviceStore.open(device.parent / "node.sqlite", ["ada"]) as store:
        assert store.contributions(["ada"]).tolist() == [1]


def test_forget_asks_first(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal to ask at, nothing happens."""
    assert run(["forget", str(device), "ada"]) == 2
    assert "Add --yes" in capsys.readouterr().err
    assert found(device, "ada") == (True, False)


def test_forgetting_a_stranger_is_bad_input(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt name must not look as if something had been erased."""
    assert run(["forget", str(device), "Ada", "--yes"]) == 2
    assert "does not know" in capsys.readouterr().err
    assert run(["forget", str(device), "Ada", "--enrol"]) == 2


def test_the_node_command_ends_with_the_code_of_what_went_wrong(
    device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for settings and options, 6 for a key that is not admitted."""
    assert run(["node", str(device)]) == 2
    assert "Expected superlink" in capsys.readouterr().err

    def refused(*_: object, **__: object) -> None:
        raise NotAdmitted("Expected the server to admit this node's key, got a refusal.")

    monkeypatch.setattr("client.node.run_node", refused)
    assert run(["node", str(device), "--once", "--poll", "0.5"]) == 6
    assert "admit" in capsys.readouterr().err
    assert run(["node", str(device), "--poll", "0"]) == 2


def test_predictions_go_on_while_the_node_writes(device: Path) -> None:
    """Reading waits for no writer."""
    store = DeviceStore.open(device.parent / "node.sqlite", ["ada", "ben"])
    done = threading.Event()

    def write() -> None:
        for sequence in range(10, 40):
            store.charge("M", sequence, bytes(32), ["ada", "ben"], np.ones(2, np.bool_), 1)
        done.set()

    threading.Thread(target=write).start()
    while not done.is_set():
        assert run(["predict", str(device), "--user", "ada", "--input", str(device.parent / "new.csv")]) == 0
    store.close()
