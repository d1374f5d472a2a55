"""AMHT-LRS through the real apps: same loop, same ledger, same guard."""

import numpy as np
import pytest

from client.settings import load_settings
from common.config import to_toml
from common.errors import UmbelError
from common.files import write_durably
from common.synthetic import draw_population
from privacy.report import report_of
from server.least_squares import subspace_distance
from server.training import ROUNDS_LOG
from tests.federation import Silent, configuration, prepare, run_real
from umbel.simulate import simulate

PLANTED = {
    "data__synthetic__users": 120,
    "data__synthetic__examples": 25,
    "data__synthetic__dimension": 8,
    "data__synthetic__rank": 2,
    "data__synthetic__sparsity": 1,
    "data__synthetic__noise": 0.0,
    "data__synthetic__beta_scale": 0.0,
    "data__test_fraction": 0.0,
    "model__rank": 2,
    "model__sparsity": 1,
    "training__algorithm": "amht-lrs",
    "amht__solver": "pursuit",
    "training__rounds": 8,
}


def truth():
    return draw_population(users=120, examples=25, dimension=8, rank=2, sparsity=1, noise=0.0, beta_scale=0.0, seed=0)[
        2
    ]


@pytest.mark.parametrize("initialization", ["pair-moments", "moments"])
def test_a_planted_model_is_recovered_without_noise(tmp_path, initialization):
    """U comes back up to what the declared range cuts off the targets, from a start that was far from it."""
    run = run_real(prepare(configuration(tmp_path, **PLANTED, amht__initialization=initialization)))
    assert subspace_distance(run.state.model.U, truth().U) < 1e-2
    assert [b.task.get("work") for _, b in sorted(run.broadcasts.items())] == ["moment"] + ["statistics"] * 7
    after_start = run.broadcasts[sorted(run.broadcasts)[1]].model
    assert subspace_distance(after_start.U, truth().U) > 5e-2


def test_targets_in_the_ten_thousands_are_no_reason_to_refuse(tmp_path):
    """Clipping norms are in the target's units, squared, and nodes accept what the server starts with."""
    settings = PLANTED | {"training__rounds": 3, "data__synthetic__U_scale": 1e4, "data__synthetic__b_scale": 1e4}
    run = run_real(prepare(configuration(tmp_path, **settings)))
    assert len(run.releases) == 3
    assert run.state.clipping_norm > 1e6


def test_a_random_start_needs_no_release(tmp_path):
    """All rounds are of statistics."""
    settings = PLANTED | {"training__rounds": 2, "amht__initialization": "random"}
    run = run_real(prepare(configuration(tmp_path, **settings)))
    assert [b.task.get("work") for _, b in sorted(run.broadcasts.items())] == ["statistics"] * 2


def test_sample_splitting_asks_for_other_examples_every_round(tmp_path):
    """And every user still contributes in every round."""
    run = run_real(prepare(configuration(tmp_path, **(PLANTED | {"training__rounds": 3}), amht__sample_splitting=True)))
    assert [tuple(b.task.get("fold", (0, 1))) for _, b in sorted(run.broadcasts.items())] == [(0, 3), (1, 3), (2, 3)]
    assert all(entry.any() for entry in run.releases.values())


def test_nodes_and_engine_do_not_matter(tmp_path):
    """The released integers are the same whether users are on one node or on three."""
    releases = [
        run_real(
            prepare(configuration(tmp_path / str(n), **(PLANTED | {"training__rounds": 3}), training__nodes=n))
        ).releases
        for n in (1, 3)
    ]
    for one, three in zip(*(found.values() for found in releases), strict=True):
        assert np.array_equal(one, three)


def test_a_private_run_is_charged_and_its_report_says_what_it_reveals(tmp_path):
    """The same ledger and accountant, the moment's release included; X'X is named in who sees what."""
    settings = PLANTED | {"training__rounds": 3, "data__test_fraction": 0.2}
    config = configuration(tmp_path / "run", **settings, privacy__epsilon=4.0)
    config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"seed": None})})
    results = simulate(config, progress=Silent())
    assert results["privacy"]["epsilon"] == pytest.approx(4.0, rel=1e-3)
    assert results["privacy"]["rounds"] == 3
    assert not results["privacy"]["not_private"]
    assert {"gradient", "low_rank", "non_private"} <= results["baselines"].keys()
    report = report_of(tmp_path / "run")
    assert "X'X" in report.who_sees_what[1].sees
    assert [sorted(facts.shares) for facts in report.rounds] == [["moment", "scalars"], *[["A", "V", "scalars"]] * 2]
    assert [facts.initialization for facts in report.rounds] == [True, False, False]


def test_the_default_algorithm_does_not_say_so(tmp_path):
    """X'X is named only where it could be computed."""
    run_real(prepare(configuration(tmp_path / "run")))
    report = report_of(tmp_path / "run")
    assert "X'X" not in report.who_sees_what[1].sees


@pytest.mark.parametrize("initialization", ["random", "pair-moments"])
def test_a_node_gives_no_statistics_unless_its_operator_allows_it(tmp_path, initialization):
    """A refusal with a code, before anything is computed; the moment for the start is one of them."""
    config = prepare(configuration(tmp_path / "run", **PLANTED, amht__initialization=initialization))
    path = tmp_path / "run" / "nodes" / "node.toml"
    settings = load_settings(path)
    assert settings.allow_statistics
    careful = settings.model_copy(update={"allow_statistics": False})
    write_durably(path, to_toml(careful.model_dump(exclude_none=True)).encode())
    with pytest.raises(UmbelError, match="policy_work"):
        run_real(config)
    assert not list((tmp_path / "run" / "release" / "rounds").iterdir())


def test_logistic_loss_is_refused_with_a_remedy(tmp_path):
    """The published algorithm is least squares."""
    config = configuration(tmp_path / "run", **PLANTED, model__family="logistic")
    with pytest.raises(UmbelError, match=r"model.family='squared'.*--algorithm gradient"):
        prepare(config)


def test_the_log_has_the_rounds(tmp_path, caplog):
    """As for the default algorithm."""
    with caplog.at_level("INFO", logger=ROUNDS_LOG.name):
        run = run_real(prepare(configuration(tmp_path, **(PLANTED | {"training__rounds": 2}))))
    assert [numbers["round"] for numbers in run.metrics] == [1, 2]
