"""CENTAUR: the noisy mean of the representation's change after a local head fit.

Shen, Ye, Kang, Hassani and Shokri, "Share your representation only: guaranteed improvement of the privacy-utility
tradeoff in federated learning" (ICLR 2023, arXiv:2309.05505): a private start from moments, then every round each user
fits its head w with the representation U fixed, improves its own copy of U locally, and sends the change of U, clipped;
the server adds noise to the mean, steps and makes U orthonormal. Heads never leave the user.

Simplified: full participation instead of sampled users; heads are exact (ridge); local steps on U are steepest descent
with exact line searches. The start takes pairs of examples together, v v' - |y|^2 I in the metric where features have
second moment I, which needs a user's X'y and |y|^2 only. Added: adaptive clipping, umbel's server steps, the metric of
the public second moment, and optionally a private mean beta from the first rounds of the budget.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.rivals.rival import (
    Budget,
    Rival,
    Setting,
    descend,
    fit_heads,
    local_penalties,
    orthonormal,
    personal_heads,
    public_directions,
)
from client.batches import Batch
from common.linalg import dot
from common.model import Array
from umbel.baselines import Mechanism, Momentum, Users, feature_metric, private_global, private_mean

_GRID = (
    # rank, penalty, local steps, rounds on the mean, start, rounds in all, server step
    (8, 3.0, 1, 3, "moments", 10, 2.0),
    (8, 3.0, 4, 3, "public", 20, 1.0),
    (4, 3.0, 1, 3, "moments", 10, 1.0),
    (8, 3.0, 1, 3, "public", 10, 0.5),
    (3, 3.0, 1, 3, "public", 6, 0.3),
    (5, 3.0, 1, 0, "moments", 6, 1.0),
)
_NAMES = ("rank", "penalty", "local_steps", "mean_rounds", "start", "rounds", "server_step")
_LEAST_HEAD = 1e-12


def _settings(dimension: int) -> list[Setting]:
    settings: list[dict[str, Any]] = [dict(zip(_NAMES, values, strict=True)) for values in _GRID]
    return [{**setting, "rank": min(setting["rank"], dimension)} for setting in settings]


def train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> tuple[Array, Array]:
    """U (`d x r`, orthonormal) and beta."""
    mechanism, rank, metric = budget.mechanism(setting["rounds"]), setting["rank"], feature_metric(users)
    d, left, beta = len(metric), setting["rounds"], np.zeros(len(metric))
    if setting["mean_rounds"]:
        beta = private_global(users, replace(mechanism, rounds=setting["mean_rounds"]))
        left -= setting["mean_rounds"]
    if setting["start"] == "moments":
        U = leading_moments(users, beta, metric, rank, mechanism)
        left -= 1
    else:
        U = public_directions(users, rank, rng)
    momentum, clipping_norm = Momentum(velocity=np.zeros((d, rank))), 0.5 * math.sqrt(rank)
    for _ in range(left):

        def change(batch: Batch, U: Array = U) -> Array:
            heads = fit_heads(batch, U, beta, setting["penalty"])
            moved = descend(batch, heads.gradient, metric, setting["local_steps"])
            # every local step on U is g w' for the same w, so that theta moves by a multiple of g
            direction = heads.w / np.maximum(dot(heads.w, heads.w), _LEAST_HEAD)[:, None]
            return np.reshape(moved[:, :, None] * direction[:, None, :], (len(moved), -1))

        mean = private_mean(users, change, size=d * rank, clipping_norm=clipping_norm, mechanism=mechanism)
        # w w' / |w|^2 is I / r on average: a step of r would be Newton's
        direction = setting["server_step"] * rank * metric @ mean.value.reshape(d, rank)
        momentum, clipping_norm = momentum.push(direction, mean.signal_share), mean.next_clipping_norm
        U, R = orthonormal(U + momentum.step)
        momentum = replace(momentum, velocity=np.asarray(np.linalg.solve(R.T, momentum.velocity.T).T))
    return U, beta


def leading_moments(users: Users, beta: Array, metric: Array, rank: int, mechanism: Mechanism) -> Array:
    """`d x r`, leading directions of one private release of the users' pair moments."""
    d = len(metric)
    upper = np.triu_indices(d)
    scale = np.where(upper[0] == upper[1], 1.0, math.sqrt(2))

    def moment(batch: Batch) -> Array:
        image = batch.products(np.broadcast_to(beta, (len(batch.count), 1, d)))[:, 0, :]
        v = (batch.cross - image) @ metric
        square = batch.square - dot(batch.cross + (batch.cross - image), np.broadcast_to(beta, image.shape))
        pairs = v[:, :, None] * v[:, None, :] - square[:, None, None] * np.eye(d)
        count = batch.count[:, None]
        return pairs[:, *upper] * scale * (count > 1) / np.maximum(count * (count - 1), 1)

    bound = 0.5 * math.sqrt(d)
    mean = private_mean(users, moment, size=len(scale), clipping_norm=bound, mechanism=mechanism)
    matrix = np.zeros((d, d))
    matrix[upper] = mean.value / scale
    _, vectors = np.linalg.eigh(matrix + np.triu(matrix, 1).T)
    return orthonormal(metric @ vectors[:, -rank:])[0]


RIVAL = Rival(
    key="centaur",
    settings=_settings,
    train=train,
    local_settings=local_penalties(0.3, 1.0, 3.0, 6.0, 12.0, 30.0),
    personal=lambda users, shared, setting, local: personal_heads(users, shared[0], shared[1], local["local_penalty"]),
    personal_numbers=lambda dimension, setting: setting["rank"],
)
