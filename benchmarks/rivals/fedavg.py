"""DP-FedAvg: one global model; and the same with local fine-tuning.

McMahan, Ramage, Talwar and Zhang, "Learning differentially private recurrent language models" (ICLR 2018,
arXiv:1710.06963), with the adaptive clipping of Andrew et al. (arXiv:1905.03871) and server momentum (FedAvgM, Hsu et
al., arXiv:1909.06335). Fine-tuning: Yu, Bagdasaryan and Shmatikov, "Salvaging federated learning by local adaptation"
(arXiv:2002.04758).

Simplified: full participation; users weigh the same; local work is full-batch steepest descent with exact line
searches instead of stochastic gradients, which needs no local learning rate (0 local steps are DP-FedSGD); all in the
metric of the public second moment of the features, with umbel's server steps. Fine-tuning is gradient descent on the
sum of the user's losses, as epochs of small stochastic steps amount to, in the features as they are (better on ratings
than in the metric), with a step cut where it would diverge.
"""

import math

import numpy as np

from benchmarks.rivals.rival import Budget, Rival, Setting, descend, residual_gradient
from client.batches import Batch
from common.linalg import dot
from common.model import Array
from umbel.baselines import Momentum, Users, feature_metric, private_mean

_POWER_STEPS = 8
_GRID = ((10, 0), (10, 1), (10, 4), (5, 1), (20, 0), (20, 1))
_FINE_TUNING = ((1, 0.01), (10, 0.005), (10, 0.02), (20, 0.05), (40, 0.1), (40, 1.0))


def _settings(dimension: int) -> list[Setting]:
    return [{"rounds": rounds, "local_steps": steps} for rounds, steps in _GRID]


def train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> Array:
    """`d`, the global model."""
    mechanism, steps = budget.mechanism(setting["rounds"]), setting["local_steps"]
    metric = feature_metric(users)
    d = len(metric)
    beta, momentum, clipping_norm = np.zeros(d), Momentum(velocity=np.zeros(d)), 0.5 * math.sqrt(d)
    for _ in range(mechanism.rounds):

        def update(batch: Batch, beta: Array = beta) -> Array:
            gradient = residual_gradient(batch, beta, users)
            if steps:
                return descend(batch, gradient, metric, steps)
            return np.asarray(gradient / np.maximum(batch.count, 1)[:, None] @ metric)

        mean = private_mean(users, update, size=d, clipping_norm=clipping_norm, mechanism=mechanism)
        momentum = momentum.push(metric @ mean.value, mean.signal_share)
        beta, clipping_norm = beta + momentum.step, mean.next_clipping_norm
    return beta


def fine_tune(users: Users, beta: Array, *, steps: int, learning_rate: float) -> Array:
    """`n x d`, gradient descent from beta on the sum of each user's squared losses."""

    def tune(batch: Batch) -> Array:
        theta = np.broadcast_to(beta, (len(batch.count), len(beta)))
        rate = np.minimum(learning_rate, 1 / np.maximum(_largest_curvature(batch), 1e-12))[:, None]
        for _ in range(steps):
            theta = theta + rate * (residual_gradient(batch, theta, users))
        return theta

    return users.theta(tune)


def _largest_curvature(batch: Batch) -> Array:
    """`n`, no less than half the largest eigenvalue of X'X: power iterations from its diagonal, with a margin."""
    diagonal = np.asarray(batch.diagonal)
    v, value = diagonal, np.zeros(len(diagonal))
    for _ in range(_POWER_STEPS):
        norm = np.sqrt(dot(v, v))
        v = v / np.where(norm > 0, norm, 1.0)[:, None]
        image = batch.products(v[:, None, :])[:, 0, :]
        value, v = dot(v, image), image
    return np.maximum(1.2 * value, diagonal.max(axis=1))


GLOBAL = Rival(
    key="fedavg",
    settings=_settings,
    train=train,
    local_settings=({},),
    personal=lambda users, beta, setting, local: np.broadcast_to(beta, (users.num_users, len(beta))),
    personal_numbers=lambda dimension, setting: 0,
)
FINE_TUNED = Rival(
    key="fedavg_tuned",
    settings=_settings,
    train=train,
    local_settings=tuple({"local_epochs": steps, "learning_rate": rate} for steps, rate in _FINE_TUNING),
    personal=lambda users, beta, setting, local: fine_tune(
        users, beta, steps=local["local_epochs"], learning_rate=local["learning_rate"]
    ),
    personal_numbers=lambda dimension, setting: dimension,
)
