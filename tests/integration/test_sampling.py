"""Sampled runs through the real apps: charged, released, audited, resumed, and what else its ledger can take."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from client.store import DeviceStore
from common.config import Config, load_config
from common.errors import BudgetExhausted, UmbelError, VerificationError
from common.files import write_durably
from privacy.amplification import Schedule, amplified
from privacy.audit import audit
from privacy.audit.verify import verify
from privacy.ledger import PrivacyLedger
from privacy.participation import cost_units
from server.settings import RunFolder
from tests.federation import Silent, configuration, prepare, run_real
from umbel import cli
from umbel.simulate import lay_out, most_heads, run_engine

Q, ROUNDS, DELTA = "0.4", 3, 1e-6


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands set environment variables; a test gives them back."""
    with mock.patch.dict(os.environ):
        yield


def sampled(root: Path, **changes) -> Config:
    """A small sampled run on one node."""
    options = {
        "privacy__epsilon": 2.0,
        "privacy__delta": DELTA,
        "privacy__seed": None,
        "privacy__sampling_probability": Q,
        "training__rounds": ROUNDS,
        "training__nodes": 1,
    }
    return configuration(root, **(options | changes))


def schedule_of(ledger: PrivacyLedger) -> Schedule:
    run = ledger.sampled
    assert run is not None
    return Schedule(
        noise_multiplier=run.noise_multiplier, sampling_probability=run.sampling_probability, rounds=run.rounds
    )


def test_a_sampled_run_costs_what_its_whole_schedule_does(tmp_path):
    """START has it, every release is of it, the budget is nearly spent, and an audit finds the same anew."""
    run = run_real(prepare(sampled(tmp_path / "run")))
    assert len(run.releases) == ROUNDS
    with run.ledger() as ledger:
        cost = amplified([schedule_of(ledger)], DELTA).epsilon
        assert ledger.sampled.sampling_probability == Q
        assert 0.99 * 2 < cost <= ledger.epsilon_spent(DELTA) <= 2
        for event in ledger.events():
            assert (event["sampling"], event["denominator"]) == ({"poisson": Q}, math.ceil(12 * 0.4))
            assert event["noise_multiplier"] == ledger.sampled.noise_multiplier
        assert (ledger.capped_units, ledger.mu_limit) == (0, "0")
    found = audit(tmp_path / "run")
    assert found["status"] == "consistent, owner not verified"
    assert found["privacy"]["epsilon"] == pytest.approx(cost, abs=1e-9)
    assert not found["privacy"]["not_private"]
    assert [line["epsilon_spent"] for line in run.metrics] == [pytest.approx(cost, abs=1e-8)] * ROUNDS


def test_seeded_sampled_runs_repeat_and_are_not_private(tmp_path):
    """Noise and coins follow from the seed, and everything is stamped."""
    runs = [
        run_real(prepare(sampled(tmp_path / name, privacy__seed=seed))) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, second, third = ([release.tobytes() for release in run.releases.values()] for run in runs)
    assert first == second
    assert not set(first) & set(third)
    assert all(line["not_private"] and line["epsilon_spent"] is None for line in runs[0].metrics)
    assert audit(tmp_path / "a")["privacy"]["not_private"]


def test_without_its_seed_a_run_repeats_neither_noise_nor_coins(tmp_path):
    """Two runs of one configuration differ in every release."""
    first, second = (run_real(prepare(sampled(tmp_path / name))) for name in "ab")
    assert all(not np.array_equal(a, b) for a, b in zip(first.releases.values(), second.releases.values(), strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.sampling_probability", "0.5"),
        ("run.noise_multiplier", "9.000000"),
        ("training.rounds", 9),
        ("run.capped_mu_max", "0.01"),
    ],
)
def test_a_schedule_that_changes_on_resume_is_refused(tmp_path, key, value):
    """z, q and rounds are as they were started, for ever; nothing is charged or released."""
    config = prepare(sampled(tmp_path / "run"))
    run_real(config)
    folder, ledger = RunFolder(root=tmp_path / "run"), tmp_path / "run" / "ledger.jsonl"
    before = ledger.read_bytes()
    write_durably(folder.config, load_config(folder.config, {key: value}).to_toml().encode())
    with pytest.raises(VerificationError, match="as it was started"):
        run_real(config)
    assert ledger.read_bytes() == before


def test_a_run_that_goes_on_keeps_its_charge(tmp_path):
    """Rounds that are left are of the schedule at START, and an aborted one counts."""
    config = prepare(sampled(tmp_path / "run"))
    with mock.patch("server.training.write_durably", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run_real(config)
    run = run_real(config)
    assert len(run.releases) == ROUNDS - 1
    with run.ledger() as ledger:
        assert len(ledger.rounds_of(str(config.run.name))) == ROUNDS
        assert ledger.epsilon_spent(DELTA) <= 2
    assert audit(tmp_path / "run")["exit_code"] == 5


def test_a_larger_budget_leaves_a_share_to_runs_without_sampling(tmp_path):
    """They run afterwards within it, and not beyond; the epsilon of both together is within the ledger's."""
    first = prepare(sampled(tmp_path / "first", privacy__ledger_epsilon=3.0))
    ledger = str(first.run.ledger)
    run_real(first)
    with pytest.raises(BudgetExhausted):  # it is not the budget that counts from now on
        prepare(plain(tmp_path / "too much", ledger, 2.9))
    run_real(prepare(plain(tmp_path / "second", ledger, 0.5)))
    with PrivacyLedger.open(Path(ledger)) as opened:
        share = opened.mu_limit
        assert 0 < opened.capped_units <= opened.limit_units
    whole = amplified([schedule_of(opened)], DELTA, capped_mu_max=share).epsilon
    assert 2.9 < whole <= 3
    for name in ("first", "second"):
        found = audit(tmp_path / name)
        assert (found["exit_code"], found["privacy"]["epsilon"]) == (5, pytest.approx(whole, abs=1e-9))
    assert verify(Path(ledger)).line is None


def plain(root: Path, ledger: str, epsilon: float) -> Config:
    """A run without sampling on an existing ledger."""
    changes = {"privacy__sampling_probability": None, "privacy__epsilon": epsilon, "training__rounds": 2}
    return sampled(root, run__ledger=ledger, **changes)


def test_a_sampled_run_leaves_nothing_unless_asked_to(tmp_path):
    """A second run of either kind is refused before anything is written."""
    config = prepare(sampled(tmp_path / "first"))
    run_real(config)
    before = Path(str(config.run.ledger)).read_bytes()
    with pytest.raises(BudgetExhausted):
        prepare(plain(tmp_path / "second", str(config.run.ledger), 0.1))
    with pytest.raises(UmbelError, match="without charges"):
        prepare(sampled(tmp_path / "third", run__ledger=str(config.run.ledger)))
    assert Path(str(config.run.ledger)).read_bytes() == before
    assert not (tmp_path / "second").exists()


def test_a_ledger_that_was_charged_meanwhile_takes_no_sampled_run(tmp_path):
    """It was empty when the run was laid out; what counts is the ledger when it starts."""
    late = lay_out(sampled(tmp_path / "late", run__ledger=str(tmp_path / "all.jsonl")), Silent())
    run_real(prepare(plain(tmp_path / "first", str(tmp_path / "all.jsonl"), 0.5)))
    before = (tmp_path / "all.jsonl").read_bytes()
    with pytest.raises(UmbelError, match="without charges"):
        run_real(late)
    assert (tmp_path / "all.jsonl").read_bytes().replace(before, b"").count(b'"type":"START"') == 0


def test_nodes_in_other_processes_toss_their_own_coins(tmp_path):
    """Under Flower's Simulation Engine: every node answers, its store has heads and tails, and the audit is content."""
    config = prepare(sampled(tmp_path / "run", training__engine="flower", training__nodes=2))
    folder = RunFolder(root=tmp_path / "run")
    rounds = run_engine(config, folder)
    assert [(line["answered"], line["refusals"]) for line in rounds] == [(2, {})] * ROUNDS
    assert {line["epsilon_spent"] for line in rounds} == {rounds[0]["epsilon_spent"]}
    cost, charges = cost_units(str(config.run.noise_multiplier)), []
    for node in range(2):
        users = [f"user-{i}" for i in range(6 * node, 6 * node + 6)]
        with DeviceStore.open(folder.nodes / f"node-{node}.sqlite", []) as store:
            assert store.known(users).all()
            charges += (store.spent(users) // cost).tolist()
    assert 0 < sum(charges) < 12 * ROUNDS  # all heads or all tails: fewer than once in ten million runs
    found = audit(tmp_path / "run")
    assert (found["exit_code"], found["releases"]["compared"]) == (5, ROUNDS)


def test_amht_lrs_is_sampled_too(tmp_path):
    """Its first release, of a moment, is one of the schedule."""
    config = sampled(tmp_path / "run", training__algorithm="amht-lrs", training__rounds=2, privacy__epsilon=8.0)
    run_real(prepare(config))
    with PrivacyLedger.open(tmp_path / "run" / "ledger.jsonl") as ledger:
        assert [event["initialization"] for event in ledger.events()] == [True, False]
        assert {event["sampling"]["poisson"] for event in ledger.events()} == {Q}


def test_no_noise_is_not_sampled(tmp_path, capsys):
    """There is nothing to amplify: bad input, and no folder."""
    words = ["simulate", "--quiet", "--epsilon", "none", "--sampling-probability", ".1", "--out", str(tmp_path / "run")]
    assert cli.run(words) == 2
    assert "sampled run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_runs_it(tmp_path, capsys):
    """`umbel simulate --sampling-probability`, its plan, and its audit by the command line."""
    small = [
        "--set",
        "data.synthetic.users=40",
        "--set",
        "data.synthetic.dimension=4",
        "--rank",
        "1",
        "--sparsity",
        "1",
    ]
    words = [
        "simulate",
        "--quiet",
        "--rounds",
        "2",
        "--sampling-probability",
        ".3",
        "--out",
        str(tmp_path / "run"),
        *small,
    ]
    assert cli.run([*words, "--dry-run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert cli.run([*words, "--format", "json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["privacy"]["noise_multiplier"] == float(plan["sampling"]["noise_multiplier"])
    assert "toss the coins" in results["privacy"]["promise"]
    assert set(results["baselines"]) >= {"global", "alone"}
    assert cli.run(["audit", str(tmp_path / "run"), "--format", "json"]) == 5
    assert json.loads(capsys.readouterr().out)["privacy"]["epsilon"] <= 1
    assert cli.run(["audit", str(tmp_path / "run"), "--empirical"]) == 2
    assert "without sampling" in capsys.readouterr().err


@pytest.mark.parametrize(("rounds", "q"), [(10, 0.1), (1000, 0.01), (50, 0.5), (3, 0.4), (100_000, 0.001)])
def test_a_device_cuts_off_fewer_than_one_user_in_a_million(rounds, q):
    """The bound on heads holds, and is not far from the exact quantile."""
    from scipy.stats import binom

    heads = most_heads(rounds, q, 1e-6)
    assert heads <= rounds
    assert binom.sf(heads, rounds, q) <= 1e-6
    assert heads <= binom.isf(1e-6, rounds, q) + max(4, 0.2 * rounds * q)
