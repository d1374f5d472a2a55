"""How the ServerApp ended is in the run's folder, whatever happened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import server.app
from common.config import Config
from common.errors import BudgetExhausted, Refused, StorageError
from server.settings import RunFolder
from tests.federation import configuration, prepare, run_real


def outcome_of(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RunFolder(root=Path(str(config.run.out))).outcome.read_text())
    return found


def test_a_run_that_ends_says_so(tmp_path: Path) -> None:
    """With Flower's number of the run, by which an older one's is told apart."""
    config = prepare(configuration(tmp_path / "run"))
    run_real(config)
    found = outcome_of(config)
    assert found.pop("flower_run_id").isdigit()
    assert found == {"error": None, "message": None, "code": None, "exit_code": 0}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BudgetExhausted("no room"), ("BudgetExhausted", "no room", None, 3)),
        (StorageError("full"), ("StorageError", "full", None, 7)),
        (Refused("replayed", "again"), ("Refused", "again", "replayed", 6)),
        (ValueError("a user's row: 17, ann"), ("ValueError", None, None, 1)),
        (SystemExit(0), ("SystemExit", None, None, 130)),
        (KeyboardInterrupt(), ("KeyboardInterrupt", None, None, 130)),
    ],
)
def test_an_error_is_told_by_name(
    error: BaseException, expected: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text only where it is our own, and the error goes on."""
    raised = raising(error)
    monkeypatch.setattr(server.app, "train", raised)
    config = prepare(configuration(tmp_path / "run"))
    with pytest.raises(type(error)):
        run_real(config)
    found = outcome_of(config)
    assert (found["error"], found["message"], found["code"], found["exit_code"]) == expected
    assert "ann" not in RunFolder(root=tmp_path / "run").outcome.read_text()


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own error is raised where its outcome cannot be written."""
    monkeypatch.setattr(server.app, "train", raising(BudgetExhausted("no room")))
    monkeypatch.setattr(server.app, "write_durably", raising(StorageError("full")))
    with pytest.raises(BudgetExhausted):
        run_real(prepare(configuration(tmp_path / "run")))


def raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*_: Any) -> None:
        raise error

    return raise_it
