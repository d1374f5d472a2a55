"""The attack on a run's mechanism: quiet where it is right, loud where it is not, through the server's own code."""

import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

import umbel.empirical
from common.config import load_config
from common.errors import UmbelError, VerificationError
from privacy.entropy import SystemNoise
from privacy.gaussian import epsilon_of_mu
from privacy.layout import Group, Layout, groups_of_event
from privacy.ledger import PrivacyLedger
from privacy.report import report_of
from server.layout import contribution_layout
from server.settings import load_run
from tests.federation import Silent, configuration, prepare, run_real
from umbel.empirical import Trials, attack, empirical_audit, mechanism_of, most_together, refutations, spread
from umbel.simulate import simulate

DELTA = 1e-5
SMALL = contribution_layout(4, 1, private=True)
WIDE = Layout(groups=(Group(name="model", size=10_000, share=1.0),), grid_scale=2**16)


def event_of(noise_multiplier: str, layout: Layout = SMALL) -> dict:
    """What a RESERVE line says of a round."""
    return {
        "mechanism": "gaussian",
        "noise_multiplier": noise_multiplier,
        "clipping_norm": "1",
        "grid_scale": layout.grid_scale,
        "groups": groups_of_event(layout),
        "denominator": 50,
        "noise": "aes-256-ctr",
        "sampling": "none",
        "initialization": False,
    }


def with_less_noise(patch: pytest.MonkeyPatch, factor: float) -> None:
    """The real release, with a wrong z."""
    real = umbel.empirical.release

    def release(contributions, *, noise_multiplier, **options):
        return real(contributions, noise_multiplier=f"{factor * float(noise_multiplier):.6f}", **options)

    patch.setattr(umbel.empirical, "release", release)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five rounds at epsilon 8."""
    root = tmp_path_factory.mktemp("empirical") / "run"
    options = {
        "run.out": str(root),
        "run.stores": "memory",
        "data.synthetic.users": 60,
        "data.synthetic.examples": 6,
        "data.synthetic.dimension": 4,
        "data.synthetic.rank": 1,
        "data.synthetic.sparsity": 1,
        "model.rank": 1,
        "model.sparsity": 1,
        "training.rounds": 5,
        "privacy.epsilon": 8.0,
        "privacy.seed": 0,
    }
    simulate(load_config(None, options), progress=Silent(), with_baselines=False)
    return root


@pytest.mark.parametrize("threat", ["all", "last"])
def test_a_correct_run_raises_no_alarm(run: Path, threat: str) -> None:
    """The bounds stay below the claim, the best of them finds a good part of it, and all of it is written down."""
    found = empirical_audit(run, canaries=600, threat=threat, seed=1)
    assert not found["alarm"]
    assert found["claimed"]["epsilon"] == pytest.approx(8, rel=1e-3)
    assert found["rounds"] == 5
    assert (found["canaries"], found["repetitions"]) == (600, 600)
    epsilon = {bound["name"]: bound["epsilon"] for bound in found["bounds"]}
    assert list(epsilon) == ["clopper-pearson", "one-run", "gaussian"]
    assert 4 < epsilon["gaussian"] < 8
    assert min(epsilon.values()) > 0.5
    assert all("one canary in a repetition" in bound["assumes"] for bound in found["bounds"])
    assert found["tpr_at_fpr"]["low"] < found["tpr_at_fpr"]["tpr"] < found["tpr_at_fpr"]["high"]
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    assert json.loads((run / "release" / "empirical.json").read_text()) == found


def test_the_result_says_what_it_was_made_on(run: Path) -> None:
    """Run, ledger, its head and the claim are in it, and the report takes it for this run's without a remark."""
    found = empirical_audit(run, canaries=40, seed=1)
    ledger = PrivacyLedger.open(run / "release" / "ledger.jsonl")
    (name,) = ledger.runs
    assert (found["run"], found["ledger_id"], found["umbel"]) == (name, ledger.ledger_id, version("umbel"))
    assert found["ledger_head"] == f"{ledger.sequence}:{ledger.head.hex()}"
    assert found["noise_multiplier"] == ledger.rounds_of(name)[0].event["noise_multiplier"]
    report = report_of(run)
    assert report.empirical is not None
    assert (report.empirical.canaries, report.empirical_remarks, report.foreign_empirical) == (40, (), ())


@pytest.mark.parametrize("factor", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("threat", ["all", "last"])
def test_less_noise_than_claimed_raises_the_alarm(
    run: Path, threat: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is as it was, only the release draws less; two audits of two notice."""
    with_less_noise(monkeypatch, factor)
    canaries = 600 if threat == "all" else 1200
    assert all(empirical_audit(run, canaries=canaries, threat=threat, seed=seed)["alarm"] for seed in range(2))


def test_the_area_is_that_of_the_whole_run(run: Path) -> None:
    """AUROC of all releases together is Phi(mu / sqrt 2), mu^2 the sum of z^-2, within its own 1 - 1e-6 interval."""
    events = mechanism_of(run).events
    mu = math.sqrt(sum(float(event["noise_multiplier"]) ** -2 for event in events))
    scores, included = attack(events, Trials(repetitions=2000, per_repetition=1), seed=3)
    pairs = (scores[included][:, None] > scores[~included][None, :]).mean()
    assert abs(pairs - norm.cdf(mu / math.sqrt(2))) < 4.9 * 0.5 / math.sqrt(2000 / 4 * 3)
    # a canary that is in scores 1, one that is out 0, with standard deviation 1 / mu
    assert scores[included].mean() == pytest.approx(1, abs=4.9 / mu / math.sqrt(900))
    assert scores[~included].mean() == pytest.approx(0, abs=4.9 / mu / math.sqrt(900))
    assert scores[~included].std() * mu == pytest.approx(1, abs=4.9 / math.sqrt(2 * 900))


@pytest.mark.parametrize(("per_repetition", "repetitions"), [(1, 200), (3, 67)])
def test_at_most_one_audit_in_twenty_of_a_correct_mechanism_alarms(per_repetition: int, repetitions: int) -> None:
    """100 audits of two rounds through the real release: alarms are within the binomial limit at 1e-6."""
    events = [event_of("1.4"), event_of("1.4")]
    claim = epsilon_of_mu(math.sqrt(2) / 1.4, DELTA)
    audits, alarms = 100, 0
    for seed in range(audits):
        trials = Trials(repetitions=repetitions, per_repetition=per_repetition)
        alarms += refutations(*attack(events, trials, seed=seed), epsilon=claim, delta=DELTA)["alarm"]
    assert alarms <= binom.ppf(1 - 1e-6, audits, 0.05)


@pytest.mark.parametrize(
    ("noise", "gaussian", "one_run"),
    [("1", (2.5, 4.377), (1.0, 2.2)), ("0.7", (4.4, 7.5), (1.5, 3.5)), ("0.3", (10, 25), (3.0, 4.8))],
)
def test_a_thousand_canaries_in_one_run(noise: str, gaussian: tuple, one_run: tuple) -> None:
    """The figures of the specification at a claim for z = 1, delta = 1e-5, and 10,000 coordinates."""
    scores, included = attack([event_of(noise, WIDE)], Trials(repetitions=1, per_repetition=1000), seed=5)
    claim = epsilon_of_mu(1.0, DELTA)
    found = refutations(scores, included, epsilon=claim, delta=DELTA, shared=True)
    epsilon = {bound["name"]: bound["epsilon"] for bound in found["bounds"]}
    assert claim == pytest.approx(4.377, abs=1e-3)
    assert gaussian[0] < epsilon["gaussian"] < gaussian[1]
    assert one_run[0] < epsilon["one-run"] < one_run[1]
    assert found["alarm"] == (noise != "1")
    assert all("several canaries in a repetition" in bound["assumes"] for bound in found["bounds"])


def test_too_many_canaries_drown_each_other() -> None:
    """As many canaries as coordinates hide each other where z is small, which is why they are limited."""
    layout = Layout(groups=(Group(name="model", size=400, share=1.0),), grid_scale=2**16)
    areas = []
    for together in (1, most_together([event_of("0.5", layout)], last=False), 400):
        scores, included = attack(
            [event_of("0.5", layout)], Trials(repetitions=2000 // together, per_repetition=together), seed=1
        )
        areas.append((scores[included][:, None] > scores[~included][None, :]).mean())
    alone, some, all_together = areas
    assert alone - some < 0.03
    assert alone - all_together > 0.06


def test_a_user_of_two_nodes_counts_twice() -> None:
    """mu of a canary that contributes from two nodes is twice as large, as it is charged."""
    events, trials = [event_of("2")], Trials(repetitions=800, per_repetition=1)
    once, twice = (attack(events, trials, max_nodes_per_user=s, seed=4) for s in (1, 2))
    claim = epsilon_of_mu(2 / 2, DELTA)
    assert not refutations(*twice, epsilon=claim, delta=DELTA)["alarm"]
    assert refutations(*twice, epsilon=epsilon_of_mu(1 / 2, DELTA), delta=DELTA)["alarm"]
    spreads = [scores[~included].std() for scores, included in (once, twice)]
    assert spreads[0] == pytest.approx(2 * spreads[1], rel=1e-6)


def test_rounds_of_different_noise_are_weighted_by_what_they_tell() -> None:
    """A round that is mostly noise takes nothing away from one that is not."""
    trials = Trials(repetitions=800, per_repetition=1)
    alone, included = attack([event_of("1")], trials, seed=2)
    mixed, included_mixed = attack([event_of("1"), event_of("100")], trials, seed=2)
    assert mixed[~included_mixed].std() == pytest.approx(alone[~included].std(), rel=0.1)
    assert mixed[included_mixed].mean() - mixed[~included_mixed].mean() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize(
    ("noise", "last", "expected"), [("4.9", False, 125), ("5", False, 1000), ("9", True, 125), ("10", True, 1000)]
)
def test_how_many_canaries_fit_together(noise: str, last: bool, expected: int) -> None:
    """D/8 below z = 5, where rounds with the same directions count together; D from there on."""
    layout = Layout(groups=(Group(name="model", size=1000, share=1.0),), grid_scale=2**16)
    assert most_together([event_of(noise, layout)] * 4, last=last) == expected


def test_canaries_are_alone_as_long_as_that_can_be_afforded() -> None:
    """One in a repetition of a small run; as few as can in a long one, never more than there is room for."""
    assert spread(1000, [event_of("10")] * 10, last=False) == Trials(repetitions=1000, per_repetition=1)
    long = spread(1000, [event_of("10", contribution_layout(30, 8, private=True))] * 200, last=False)
    assert 1 < long.per_repetition < 20
    assert long.canaries >= 1000
    assert spread(1000, [event_of("1")] * 10_000, last=False).per_repetition == SMALL.size // 8


def test_a_seed_repeats_an_audit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds, equal bounds; without a seed noise is the operating system's."""
    drawn = []
    real = SystemNoise.rounded_gaussian
    monkeypatch.setattr(SystemNoise, "rounded_gaussian", lambda *given: drawn.append(0) or real(*given))
    first, second, other = (empirical_audit(run, canaries=100, seed=seed) for seed in (7, 7, 8))
    assert not drawn
    assert (first["bounds"], first["auroc"]) == (second["bounds"], second["auroc"])
    assert first["auroc"] != other["auroc"]
    free = empirical_audit(run, canaries=100)
    assert (len(drawn), free["seed"]) == (500, None)


def test_a_release_folder_is_enough_for_all_releases(run: Path) -> None:
    """What is published can be audited by whoever has it; the last model's attack needs the configuration."""
    assert empirical_audit(run / "release", canaries=40, seed=1)["rounds"] == 5
    with pytest.raises(UmbelError, match="Expected"):
        empirical_audit(run / "release", canaries=40, threat="last", seed=1)


def test_the_attack_on_the_last_model_runs_the_servers_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server does not step, the last model shows nothing."""
    mechanism = mechanism_of(run)
    events, s = mechanism.events, mechanism.max_nodes_per_user
    trials, settings = Trials(repetitions=100, per_repetition=1), load_run(run)
    seen, _ = attack(events, trials, max_nodes_per_user=s, settings=settings, seed=0)
    assert len(np.unique(seen)) == 100
    monkeypatch.setattr(umbel.empirical, "algorithm_of", lambda *given: Still(real(*given)))
    blind, _ = attack(events, trials, max_nodes_per_user=s, settings=settings, seed=0)
    assert set(blind) == {0.0}


real = umbel.empirical.algorithm_of


class Still:
    """An algorithm whose steps are left out."""

    def __init__(self, algorithm):
        self.first_state, self.metric = algorithm.first_state, algorithm.metric

    def step(self, state, noised, event):
        return state


@pytest.mark.parametrize("initialization", ["pair-moments", "random"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_other_algorithm_is_audited_too(tmp_path: Path, initialization: str, rounds: int) -> None:
    """Runs of moments and statistics are attacked through their own layouts and steps, and raise no alarm."""
    options = {
        "training__algorithm": "amht-lrs",
        "amht__initialization": initialization,
        "training__rounds": rounds,
        "privacy__epsilon": 30.0,
        "privacy__seed": None,
    }
    run_real(prepare(configuration(tmp_path / "run", **options)))
    for threat in ("all", "last"):
        found = empirical_audit(tmp_path / "run", canaries=200, threat=threat, seed=0)
        assert not found["alarm"]
        assert found["auroc"]["low"] > (0.85 if threat == "all" else 0.5)


def test_a_run_without_noise_claims_nothing(tmp_path: Path) -> None:
    """There is nothing to refute, and it is said so."""
    run_real(prepare(configuration(tmp_path / "run")))
    with pytest.raises(UmbelError, match="without"):
        empirical_audit(tmp_path / "run")


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    """Too few canaries, another threat, no folder, no ledger, a ledger that was tampered with."""
    with pytest.raises(UmbelError, match="canaries=39"):
        empirical_audit(run, canaries=39)
    with pytest.raises(UmbelError, match="threat='first'"):
        empirical_audit(run, threat="first")
    with pytest.raises(UmbelError, match="run folder"):
        empirical_audit(run / "release" / "ledger.jsonl")
    with pytest.raises(UmbelError, match=r"ledger\.jsonl"):
        empirical_audit(tmp_path)
    lines = (run / "release" / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").write_bytes(lines.replace(b'"denominator":60', b'"denominator":61', 1))
    with pytest.raises(VerificationError, match="Expected a valid ledger"):
        empirical_audit(tmp_path)
