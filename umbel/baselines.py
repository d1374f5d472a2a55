"""What a simulation is compared with, on the same split and the same budget; all of it evaluation, none released.

The private ones spend the same (epsilon, delta) with the same mechanism, so that only the algorithm differs.
Penalties are chosen on a validation part of the training examples, by the same rule for every baseline.
"""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from client.batches import Batch, Design
from client.personalize import personalize
from client.shard import Shard, total_contribution
from common.data import DataSchema, Population, partition, split
from common.families import Family
from common.linalg import apply, transpose
from common.model import Array, IntArray, SharedModel
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.entropy import NoiseSource
from privacy.layout import Group, Layout, clip_to_ball, grid_scale_for, scalars_to_ball, split_groups, to_grid
from privacy.mechanism import release
from server.initialization import initial_model, prior_noise_variance, regularized_moment
from server.layout import contribution_layout
from server.rounds import CLIPPING_BOUNDS, ServerState, apply_round, initial_state, public_metric

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 50.0, 100.0)
"""Ridge penalties tried on the validation part."""
_VALIDATION_SEED_OFFSET = 1_000_003
_VALIDATION_FRACTION = 0.2
_RIDGE_STEPS = 8
_BIT_SHARE = 0.2
_STEP_DECAY = 0.5
_MOMENTUM = 0.5
_LEAST_PROGRESS = 0.2


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """How the releases of a baseline are made.

    Attributes:
        noise_multiplier: z as a decimal string; "0" without noise.
        rounds: How many releases.
        noise: A source of noise for each release.
    """

    noise_multiplier: str
    rounds: int
    noise: Callable[[], NoiseSource]

    @property
    def z(self) -> float:
        """The noise multiplier as a number."""
        return float(self.noise_multiplier)


@dataclass(frozen=True, kw_only=True, eq=False)
class Users:
    """A population cut into shards that are worked on in parallel.

    Attributes:
        shards: Blocks of users, in order.
        starts: Index of each shard's first user.
        num_users: n.
    """

    shards: tuple[Shard, ...]
    starts: tuple[int, ...]
    num_users: int

    def map(self, task: Callable[[Shard], IntArray]) -> list[IntArray]:
        """`task` of every shard, in order."""
        with ThreadPoolExecutor(len(self.shards)) as pool:
            return list(pool.map(task, self.shards))

    def theta(self, task: Callable[[Batch], Array]) -> Array:
        """`n x d` parameters of all users, batch by batch."""
        result = np.empty((self.num_users, self.shards[0].schema.dimension))

        def fill(place: tuple[int, Shard]) -> None:
            start, shard = place
            with np.errstate(all="ignore"):
                for chunk, batch in shard.batches():
                    result[start + chunk.users] = task(batch)

        with ThreadPoolExecutor(len(self.shards)) as pool:
            list(pool.map(fill, zip(self.starts, self.shards, strict=True)))
        return result


def users_of(population: Population, schema: DataSchema, family: Family) -> Users:
    """Cut a population into one shard a core."""
    count = min(os.cpu_count() or 1, population.num_users)
    parts = [partition(population, count, index) for index in range(count)]
    sizes = np.cumsum([0, *(part.num_users for part in parts)])
    return Users(
        shards=tuple(Shard(part, schema, family) for part in parts),
        starts=tuple(int(start) for start in sizes[:-1]),
        num_users=population.num_users,
    )


def train_model(
    users: Users, *, rank: int, sparsity: int, mechanism: Mechanism, rng: np.random.Generator
) -> SharedModel:
    """The same training as `server.training`, without messages, ledger and devices.

    Args:
        users: Who trains.
        rank: Columns of U.
        sparsity: Cap on nonzeros of b.
        mechanism: Noise and rounds.
        rng: Breaks ties in the initial U.
    """
    shard = users.shards[0]
    schema, family = shard.schema, shard.family
    moment = schema.feature_second_moment
    start = initial_model(moment, rank, prior_noise_variance(schema.target_range, family.name), rng)
    state = initial_state(start, regularized_moment(moment), None)
    layout = contribution_layout(schema.dimension, rank, private=mechanism.z > 0)
    for _ in range(mechanism.rounds):
        metric = public_metric(state, family.name)

        def node_total(part: Shard, state: ServerState = state, metric: Array = metric) -> IntArray:
            return total_contribution(
                part,
                state.model,
                metric,
                sparsity=sparsity,
                clipping_norm=state.clipping_norm,
                layout=layout,
                admitted=np.ones(part.population.num_users, np.bool_),
            )

        noised = _release(users.map(node_total), layout, mechanism)
        state = apply_round(
            state,
            noised,
            layout=layout,
            clipping_norm=state.clipping_norm,
            noise_multiplier=mechanism.z,
            denominator=users.num_users,
            adapt_clipping=True,
            family=family.name,
            sparsity=sparsity,
        )
    return state.model


def personal_theta(users: Users, model: SharedModel, sparsity: int) -> Array:
    """`n x d`, every user's parameters under a released model."""
    family = users.shards[0].family
    return users.theta(lambda batch: personalize(batch, model, family=family, sparsity=sparsity).theta)


def private_global(users: Users, mechanism: Mechanism) -> Array:
    """`d`, one linear model for all, every user weighing the same whatever the number of examples.

    DP gradient descent on the average over users of the mean loss, preconditioned by the public second moment of
    the features, with the clipping, grid, noise, step sizes and momentum that umbel itself uses.
    """
    shard = users.shards[0]
    family, schema = shard.family, shard.schema
    d = schema.dimension
    layout = Layout(
        groups=(
            Group(name="model", size=d, share=math.sqrt(1 - _BIT_SHARE**2) - 1e-9),
            Group(name="scalars", size=1, share=_BIT_SHARE),
        ),
        grid_scale=grid_scale_for(d, private=mechanism.z > 0),
    )
    metric = np.linalg.cholesky(np.linalg.inv(regularized_moment(schema.feature_second_moment)))
    if family.name == "logistic":
        metric = 2 * metric  # the curvature is at most a quarter
    beta, velocity, elapsed, clipping_norm = np.zeros(d), np.zeros(d), 0.0, 0.5 * math.sqrt(d)
    for _ in range(mechanism.rounds):

        def node_total(part: Shard, beta: Array = beta, clipping_norm: float = clipping_norm) -> IntArray:
            total = np.zeros(layout.size, np.int64)
            for _, batch in part.batches():
                gradient = _loss_gradient(batch, beta, family) / np.maximum(batch.count, 1)[:, None]
                unit, within = clip_to_ball(gradient @ metric, clipping_norm)
                bit = scalars_to_ball((within.astype(np.float64) - 0.5)[:, None])
                grid = to_grid((unit, bit), layout)
                total += (batch.count > 0) @ grid
            return total

        mean, bit_mean = split_groups(_release(users.map(node_total), layout, mechanism), layout, users.num_users)
        step_direction = clipping_norm * mean
        energy = float((step_direction**2).sum())
        noise_stddev = mechanism.z * clipping_norm / (layout.groups[0].share * users.num_users)
        signal = max(0.0, 1 - d * noise_stddev**2 / energy) if energy > 0 else 0.0
        elapsed += max(1 - signal, _LEAST_PROGRESS)
        velocity = _MOMENTUM * signal * velocity + metric @ step_direction
        beta = beta + velocity / (1 + _STEP_DECAY * elapsed)
        if may_adapt(users.num_users, mechanism.z):
            clipping_norm = next_clipping_norm(clipping_norm, float(bit_mean[0]) / 2, bounds=CLIPPING_BOUNDS)
    return beta


def ridge(users: Users, center: Array, penalty: float) -> Array:
    """`n x d`, each user's argmin of its loss sum (times 1, in the family's own units) + penalty |theta - center|^2.

    Exact for squared loss; Newton's method with a fixed number of steps otherwise.
    """
    family = users.shards[0].family
    d = len(center)
    eye = np.eye(d)

    def solve(batch: Batch) -> Array:
        theta = np.broadcast_to(center, (len(batch.count), d))
        for _ in range(1 if family.name == "squared" else _RIDGE_STEPS):
            gradient = _loss_gradient(batch, theta, family) - penalty * (theta - center)
            theta = (
                theta + np.linalg.solve(_hessian(batch, theta, family) + penalty * eye, gradient[:, :, None])[:, :, 0]
            )
        return theta

    return users.theta(solve)


def choose_penalty(
    fit: Users, score: Callable[[Array], float], center: Array, penalties: Iterable[float] = PENALTIES
) -> float:
    """The penalty with the least error on the validation part, among users trained on the rest."""
    return min(penalties, key=lambda penalty: score(ridge(fit, center, penalty)))


def validation_split(train: Population, split_seed: int) -> tuple[Population, Population]:
    """A part of the training examples to choose penalties on, by the same rule as the held-out part."""
    return split(train, split_seed + _VALIDATION_SEED_OFFSET, _VALIDATION_FRACTION)


def _release(totals: list[IntArray], layout: Layout, mechanism: Mechanism) -> IntArray:
    return release(
        totals,
        size=layout.size,
        noise_multiplier=mechanism.noise_multiplier,
        grid_scale=layout.grid_scale,
        source=mechanism.noise(),
    )


def _loss_gradient(batch: Batch, theta: Array, family: Family) -> Array:
    """`n x d`, X'(y - mean), minus the gradient of the negative log likelihood at noise variance 1."""
    rows = np.broadcast_to(theta, (len(batch.count), theta.shape[-1]))
    if family.name == "squared":
        return np.asarray(batch.cross - batch.products(rows[:, None, :])[:, 0, :])
    if not isinstance(batch, Design):
        raise TypeError("Expected a Design for a family other than squared.")
    residual = batch.weight * family.residual(apply(batch.X, rows), batch.y)
    return np.asarray((residual[:, None, :] @ batch.X)[:, 0, :])


def _hessian(batch: Batch, theta: Array, family: Family) -> Array:
    """`n x d x d`."""
    if isinstance(batch, Design):
        curvature = batch.weight * family.curvature(apply(batch.X, np.asarray(theta)))
        return np.asarray(transpose(batch.X) @ (curvature[:, :, None] * batch.X))
    return np.asarray(batch.products(np.eye(theta.shape[-1])))
