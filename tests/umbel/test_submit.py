"""A run of a federation: what is laid out, what is made of its end. SuperLink is played."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config import Config, load_config
from common.errors import BudgetExhausted, Refused, StorageError, UmbelError
from common.loading import public_schema
from privacy.ledger import PrivacyLedger
from server.registry import load_registry
from server.settings import RunSettings
from umbel import submit
from umbel.deploy import Federation, UnreachableError
from umbel.flower_engine import build_bundle
from umbel.provision import Request, provision

TRIAL = {"data.synthetic.users": 40, "data.synthetic.dimension": 5, "data.synthetic.rank": 1}


class Watching:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.rounds: list[int] = []

    def step(self, name: str) -> None:
        self.said.append(name)

    def warn(self, message: str) -> None:
        self.said.append(message)

    def round(self, numbers: Mapping[str, Any]) -> None:
        self.rounds.append(numbers["round"])


class Played:
    """A SuperLink: runs go through the states of a script, each with something that happens."""

    def __init__(self, script: list[tuple[str, Callable[[str], None]]]) -> None:
        self.script = script
        self.runs: list[str] = []
        self.stopped: list[str] = []

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_run(self, bundle: Path, run_config: Mapping[str, Any]) -> str:
        assert bundle.is_file()
        assert Path(str(run_config["run-folder"])).is_absolute()
        self.runs.append(str(100 + len(self.runs)))
        return self.runs[-1]

    def run_status(self, run_id: str) -> str:
        status, happens = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        happens(run_id)
        return status

    def stop_run(self, run_id: str) -> None:
        self.stopped.append(run_id)

    def log_of(self, run_id: str) -> str:
        return f"log of {run_id}"


def config_of(**overrides: Any) -> Config:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, TRIAL | {"training.rounds": 3, "model.rank": 1, "privacy.epsilon": 2.0} | given)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    ports = {"superlink": 0, "fleet": 0, "metrics": 0}
    provision(tmp_path / "fed", Request(nodes=2, config=config_of(), epsilon=4.0, ports=ports))
    for name in ("_LOOK_SECONDS", "_ASK_SECONDS", "_GRACE_SECONDS"):
        monkeypatch.setattr(submit, name, 0.02)
    monkeypatch.setattr(submit, "build_bundle", no_bundle)
    made = Federation(tmp_path / "fed")
    made.logs.mkdir(parents=True)
    return made


def no_bundle(folder: Path, app_dir: Path) -> Path:
    """A file instead of the bundle."""
    assert (app_dir / "pyproject.toml").is_file()
    (folder / "umbel.fab").write_bytes(b"bundle")
    return folder / "umbel.fab"


def play(federation: Federation, monkeypatch: pytest.MonkeyPatch, *script: tuple[str, Callable[[str], None]]) -> Played:
    played = Played(list(script))
    monkeypatch.setattr(federation, "control", lambda: played)
    return played


def nothing(run_id: str) -> None:
    del run_id


def test_a_run_folder_is_for_the_population(federation: Federation) -> None:
    """Ledger, delta and registry are the population's, the schema the public one; what it needs not is not there."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    folder = settings.folder
    assert folder.root == federation.folder.runs / "first"
    assert sorted(p.name for p in folder.root.iterdir()) == ["config.toml", "registry.json", "schema.safetensors"]
    assert settings.place == federation.folder.place
    assert load_registry(folder.registry) == load_registry(federation.folder.registry)
    assert settings.schema.digest == public_schema(config_of().data).digest
    with PrivacyLedger.open(settings.place.ledger) as ledger:
        assert settings.config.privacy.delta == float(ledger.genesis["delta"])
        assert ledger.runs == {}


def test_what_does_not_fit_is_refused_first(federation: Federation) -> None:
    """Before a folder is made: the budget, a name that is taken, one that is none, a rank without room."""
    with pytest.raises(BudgetExhausted, match="room for"):
        submit.lay_out(federation, config_of(privacy__epsilon=40.0), "large", Watching())
    with pytest.raises(BudgetExhausted):
        submit.lay_out(federation, config_of(privacy__epsilon="none"), "bare", Watching())
    with pytest.raises(UmbelError, match=r"model\.rank"):
        submit.lay_out(federation, config_of(model__rank=9), "wide", Watching())
    with pytest.raises(UmbelError, match="name of letters"):
        submit.lay_out(federation, config_of(), "../outside", Watching())
    assert list(federation.folder.runs.glob("*")) == []
    submit.lay_out(federation, config_of(), "first", Watching())
    with pytest.raises(UmbelError, match="'first', which there is"):
        submit.lay_out(federation, config_of(), "first", Watching())
    with pytest.raises(UmbelError, match="There is: first"):
        submit.resumed(federation, "second")


def test_a_run_without_data_takes_the_federations(federation: Federation) -> None:
    """A trial federation knows its data; others, which its nodes would refuse after the charge, are refused before."""
    bare = load_config(None, {"training.rounds": 1, "model.rank": 1})
    settings = submit.lay_out(federation, bare, "bare", Watching())
    assert settings.config.data == federation.deployment.data
    assert settings.schema.dimension == TRIAL["data.synthetic.dimension"]
    with pytest.raises(UmbelError, match="would refuse every round"):
        submit.lay_out(federation, config_of(data__synthetic__dimension=6), "other", Watching())
    with pytest.raises(UmbelError, match=r"model\.family='squared'"):
        submit.lay_out(federation, config_of(model__family="logistic"), "likes", Watching())


def outcome(settings: RunSettings, **changes: Any) -> Callable[[str], None]:
    """Writes how a ServerApp ended."""
    fine = {"error": None, "message": None, "code": None, "exit_code": 0}
    return lambda run_id: settings.folder.outcome.write_text(json.dumps(fine | {"flower_run_id": run_id} | changes))


def metrics(settings: RunSettings, *rounds: int, torn: str = "") -> Callable[[str], None]:
    """Adds rounds to those that are reported."""
    lines = "".join(json.dumps({"round": i}) + "\n" for i in rounds) + torn

    def write(run_id: str) -> None:
        del run_id
        settings.folder.release.mkdir(exist_ok=True)
        with settings.folder.metrics.open("a") as file:
            file.write(lines)

    return write


def test_rounds_are_shown_until_the_outcome(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines only, each once, the last ones too; what was there before is not this ServerApp's."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    metrics(settings, 1)("")

    def last(run_id: str) -> None:
        metrics(settings, 4)(run_id)
        outcome(settings)(run_id)

    script = (
        ("pending", nothing),
        ("running", metrics(settings, 2, torn='{"rou')),
        ("running", metrics(settings, torn='nd": 3}\n')),
        ("running", last),
    )
    played = play(federation, monkeypatch, *script)
    watching = Watching()
    submit.follow(federation, settings, submit.submit(federation, settings), watching)
    assert watching.rounds == [2, 3, 4]
    assert played.stopped == []


def test_the_outcome_of_another_start_does_not_count(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ServerApp that ended before this one was submitted left it."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    outcome(settings)("99")
    played = play(federation, monkeypatch, ("running", nothing), ("finished", nothing))
    with pytest.raises(submit.RunDiedError, match=r"--resume first") as died:
        submit.follow(federation, settings, submit.submit(federation, settings), Watching())
    assert (died.value.exit_code, played.stopped) == (130, ["100"])
    assert (federation.logs / "run-first.log").read_text() == "log of 100"


@pytest.mark.parametrize(
    ("changes", "kind", "code"),
    [
        ({"error": "BudgetExhausted", "message": "No room.", "exit_code": 3}, BudgetExhausted, 3),
        ({"error": "StorageError", "message": "Full.", "exit_code": 7}, StorageError, 7),
        ({"error": "Refused", "message": "No.", "code": "replayed", "exit_code": 6}, Refused, 6),
        ({"error": "NewError", "message": "Of a newer version.", "exit_code": 2}, UmbelError, 2),
        ({"error": "KeyError", "exit_code": 1}, submit.RunFailedError, 1),
        ({"error": "SystemExit", "exit_code": 130}, submit.RunDiedError, 130),
    ],
)
def test_errors_of_the_server_are_raised_here(
    changes: dict[str, Any],
    kind: type[UmbelError],
    code: int,
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With their exit code and our own words; of others only the name is told, and where the log is."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    play(federation, monkeypatch, ("finished", outcome(settings, **changes)))
    with pytest.raises(kind, match=changes.get("message", ".")) as raised:
        submit.follow(federation, settings, submit.submit(federation, settings), Watching())
    assert raised.value.exit_code == code
    if kind is submit.RunFailedError:
        assert "KeyError" in str(raised.value)
        assert "run-first.log" in str(raised.value)


def test_a_superlink_that_is_away_is_waited_for(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once; the ServerApp goes on without it."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())

    def away(run_id: str) -> None:
        raise UnreachableError("Expected SuperLink, got none.")

    play(federation, monkeypatch, ("", away), ("", away), ("running", nothing), ("running", outcome(settings)))
    watching = Watching()
    submit.follow(federation, settings, submit.submit(federation, settings), watching)
    assert [said for said in watching.said if "Still waiting" in said] == [
        "Expected SuperLink, got none. Still waiting."
    ]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs whose report was asked for."""
    written: list[Path] = []
    monkeypatch.setattr(submit, "write_reports", written.append)
    return written


def test_a_run_at_work_is_joined_not_submitted_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, reports: list[Path]
) -> None:
    """Then, if its ServerApp turns out to be gone, another one goes on; when it has ended, nothing is done again."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    script = (("running", nothing), ("finished", nothing), ("finished", nothing), ("running", outcome(settings)))
    played = play(federation, monkeypatch, *script)
    submit.submit(federation, settings)
    results = submit.train(federation, submit.resumed(federation, "first"), Watching())
    assert (played.runs, results["flower_run_id"], reports) == (["100", "101"], "101", [settings.folder.root])
    submit.train(federation, submit.resumed(federation, "first"), Watching())
    assert played.runs == ["100", "101"]


def test_a_budget_that_ends_early_leaves_a_report(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, reports: list[Path]
) -> None:
    """Where a model was released; the exit code is still that of the budget."""
    settings = submit.lay_out(federation, config_of(), "first", Watching())
    spent = outcome(settings, error="BudgetExhausted", message="No room.", exit_code=3)
    play(federation, monkeypatch, ("running", spent))
    with pytest.raises(BudgetExhausted, match=r"No room\.$"):
        submit.train(federation, settings, Watching())
    settings.folder.release.mkdir()
    settings.folder.model.touch()
    with pytest.raises(BudgetExhausted, match=r"No room\. The rounds before are in .*report\.html"):
        submit.train(federation, settings, Watching())
    assert reports == [settings.folder.root]


def test_the_bundle_is_the_one_that_flower_builds(tmp_path: Path) -> None:
    """The same bytes from the few files that are in it as from the whole checkout, so that its hash can be pinned."""
    quick = submit.bundle_of(tmp_path)
    assert quick.read_bytes() == build_bundle(tmp_path / "slow").read_bytes()
