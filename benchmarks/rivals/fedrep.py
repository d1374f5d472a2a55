"""Low rank only: theta_i = beta + U w_i by least-squares heads and gradient steps on what is shared.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting shared representations for personalized federated learning"
(ICML 2021, arXiv:2102.07078): every round each user solves for its head w with the representation U fixed, then sends
one gradient of its loss in U, and the server steps and makes U orthonormal.

Made private: the gradient is clipped per user. Simplified: heads are exact (ridge), not gradient steps. Added: a shared
beta, learned beside U from the same release; the metric of the public second moment of the features; umbel's server
steps. How large a head is, and so how long a step of U may be, is not known publicly: the variance that heads explain
is taken as a share of the range of the target, and that share is tuned.
"""

import math

import numpy as np

from benchmarks.rivals.rival import (
    Budget,
    Rival,
    Setting,
    fit_heads,
    local_penalties,
    orthonormal,
    personal_heads,
    public_directions,
)
from client.batches import Batch
from common.model import Array
from server.initialization import prior_noise_variance
from umbel.baselines import Momentum, Users, feature_metric, private_mean

_GRID = (
    # rank, penalty, share of the target's variance that heads explain, rounds
    (8, 3.0, 0.3, 10),
    (8, 3.0, 0.05, 10),
    (4, 3.0, 0.1, 10),
    (8, 3.0, 0.3, 20),
    (8, 10.0, 0.1, 5),
    (3, 3.0, 1.0, 5),
)


def _settings(dimension: int) -> list[Setting]:
    return [
        {"rank": min(rank, dimension), "penalty": penalty, "head_share": share, "rounds": rounds}
        for rank, penalty, share, rounds in _GRID
    ]


def train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> tuple[Array, Array]:
    """U (`d x r`, orthonormal) and beta."""
    mechanism, rank, metric = budget.mechanism(setting["rounds"]), setting["rank"], feature_metric(users)
    d, target_range = len(metric), users.shards[0].schema.target_range
    # a step of 1 is Newton's for E[w w'] = explained variance / r in the metric; U is learned in units of `unit`
    unit = math.sqrt(rank / (setting["head_share"] * prior_noise_variance(target_range, "squared")))
    U, beta = public_directions(users, rank, rng), np.zeros(d)
    momentum, clipping_norm = Momentum(velocity=np.zeros((rank + 1, d))), 0.5 * math.sqrt(d * rank)
    for _ in range(mechanism.rounds):

        def gradient(batch: Batch, U: Array = U, beta: Array = beta) -> Array:
            heads = fit_heads(batch, U, beta, setting["penalty"])
            own = heads.gradient / np.maximum(batch.count, 1)[:, None] @ metric
            factors = np.concatenate([unit * heads.w, np.ones((len(own), 1))], axis=1)
            return np.reshape(factors[:, :, None] * own[:, None, :], (len(own), -1))

        mean = private_mean(users, gradient, size=d * (rank + 1), clipping_norm=clipping_norm, mechanism=mechanism)
        momentum = momentum.push(mean.value.reshape(rank + 1, d), mean.signal_share)
        clipping_norm, step = mean.next_clipping_norm, momentum.step
        beta = beta + metric @ step[rank]
        U, R = orthonormal(U + unit * metric @ step[:rank].T)
        # the velocity is in the basis that the heads have now
        velocity = np.concatenate([np.linalg.solve(R.T, momentum.velocity[:rank]), momentum.velocity[rank:]])
        momentum = Momentum(velocity=velocity, elapsed=momentum.elapsed)
    return U, beta


RIVAL = Rival(
    key="fedrep",
    settings=_settings,
    train=train,
    local_settings=local_penalties(0.3, 1.0, 3.0, 6.0, 12.0, 30.0),
    personal=lambda users, shared, setting, local: personal_heads(users, shared[0], shared[1], local["local_penalty"]),
    personal_numbers=lambda dimension, setting: setting["rank"],
)
