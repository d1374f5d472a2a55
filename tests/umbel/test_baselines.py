"""Baselines: right against scikit-learn and against the recipe's own server, and of the same privacy."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

import umbel.baselines
from common.families import FAMILIES, LINEAR_FAMILIES
from common.synthetic import draw_population
from privacy.entropy import NoNoise, SystemNoise
from server.initialization import regularized_moment
from server.layout import contribution_layout
from tests.populations import draw_model, draw_users, population_of, schema_of
from umbel.baselines import (
    PENALTIES,
    Mechanism,
    Momentum,
    PrivateMean,
    choose_penalty,
    feature_metric,
    personal_theta,
    private_global,
    private_mean,
    ridge,
    train_model,
    users_of,
    validation_split,
)
from umbel.evaluate import held_out_error

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]
PLAIN = Mechanism(noise_multiplier="0", rounds=10, noise=NoNoise)


def cohort(family="squared", counts=(0, 1, 3, 20, 40, 7), d=4):
    rng = np.random.default_rng(0)
    model = draw_model(rng, d, 2, noise_variance=0.3 if family == "squared" else 1.0)
    people = draw_users(rng, model, counts, family=family)
    return people, users_of(population_of(people), schema_of(d), FAMILIES[family])


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_ridge_is_scikit_learns_around_a_center(penalty):
    """Each user's penalised least squares; a user without examples has the center."""
    people, users = cohort()
    center = np.array([1.0, -1.0, 0.5, 0.0])
    theta = ridge(users, center, penalty)
    for i, user in enumerate(people):
        if len(user.y):
            oracle = Ridge(alpha=penalty, fit_intercept=False).fit(user.X, user.y - user.X @ center)
            np.testing.assert_allclose(theta[i], center + oracle.coef_, atol=1e-9)
        else:
            assert np.array_equal(theta[i], center)


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_logistic_ridge_is_scikit_learns(penalty):
    """Newton's fixed number of steps reaches the minimum, with C = 1 / (2 penalty) for penalty |theta|^2 / 2."""
    people, users = cohort("logistic", counts=(5, 30, 100))
    theta = ridge(users, np.zeros(4), penalty)
    for i, user in enumerate(people):
        oracle = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-12, max_iter=1000).fit(user.X, user.y)
        np.testing.assert_allclose(theta[i], oracle.coef_[0], atol=1e-6)


def test_logistic_ridge_survives_separable_users():
    """A likelihood without a maximum still has a penalised one, and Newton's steps do not fly off."""
    rng = np.random.default_rng(1)
    people, _ = cohort("logistic", counts=(40,))
    X = 3 * rng.standard_normal((40, 4))
    separable = replace(people[0], X=X, y=(X[:, 0] > 0) * 1.0)
    users = users_of(population_of([separable]), schema_of(4), LOGISTIC)
    oracle = LogisticRegression(C=1 / 0.3, fit_intercept=False, tol=1e-12, max_iter=1000).fit(X, separable.y)
    np.testing.assert_allclose(ridge(users, np.zeros(4), 0.3), oracle.coef_, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_do_not_matter(monkeypatch, count):
    """One shard or one a core: the same parameters in the users' order."""
    people, _ = cohort()
    monkeypatch.setattr(umbel.baselines.os, "cpu_count", lambda: count)
    users = users_of(population_of(people), schema_of(4), SQUARED)
    assert len(users.shards) == count
    theta = ridge(users, np.zeros(4), 1.0)
    monkeypatch.setattr(umbel.baselines.os, "cpu_count", lambda: 1)
    alone = users_of(population_of(people), schema_of(4), SQUARED)
    np.testing.assert_allclose(theta, ridge(alone, np.zeros(4), 1.0), atol=1e-12)


def test_personal_theta_is_in_the_users_order():
    """Personalized parameters land on their users, through shards and chunks."""
    people, users = cohort()
    model = draw_model(np.random.default_rng(0), 4, 2)
    theta = personal_theta(users, model, 2)
    for i, user in enumerate(people):
        one = users_of(population_of([user]), schema_of(4), SQUARED)
        np.testing.assert_allclose(theta[i], personal_theta(one, model, 2)[0], atol=1e-12)


def test_the_penalty_with_the_least_error_is_chosen():
    """The validation score decides, among the penalties offered."""
    _, users = cohort()
    seen = []

    def score(theta):
        seen.append(theta)
        return abs(float(np.abs(theta).sum()) - 3.0)

    chosen = choose_penalty(users, score, np.zeros(4))
    assert len(seen) == len(PENALTIES)
    scores = {penalty: abs(float(np.abs(ridge(users, np.zeros(4), penalty)).sum()) - 3.0) for penalty in PENALTIES}
    assert chosen == min(scores, key=lambda penalty: scores[penalty])


def test_validation_is_another_split_than_the_held_out_part():
    """A fifth of the training examples by rule, the same users, disjoint from what is trained on."""
    population, _, _ = draw_population(users=50, examples=20, dimension=3, rank=1, sparsity=0)
    fit, validation = validation_split(population, 0)
    assert fit.users == validation.users == population.users
    assert fit.num_examples + validation.num_examples == population.num_examples
    assert 0.1 < validation.num_examples / population.num_examples < 0.3
    assert set(fit.key.tolist()).isdisjoint(validation.key.tolist())


def synthetic(family="squared", **options):
    defaults = {"users": 400, "examples": 20, "dimension": 8, "rank": 2, "sparsity": 0, "noise": 0.3, "seed": 1}
    return draw_population(**{**defaults, **options}, family=family)


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_the_global_model_finds_what_users_share(family):
    """Without noise and without differences between users the mean parameters come out."""
    population, schema, truth = synthetic(family, U_scale=0.0, beta_scale=1.0, examples=30)
    found = private_global(users_of(population, schema, FAMILIES[family]), PLAIN)
    assert np.linalg.norm(found - truth.beta) < (0.03 if family == "squared" else 0.15)


def test_a_trained_model_beats_its_own_start_and_everybody_alone():
    """On a planted low-rank population the released prior helps held-out error, noiseless and at epsilon about 2."""
    population, schema, _ = synthetic(users=600)
    train, test = validation_split(population, 3)
    users = users_of(train, schema, SQUARED)
    alone = held_out_error(ridge(users, np.zeros(8), 1.0), test, train, SQUARED).error()
    for mechanism in (PLAIN, Mechanism(noise_multiplier="7.05", rounds=10, noise=SystemNoise)):
        trained = train_model(users, rank=2, sparsity=0, mechanism=mechanism, rng=np.random.default_rng(0))
        ours = held_out_error(personal_theta(users, trained, 0), test, train, SQUARED).error()
        assert ours is not None
        assert alone is not None
        assert ours < 0.97 * alone


def test_baselines_release_with_the_noise_they_are_given(monkeypatch):
    """Each round is one release with the mechanism's noise, for our own training and for the global model."""
    population, schema, _ = synthetic(users=60)
    users = users_of(population, schema, SQUARED)
    releases = []
    real = umbel.baselines.release

    def recorded(totals, **options):
        releases.append(options)
        return real(totals, **options)

    monkeypatch.setattr(umbel.baselines, "release", recorded)
    mechanism = Mechanism(noise_multiplier="3.5", rounds=4, noise=SystemNoise)
    train_model(users, rank=2, sparsity=1, mechanism=mechanism, rng=np.random.default_rng(0))
    private_global(users, mechanism)
    assert len(releases) == 8
    assert {release["noise_multiplier"] for release in releases} == {"3.5"}
    assert {release["size"] for release in releases} == {contribution_layout(8, 2, private=True).size, 9}
    assert {release["grid_scale"] for release in releases} == {2**16}
    assert len({id(release["source"]) for release in releases}) == 8


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_users_without_usable_examples_do_not_move_the_global_model(family):
    """NaN rows and empty users are zeros in its sum too, and the denominator stays."""
    people, _ = cohort(family, counts=(10, 20, 0))
    bad = replace(people[0], X=np.full((10, 4), np.nan))
    empty = replace(people[0], X=np.zeros((0, 4)), y=np.zeros(0), weight=np.zeros(0))
    schema = schema_of(4, bound=10.0, target_range=(-20.0, 20.0) if family == "squared" else (0.0, 1.0))
    found = [
        private_global(users_of(population_of([one, *people[1:]]), schema, FAMILIES[family]), PLAIN)
        for one in (bad, empty)
    ]
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_a_private_mean_is_the_mean_of_clipped_vectors():
    """Without noise, over all users: those without examples or finite numbers add zeros and stay in the denominator."""
    _, users = cohort(counts=(0, 1, 3, 20, 40, 7))
    vectors = np.array([[9.0, 9.0], [3.0, 4.0], [0.3, 0.4], [np.nan, 1.0], [0.0, -2.0], [-0.5, 0.0]])
    place = {0: 0, 1: 1, 3: 2, 20: 3, 40: 4, 7: 5}

    def of(batch):
        return vectors[[place[int(count)] for count in batch.count]]

    mean = private_mean(users, of, size=2, clipping_norm=1.0, mechanism=PLAIN)
    clipped = np.array([[0.6, 0.8], [0.3, 0.4], [0.0, -1.0], [-0.5, 0.0]])
    np.testing.assert_allclose(mean.value, clipped.sum(axis=0) / 6, atol=1e-8)
    assert mean.noise_stddev == 0
    # bits: two within C, three not (NaN is not), one absent
    assert mean.next_clipping_norm == pytest.approx(np.exp(-0.5 * (2 * 0.5 - 3 * 0.5) / 6), rel=1e-6)


def test_a_private_mean_says_how_much_noise_it_has():
    """Of zeros the mean is noise of the declared standard deviation, and no signal; false failures 1e-6."""
    population, schema, _ = synthetic(users=40, dimension=2)
    users = users_of(population, schema, SQUARED)
    mechanism = Mechanism(noise_multiplier="3.5", rounds=1, noise=SystemNoise)
    size = 4000
    mean = private_mean(
        users, lambda batch: np.zeros((len(batch.count), size)), size=size, clipping_norm=7.0, mechanism=mechanism
    )
    assert mean.noise_stddev == pytest.approx(3.5 * 7.0 / (np.sqrt(0.96) * 40), rel=1e-6)
    energy = float((mean.value**2).sum()) / mean.noise_stddev**2  # chi-square of 4000 degrees of freedom
    assert abs(energy - size) < 5 * np.sqrt(2 * size)
    assert mean.signal_share < 0.11
    assert mean.next_clipping_norm == 7.0  # 40 users are too few for a bit under this noise


def test_signal_share_is_what_noise_does_not_explain():
    """One without noise, zero where the noise is as large as what came out, or nothing did."""
    value = np.array([3.0, 4.0])
    shares = [
        PrivateMean(value=value * scale, noise_stddev=stddev, next_clipping_norm=1.0).signal_share
        for scale, stddev in ((1, 0.0), (1, np.sqrt(5.0)), (1, 10.0), (0, 1.0))
    ]
    assert shares == pytest.approx([1.0, 0.6, 0.0, 0.0])


def test_momentum_keeps_what_is_signal_and_slows_down_for_noise():
    """The steps of server.rounds: velocity halves times the signal, the step size falls faster without signal."""
    start = Momentum(velocity=np.array([2.0]))
    clear, drowned = start.push(np.array([1.0]), 1.0), start.push(np.array([1.0]), 0.0)
    assert (clear.velocity[0], clear.elapsed) == (2.0, 0.2)
    assert (drowned.velocity[0], drowned.elapsed) == (1.0, 1.0)
    assert clear.step[0] == pytest.approx(2.0 / 1.1)
    assert drowned.step[0] == pytest.approx(1.0 / 1.5)


def test_the_feature_metric_whitens_the_public_moment():
    """x'M has second moment I for features of the regularized moment; logistic curvature is a quarter of it."""
    population, schema, _ = synthetic()
    schema = replace(schema, feature_second_moment=np.diag(np.arange(1.0, 9.0)))
    metric = feature_metric(users_of(population, schema, SQUARED))
    S = regularized_moment(schema.feature_second_moment)
    np.testing.assert_allclose(metric.T @ S @ metric, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(feature_metric(users_of(population, schema, LOGISTIC)), 2 * metric)


def test_shards_can_be_asked_for():
    """One shard where the caller has processes of its own."""
    people, _ = cohort()
    assert len(users_of(population_of(people), schema_of(4), SQUARED, shards=1).shards) == 1
    assert len(users_of(population_of(people), schema_of(4), SQUARED, shards=3).shards) == 3
