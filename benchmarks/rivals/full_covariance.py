"""The ceiling without privacy: empirical Bayes with a full covariance, theta_i ~ N(mu, Sigma).

Morris, "Parametric empirical Bayes inference" (JASA 1983); fitted by EM as the random-effects model of Laird and Ware,
"Random-effects models for longitudinal data" (Biometrics 1982): mu, Sigma and the noise variance from the posteriors of
all users, d + d (d + 1) / 2 + 1 shared numbers. Nothing here is released: there is no cell of it with privacy.
How many EM steps, which is early stopping, is chosen on the validation part.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.rivals.rival import Budget, Rival, Setting
from client.batches import Batch, Design
from common.linalg import apply, apply_transposed, dot, inverse_positive, trace, transpose
from common.model import Array
from server.initialization import prior_noise_variance
from umbel.baselines import Users, feature_metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Prior:
    """theta ~ N(mean, covariance), y = x'theta + N(0, noise_variance)."""

    mean: Array
    covariance: Array
    noise_variance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """Of n users: means `n x d`, the sum of their covariances `d x d`, and E|y - X theta|^2 of each (`n`)."""

    theta: Array
    covariance: Array
    squared_error: Array


def posterior(batch: Batch, prior: Prior) -> Posterior:
    """Gaussian conditioning, in the examples where they are fewer than the features and in the features otherwise."""
    mean, S, s2 = prior.mean, prior.covariance, prior.noise_variance
    n = len(batch.count)
    if isinstance(batch, Design):
        X, y = batch.X * np.sqrt(batch.weight)[:, :, None], batch.y * np.sqrt(batch.weight)
        XS = X @ S
        # the padding's rows are s2 on the diagonal
        K = inverse_positive(XS @ transpose(X) + s2 * np.eye(X.shape[1]))
        alpha = apply(K, y - X @ mean)
        theta = mean + apply_transposed(XS, alpha)
        lowered = (transpose(XS) @ (K @ XS)).sum(axis=0)
        # X Cov X' = s2 (I - s2 K), and y - X theta = s2 alpha
        spread = s2 * (X.shape[1] - s2 * trace(K))
        return Posterior(theta=theta, covariance=n * S - lowered, squared_error=s2**2 * dot(alpha, alpha) + spread)
    G = batch.products(np.eye(len(mean)))
    covariance = inverse_positive(G / s2 + np.linalg.inv(S))
    theta = mean + apply(covariance, batch.cross - apply(G, np.broadcast_to(mean, (n, len(mean))))) / s2
    residual = batch.square - 2 * dot(theta, batch.cross) + dot(theta, apply(G, theta))
    spread = (G * covariance).sum(axis=(1, 2))
    return Posterior(theta=theta, covariance=covariance.sum(axis=0), squared_error=residual + spread)


def train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> Prior:
    """EM from a broad prior.

    Raises:
        ValueError: If asked to be private.
    """
    if budget.epsilon is not None:
        raise ValueError(f"Expected epsilon None for a ceiling without privacy, got epsilon={budget.epsilon}.")
    metric, target_range = feature_metric(users), users.shards[0].schema.target_range
    d, s2 = len(metric), prior_noise_variance(target_range, "squared")
    prior = Prior(mean=np.zeros(d), covariance=0.2 * s2 / d * metric @ metric.T, noise_variance=s2)
    for _ in range(setting["em_steps"]):
        prior = _em_step(users, prior)
    return prior


def _em_step(users: Users, prior: Prior) -> Prior:
    d = len(prior.mean)
    people, examples, first, squared_error = 0, 0.0, np.zeros(d), 0.0
    second = np.zeros((d, d))
    for shard in users.shards:
        for _, batch in shard.batches():
            with_examples = batch.count > 0
            if not with_examples.any():
                continue
            found = posterior(batch, prior)
            people += len(batch.count)
            examples += float(batch.count.sum())
            difference = found.theta - prior.mean
            first += difference.sum(axis=0)
            second += found.covariance + difference.T @ difference
            squared_error += float(found.squared_error.sum())
    shift = first / people
    return Prior(
        mean=prior.mean + shift,
        covariance=second / people - np.outer(shift, shift),
        noise_variance=squared_error / examples,
    )


RIVAL = Rival(
    key="full_covariance",
    settings=lambda dimension: [{"em_steps": steps} for steps in (30, 10, 60)],
    train=train,
    local_settings=({},),
    personal=lambda users, prior, setting, local: users.theta(lambda batch: posterior(batch, prior).theta),
    personal_numbers=lambda dimension, setting: dimension,
    is_released=False,
)
