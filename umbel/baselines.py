"""What a simulation is compared with, on the same split and the same budget; all of it evaluation, none released.

The private ones spend the same (epsilon, delta) with the same mechanism, so that only the algorithm differs.
Penalties are chosen on a validation part of the training examples, by the same rule for every baseline.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from client import work
from client.batches import Batch, Design
from client.shard import Shard, total_contribution
from client.work import contribution_to, shard_for
from common.data import DataSchema, Population, partition, split
from common.families import Family
from common.linalg import apply, transpose
from common.model import Array, IntArray, SharedModel
from common.task import Task
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.entropy import NoiseSource
from privacy.layout import (
    Group,
    Layout,
    clip_to_ball,
    grid_scale_for,
    groups_of_event,
    scalars_to_ball,
    split_groups,
    to_grid,
)
from privacy.mechanism import release
from server.algorithms import Algorithm, Gradient
from server.initialization import regularized_moment
from server.layout import contribution_layout
from server.rounds import CLIPPING_BOUNDS, LEAST_PROGRESS, MOMENTUM, STEP_DECAY

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 50.0, 100.0)
"""Ridge penalties tried on the validation part."""
_VALIDATION_SEED_OFFSET = 1_000_003
_VALIDATION_FRACTION = 0.2
_RIDGE_STEPS = 8
_BIT_SHARE = 0.2


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


def users_of(population: Population, schema: DataSchema, family: Family, *, shards: int | None = None) -> Users:
    """Cut a population into so many shards, by default one a core."""
    count = min(shards or os.cpu_count() or 1, population.num_users)
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
    """The default algorithm with adaptive clipping, see `learn`.

    Args:
        users: Who trains.
        rank: Columns of U.
        sparsity: Cap on nonzeros of b.
        mechanism: Noise and rounds.
        rng: Breaks ties in the initial U.
    """
    family = users.shards[0].family.name
    algorithm = Gradient(family=family, rank=rank, sparsity=sparsity, clipping_norm=None)
    return learn(users, algorithm, mechanism=mechanism, rng=rng)


def learn(users: Users, algorithm: Algorithm, *, mechanism: Mechanism, rng: np.random.Generator) -> SharedModel:
    """The last model of `trajectory`."""
    *_, model = trajectory(users, algorithm, mechanism=mechanism, rng=rng)
    return model


def trajectory(
    users: Users, algorithm: Algorithm, *, mechanism: Mechanism, rng: np.random.Generator
) -> Iterator[SharedModel]:
    """The same training as `server.training`, without messages, ledger and devices: the model before and each round's.

    Args:
        users: Who trains.
        algorithm: How.
        mechanism: Noise and rounds.
        rng: Whatever is random at the start.
    """
    schema = users.shards[0].schema
    state = algorithm.first_state(schema, rng)
    yield state.model
    for _ in range(mechanism.rounds):
        task, rank = algorithm.task(state), state.model.rank
        layout = contribution_layout(schema.dimension, rank, private=mechanism.z > 0, work=task.work)
        contribution = contribution_to(
            task, state.model, algorithm.metric(state), clipping_norm=state.clipping_norm, layout=layout
        )

        def node_total(
            part: Shard,
            contribution: Callable[[Batch], IntArray] = contribution,
            size: int = layout.size,
            task: Task = task,
            rank: int = rank,
        ) -> IntArray:
            part = part if task.work == "gradient" else shard_for(task, part.population, part.schema, rank)
            return total_contribution(
                part, contribution, size=size, admitted=np.ones(part.population.num_users, np.bool_)
            )

        noised = released(users.map(node_total), layout, mechanism)
        event = {
            "groups": groups_of_event(layout),
            "grid_scale": layout.grid_scale,
            "clipping_norm": state.clipping_norm,
            "noise_multiplier": mechanism.noise_multiplier,
            "denominator": users.num_users,
            "initialization": task.work == "moment",
        }
        state = algorithm.step(state, noised, event)
        yield state.model


def personal_theta(users: Users, model: SharedModel, sparsity: int) -> Array:
    """`n x d`, every user's parameters under a released model of the default algorithm."""
    return theta_under(users, Task(family=users.shards[0].family.name, sparsity=sparsity), model)


def theta_under(users: Users, task: Task, model: SharedModel) -> Array:
    """`n x d`, every user's parameters under a released model, personalized as `task` says."""
    return users.theta(work.personal_theta(task, model))


def private_global(users: Users, mechanism: Mechanism) -> Array:
    """`d`, one linear model for all, every user weighing the same whatever the number of examples.

    DP gradient descent on the average over users of the mean loss, preconditioned by the public second moment of
    the features, with the clipping, grid, noise, step sizes and momentum that umbel itself uses.
    """
    shard = users.shards[0]
    family, d = shard.family, shard.schema.dimension
    metric = feature_metric(users)
    beta, momentum, clipping_norm = np.zeros(d), Momentum(velocity=np.zeros(d)), 0.5 * math.sqrt(d)
    for _ in range(mechanism.rounds):

        def gradient(batch: Batch, beta: Array = beta) -> Array:
            mean_gradient = loss_gradient(batch, beta, family) / np.maximum(batch.count, 1)[:, None]
            return np.asarray(mean_gradient @ metric)

        mean = private_mean(users, gradient, size=d, clipping_norm=clipping_norm, mechanism=mechanism)
        momentum = momentum.push(metric @ mean.value, mean.signal_share)
        beta, clipping_norm = beta + momentum.step, mean.next_clipping_norm
    return beta


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateMean:
    """A release of the mean over users of one vector each.

    Attributes:
        value: `p`, the noised mean of the clipped vectors, in the vectors' own units.
        noise_stddev: Standard deviation of the noise in each coordinate of `value`.
        next_clipping_norm: C to clip the next vectors to: it follows the median of their norms.
    """

    value: Array
    noise_stddev: float
    next_clipping_norm: float

    @property
    def signal_share(self) -> float:
        """Share of the squared norm that the noise does not explain, in [0, 1]."""
        energy = float((self.value**2).sum())
        return max(0.0, 1 - self.value.size * self.noise_stddev**2 / energy) if energy > 0 else 0.0


def private_mean(
    users: Users, vectors: Callable[[Batch], Array], *, size: int, clipping_norm: float, mechanism: Mechanism
) -> PrivateMean:
    """One release: each user's vector clipped, beside it the clip bit, on the grid, summed, noised.

    Args:
        users: Who contributes; the denominator is all of them. Users without examples or finite numbers add zeros.
        vectors: `n x size` vectors of a batch of n users, each a function of that user's data alone.
        size: Their length.
        clipping_norm: C, in the vectors' units.
        mechanism: Noise of the release.
    """
    layout = Layout(
        groups=(
            Group(name="model", size=size, share=math.sqrt(1 - _BIT_SHARE**2) - 1e-9),
            Group(name="scalars", size=1, share=_BIT_SHARE),
        ),
        grid_scale=grid_scale_for(size, private=mechanism.z > 0),
    )

    def node_total(part: Shard) -> IntArray:
        total = np.zeros(layout.size, np.int64)
        with np.errstate(all="ignore"):  # a user's overflow is that user's zeros
            for _, batch in part.batches():
                unit, within = clip_to_ball(vectors(batch), clipping_norm)
                bit = scalars_to_ball((within.astype(np.float64) - 0.5)[:, None])
                total += (batch.count > 0) @ to_grid((unit, bit), layout)
        return total

    mean, bit_mean = split_groups(released(users.map(node_total), layout, mechanism), layout, users.num_users)
    following = clipping_norm
    if may_adapt(users.num_users, mechanism.z):
        following = next_clipping_norm(clipping_norm, float(bit_mean[0]) / 2, bounds=CLIPPING_BOUNDS)
    return PrivateMean(
        value=clipping_norm * mean,
        noise_stddev=mechanism.z * clipping_norm / (layout.groups[0].share * users.num_users),
        next_clipping_norm=following,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Momentum:
    """Step sizes and momentum of `server.rounds.apply_round`, for any vector.

    Attributes:
        velocity: Momentum, as far as there was signal.
        elapsed: Noise-weighted number of steps; the step size is 1 / (1 + elapsed / 2).
    """

    velocity: Array
    elapsed: float = 0.0

    def push(self, direction: Array, signal: float) -> "Momentum":
        """After a release that says `direction`, of which the share `signal` is no noise."""
        return replace(
            self,
            velocity=MOMENTUM * signal * self.velocity + direction,
            elapsed=self.elapsed + max(1 - signal, LEAST_PROGRESS),
        )

    @property
    def step(self) -> Array:
        """What to add to the parameters now."""
        return np.asarray(self.velocity / (1 + STEP_DECAY * self.elapsed))


def feature_metric(users: Users) -> Array:
    """`d x d` M with M M' the inverse of the public curvature: x'M has second moment about 1 in all directions."""
    shard = users.shards[0]
    metric = np.linalg.cholesky(np.linalg.inv(regularized_moment(shard.schema.feature_second_moment)))
    # the curvature of the logistic loss is at most a quarter
    return np.asarray(2 * metric if shard.family.name == "logistic" else metric)


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
            gradient = loss_gradient(batch, theta, family) - penalty * (theta - center)
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


def released(totals: list[IntArray], layout: Layout, mechanism: Mechanism) -> IntArray:
    """The noised sum of the nodes' totals."""
    return release(
        totals,
        size=layout.size,
        noise_multiplier=mechanism.noise_multiplier,
        grid_scale=layout.grid_scale,
        source=mechanism.noise(),
    )


def loss_gradient(batch: Batch, theta: Array, family: Family) -> Array:
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
