"""Agreement with LinkedIn's lambda-learner 0.1.0 on the same batches, and where it is wrong."""

from typing import Any

import numpy as np
import pytest
from linkedin.learner.ds.indexed_dataset import IndexedDataset
from linkedin.learner.ds.indexed_model import IndexedModel
from linkedin.learner.prediction import trainer_lbgfs
from linkedin.learner.prediction.hessian_type import HessianType
from linkedin.learner.prediction.linear_scorer import score_linear_model
from linkedin.learner.prediction.trainer_sequential_bayesian_logistic_loss_with_l2 import (
    TrainerSequentialBayesianLogisticLossWithL2,
)
from linkedin.learner.prediction.trainer_square_loss_with_l2 import TrainerSquareLossWithL2
from scipy import sparse

from client.incremental import Examples, Posterior, fresh, thompson_scores, update
from common.families import FAMILIES

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]


@pytest.fixture(autouse=True)
def tight(monkeypatch):
    """Its search to the end: `train` takes a `gradient_tolerance` and does not pass it on, so it stops at 1e-5.

    Nor is `disp` passed on, which scipy no longer wants.
    """
    search = trainer_lbgfs.fmin_l_bfgs_b

    def thorough(*arguments: Any, disp: int, **options: Any) -> Any:
        return search(*arguments, pgtol=1e-8, **options)

    monkeypatch.setattr(trainer_lbgfs, "fmin_l_bfgs_b", thorough)


def draw(seed: int, n: int, m: int, p: int) -> Examples:
    """Examples of n entities, unweighted since the package's Hessian ignores weights."""
    rng = np.random.default_rng(seed)
    X, offset = rng.standard_normal((n, m, p)), 0.5 * rng.standard_normal((n, m))
    X[:, :, 0] = 1
    eta = X.sum(axis=2) * 0.4 + offset
    return Examples(X=X, y=1.0 * (rng.random((n, m)) < 1 / (1 + np.exp(-eta))), weight=np.ones((n, m)), offset=offset)


def trainer(posterior: Posterior, examples: Examples, i: int, **options) -> TrainerSequentialBayesianLogisticLossWithL2:
    """The package's trainer for one entity; its labels are -1 and 1."""
    data = IndexedDataset(
        sparse.csr_matrix(examples.X[i]), 2 * examples.y[i] - 1, examples.weight[i], examples.offset[i]
    )
    model = IndexedModel(posterior.mean[i], sparse.csr_matrix(posterior.full_precision[i]))
    return TrainerSequentialBayesianLogisticLossWithL2(training_data=data, initial_model=model, **options)


@pytest.mark.parametrize("forgetting", [0.0, 0.5, 0.8, 1.0])
def test_lambda_learner_full_hessian(forgetting):
    """Over a stream of batches theta agrees to 1e-6 and H to 1e-8 of their size, each batch from the same past."""
    n, p, penalty = 6, 5, 2.0
    posterior = fresh(n, p, penalty, like=np.zeros(1))
    for t in range(5):
        examples = draw(t, n, (3, 20, 1, 50, 8)[t], p)
        found = update(posterior, examples, family=LOGISTIC, forgetting=forgetting, prior_precision=penalty)
        assert found.converged.all()
        for i in range(n):
            options = {"hessian_type": HessianType.FULL, "penalty": penalty, "delta": forgetting}
            theirs, _, _ = trainer(posterior, examples, i, **options).train(precision=10.0, gradient_tolerance=1e-8)
            theta, H = found.posterior.mean[i], found.posterior.precision[i]
            np.testing.assert_allclose(theta, theirs.theta, rtol=0, atol=1e-6 * np.abs(theta).max())
            # its Hessian at our theta, so that only the formula is compared
            package = trainer(posterior, examples, i, **options)._update_full_hessian(theta)
            np.testing.assert_allclose(H, package.toarray(), rtol=0, atol=1e-8 * np.abs(H).max())
        posterior = found.posterior


def test_lambda_learner_diagonal():
    """Its DIAGONAL is our diagonal-simple, also as the past of the next batch."""
    n, p, penalty = 4, 5, 2.0
    posterior = fresh(n, p, penalty, like=np.zeros(1), curvature="diagonal-simple")
    for t in range(3):
        examples = draw(10 + t, n, 20, p)
        found = update(
            posterior,
            examples,
            family=LOGISTIC,
            forgetting=0.8,
            prior_precision=penalty,
            curvature="diagonal-simple",
        ).posterior
        for i in range(n):
            options = {"hessian_type": HessianType.DIAGONAL, "penalty": penalty, "delta": 0.8}
            theirs, _, _ = trainer(posterior, examples, i, **options).train(precision=10.0)
            np.testing.assert_allclose(found.mean[i], theirs.theta, rtol=0, atol=1e-6 * np.abs(found.mean[i]).max())
            np.testing.assert_allclose(found.precision[i], theirs.hessian.diagonal(), rtol=1e-5)
        posterior = found


def test_lambda_learner_weights_in_theta():
    """Its theta takes weights into account as ours does."""
    examples = draw(20, 3, 15, 4)
    weighted = Examples(X=examples.X, y=examples.y, weight=examples.weight * 3, offset=examples.offset)
    prior = fresh(3, 4, 1.0, like=examples.X)
    found = update(prior, weighted, family=LOGISTIC, forgetting=1.0, prior_precision=1.0)
    for i in range(3):
        theirs, _, _ = trainer(prior, weighted, i, penalty=1.0, delta=1.0).train(precision=10.0)
        np.testing.assert_allclose(found.posterior.mean[i], theirs.theta, rtol=0, atol=1e-6)


def test_lambda_learner_ignores_weights_in_the_hessian():
    """At weight 3 its curvature is that of weight 1; ours is the second derivative of its own loss."""
    examples = draw(21, 1, 600, 1)
    weighted = Examples(X=examples.X, y=examples.y, weight=examples.weight * 3, offset=examples.offset)
    prior = fresh(1, 1, 1.0, like=examples.X)
    found = update(prior, weighted, family=LOGISTIC, forgetting=1.0, prior_precision=1.0).posterior
    theirs = trainer(prior, weighted, 0, penalty=1.0, delta=1.0)
    theta, h = found.mean[0], 1e-4
    second = (theirs.loss(theta + h) - 2 * theirs.loss(theta) + theirs.loss(theta - h)) / h**2
    assert found.precision[0, 0, 0] == pytest.approx(second, rel=1e-5)
    ours, its = found.precision[0, 0, 0] - 1, theirs._update_full_hessian(theta).toarray()[0, 0] - 1
    assert ours == pytest.approx(3 * its, rel=1e-10)


@pytest.mark.filterwarnings("ignore:overflow")
def test_lambda_learner_overflows():
    """At margin -1000 its loss is infinite; ours ends where the gradient is zero."""
    examples = Examples(X=np.ones((1, 1, 1)), y=np.ones((1, 1)), weight=np.ones((1, 1)), offset=np.full((1, 1), -1e3))
    prior = fresh(1, 1, 1.0, like=examples.X)
    assert trainer(prior, examples, 0, penalty=1.0, delta=1.0).loss(np.zeros(1)) == np.inf
    found = update(prior, examples, family=LOGISTIC, forgetting=1.0, prior_precision=1.0)
    assert found.converged.all()
    assert found.posterior.mean[0, 0] == pytest.approx(1.0, rel=1e-12)  # theta = y - p = 1


def test_lambda_learner_samples_with_precision_for_variance():
    """Its Thompson scores spread more the more is known, by the precision; ours by the variance."""
    draws, precision = 4000, np.array([100.0, 0.25])
    X = np.eye(2)
    model = IndexedModel(np.zeros(2), sparse.diags(precision).tocsc())
    data = IndexedDataset(sparse.csr_matrix(X), np.ones(2), np.ones(2), np.zeros(2))
    np.random.seed(0)  # the package draws from the global generator
    theirs = np.array([score_linear_model(model, data, exploration_threshold=1.0) for _ in range(draws)])
    posterior = Posterior(mean=np.zeros((draws, 2)), precision=np.tile(precision, (draws, 1)))
    z = np.random.default_rng(0).standard_normal((draws, 2))
    ours = thompson_scores(posterior, np.broadcast_to(X, (draws, 2, 2)), z)
    # relative standard deviation of a variance of 4,000 draws: 2.2 %; false alarms by seed: none
    np.testing.assert_allclose(theirs.var(axis=0), precision, rtol=0.12)
    np.testing.assert_allclose(ours.var(axis=0), 1 / precision, rtol=0.12)


def test_lambda_learner_squared_loss():
    """The first batch of squared loss is its ridge solution and Hessian."""
    rng = np.random.default_rng(3)
    X, y, offset = rng.standard_normal((1, 12, 4)), rng.standard_normal((1, 12)), rng.standard_normal((1, 12))
    examples = Examples(X=X, y=y, weight=np.ones((1, 12)), offset=offset)
    prior = fresh(1, 4, 2.0, like=X)
    found = update(prior, examples, family=SQUARED, forgetting=1.0, prior_precision=2.0).posterior
    theirs, _, _ = TrainerSquareLossWithL2(
        training_data=IndexedDataset(sparse.csr_matrix(X[0]), y[0], np.ones(12), offset[0]),
        initial_model=IndexedModel(np.zeros(4), sparse.csr_matrix(2 * np.eye(4))),
        penalty=2.0,
    ).train(precision=10.0)
    np.testing.assert_allclose(found.mean[0], theirs.theta, rtol=0, atol=1e-6 * np.abs(found.mean).max())
