"""The command line: what it prints where, and with which exit code it ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from typer.testing import CliRunner

from privacy.keys import create_key, load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.lines import parse_line, signed_line
from privacy.report import report_of
from privacy.rounding import rounded_up
from umbel import cli, console
from umbel.plan import points

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
USERS = 60
SMALL = (
    *("--set", f"data.synthetic.users={USERS}", "--set", "data.synthetic.examples=[4, 14]"),
    *("--set", "data.synthetic.dimension=6", "--rank", "2", "--sparsity", "1", "--rounds", str(ROUNDS), "--quiet"),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands set environment variables; a test gives them back."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def umbel(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a ledger that it has used up; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli.run(["simulate", *SMALL, "--out", str(folder / "run"), "--ledger", str(folder / "all.jsonl")]) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder, to be tampered with."""
    return Path(shutil.copytree(finished / "run", tmp_path / "copied"))


def process(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    program = ["-m", "umbel"] if code is None else ["-c", code]
    words = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def fails_in_one_line(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("umbel: error: ")
    assert [part for part in parts if part not in ended.err] == []


def test_help_is_light() -> None:
    """Help comes without the numerical and federated worlds, and documents the exit codes."""
    code = (
        "import sys; from umbel.cli import run; code = run(['--help']); "
        "print(sorted({'numpy', 'scipy', 'flwr', 'pydantic', 'rich.progress'} & set(sys.modules)), code)"
    )
    ended = process(code=code)
    assert ended.stdout.endswith("[] 0\n")
    assert "130  interrupted" in ended.stdout


@pytest.mark.parametrize("words", ["simulate", "plan", "audit", "ledger show", "ledger head"])
def test_help_shows_an_example(words: str) -> None:
    """Every command's help has an example that starts with the command."""
    ended = CliRunner().invoke(cli.app, [*words.split(), "--help"])
    assert ended.exit_code == 0
    assert re.search(rf"Examples?:\s+umbel {words} ?", ended.stdout)


def test_version(umbel: Command) -> None:
    """--version names program and version."""
    assert re.fullmatch(r"umbel \d+\.\d+\.\d+\S*\n", umbel("--version").out)


def test_simulate_prints_one_json_object(umbel: Command, tmp_path: Path) -> None:
    """Machines get one object on stdout; progress goes to stderr."""
    ended = umbel("simulate", *SMALL[:-1], "--out", tmp_path / "run", "--format", "json")
    results = json.loads(ended.out)
    assert ended.code == 0
    assert results["users"] == USERS
    assert results["privacy"]["rounds"] == ROUNDS
    assert results == json.loads((tmp_path / "run/evaluation/results.json").read_text())
    assert f"umbel: round {ROUNDS}/{ROUNDS}, answered 2/2, epsilon 1.000 spent, 0.0000 left" in ended.err
    assert "umbel: training\n" in ended.err


def test_what_others_print_stays_off_stdout(umbel: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that prints while a simulation runs does not spoil the JSON."""

    def noisy(*_: object, **__: object) -> dict[str, int]:
        print("hello")  # noqa: T201
        return {"a": 1}

    monkeypatch.setattr("umbel.simulate.simulate", noisy)
    ended = umbel("simulate", "--quiet", "--out", "absent", "--format", "json")
    assert (json.loads(ended.out), ended.err) == ({"a": 1}, "hello\n")


def test_simulate_ends_with_a_table_and_a_promise(umbel: Command, tmp_path: Path) -> None:
    """People get errors against baselines, epsilon, the promise, and where it all is."""
    ended = umbel("simulate", *SMALL, "--out", tmp_path / "run")
    assert ended.err == ""
    for part in ("umbel (this run)", "each user alone", "0-9  ", "private for each single user", str(tmp_path / "run")):
        assert part in ended.out
    assert ended.out.count("*") >= 2  # the best of a column
    assert "NOT PRIVATE" not in ended.out


def test_quiet_and_without_baselines(umbel: Command, tmp_path: Path) -> None:
    """--no-baselines leaves them out, --quiet says nothing on stderr."""
    ended = umbel("simulate", *SMALL, "--no-baselines", "--out", tmp_path / "run", "--format", "json")
    assert json.loads(ended.out)["baselines"] == {}
    assert ended.err == ""


@pytest.mark.parametrize("option", [("--epsilon", "none"), ("--seed", "1")])
def test_a_run_without_privacy_is_stamped(umbel: Command, tmp_path: Path, option: tuple[str, str]) -> None:
    """Without noise or with a seed, results say NOT PRIVATE and promise nothing, and so does the audit."""
    ended = umbel("simulate", *SMALL, *option, "--no-baselines", "--out", tmp_path / "run")
    assert ended.code == 0
    assert "NOT PRIVATE" in ended.out
    assert "for each single user" not in ended.out
    assert "NOT PRIVATE" in umbel("audit", tmp_path / "run").out
    assert "NOT PRIVATE" in umbel("ledger", "show", tmp_path / "run").out
    assert "NOT PRIVATE" in umbel("simulate", *SMALL, *option, "--dry-run").out


def test_config_file_and_options(umbel: Command, tmp_path: Path) -> None:
    """Options go on top of the file, --set reaches any key, and the run folder has what was resolved."""
    file = tmp_path / "my.toml"
    file.write_text("[model]\nrank = 5\nsparsity = 1\n[data.synthetic]\nusers = 60\nexamples = 9\ndimension = 6\n")
    out = tmp_path / "run"
    options = ("--rounds", 2, "--target-range", "-9,9", "--set", "training.nodes=3", "--set", "privacy.clipping=2.5")
    assert umbel("simulate", "--config", file, "--rank", 2, *options, "--no-baselines", "--out", out).code == 0
    resolved = (out / "config.toml").read_text()
    for line in ("rank = 2", "sparsity = 1", "nodes = 3", "clipping = 2.5", "target_range = [-9.0, 9.0]"):
        assert line in resolved.splitlines()


def test_a_missing_file_is_named(umbel: Command, tmp_path: Path) -> None:
    """Data, configuration or ledger that are not there are bad input."""
    absent = tmp_path / "absent"
    fails_in_one_line(umbel("simulate", "--data", absent, "--quiet"), 2, str(absent))
    fails_in_one_line(umbel("simulate", "--config", absent), 2, str(absent))
    for command in ("audit", "ledger show", "ledger head"):
        fails_in_one_line(umbel(*command.split(), absent), 2, str(absent))
    fails_in_one_line(umbel("audit", tmp_path), 2, "ledger.jsonl")


def test_an_unknown_column_is_named(umbel: Command, tmp_path: Path) -> None:
    """A column that the table lacks is bad input."""
    table = tmp_path / "table.csv"
    table.write_text("user,x,target\n" + "".join(f"u{i % 9},0.5,{i % 2}\n" for i in range(90)))
    options = ("--data", table, "--data-format", "table", "--target-range", "0,1", "--quiet")
    named = ("--set", 'data.features=["x", "height"]', "--out", tmp_path / "run")
    fails_in_one_line(umbel("simulate", *options, *named), 2, "height")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "data.sorce=x"], ["data.sorce", "Did you mean data.source?"]),
        (["--set", "rank"], ["--set key=value", "'rank'"]),
        (["--set", ".rank=1"], ["--set key=value"]),
        (["--set", "privacy=1"], ["Expected a table", "privacy=1"]),
        (["--epsilon", "0"], ["error: --epsilon: ", "above 0", "privacy.epsilon='0'", "default 1.0"]),
        (["--epsilon", "-1"], ["above 0", "privacy.epsilon='-1'"]),
        (["--epsilon", "nan"], ["above 0"]),
        (["--epsilon", "much"], ["above 0", "'much'"]),
        (["--epsilon", "1", "--set", "privacy.epsilon=2"], ["one value for privacy.epsilon"]),
        (["--delta", "0"], ["privacy.delta"]),
        (["--delta", "x"], ["--delta"]),
        (["--rounds", "0"], ["training.rounds"]),
        (["--rank", "7"], ["at most 6", "model.rank=7"]),
        (["--sparsity", "7"], ["at most 6", "model.sparsity=7"]),
        (["--nodes", "61"], ["training.nodes <= 60"]),
        (["--engine", "ray"], ["training.engine", "'in-process'"]),
        (["--target-range", "5,1"], ["data.target_range", "low < high"]),
        (["--target-range", "5"], ["error: --target-range: ", "data.target_range"]),
        (["--target-range", "1-5"], ["data.target_range='1-5'"]),
        (["--set", "foo.bar=1"], ["error: --set foo.bar: ", "foo={'bar': 1}"]),
        (["--data-format", "csv"], ["error: --data-format: ", "data.format='csv'"]),
        (["--epsilon", "1e-12", "--delta", "1e-12"], ["mu >= 1e-9", "Raise epsilon"]),
        (["--epsilom", "1"], ["--epsilom", "'--epsilon'"]),
        (["--format", "yaml"], ["--format", "yaml"]),
    ],
)
def test_bad_options(umbel: Command, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    """Every bad option is one line that names it, and nothing is charged."""
    fails_in_one_line(umbel("simulate", *SMALL, "--out", tmp_path / "run", *options), 2, *parts)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_a_folder_with_a_run_is_not_overwritten(umbel: Command, finished: Path) -> None:
    """A second run in the same folder is refused."""
    fails_in_one_line(umbel("simulate", *SMALL, "--out", finished / "run"), 2, "Expected a new folder", "--resume")


def test_a_file_in_the_way_is_named(umbel: Command, tmp_path: Path) -> None:
    """A file where the run folder should be is bad input, not a defect."""
    (tmp_path / "file").touch()
    fails_in_one_line(umbel("simulate", *SMALL, "--out", tmp_path / "file"), 2, str(tmp_path / "file"))


def test_a_large_delta_is_warned_of(umbel: Command, tmp_path: Path) -> None:
    """A delta of at least 1/users runs, with a warning."""
    ended = umbel("simulate", *SMALL, "--delta", "0.1", "--no-baselines", "--out", tmp_path / "run")
    assert ended.code == 0
    assert "umbel: warning: delta=0.1 is not below 1/users" in ended.err
    plan = umbel("simulate", *SMALL, "--delta", "0.1", "--dry-run")
    assert "note: delta=0.1 is not below 1/users" in plan.out


def test_a_used_up_ledger_stops_a_run(umbel: Command, finished: Path, tmp_path: Path) -> None:
    """Where not one round fits, a run and its plan end with the budget's exit code, before anything is charged."""
    ledger = finished / "all.jsonl"
    before = ledger.read_bytes()
    run = umbel("simulate", *SMALL, "--ledger", ledger, "--out", tmp_path / "run")
    fails_in_one_line(run, 3, "room for 0")
    dry = umbel("simulate", *SMALL, "--ledger", ledger, "--dry-run", "--format", "json")
    assert dry.code == 3
    assert json.loads(dry.out)["ledger"] | {"path": ""} == {
        **{"path": "", "population": "synthetic", "epsilon": 1.0, "epsilon_left": mock.ANY, "delta": 1e-6},
        **{"epsilon_spent": pytest.approx(1), "affordable_rounds": 0, "fits": False},
        **{"not_private": False, "reasons_against": []},
    }
    assert umbel("plan", "--epsilon", 1, "--rounds", 1, "--ledger", ledger).code == 3
    assert ledger.read_bytes() == before


def test_a_ledger_with_room_is_charged_again(umbel: Command, tmp_path: Path) -> None:
    """Two runs share a population's ledger, and its plan says what the second one finds."""
    ledger = tmp_path / "all.jsonl"
    with PrivacyLedger.create(
        ledger,
        population="synthetic",
        epsilon=3,
        delta=1e-6,
        mu_max="0.6",
        max_nodes_per_user=1,
        key=create_key(tmp_path / "all.key"),
    ):
        pass
    one = ("simulate", *SMALL, "--no-baselines", "--ledger", ledger, "--format", "json")
    first, plan, second = (
        json.loads(umbel(*one, *o).out) for o in (["--out", tmp_path / "1"], ["--dry-run"], ["--out", tmp_path / "2"])
    )
    assert first["privacy"]["epsilon"] == plan["ledger"]["epsilon_spent"] < second["privacy"]["epsilon"]
    assert plan["ledger"]["fits"]
    contents = json.loads(umbel("ledger", "show", ledger, "--format", "json").out)
    assert len(contents["runs"]) == 2
    assert [entry["outcome"] for entry in contents["rounds"]] == ["released"] * 2 * ROUNDS
    run = contents["rounds"][-1]["run"]
    only = json.loads(umbel("ledger", "show", ledger, "--run", run, "--format", "json").out)
    assert only["rounds"] == contents["rounds"][ROUNDS:]
    fails_in_one_line(umbel("ledger", "show", ledger, "--run", "other"), 2, "'other'", run)


def test_the_ledger_of_another_population_is_refused(umbel: Command, finished: Path, tmp_path: Path) -> None:
    """A ledger with another name of population is not charged, and not even looked at for a plan."""
    ledger = finished / "all.jsonl"
    table = tmp_path / "table.csv"
    table.write_text("user,target,x\n" + "".join(f"u{i},{i % 2},0.5\n" * 3 for i in range(60)))
    other = ("--data", table, "--target-range", "0,1", "--set", 'data.features=["x"]', "--ledger", ledger)
    ended = umbel("simulate", *other, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "ledger of table.csv, got" in ended.err
    absent = ("--data", tmp_path / "ratings.csv", "--ledger", ledger, "--dry-run")
    fails_in_one_line(umbel("simulate", *absent), 2, "ledger of ratings.csv", "synthetic")


def test_dry_run_touches_nothing(umbel: Command, tmp_path: Path) -> None:
    """The plan needs no data, leaves no folder, and states the delta it took."""
    options = ("--data", tmp_path / "absent.csv", "--ledger", tmp_path / "new.jsonl", "--rounds", 10)
    ended = umbel("simulate", *options, "--out", tmp_path / "run", "--dry-run")
    assert ended.code == 0
    assert "13.359608" in ended.out
    assert "delta=1e-06 by default" in ended.out
    assert "starts with the whole budget" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_plan_agrees_with_published_numbers(umbel: Command) -> None:
    """Noise for a budget and the cost of a noise are those of the exact Gaussian formula (own reference values)."""
    forward = json.loads(umbel("plan", "--epsilon", 1, "--delta", "1e-6", "--rounds", 10, "--format", "json").out)
    assert float(forward["noise_multiplier"]) == pytest.approx(13.36, abs=0.01)
    assert forward["epsilon"] == pytest.approx(1, abs=1e-6)
    inverse = json.loads(umbel("plan", "--noise-multiplier", "4", "--rounds", 50, "--format", "json").out)
    assert inverse["epsilon"] == pytest.approx(9.482, abs=1e-3)
    assert inverse["curve"][0] == {"round": 1, "epsilon": pytest.approx(1.061, abs=1e-3)}
    assert [point["round"] for point in inverse["curve"]] == list(range(1, 51))
    twice = json.loads(umbel("plan", "--noise-multiplier", "2", "--rounds", 50, "--format", "json").out)
    assert inverse["replace_one_epsilon"] == pytest.approx(twice["epsilon"])


def test_plan_for_many_users_takes_a_smaller_delta(umbel: Command) -> None:
    """The default delta stays below 1/users, and a user on two nodes costs twice the noise."""
    plans = [
        json.loads(umbel("plan", "--epsilon", 1, "--rounds", 4, *more, "--format", "json").out)
        for more in (["--users", 10**9], ["--max-nodes-per-user", 2], [])
    ]
    assert plans[0]["delta"] == pytest.approx(1e-10)
    z = [float(plan["noise_multiplier"]) for plan in plans]
    assert z[1] == pytest.approx(2 * z[2], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--epsilon", "1", "--noise-multiplier", "1"],
        ["--epsilon", "-1"],
        ["--epsilon", "inf"],
        ["--epsilon", "1", "--delta", "2"],
        ["--epsilon", "1", "--rounds", "0"],
        ["--epsilon", "1e-12", "--delta", "1e-12"],
        ["--noise-multiplier", "0.01"],
        ["--noise-multiplier", "1e3"],
        ["--noise-multiplier", "1", "--rounds", "0"],
        ["--epsilon", "1", "--users", "0"],
        ["--epsilon", "much"],
    ],
)
def test_bad_plans(umbel: Command, options: list[str]) -> None:
    """A plan out of range is bad input."""
    fails_in_one_line(umbel("plan", *options), 2)


def test_a_plan_has_at_most_a_million_rounds(umbel: Command) -> None:
    """More are refused at once, with the limit."""
    fails_in_one_line(umbel("plan", "--epsilon", 1, "--rounds", 10**8), 2, "rounds <= 1000000", "--rounds")


def test_plan_says_which_of_two_it_got(umbel: Command) -> None:
    """Budget and noise exclude each other, and one is needed."""
    fails_in_one_line(umbel("plan"), 2, "got neither")
    fails_in_one_line(umbel("plan", "--epsilon", 1, "--noise-multiplier", 1), 2, "got both")


def test_plan_without_a_budget_is_stamped(umbel: Command) -> None:
    """`--epsilon none` is a plan without noise."""
    assert "NOT PRIVATE" in umbel("plan", "--epsilon", "none").out


def test_plan_finds_the_ledger_of_a_run_folder(umbel: Command, finished: Path) -> None:
    """A run folder stands for its ledger."""
    ended = umbel("plan", "--epsilon", 1, "--ledger", finished / "run", "--format", "json")
    assert (ended.code, json.loads(ended.out)["ledger"]["population"]) == (3, "synthetic")


@pytest.mark.parametrize("words", [(), ("ledger",)])
def test_without_a_command_help_is_shown(umbel: Command, words: tuple[str, ...]) -> None:
    """What comes is the help as it is laid out, not an error."""
    ended = umbel(*words)
    assert ended.code == 2
    assert ended.err.startswith("Usage: umbel")
    assert ended.err.count("\n") > 5


@pytest.mark.parametrize("words", ["plan", "audit", "ledger show", "ledger head"])
def test_help_has_no_backslashes(umbel: Command, words: str) -> None:
    """Brackets stand as they are."""
    ended = umbel(*words.split(), "--help")
    assert re.search(r"\[(required|x>=1)\]", ended.out)
    assert "\\" not in ended.out


def test_a_mistyped_command_is_suggested_once(umbel: Command) -> None:
    """Click and typer both suggest; one is enough."""
    assert umbel("simulat").err.count("Did you mean") == 1


def test_a_closed_pipe_is_no_defect() -> None:
    """Whoever reads may go away; nothing is said about it."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "umbel", "plan", "--epsilon", "1"]
    try:
        ended = subprocess.run(words, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=120)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_with_a_file_leaving_out_is_no_remedy(umbel: Command, tmp_path: Path) -> None:
    """Without the option, the file's value would be taken and not the default."""
    file = tmp_path / "my.toml"
    file.write_text("[model]\nrank = 5\n")
    ended = umbel("simulate", "--config", file, "--rank", "0", "--out", tmp_path / "run")
    fails_in_one_line(ended, 2, "error: --rank: ", "model.rank=0. Correct it.")
    assert "default" not in ended.err
    file.write_text("[model]\nrank = 0\n")
    fails_in_one_line(umbel("simulate", "--config", file, "--sparsity", "1"), 2, f"{file}: ", "for the default")


def test_every_loss_of_an_audit_is_rounded_up(umbel: Command, finished: Path) -> None:
    """By the other accountants too, what is printed is never less than what was spent."""
    privacy = json.loads(umbel("audit", finished / "run", "--format", "json").out)["privacy"]
    names = ("epsilon", "pld_epsilon", "prv_epsilon", "rdp_epsilon", "replace_one_epsilon")
    lines = umbel("audit", finished / "run").out.splitlines()
    row = next(i for i, line in enumerate(lines) if line.lstrip().startswith("epsilon at delta")) + 1
    cells = ["–" if privacy[name] is None else rounded_up(privacy[name]) for name in names]
    assert lines[row].split() == [rounded_up(privacy["delta"]), *cells]


def test_a_ledger_without_rounds_has_no_table(umbel: Command, tmp_path: Path) -> None:
    """A sentence stands for an empty table."""
    with PrivacyLedger.create(
        tmp_path / "all.jsonl",
        population="synthetic",
        epsilon=3,
        delta=1e-6,
        mu_max="0.6",
        max_nodes_per_user=1,
        key=create_key(tmp_path / "all.key"),
    ):
        pass
    out = umbel("ledger", "show", tmp_path / "all.jsonl").out
    assert "No round was charged yet." in out
    assert "outcome" not in out


def test_curve_points() -> None:
    """A long curve is thinned evenly and keeps its end."""
    assert points(3, 500) == [1, 2, 3]
    assert points(10, 4) == [3, 5, 8, 10]
    assert points(100_000, 500)[-1] == 100_000


def test_the_best_that_keeps_the_promise_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """The best private error of each column is marked, and the non-private one where nothing is private."""
    rows = {"ours": 1.5, "alone": 1.0, "non_private": 0.5}
    errors = {name: {"overall": error, "by_examples": {"0-9": error, "100+": None}} for name, error in rows.items()}
    results = {
        "metric": "rmse",
        "error": errors.pop("ours") | {"standard_error": 0.01},
        "baselines": errors,
        "users": 3,
        "users_per_second": None,
        "peak_memory_bytes": 2**20,
        "report": "absent",
        "run": "here",
    }
    privacy = {"epsilon": 1.0, "delta": 1e-6, "replace_one_epsilon": 2.0, "rounds": 2, "noise_multiplier": 9.0}
    console.show_results({**results, "privacy": {**privacy, "promise": "this much", "not_private": False}})
    private = capsys.readouterr().out
    console.show_results({**results, "privacy": {**privacy, "not_private": True}})
    plain = capsys.readouterr().out
    assert (private.count("1.0000*"), private.count("0.5000*"), private.count("1.5000*")) == (2, 0, 0)
    assert (plain.count("1.0000*"), plain.count("0.5000*")) == (0, 2)
    assert "100+" not in private
    assert "report" not in private
    assert "this much" in private


def test_the_bar_shows_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal, rounds move one bar that says who answered and what is left."""
    numbers = {"round": 3, "rounds": 9, "answered": 1, "invited": 2, "epsilon_spent": 0.50001, "epsilon_budget": 1.0}
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    columns = (TextColumn("{task.description}|{task.fields[details]}"), BarColumn())
    with Progress(*columns, console=terminal, auto_refresh=False) as progress:
        bar = console.Bar(progress)
        bar.step("reading data")
        bar.step("training")
        bar.round(numbers)
        bar.warn("look [here]")
        assert [(task.completed, task.total) for task in progress.tasks] == [(3, 9)]
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "round 3/9|answered 1/2, epsilon 0.5001 spent, 0.4999 left" in shown
    assert "umbel: warning: look [here]" in shown
    assert console.round_details({**numbers, "epsilon_spent": None}) == "answered 1/2, NOT PRIVATE"


def test_a_long_run_is_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log, a thousand rounds are some twenty lines, the last among them."""
    numbers = {"rounds": 1000, "answered": 1, "invited": 2, "epsilon_spent": 0.5, "epsilon_budget": 1.0}
    lines = console.Lines()
    for number in range(1, 1001):
        lines.round({**numbers, "round": number})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 20
    assert said[-1].startswith("umbel: round 1000/1000")


def test_a_terminal_that_knows_ascii_only_gets_words(finished: Path) -> None:
    """What an encoding lacks is spelled out, on stdout and in errors, and never a defect."""
    for command in (["plan", "--epsilon", "1"], ["audit", finished / "run"]):
        words = [sys.executable, "-m", "umbel", *map(str, command)]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode in (0, 5)
        assert "with epsilon = 1.000 and delta = 10^-6: " in ended.stdout
        assert "?" not in ended.stdout


def test_audit_knows_the_owner_by_the_key(umbel: Command, finished: Path) -> None:
    """Without a key a good run is consistent, with it verified, in hex, as a file, and at another delta."""
    run, key_file = finished / "run", finished / "all.key"
    unknown = umbel("audit", run, "--format", "json")
    audit = json.loads(unknown.out)
    assert (unknown.code, audit["status"]) == (5, "consistent, owner not verified")
    assert audit["releases"] == {"reserved": ROUNDS, "committed": ROUNDS, "open": 0, "compared": ROUNDS}
    assert audit["privacy"]["epsilon"] == pytest.approx(1, abs=1e-6)
    assert audit["privacy"]["pld_epsilon"] == pytest.approx(1, abs=1e-3)
    assert audit["privacy"]["promise"] == report_of(run).statement
    for key in (audit["public_key"], audit["public_key"].upper(), key_file):
        assert umbel("audit", run, "--public-key", key, "--all-signatures").code == 0
    smaller = json.loads(umbel("audit", finished / "all.jsonl", "--delta", "1e-9", "--format", "json").out)
    assert smaller["privacy"]["epsilon"] > 1.2
    text = umbel("audit", run)
    assert text.code == 5
    assert "--public-key" in text.out


def test_audit_of_a_wrong_key_or_head_fails(umbel: Command, finished: Path, tmp_path: Path) -> None:
    """Another owner's key, or a head that the ledger never had, is a failed verification."""
    ledger = finished / "all.jsonl"
    other = public_key_hex(create_key(tmp_path / "other.key"))
    head = umbel("ledger", "head", ledger).out.strip()
    assert umbel("audit", ledger, "--public-key", other).code == 4
    assert umbel("audit", ledger, "--anchor", head).code == 5
    assert umbel("audit", ledger, "--anchor", head[:-1] + ("0" if head[-1] != "0" else "1")).code == 4
    fails_in_one_line(umbel("audit", ledger, "--anchor", "head"), 2, "anchor", "umbel ledger head")
    fails_in_one_line(umbel("audit", ledger, "--public-key", "abc"), 2, "64 hex digits")
    fails_in_one_line(umbel("audit", ledger, "--delta", "0"), 2, "delta", "Correct --delta")


def test_audit_names_the_line_that_was_changed(umbel: Command, copied: Path) -> None:
    """A changed line fails the audit and every command that would trust the ledger."""
    ledger = copied / "release" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"round":1', b'"round":2')
    ledger.write_bytes(b"".join(lines))
    ended = umbel("audit", copied, "--format", "json")
    audit = json.loads(ended.out)
    assert (ended.code, audit["status"], audit["line"]) == (4, "failed", 5)
    assert "line 5" in umbel("audit", copied).out
    fails_in_one_line(umbel("ledger", "show", copied), 4, "line 5")


def test_audit_compares_the_releases(umbel: Command, copied: Path) -> None:
    """A changed, a missing and an unpaid release each fail the audit."""
    first, second, *_ = sorted((copied / "release" / "rounds").iterdir())
    good, name = first.read_bytes(), first.name
    first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    changed = umbel("audit", copied)
    first.unlink()
    missing = umbel("audit", copied)
    first.write_bytes(good)
    assert umbel("audit", copied).code == 5
    shutil.copy(second, second.with_name("000000001.safetensors"))
    unpaid = umbel("audit", copied)
    assert [ended.code for ended in (changed, missing, unpaid)] == [4, 4, 4]
    assert "round 1" in changed.out
    assert "000000001" in unpaid.out
    assert name != "000000001.safetensors"


@pytest.mark.parametrize("source", ["release", "run", "run without config.toml", "run without model"])
def test_a_deleted_release_is_missed(umbel: Command, copied: Path, source: str) -> None:
    """Whose run a folder is, the released model says, or the configuration: a release that is gone fails the audit."""
    target = copied / "release" if source == "release" else copied
    if source == "run without config.toml":
        (copied / "config.toml").unlink()
    if source == "run without model":
        (copied / "release/model.safetensors").unlink()
    assert umbel("audit", target).code == (4 if source == "run without config.toml" else 5)
    min((copied / "release/rounds").iterdir()).unlink()
    ended = umbel("audit", target)
    assert ended.code == 4
    assert "round 1" in ended.out


def test_a_folder_of_an_unknown_run_must_be_complete(umbel: Command, copied: Path) -> None:
    """Deleting the model too does not hide a deleted release; the ledger alone can still be shown and audited."""
    release = copied / "release"
    (release / "model.safetensors").unlink()
    assert umbel("audit", release).code == 5
    min((release / "rounds").iterdir()).unlink()
    ended = umbel("audit", release)
    assert ended.code == 4
    assert f"Expected all {ROUNDS} committed releases" in ended.out
    assert umbel("audit", release / "ledger.jsonl").code == 5
    (release / "model.safetensors").write_bytes(b"broken")
    fails_in_one_line(umbel("audit", release), 2, "model.safetensors")
    assert umbel("ledger", "head", release).code == 0


def test_a_staged_release_is_not_verified(umbel: Command, tmp_path: Path) -> None:
    """Bytes for a RESERVE line that is open are named and fail the audit, with the owner's key too."""
    run, key = tmp_path / "run", tmp_path / "run/ledger.key"
    assert umbel("simulate", *SMALL, "--no-baselines", "--out", run).code == 0
    ledger, release = run / "ledger.jsonl", run / "release"
    lines = ledger.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if parse_line(line[:-1]).kind == "COMMIT")
    (release / "ledger.jsonl").write_bytes(b"".join(lines[:last]))
    for data in (b"any bytes", None):
        if data is not None:
            max((release / "rounds").iterdir()).write_bytes(data)
        ended = umbel("audit", run, "--public-key", key, "--format", "json")
        assert ended.code == json.loads(ended.out)["exit_code"] == 4
        assert "staged, not committed" in json.loads(ended.out)["reason"]
    max((release / "rounds").iterdir()).unlink()
    (release / "model.safetensors").unlink()  # it was made with that release
    assert umbel("audit", run, "--public-key", key).code == 0


@pytest.mark.parametrize("option", [("--epsilon", "none"), ("--seed", "1")])
def test_without_a_promise_every_epsilon_is_void(umbel: Command, tmp_path: Path, option: tuple[str, str]) -> None:
    """A ledger that promises nothing is verified as such: stamped, with its noise named, and no epsilon spent."""
    run = tmp_path / "run"
    assert umbel("simulate", *SMALL, *option, "--no-baselines", "--out", run).code == 0
    noise = {"none": "none", "1": "seeded"}[option[1]]
    text, known = umbel("audit", run), ("--public-key", run / "ledger.key")
    audit = json.loads(umbel("audit", run, *known, "--format", "json").out)
    assert (audit["status"], audit["exit_code"], audit["privacy"]["not_private"]) == ("verified, NOT PRIVATE", 0, True)
    assert [name for name, value in audit["privacy"].items() if "epsilon" in name and value is not None] == (
        [] if noise == "none" else ["epsilon_budget"]
    )
    assert audit["privacy"]["mu"] is None
    assert len(audit["privacy"]["reasons_against"]) == 1
    assert text.code == 5
    assert text.out.startswith("consistent, owner not verified, NOT PRIVATE")
    contents = json.loads(umbel("ledger", "show", run, "--format", "json").out)
    assert (contents["not_private"], contents["epsilon_spent"]) == (True, None)
    assert contents["reasons_against"] == audit["privacy"]["reasons_against"]
    assert {entry["mu_after"] for entry in contents["rounds"]} == {None}
    shown = umbel("ledger", "show", run)
    assert "NOT PRIVATE: nothing is promised" in shown.out
    assert shown.out.count(noise) >= ROUNDS
    planned = umbel("plan", "--epsilon", 1, "--ledger", run, "--format", "json")
    room = json.loads(planned.out)["ledger"]
    assert (room["epsilon_spent"], room["epsilon_left"], room["not_private"]) == (None, None, True)
    assert room["reasons_against"] == audit["privacy"]["reasons_against"]
    for out in (text.out, shown.out, umbel("plan", "--epsilon", 1, "--ledger", run).out):
        assert "epsilon void, NOT PRIVATE" in out
        spent = [line for line in out.splitlines() if line.startswith("spent ")]
        assert [line for line in spent if "1.000" in line] == []


def test_audit_tells_an_overrun_from_a_forgery(umbel: Command, copied: Path, finished: Path, tmp_path: Path) -> None:
    """A release beyond the budget signed by the owner has an exit code of its own; by another key it is a forgery."""
    ledger = copied / "release" / "ledger.jsonl"
    good = ledger.read_bytes()
    reserve = next(line for line in map(parse_line, good.splitlines()) if line.kind == "RESERVE")
    last = parse_line(good.splitlines()[-1])
    for key, code in ((load_key(finished / "all.key"), 3), (create_key(tmp_path / "forger.key"), 4)):
        overrun = signed_line(
            sequence=last.sequence + 1,
            kind="RESERVE",
            body={**reserve.body, "round": ROUNDS + 1},
            previous=last.head,
            time=last.time,
            key=key,
        )
        ledger.write_bytes(good + overrun + b"\n")
        ended = umbel("audit", copied)
        assert ended.code == code
        assert f"line {last.sequence + 2}" in ended.out


def test_audit_needs_only_what_is_published(finished: Path, tmp_path: Path) -> None:
    """The release folder alone can be audited, without Flower, the client or the simulation being imported."""
    shutil.copytree(finished / "run" / "release", tmp_path / "published")
    code = (
        "import sys; from umbel.cli import run; code = run(['audit', sys.argv[1]]); "
        "print(sorted({'flwr', 'client', 'server', 'umbel.simulate', 'pydantic'} & set(sys.modules)), code)"
    )
    ended = process(tmp_path / "published", code=code)
    assert ended.stdout.endswith("[] 5\n")
    assert f"{ROUNDS} compared with files" in ended.stdout


def test_ledger_show_for_people(umbel: Command, finished: Path) -> None:
    """Every charged round is a line, with epsilon after it."""
    out = umbel("ledger", "show", finished / "run").out
    assert out.count("released") == out.count("aes-256-ctr") == ROUNDS
    assert "NOT PRIVATE" not in out
    assert "epsilon 1.000 at delta 10⁻⁶, zero-out" in out


def test_a_defect_is_one_line(umbel: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw ends with exit code 1, its type and no text of its own, unless asked."""

    def broken(**_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("umbel.plan.forecast", broken)
    ended = umbel("plan", "--epsilon", "1")
    fails_in_one_line(ended, 1, "ZeroDivisionError", "--debug")
    assert "secret" not in ended.err
    assert "Traceback" in umbel("plan", "--epsilon", "1", "--debug").err
    monkeypatch.setenv("UMBEL_DEBUG", "1")
    assert "Traceback" in umbel("plan", "--epsilon", "1").err


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """Without the optional packages, the error says how to install them."""
    code = (
        "import sys; sys.modules['scipy'] = None; from umbel.cli import run; "
        "sys.exit(run(['simulate', '--quiet', '--out', sys.argv[1]]))"
    )
    ended = process(tmp_path / "run", code=code)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        'umbel: error: Expected the package scipy, found none. Run: pip install "umbel[simulate]"\n'
    )


def test_resume_takes_no_other_settings(umbel: Command, finished: Path, tmp_path: Path) -> None:
    """A run goes on as it was started; a folder without one is bad input."""
    fails_in_one_line(umbel("simulate", "--resume", finished / "run", "--epsilon", "2"), 2, "privacy.epsilon")
    fails_in_one_line(umbel("simulate", "--resume", tmp_path, "--config", tmp_path / "x"), 2, "--config")
    fails_in_one_line(umbel("simulate", "--resume", tmp_path, "--out", finished), 2, "one folder to resume")
    fails_in_one_line(umbel("simulate", "--resume", tmp_path, "--dry-run"), 2, "--dry-run")
    fails_in_one_line(umbel("simulate", "--resume", tmp_path, "--quiet"), 2, "Expected a run at")


def test_resume_of_a_finished_run_charges_nothing(umbel: Command, copied: Path, finished: Path) -> None:
    """There is nothing left to do but the evaluation."""
    before = (finished / "all.jsonl").read_bytes()
    ended = umbel("simulate", "--resume", finished / "run", "--no-baselines", "--quiet", "--format", "json")
    assert ended.code == 0
    assert json.loads(ended.out)["privacy"]["rounds"] == ROUNDS
    assert (finished / "all.jsonl").read_bytes() == before


@pytest.mark.faults
def test_an_interrupted_run_is_resumed(tmp_path: Path, umbel: Command) -> None:
    """Ctrl-C ends with 130 and says how to go on; the resumed run has every round once, within the budget."""
    rounds, out = 120, tmp_path / "run"
    words = [sys.executable, "-m", "umbel", "simulate", *SMALL[:-1], "--rounds", str(rounds), "--out", str(out)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        next(line for line in running.stderr if line.startswith("umbel: round"))
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=60)
    assert (running.returncode, printed) == (130, "")
    assert said.splitlines()[-1] == (f"umbel: interrupted; nothing is lost. Go on with: umbel simulate --resume {out}")
    charged = json.loads(umbel("ledger", "show", out, "--format", "json").out)["rounds"]
    assert 0 < len(charged) < rounds
    ended = umbel("simulate", "--resume", out, "--no-baselines", "--quiet", "--format", "json")
    assert ended.code == 0
    assert json.loads(ended.out)["privacy"]["epsilon"] <= 1
    audit = json.loads(umbel("audit", out, "--format", "json").out)
    assert audit["exit_code"] == 5
    assert audit["releases"]["reserved"] == rounds
