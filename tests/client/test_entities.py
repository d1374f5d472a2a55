"""Entities with features of their own: union, alignment, and several types acting on each other by offsets."""

import numpy as np
import pytest
from scipy.special import expit

from client.entities import columns_of, counts, realigned, union
from client.incremental import Examples, Posterior, fresh, score, update
from common.families import FAMILIES

LOGISTIC = FAMILIES["logistic"]


def test_union_of_features():
    """Those of both, ascending, each once, and -1 after them."""
    old = np.array([[7, 2, -1], [-1, -1, -1]])
    new = np.array([[2, 9, 9, -1], [3, -1, 3, 0]])
    found = union(old, new, 5)
    assert found.tolist() == [[2, 7, 9, -1, -1], [0, 3, -1, -1, -1]]
    assert counts(found).tolist() == [3, 2]
    assert union(old, new, 9)[0].tolist() == [2, 7, 9] + [-1] * 6
    assert columns_of(found, new).tolist() == [[0, 2, 2, -1], [1, -1, 1, 0]]


def test_more_features_than_fit():
    """An error, not a feature lost."""
    with pytest.raises(ValueError, match="at most width=2"):
        union(np.array([[1, 2]]), np.array([[3]]), 2)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_new_feature_starts_at_the_prior(diagonal):
    """It has mean 0 and precision lambda, uncorrelated; known ones move with all they have."""
    H = np.array([[[4.0, 1.0], [1.0, 3.0]]])
    prior = Posterior(mean=np.array([[0.5, -1.5]]), precision=H[:, [0, 1], [0, 1]] if diagonal else H)
    moved = realigned(prior, np.array([[20, 10]]), np.array([[10, 15, 20, -1]]), prior_precision=7.0)
    assert moved.mean.tolist() == [[-1.5, 0.0, 0.5, 0.0]]
    expected = np.array([[3.0, 0, 1, 0], [0, 7, 0, 0], [1, 0, 4, 0], [0, 0, 0, 7]])
    assert moved.precision[0].tolist() == (np.diag(expected) if diagonal else expected).tolist()


def test_an_entity_without_features_yet():
    """A new entity is all prior."""
    prior = fresh(1, 0, 2.0, like=np.zeros(1))
    moved = realigned(prior, np.zeros((1, 0), np.int64), np.array([[4, 5]]), prior_precision=2.0)
    assert moved.mean.tolist() == [[0, 0]]
    assert moved.precision.tolist() == [[[2, 0], [0, 2]]]


def test_features_that_come_and_stay_away_are_one_large_model():
    """Updating over the union equals updating over all features ever, and an absent feature is kept."""
    rng = np.random.default_rng(0)
    d, lam, delta = 6, 1.5, 0.8
    batches = [[0, 1, 2], [0, 2, 4], [0, 5]]
    everything, mine = fresh(1, d, lam, like=np.zeros(1)), fresh(1, 0, lam, like=np.zeros(1))
    features = np.zeros((1, 0), np.int64)
    options = {"family": LOGISTIC, "forgetting": delta, "prior_precision": lam}
    for batch in batches:
        X = np.zeros((1, 10, d))
        X[:, :, batch] = rng.standard_normal((1, 10, len(batch)))
        y, ones = 1.0 * (rng.random((1, 10)) < 0.5), np.ones((1, 10))
        everything = update(everything, Examples(X=X, y=y, weight=ones, offset=0 * ones), **options).posterior
        wanted = union(features, np.array([batch]), 8)
        prior = realigned(mine, features, wanted, prior_precision=lam)
        own = np.where(wanted[:, None, :] >= 0, X[:, :, np.maximum(wanted[0], 0)], 0.0)
        mine = update(prior, Examples(X=own, y=y, weight=ones, offset=0 * ones), **options).posterior
        features = wanted
    used = features[0][features[0] >= 0]
    assert used.tolist() == [0, 1, 2, 4, 5]
    np.testing.assert_allclose(mine.mean[0, : len(used)], everything.mean[0, used], rtol=1e-9)
    got = mine.precision[0, : len(used), : len(used)]
    np.testing.assert_allclose(got, everything.precision[0][np.ix_(used, used)], rtol=1e-9, atol=1e-12)
    assert not mine.mean[0, len(used) :].any()


def test_entity_types_act_by_offsets():
    """Users and items in turn, each with the others' scores as offset, reach the joint optimum."""
    rng = np.random.default_rng(1)
    users, items, lam = 6, 5, 1.0
    fixed = rng.standard_normal((users, items))
    eta = fixed + rng.standard_normal((users, 1)) + rng.standard_normal((1, items))
    y = 1.0 * (rng.random((users, items)) < expit(eta))
    user, item = fresh(users, 1, lam, like=y), fresh(items, 1, lam, like=y)
    start = user, item
    options = {"family": LOGISTIC, "forgetting": 1.0, "prior_precision": lam}
    intercept = np.ones((users, items, 1))
    for _ in range(40):
        offset = fixed + score(item, intercept.transpose(1, 0, 2)).T
        user = update(start[0], Examples(X=intercept, y=y, weight=0 * y + 1, offset=offset), **options).posterior
        offset = (fixed + score(user, intercept)).T
        transposed = intercept.transpose(1, 0, 2)
        item = update(start[1], Examples(X=transposed, y=y.T, weight=0 * y.T + 1, offset=offset), **options).posterior
    residual = y - expit(fixed + user.mean + item.mean.T)
    np.testing.assert_allclose(lam * user.mean[:, 0], residual.sum(axis=1), atol=1e-8)
    np.testing.assert_allclose(lam * item.mean[:, 0], residual.sum(axis=0), atol=1e-8)
