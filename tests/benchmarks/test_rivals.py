"""Rivals: private as they claim, right against direct formulas, and good on populations made for them."""

from dataclasses import replace

import numpy as np
import pytest

import benchmarks.rivals.amht_lrs
import umbel.baselines
from benchmarks.rivals import RIVALS
from benchmarks.rivals.amht_lrs import around, in_metric
from benchmarks.rivals.fedavg import fine_tune
from benchmarks.rivals.full_covariance import Prior, posterior
from benchmarks.rivals.full_covariance import train as train_covariance
from benchmarks.rivals.rival import MOST_SETTINGS, Budget, descend, fit_heads, orthonormal
from client.batches import gram_of
from common.data import DenseFeatures, take_examples
from common.families import FAMILIES
from common.synthetic import draw_population
from privacy.entropy import SystemNoise
from server.least_squares import subspace_distance
from tests.populations import design, draw_model, draw_users, population_of, schema_of
from umbel.baselines import ridge, users_of
from umbel.evaluate import held_out_error
from umbel.plan import least_noise

SQUARED = FAMILIES["squared"]
PLAIN = Budget(epsilon=None, delta=1e-5)
RELEASED = [key for key, rival in RIVALS.items() if rival.is_released]


def people(counts=(0, 1, 3, 9, 30), d=5):
    rng = np.random.default_rng(3)
    return draw_users(rng, draw_model(rng, d, 2), counts)


def planted(*, users=400, m=20, d=12, rank=2, sparsity=0, noise=0.1, beta=1.0):
    """Training and held-out part, and the truth."""
    population, schema, truth = draw_population(
        users=users, examples=m + 5, dimension=d, rank=rank, sparsity=sparsity, noise=noise, beta_scale=beta, seed=4
    )
    test = np.tile(np.arange(m + 5) >= m, users)
    return take_examples(population, ~test), take_examples(population, test), schema, truth


@pytest.mark.parametrize("key", RIVALS)
@pytest.mark.parametrize("dimension", [2, 27, 101])
def test_grids_are_small_and_fit_the_data(key, dimension):
    """At most six settings and six of what users do alone, none larger than the data."""
    rival = RIVALS[key]
    settings = rival.settings(dimension)
    assert 1 <= len(settings) <= MOST_SETTINGS
    assert 1 <= len(rival.local_settings) <= MOST_SETTINGS
    assert all(setting.get(name, 0) <= dimension for setting in settings for name in ("rank", "sparsity"))
    assert all(rival.personal_numbers(dimension, setting) >= 0 for setting in settings)


@pytest.mark.parametrize("key", RELEASED)
def test_every_release_is_noised_as_the_accountant_asks(key, monkeypatch):
    """As many releases as the setting says, each with a noise of its own, of the multiplier that so many cost."""
    train, _, schema, _ = planted(users=50, m=6, d=6)
    users, rival = users_of(train, schema, SQUARED, shards=1), RIVALS[key]
    releases = []
    real = umbel.baselines.release

    def recorded(totals, **options):
        releases.append(options)
        return real(totals, **options)

    monkeypatch.setattr(umbel.baselines, "release", recorded)
    monkeypatch.setattr(benchmarks.rivals.amht_lrs, "release", recorded)
    for setting in rival.settings(6):
        releases.clear()
        released = rival.train(users, Budget(epsilon=1.0, delta=1e-5), setting, np.random.default_rng(0))
        assert len(releases) == rival.releases(setting)
        assert {r["noise_multiplier"] for r in releases} == {least_noise(1.0, 1e-5, len(releases), 1)}
        assert len({id(r["source"]) for r in releases}) == len(releases)
        assert all(isinstance(r["source"], SystemNoise) for r in releases)
        theta = rival.personal(users, released, setting, rival.local_settings[0])
        assert theta.shape == (50, 6)
        assert np.isfinite(theta).all()


def test_heads_are_ridge_regressions_in_the_span():
    """w and what it leaves, against the normal equations of each user, in both forms of a batch."""
    group = people()
    rng = np.random.default_rng(0)
    U, beta = rng.standard_normal((5, 2)), rng.standard_normal(5)
    whole = design(group)
    for batch in (whole, gram_of(whole)):
        heads = fit_heads(batch, U, beta, 0.7)
        for i, user in enumerate(group):
            Z, residual = user.X @ U, user.y - user.X @ beta
            w = np.linalg.solve(Z.T @ Z + 0.7 * np.eye(2), Z.T @ residual)
            np.testing.assert_allclose(heads.w[i], w, atol=1e-9)
            np.testing.assert_allclose(heads.gradient[i], user.X.T @ (residual - Z @ w), atol=1e-8)


def test_descent_takes_the_best_step_along_the_gradient():
    """One step is the minimum along its direction; many reach least squares; nobody without examples moves."""
    group = people((0, 12, 30))
    batch = design(group)
    metric = np.linalg.cholesky(np.eye(5) + 0.3)
    one = descend(batch, batch.cross, metric, 1)
    many = descend(batch, batch.cross, metric, 400)
    assert (one[0] == 0).all()
    for i, user in enumerate(group[1:], 1):
        losses = [((user.y - user.X @ metric @ (scale * one[i])) ** 2).sum() for scale in (0.99, 1.0, 1.01)]
        assert losses[1] == min(losses)
        np.testing.assert_allclose(metric @ many[i], np.linalg.lstsq(user.X, user.y, rcond=None)[0], atol=1e-5)


def test_fine_tuning_converges_and_never_diverges():
    """Long enough it is least squares, also where y is orthogonal to all features or a user has one example."""
    group = people((1, 12, 30))
    X = np.eye(5)[:4]
    flat = type(group[0])(X=X, y=np.zeros(4), weight=np.ones(4))
    users = users_of(population_of([*group, flat]), schema_of(5), SQUARED)
    theta = fine_tune(users, np.ones(5), steps=3000, learning_rate=10.0)
    assert np.isfinite(theta).all()
    for i in (1, 2):
        np.testing.assert_allclose(theta[i], np.linalg.lstsq(group[i].X, group[i].y, rcond=None)[0], atol=1e-4)
    np.testing.assert_allclose(theta[3], [0, 0, 0, 0, 1], atol=1e-6)


def test_little_fine_tuning_stays_near_the_start():
    """One step of a small rate is that rate times the gradient."""
    group = people((30,))
    users = users_of(population_of(group), schema_of(5), SQUARED)
    start = np.ones(5)
    gradient = group[0].X.T @ (group[0].y - group[0].X @ start)
    theta = fine_tune(users, start, steps=1, learning_rate=1e-4)
    np.testing.assert_allclose(theta[0], start + 1e-4 * gradient, atol=1e-12)


def test_orthonormal_factors_give_the_matrix_back():
    """U = Q R with R upper triangular and positive on the diagonal."""
    U = np.random.default_rng(0).standard_normal((6, 3))
    Q, R = orthonormal(U)
    np.testing.assert_allclose(Q @ R, U, atol=1e-12)
    np.testing.assert_allclose(Q.T @ Q, np.eye(3), atol=1e-12)
    assert (np.diag(R) > 0).all()


def test_recentred_and_whitened_batches_are_the_same_in_both_forms():
    """Taking off x'beta and changing the features commute with going to second moments."""
    batch = design(people((3, 9, 30)))
    beta, metric = np.arange(5.0), np.linalg.cholesky(np.eye(5) + 0.3)
    direct, moments = in_metric(around(batch, beta), metric), in_metric(around(gram_of(batch), beta), metric)
    np.testing.assert_allclose(direct.cross, moments.cross, atol=1e-8)
    np.testing.assert_allclose(direct.products(np.eye(5)), moments.products(np.eye(5)), atol=1e-8)
    centred = around(gram_of(batch), beta)
    expected = (batch.weight * (batch.y - batch.X @ beta) ** 2).sum(axis=1)
    np.testing.assert_allclose(centred.square, expected, rtol=1e-8)


@pytest.mark.parametrize("form", [lambda batch: batch, gram_of])
def test_full_covariance_conditions_exactly(form):
    """Mean, covariance and expected squared error of the Gaussian posterior, from examples and from moments."""
    group = people((0, 1, 3, 30))
    rng = np.random.default_rng(1)
    root = rng.standard_normal((5, 5))
    prior = Prior(mean=rng.standard_normal(5), covariance=root @ root.T + np.eye(5), noise_variance=0.6)
    found = posterior(form(design(group)), prior)
    total = np.zeros((5, 5))
    for i, user in enumerate(group):
        precision = user.X.T @ user.X / 0.6 + np.linalg.inv(prior.covariance)
        covariance = np.linalg.inv(precision)
        mean = prior.mean + covariance @ user.X.T @ (user.y - user.X @ prior.mean) / 0.6
        error = ((user.y - user.X @ mean) ** 2).sum() + np.trace(user.X @ covariance @ user.X.T)
        np.testing.assert_allclose(found.theta[i], mean, atol=1e-8)
        np.testing.assert_allclose(found.squared_error[i], error, atol=1e-7)
        total += covariance
    np.testing.assert_allclose(found.covariance, total, atol=1e-8)


def test_full_covariance_finds_the_population():
    """EM recovers mean, covariance and noise of a planted low-rank population; it refuses to be called private."""
    train, _, schema, truth = planted(users=1500, d=6, noise=0.3)
    users = users_of(train, schema, SQUARED, shards=1)
    prior = train_covariance(users, PLAIN, {"em_steps": 60}, np.random.default_rng(0))
    assert np.linalg.norm(prior.mean - truth.beta) < 0.15
    assert np.linalg.norm(prior.covariance - truth.U @ truth.U.T) < 0.25
    assert abs(prior.noise_variance - 0.09) < 0.01
    with pytest.raises(ValueError, match="without privacy"):
        train_covariance(users, Budget(epsilon=1.0, delta=1e-5), {"em_steps": 1}, np.random.default_rng(0))


SETTINGS = {
    "fedrep": {"rank": 2, "penalty": 0.1, "head_share": 0.05, "rounds": 30},
    "centaur": {
        **{"rank": 2, "penalty": 0.1, "local_steps": 1, "mean_rounds": 5},
        **{"start": "moments", "rounds": 20, "server_step": 1.0},
    },
    "amht_lrs": {"rank": 2, "sparsity": 0, "ridge": 0.1, "mean_rounds": 5, "rounds": 12, "solver": "pursuit"},
}


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("epsilon", [None, 8.0])
def test_shared_representations_are_found(key, epsilon):
    """On a planted low-rank population the learned span is the truth's, and users beat being alone, also with noise."""
    train, test, schema, truth = planted(users=1500, m=10)
    users, rival = users_of(train, schema, SQUARED, shards=1), RIVALS[key]
    released = rival.train(users, Budget(epsilon=epsilon, delta=1e-5), SETTINGS[key], np.random.default_rng(0))
    U = released.U if key == "amht_lrs" else released[0]
    assert subspace_distance(truth.U, U) < (0.1 if epsilon is None else 0.5)
    local = {"local_penalty": 0.1, "local_ridge": 0.1}
    ours = held_out_error(rival.personal(users, released, SETTINGS[key], local), test, train, SQUARED).error()
    alone = held_out_error(ridge(users, np.zeros(12), 0.1), test, train, SQUARED).error()
    assert ours < 0.9 * alone


def test_amht_finds_sparse_parts():
    """With planted nonzeros its b explains what no head can."""
    train, test, schema, _ = planted(users=500, m=30, sparsity=1)
    users, rival = users_of(train, schema, SQUARED, shards=1), RIVALS["amht_lrs"]
    errors = []
    for sparsity in (0, 1):
        setting = {**SETTINGS["amht_lrs"], "sparsity": sparsity, "rounds": 8}
        released = rival.train(users, PLAIN, setting, np.random.default_rng(0))
        theta = rival.personal(users, released, setting, {"local_ridge": 0.01})
        errors.append(held_out_error(theta, test, train, SQUARED).error())
    assert errors[1] < 0.4 * errors[0]


def test_amht_finds_the_span_in_correlated_features():
    """Statistics in the metric and b in the features as they are go together: without noise U is found to 1 %."""
    train, _, schema, truth = planted(users=500, m=30, sparsity=1, beta=0.0, noise=0.01)
    mixing = np.linalg.cholesky(np.eye(12) + np.outer(np.linspace(0, 1, 12), np.linspace(0, 1, 12)))
    X = train.features.rows(slice(None)) @ mixing.T
    noise = train.y - (train.features.rows(slice(None)) * truth.theta[train.user_of_example]).sum(axis=1)
    y = (X * truth.theta[train.user_of_example]).sum(axis=1) + noise
    mixed = replace(train, features=DenseFeatures(X), y=y)
    public = replace(schema, feature_second_moment=mixing @ mixing.T, feature_bound=100.0, target_range=(-50.0, 50.0))
    setting = {**SETTINGS["amht_lrs"], "sparsity": 1, "ridge": 0.0, "mean_rounds": 0, "rounds": 10}
    users = users_of(mixed, public, SQUARED, shards=1)
    released = RIVALS["amht_lrs"].train(users, PLAIN, setting, np.random.default_rng(0))
    assert subspace_distance(truth.U, released.U) < 0.01


@pytest.mark.parametrize("steps", [0, 1])
def test_fedavg_finds_the_mean(steps):
    """Without differences between users the global model is the truth."""
    population, schema, truth = draw_population(
        users=300, examples=20, dimension=6, rank=1, sparsity=0, noise=0.1, U_scale=0.0, seed=2
    )
    users, rival = users_of(population, schema, SQUARED, shards=1), RIVALS["fedavg"]
    beta = rival.train(users, PLAIN, {"rounds": 20, "local_steps": steps}, np.random.default_rng(0))
    assert np.linalg.norm(beta - truth.beta) < 0.03
