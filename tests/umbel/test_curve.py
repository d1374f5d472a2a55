"""The curve of exact errors agrees with what training, evaluation and ledger say at its ends."""

import json
from pathlib import Path

import pytest

from common.config import load_config
from privacy.report import report_of
from server.settings import load_run
from umbel.curve import error_curve
from umbel.simulate import simulate

SMALL = {
    "data.synthetic.users": 50,
    "data.synthetic.examples": [5, 15],
    "data.synthetic.dimension": 6,
    "model.rank": 2,
    "model.sparsity": 1,
}


class Silent:
    def step(self, name: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


def run(root: Path, *, with_baselines: bool = False, **options: object) -> dict[str, object]:
    config = load_config(
        None, SMALL | {"run.out": str(root)} | {name.replace("__", "."): v for name, v in options.items()}
    )
    return simulate(config, progress=Silent(), with_baselines=with_baselines)


def test_the_curve_ends_where_the_run_does(tmp_path: Path) -> None:
    """At most five points, from round 0 to the last: its error is the evaluation's, epsilons are the report's."""
    results = run(tmp_path / "run", with_baselines=True, training__rounds=7)
    curve = results["curve"]
    assert curve == json.loads((tmp_path / "run/evaluation/results.json").read_text())["curve"]
    assert [point["round"] for point in curve] == [0, 2, 4, 5, 7]
    assert curve[-1]["error"] == pytest.approx(results["error"]["overall"], rel=1e-6)
    assert len({point["error"] for point in curve}) == 5
    spent = {0: 0.0} | {point.number: point.epsilon for point in report_of(tmp_path / "run").curve}
    assert [point["epsilon"] for point in curve] == [spent[point["round"]] for point in curve]


def test_a_later_run_begins_where_the_ledger_stood(tmp_path: Path) -> None:
    """On a shared ledger, epsilon counts what other runs had spent; few rounds give few points."""
    shared = {"run__ledger": str(tmp_path / "all.jsonl"), "privacy__ledger_epsilon": 2.0, "training__rounds": 2}
    run(tmp_path / "first", **shared)
    run(tmp_path / "second", **shared)
    first, second = (error_curve(load_run(tmp_path / name)) for name in ("first", "second"))
    assert [point["round"] for point in first] == [point["round"] for point in second] == [0, 1, 2]
    assert second[0]["epsilon"] == first[-1]["epsilon"] > first[0]["epsilon"] == 0


def test_a_sampled_run_has_spent_all_of_it_from_its_first_round_on(tmp_path: Path) -> None:
    """As charged when it started, and not what its rounds would cost without coins."""
    results = run(tmp_path / "run", training__rounds=2, privacy__sampling_probability="0.3")
    spent = results["privacy"]["epsilon"]
    curve = error_curve(load_run(tmp_path / "run"))
    assert [point["epsilon"] for point in curve] == [0, *[pytest.approx(spent, abs=1e-8)] * 2]


def test_without_noise_epsilon_is_null(tmp_path: Path) -> None:
    """After the first round without noise nothing finite is spent; without baselines there is no curve."""
    results = run(tmp_path / "run", privacy__epsilon="none", training__rounds=2)
    assert results["curve"] == []
    curve = error_curve(load_run(tmp_path / "run"))
    assert [point["epsilon"] for point in curve] == [0.0, None, None]
    assert all(point["error"] > 0 for point in curve)
