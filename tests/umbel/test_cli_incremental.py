"""`umbel update` and `umbel predict`: what they print, with which code they end, what they import."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.personal_update import coordinates, from_state
from client.store import DeviceStore
from tests.umbel.test_predict import MODEL, device, nothing_cached
from tests.umbel.test_update import HEADER, entities, rows, write
from umbel.cli import run

__all__ = ["device", "nothing_cached"]
INIT = ("--init", "--entity", "user", "--target", "click", "--feature", "x1", "--feature", "x2")


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def table_of(out: str) -> list[list[str]]:
    return [line.split(",") for line in out.splitlines()]


def test_a_store_is_made_updated_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People read a line of what was done; programs one object."""
    store, events = tmp_path / "s.umbel", write(tmp_path / "e.csv", [*rows(0, 50), "u1,i,1,zz,0,1,e"])
    code, out, err = called(capsys, "update", "--store", store, *INIT)
    assert (code, out) == (0, "")
    assert "Made" in err
    code, out, err = called(capsys, "update", "--store", store, "--events", events)
    assert (code, out) == (0, "50 events applied in 9 updates of a user\n")
    assert "row 52, column 'x1'" in err
    assert "1 bad rows left out" in err
    code, out, err = called(capsys, "update", "--store", store, "--events", events, "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["events"], document["sources"][0]["status"]) == (0, "applied before")
    code, out, err = called(capsys, "predict", "--store", store, "--events", events, "--uncertainty")
    assert table_of(out)[0] == ["row", "score", "stddev"]
    assert len(table_of(out)) == 52
    assert table_of(out)[-1] == ["52", "", ""]
    assert "row 52, column 'x1'" in err
    assert all(0 < float(score) < 1 and 0 < float(stddev) < 2 for _, score, stddev in table_of(out)[1:-1])


def test_what_is_missing_or_does_not_go_together_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, and nothing is made."""
    store, events = tmp_path / "s.umbel", write(tmp_path / "e.csv", rows(0, 5))
    for arguments, named in (
        (["update", "--store", store], "--events"),
        (["update", "--store", store, "--events", events], "--init"),
        (["update", "--store", store, "--events", events, "--target", "y"], "--target with --init"),
        (["update", "--store", store, "--init", "--target", "y"], "--entity"),
        (["update", "--store", store, *INIT, "--prior-precision", "0"], "--prior-precision"),
        (["update", "--store", store, *INIT, "--feature", "user"], "'user' in several"),
        (["update", "--store", store, *INIT, "--feature", "intercept"], "'intercept'"),
        (["update", "--store", store, "--events", events, "--forgetting", "1.2"], "forgetting"),
        (["update", "--store", store, "--events", events, "--since", "once"], "which is not there|--since"),
        (["predict", "--events", events], "--store"),
        (["predict", store, "--store", store, "--events", events], "--store"),
        (["predict", "--store", store, "--events", events, "--seed", "1"], "--thompson"),
        (["predict", "--store", events, "--events", events], "store"),
    ):
        code, out, err = called(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert any(name in err for name in named.split("|")), err
        assert not store.exists()


def test_the_fixed_effect_is_public_and_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of coefficients; who is unknown gets it alone."""
    store, fixed = tmp_path / "s.umbel", write(tmp_path / "f.csv", ["x1,2", "intercept,-1"], "feature,coefficient")
    asked = write(tmp_path / "q.csv", ["u1,0.5,7"], "user,x1,x2")
    squared = ("--family", "squared", "--fixed", fixed)
    assert called(capsys, "update", "--store", store, *INIT, *squared)[0] == 0
    code, out, err = called(capsys, "predict", "--store", store, "--events", asked)
    assert (code, table_of(out)[1]) == (0, ["2", "0"])
    assert "answers for anybody" in err
    for bad in ("x3,1", "x1,nan", "x1,1\nx1,2"):
        write(fixed, [bad], "feature,coefficient")
        code, _, err = called(capsys, "update", "--store", tmp_path / "t", *INIT, *squared)
        assert code == 2
        assert "f.csv, row" in err


def test_one_user_of_a_store_of_entities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--user stands in for the column; where an event names several entities it is not enough."""
    store, both = entities(tmp_path, entity=["user"]), entities(tmp_path, "both")
    events = write(tmp_path / "e.csv", rows(0, 50))
    for path in (store, both):
        assert called(capsys, "update", "--store", path, "--events", events)[0] == 0
    asked, without = write(tmp_path / "q.csv", ["u3,1,2"], "user,x1,x2"), write(tmp_path / "r.csv", ["1,2"], "x1,x2")
    _, by_column, _ = called(capsys, "predict", "--store", store, "--events", asked)
    _, by_option, _ = called(capsys, "predict", "--store", store, "--events", without, "--user", "u3")
    assert by_column == by_option
    assert called(capsys, "predict", "--store", both, "--events", without, "--user", "u3")[0] == 2
    code, out, _ = called(capsys, "predict", "--store", store, "--events", asked, "--format", "json", "--thompson")
    assert (code, json.loads(out)["source"], len(json.loads(out)["thompson"])) == (0, "posterior", 1)


def test_a_node_is_named_by_its_settings_or_its_store(
    device: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One state, one answer; users may be a column of the rows."""
    new = write(device.parent / "rows.csv", ["ada,0.2,0.1", "ben,-1,1", "eve,0,0"], "user,b,a")
    store = device.parent / "node.sqlite"
    _, by_store, err = called(capsys, "predict", "--store", store, "--events", new, "--uncertainty")
    assert called(capsys, "predict", device, "--input", new, "--uncertainty")[1] == by_store
    assert "in 1 of the rows" in err
    by_row = table_of(by_store)
    for user, row in (("ada", by_row[1]), ("eve", by_row[3])):
        _, alone, _ = called(capsys, "predict", device, "--input", new, "--user", user, "--uncertainty")
        assert table_of(alone)[int(row[0]) - 1] == row
    assert called(capsys, "update", "--store", store, "--events", write(new, ["ada,0.2,0.1,5"], "user,b,a,y"))[0] == 0
    assert called(capsys, "predict", "--store", store, "--events", new, "--user", "ada")[1] != by_store


def test_a_devices_uncertainty_is_its_posteriors(
    device: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """sqrt(c'H^-1 c) in the coordinates (w, b); for who is unknown |U'x|; draws vary as much (4000: within 10 %)."""
    x = np.array([0.1, 0.2, 1.0])
    new = write(device.parent / "rows.csv", ["ada,0.2,0.1", "eve,0.2,0.1"], "user,b,a")
    _, out, _ = called(capsys, "predict", device, "--input", new, "--uncertainty")
    found = [float(row[2]) for row in table_of(out)[1:]]
    with DeviceStore.open(device.parent / "node.sqlite", ["ada"]) as store:
        states = store.load_states(["ada"])
    personal = from_state(states.with_model(MODEL), MODEL, share=states.share)
    c = coordinates(x[None, None], MODEL, personal.support)[0, 0]
    expected = [np.sqrt(c @ np.linalg.inv(states.precision[0]) @ c), np.linalg.norm(MODEL.U.T @ x)]
    assert found == pytest.approx(expected, rel=1e-8)
    write(new, ["ada,0.2,0.1"], "user,b,a")
    arguments = ("predict", device, "--input", new, "--thompson", "--seed")
    draws = [float(table_of(called(capsys, *arguments, seed)[1])[1][2]) for seed in range(300)]
    assert np.std(draws) == pytest.approx(expected[0], rel=0.25)
    assert draws[7] == float(table_of(called(capsys, *arguments, 7)[1])[1][2])


def test_lines_from_standard_input(tmp_path: Path) -> None:
    """A log shipper's; the second time nothing changes."""
    store = entities(tmp_path, entity=["user"], event_id="id")
    lines = [json.dumps(dict(zip(HEADER.split(","), row.split(","), strict=True))) for row in rows(0, 40)]
    command = [sys.executable, "-m", "umbel", "update", "--store", str(store), "--events", "-", "--format", "json"]

    def fed() -> dict[str, Any]:
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    assert (fed()["events"], fed()["already_applied"]) == (40, 40)


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130; whole pieces were applied."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("umbel.update.update", interrupted)
    code, _, err = called(capsys, "update", "--store", entities(tmp_path), "--events", tmp_path / "e.csv")
    assert (code, "Run it again" in err) == (130, True)


def test_progress_is_for_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar with the events so far; a log stays clean."""
    from umbel.cli_incremental import _progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with _progress(quiet=False) as watcher:
        assert watcher is None
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with _progress(quiet=True) as watcher:
        assert watcher is None
    with _progress(quiet=False) as watcher:
        assert watcher is not None
        watcher.progress("e.csv", 0.5, 1234)
        watcher.progress("standard input", None, 1300)
    assert "1234 events" in terminal.getvalue()


@pytest.mark.parametrize("command", ["predict", "update"])
def test_a_store_of_entities_needs_neither_flower_nor_scipy(tmp_path: Path, command: str) -> None:
    """The whole command is watched; it answers in a moment."""
    store, events = entities(tmp_path), write(tmp_path / "e.csv", rows(0, 20))
    code = (
        "import sys; from umbel.cli import run; "
        f"code = run([{command!r}, '--store', {str(store)!r}, '--events', {str(events)!r}]); "
        "print(code, [name for name in ('flwr', 'scipy', 'torch', 'server', 'pyarrow', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_no_message_of_a_whole_update_holds_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of people and what they did are in no line, whatever is wrong with them."""
    store = entities(tmp_path, entity=["user"])
    name = "Xavier7919"
    lines = [f"{name},i,1,{name},0,1,e", f"{name},i,{name},1,0,1,e", f"{name},i,1,1,0", *rows(0, 3)]
    code, out, err = called(capsys, "update", "--store", store, "--events", write(tmp_path / "e.csv", lines))
    assert code == 0
    headless = write(tmp_path / "headless.csv", [], f"{name},1,2")
    code, more, worse = called(capsys, "update", "--store", store, "--events", headless)
    assert code == 2
    assert "3 bad rows" in err
    assert name not in out + err + more + worse
