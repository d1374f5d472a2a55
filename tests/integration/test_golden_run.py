"""A tiny run without noise, whose integers are pinned, and the recovery of planted parameters.

The pinned integers came from this program itself: they show that it still computes the same, not that it is right;
`tests/reference.py` is for that.
"""

from pathlib import Path

import numpy as np
import pytest

from client.personalize import personalize
from client.shard import Shard
from client.sources import node_data
from common.families import FAMILIES, LINEAR_FAMILIES
from common.synthetic import draw_population
from privacy.entropy import NoNoise
from server.algorithms import algorithm_of
from server.initialization import tie_breaker
from server.rounds import apply_round, public_metric
from server.settings import load_run
from server.training import decimal_string
from tests.federation import configuration, layout_of, prepare, run_real
from tests.populations import gradient_total
from umbel.baselines import Mechanism, train_model, users_of

# First six of the released integers, on the grid of 2^30; another processor's rounding may move the last few bits.
GOLDEN = {
    "squared": [
        [-88715181, -122224877, 20056590, 327454895, 88919945, 426234541],
        [-52343129, 204237506, 695321100, 479806577, 251456405, 717908478],
    ],
    "logistic": [
        [84785654, 137394294, -360537597, 382288713, -191846276, 197037607],
        [100092198, 54184495, -327817851, 387142297, -240227695, 169301776],
    ],
}
TOLERANCE = 2**12
NUM_NODES, NUM_ROUNDS = 2, 2


def by_function_calls(config):
    """The run's releases and last state without messages, ledger and devices."""
    settings = load_run(Path(str(config.run.out)))
    rng = tie_breaker(settings.run, config.privacy.seed)
    state = algorithm_of(settings.config).first_state(settings.schema, rng)
    layout = layout_of(config, private=False)
    family, sparsity = config.model.family, config.model.sparsity
    sources = [node_data(config.data, family, i, NUM_NODES) for i in range(NUM_NODES)]
    shards = [Shard(population, schema, FAMILIES[family]) for population, schema in sources]
    releases = []
    for _ in range(NUM_ROUNDS):
        clipping_norm = float(decimal_string(state.clipping_norm))
        totals = [
            gradient_total(
                shard,
                state.model,
                public_metric(state, family),
                sparsity=sparsity,
                clipping_norm=clipping_norm,
                layout=layout,
            )
            for shard in shards
        ]
        releases.append(np.sum(totals, axis=0))
        state = apply_round(
            state,
            releases[-1],
            layout=layout,
            clipping_norm=clipping_norm,
            noise_multiplier=0.0,
            denominator=sum(shard.population.num_users for shard in shards),
            adapt_clipping=True,
            family=family,
            sparsity=sparsity,
        )
    return releases, state


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_two_nodes_two_rounds(tmp_path, family):
    """The same integers by plain function calls and by the real apps over messages, and the pinned ones."""
    shape = {"data__synthetic__dimension": 8, "data__synthetic__rank": 2, "model__rank": 2}
    config = prepare(configuration(tmp_path / "run", model__family=family, data__synthetic__examples=10, **shape))
    run = run_real(config)
    releases, state = by_function_calls(config)
    found = list(run.releases.values())
    assert len(found) == NUM_ROUNDS
    for released, computed, golden in zip(found, releases, GOLDEN[family], strict=True):
        assert np.array_equal(released, computed)
        np.testing.assert_allclose(released[:6], golden, rtol=0, atol=TOLERANCE)
    assert np.array_equal(run.state.model.U, state.model.U)
    assert np.array_equal(run.state.model.beta, state.model.beta)
    assert run.state.clipping_norm == state.clipping_norm


def test_nodes_do_not_matter(tmp_path):
    """One node or three: bit for bit the same releases and the same model."""
    runs = [
        run_real(prepare(configuration(tmp_path / str(nodes), training__nodes=nodes, data__synthetic__users=11)))
        for nodes in (1, 3)
    ]
    for one, three in zip(runs[0].releases.values(), runs[1].releases.values(), strict=True):
        assert np.array_equal(one, three)
    assert np.array_equal(runs[0].state.model.U, runs[1].state.model.U)


def test_planted_parameters_are_recovered():
    """On a noiseless population of the model itself, within the default ten rounds (seed 0, deterministic):

    the sine of the largest angle between learned and true U falls below .1, 19 of 20 of the nonzeros of b that are
    larger than .2 are found, and the median user's parameters are right to .1, of a norm of about 2.
    """
    population, schema, truth = draw_population(
        users=300, examples=30, dimension=12, rank=2, sparsity=1, noise=0.0, seed=0
    )
    users = users_of(population, schema, FAMILIES["squared"])
    mechanism = Mechanism(noise_multiplier="0", rounds=10, noise=NoNoise)
    model = train_model(users, rank=2, sparsity=1, mechanism=mechanism, rng=np.random.default_rng(0))
    true_U = np.linalg.qr(truth.U)[0]
    learned, _ = model.gauge()
    distance = np.linalg.norm(learned - true_U @ (true_U.T @ learned), 2)
    assert distance < 0.1
    found = planted = 0
    errors = []
    for start, shard in zip(users.starts, users.shards, strict=True):
        for chunk, batch in shard.batches():
            solution = personalize(batch, model, family=FAMILIES["squared"], sparsity=1)
            b = truth.b[start + chunk.users]
            large = np.abs(b) > 0.2
            planted += int(large.sum())
            found += int((large & (np.arange(12) == solution.support)).sum())
            errors.append(np.linalg.norm(solution.theta - truth.theta[start + chunk.users], axis=1))
    assert planted > 200
    assert found >= 0.95 * planted
    assert np.median(np.concatenate(errors)) < 0.1
