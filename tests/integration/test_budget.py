"""One ledger, many runs: they add up, none begins what it cannot pay, and two at once do not mix."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from privacy.audit.verify import verify
from privacy.keys import create_key, load_key
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string
from server.settings import LedgerPlace, RunFolder
from tests.federation import Silent, configuration
from umbel import cli
from umbel.simulate import lay_out

ROOT = Path(__file__).parents[2]
DELTA = 1e-6
SIZE = {"synthetic.users": 12, "synthetic.examples": 6, "synthetic.dimension": 4}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands set environment variables; a test gives them back."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def ledger(tmp_path) -> Path:
    """A new ledger of the synthetic population, with a budget of epsilon 1."""
    place = LedgerPlace(ledger=tmp_path / "population.jsonl")
    mu_max = mu_max_string(1.0, DELTA)
    options = {"epsilon": 1.0, "delta": DELTA, "mu_max": mu_max, "max_nodes_per_user": 1, "population": "synthetic"}
    with PrivacyLedger.create(place.ledger, key=create_key(place.key), **options):
        return place.ledger


def arguments(ledger: Path, out: Path, epsilon: float, rounds: int) -> list[str]:
    """`umbel simulate` of a small population."""
    size = [part for key, value in SIZE.items() for part in ("--set", f"data.{key}={value}")]
    where = ["--ledger", str(ledger), "--out", str(out)]
    budget = ["--epsilon", str(epsilon), "--delta", str(DELTA), "--rounds", str(rounds)]
    return ["simulate", "--quiet", "--no-baselines", "--rank", "1", "--sparsity", "1", *size, *where, *budget]


def laid_out(ledger: Path, out: Path, epsilon: float, rounds: int) -> Path:
    """A run that is planned and has not begun."""
    config = configuration(
        out,
        privacy__seed=None,
        privacy__epsilon=epsilon,
        privacy__delta=DELTA,
        training__rounds=rounds,
        run__ledger=str(ledger),
    )
    lay_out(config, Silent())
    return out


def test_runs_on_one_ledger_add_up(tmp_path, ledger, capsys):
    """Two runs of epsilon .6 within a budget of 1: the second run's numbers are those of both together."""
    for name in ("first", "second"):
        assert cli.run(arguments(ledger, tmp_path / name, 0.6, 2)) == 0
    verification = verify(tmp_path / "second" / "release" / "ledger.jsonl")
    assert [entry.server_round for entry in verification.rounds] == [1, 2, 1, 2]
    assert len(verification.runs) == 2
    one = verify(tmp_path / "first" / "release" / "ledger.jsonl")
    assert len(one.rounds) == 2
    assert verification.mu_spent == pytest.approx(math.sqrt(2) * one.mu_spent, rel=1e-6)
    with PrivacyLedger.open(ledger) as opened:
        assert 0.6 < opened.epsilon_spent(DELTA) < 1
        assert len({event["noise_multiplier"] for event in opened.events()}) == 1
    releases = [set(RunFolder(root=tmp_path / name).rounds.iterdir()) for name in ("first", "second")]
    assert [len(found) for found in releases] == [2, 2]
    assert not {path.name for path in releases[0]} & {path.name for path in releases[1]}


def test_a_run_that_does_not_fit_is_refused_before_anything_is_charged(tmp_path, ledger, capsys):
    """Room for some of its rounds is not enough: exit code 3, no folder, and the ledger as it was."""
    assert cli.run(arguments(ledger, tmp_path / "first", 0.8, 2)) == 0
    before = ledger.read_bytes()
    capsys.readouterr()
    assert cli.run(arguments(ledger, tmp_path / "second", 0.9, 4)) == 3
    err = capsys.readouterr().err
    assert sum("error" in line for line in err.splitlines()) == 1
    assert "room for 1" in err
    assert "Lower --epsilon or --rounds" in err
    assert ledger.read_bytes() == before
    assert not (tmp_path / "second").exists()


def test_a_run_whose_budget_was_spent_meanwhile_asks_nobody(tmp_path, ledger, capsys):
    """It fitted when it was planned; the ledger decides again when the round is charged."""
    out = laid_out(ledger, tmp_path / "late", 1.0, 3)
    assert cli.run(arguments(ledger, tmp_path / "first", 1.0, 3)) == 0
    before = ledger.read_bytes()
    capsys.readouterr()
    assert cli.run(["simulate", "--quiet", "--resume", str(out)]) == 3
    assert sum("error" in line for line in capsys.readouterr().err.splitlines()) == 1
    started = verify(ledger)
    assert len(started.rounds) == 3
    assert ledger.read_bytes().startswith(before)
    assert not RunFolder(root=out).model.exists()


def test_a_run_that_is_stopped_by_the_budget_releases_what_it_has_paid_for(tmp_path, ledger, capsys):
    """Another run took a part of its budget: the rounds that fit are done, their model is there, and it ends with 3."""
    out = laid_out(ledger, tmp_path / "stopped", 1.0, 4)
    assert cli.run(arguments(ledger, tmp_path / "other", 0.7, 2)) == 0
    capsys.readouterr()
    assert cli.run(["simulate", "--quiet", "--resume", str(out)]) == 3
    folder = RunFolder(root=out)
    done = len(list(folder.rounds.iterdir()))
    assert 0 < done < 4
    verification = verify(ledger)
    assert len(verification.rounds) == 2 + done
    assert folder.model.exists()
    assert folder.ledger_copy.read_bytes() == ledger.read_bytes()


def test_a_ledger_has_one_writer(tmp_path, ledger, capsys):
    """While a run holds it, neither a new run nor one that was planned before gets further than one clear line."""
    planned = laid_out(ledger, tmp_path / "planned", 0.5, 2)
    command = [sys.executable, "-m", "umbel", *arguments(ledger, tmp_path / "first", 0.5, 30)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while b'"RESERVE"' not in ledger.read_bytes():
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)  # it holds the ledger for as long as this test wants
        held = ledger.read_bytes()
        try:
            new = arguments(ledger, tmp_path / "second", 0.5, 2)
            for refused in (new, ["simulate", "--quiet", "--resume", str(planned)]):
                capsys.readouterr()
                assert cli.run(refused) == 2
                err = capsys.readouterr().err
                assert sum("error" in line for line in err.splitlines()) == 1
                assert "only writer" in err
                assert "Wait for the other run" in err
        finally:
            assert ledger.read_bytes() == held
            process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    assert not (tmp_path / "second").exists()
    assert cli.run(["simulate", "--quiet", "--no-baselines", "--resume", str(planned)]) == 0
    with PrivacyLedger.open(ledger, key=load_key(ledger.with_suffix(".key"))) as opened:
        assert len(opened.events()) == 32
