"""Private AMHT-LRS: theta_i = U w_i + b_i by alternating minimization with hard thresholding.

Pal, Varshney, Jain, Thakurta, Madan, Aggarwal, Shenoy and Srivastava, "Sample-efficient personalization: modeling user
parameters as low rank plus sparse components" (AISTATS 2024, arXiv:2210.03505): U starts from moments; every round each
user finds w and b, and the server solves for U from sums of A_i = (w w') kron X'X and V_i = X'(y - X b) w', with noise.

Made private as umbel's own `amht-lrs` is: a user's A and V are clipped together by one factor, which needs several
times less noise than the paper's clipping of x, y and w; the server raises A's eigenvalues to the edge of its noise.
Kept: exact least squares for U and QR. Tuned beyond the paper: the local solver, greedy with a joint ridge fit (on
the base population without privacy the published alternation took twice as long or more and came to 1.33 where this
came to .92); the metric of the public second moment of the features for U; optionally a private mean beta from the
first rounds of the budget; and how often U is solved for, which may be never: at small epsilon the start is best left
alone. Left out: sample splitting, and clipping of anything but the contribution.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.rivals.rival import Budget, Rival, Setting
from client.alternation import LocalSettings, fit
from client.batches import Batch, Chunk, Design, design_of, form_of, plan_chunks
from client.statistics import contribute_moment, contribute_statistics
from common.linalg import apply, dot, unsvec
from common.model import Array, IntArray
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.layout import Layout, cross_norm, split_groups
from privacy.mechanism import release
from server.initialization import prior_noise_variance
from server.layout import contribution_layout
from server.least_squares import leading_directions, orthonormal, solve_for_U
from umbel.baselines import Mechanism, Users, feature_metric, private_global

_GRID = (
    # rank, sparsity, ridge, rounds on the mean, rounds in all (one more is the start), local solver
    (4, 3, 1.0, 3, 4, "pursuit"),
    (8, 3, 1.0, 3, 4, "pursuit"),
    (4, 5, 1.0, 2, 4, "pursuit"),
    (2, 3, 3.0, 3, 6, "pursuit"),
    (4, 3, 1.0, 3, 8, "pursuit"),
    (5, 3, 1.0, 0, 5, "pursuit"),
)
_NAMES = ("rank", "sparsity", "ridge", "mean_rounds", "rounds", "solver")
CLIPPING_BOUNDS = (1e-9, 1e9)
_EXPLAINED = 0.1
_TYPICAL_EXAMPLES = 20.0
_LEAST_EIGENVALUE = 1e-2
_LARGEST_U = 250
"""Entries of U above which statistics, of half the square of that, are not tried; U then stays at its start."""
_RESULT_BYTES = 2**26
_FLOAT_BYTES = 8
_EXAMPLES_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Released:
    """What the server publishes: U (`d x r`) and beta (`d`)."""

    U: Array
    beta: Array


def _settings(dimension: int) -> list[Setting]:
    settings: list[dict[str, Any]] = [dict(zip(_NAMES, values, strict=True)) for values in _GRID]
    capped = [
        {**setting, "rank": min(setting["rank"], dimension), "sparsity": min(setting["sparsity"], dimension)}
        for setting in settings
    ]
    return [setting for setting in capped if dimension * setting["rank"] <= _LARGEST_U or not _solves(setting)]


def _solves(setting: Setting) -> int:
    """How many releases of statistics."""
    return int(setting["rounds"] - setting["mean_rounds"] - 1)


def train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> Released:
    """The releases: a mean if there is one, the start's moment, then statistics."""
    mechanism, rank, metric = budget.mechanism(setting["rounds"]), setting["rank"], feature_metric(users)
    beta = np.zeros(len(metric))
    if setting["mean_rounds"]:
        beta = private_global(users, replace(mechanism, rounds=setting["mean_rounds"]))
    U = _start(users, rank, beta, metric, mechanism)
    local = _local(setting["solver"], setting["sparsity"], setting["ridge"])
    batches = [around(batch, beta) for batch in _batches(users, rank)]
    clipping_norm = first_norm(users)
    for _ in range(_solves(setting)):
        U, clipping_norm = _round(
            users, batches, U=U, clipping_norm=clipping_norm, local=local, metric=metric, mechanism=mechanism
        )
    return Released(U=U, beta=beta)


def first_norm(users: Users) -> float:
    """C of the first release of statistics: half of |A| where w explains a tenth of the largest variance y may have."""
    schema = users.shards[0].schema
    explained = _EXPLAINED * prior_noise_variance(schema.target_range, "squared")
    return 0.5 * explained * _TYPICAL_EXAMPLES * math.sqrt(schema.dimension)


def _start(users: Users, rank: int, beta: Array, metric: Array, mechanism: Mechanism) -> Array:
    """U along the leading directions of one release of pair moments, in the features x'metric."""
    schema, d = users.shards[0].schema, len(beta)
    layout = contribution_layout(d, rank, private=mechanism.z > 0, work="moment")
    norm = prior_noise_variance(schema.target_range, "squared")

    def contribution(design: Design) -> IntArray:
        centred = replace(design, y=design.y - design.X @ beta)
        grid: IntArray = contribute_moment(centred, "pair-moments", metric.T, clipping_norm=norm, layout=layout)
        return grid

    moment, _ = split_groups(
        _release(map(contribution, _designs(users, 1)), layout, mechanism), layout, users.num_users
    )
    return leading_directions(unsvec(moment[None, :], d)[0], rank, metric)


def _round(
    users: Users,
    batches: list[Batch],
    *,
    U: Array,
    clipping_norm: float,
    local: LocalSettings,
    metric: Array,
    mechanism: Mechanism,
) -> tuple[Array, float]:
    """Every user's w and b for the U there is; then U from the noised sum of their statistics, and the next C."""
    d, rank = U.shape
    layout = contribution_layout(d, rank, private=mechanism.z > 0, work="statistics")
    back = np.linalg.inv(metric)

    def contribution(batch: Batch) -> IntArray:
        found = fit(batch, U, local)
        moved = replace(found, b=found.b @ back.T)  # x'b = (x'metric)(metric^-1 b)
        own = in_metric(batch, metric)
        grid: IntArray = contribute_statistics(own, moved, clipping_norm=clipping_norm, layout=layout)
        return grid

    noised = _release(map(contribution, batches), layout, mechanism)
    sum_A, V, scalars = split_groups(noised, layout, users.num_users)
    A = unsvec(clipping_norm * sum_A[None, :], d * rank)[0]
    noise_stddev = mechanism.z * clipping_norm / (layout.groups[0].share * users.num_users)
    # features that hardly any user has would be fitted to their noise, or without noise to the grid's rounding
    least = _LEAST_EIGENVALUE * float(np.trace(A)) / len(A) / math.sqrt(2 * len(A))
    found = solve_for_U(A, cross_norm(clipping_norm, d) * V, d, rank, noise_stddev=max(noise_stddev, least))
    if may_adapt(users.num_users, mechanism.z):
        bit = float(scalars[0]) * math.sqrt(len(scalars)) / 2
        clipping_norm = next_clipping_norm(clipping_norm, bit, bounds=CLIPPING_BOUNDS)
    return orthonormal(metric @ found), clipping_norm


def _release(grids: Iterable[IntArray], layout: Layout, mechanism: Mechanism) -> IntArray:
    return release(
        (grid.sum(axis=0) for grid in grids),
        size=layout.size,
        noise_multiplier=mechanism.noise_multiplier,
        grid_scale=layout.grid_scale,
        source=mechanism.noise(),
    )


def around(batch: Batch, beta: Array) -> Batch:
    """The same examples with x'beta taken off y."""
    if isinstance(batch, Design):
        return replace(batch, y=batch.y - batch.X @ beta)
    rows = np.broadcast_to(beta, (len(batch.count), len(beta)))
    image = apply(batch.G, rows)  # type: ignore[attr-defined]
    square = batch.square - 2 * dot(batch.cross, rows) + dot(image, rows)
    return replace(batch, v=batch.cross - image, square=square)  # type: ignore[type-var]


def in_metric(batch: Batch, metric: Array) -> Batch:
    """The same examples in the features x'metric."""
    if isinstance(batch, Design):
        return replace(batch, X=batch.X @ metric)
    return replace(batch, G=metric.T @ batch.G @ metric, v=batch.v @ metric)  # type: ignore[attr-defined,type-var]


def _designs(users: Users, rank: int) -> Iterable[Design]:
    """All examples, in batches small enough that what users contribute fits in memory."""
    d = users.shards[0].schema.dimension
    most = max(1, _RESULT_BYTES // (_FLOAT_BYTES * (d * rank) ** 2))
    for shard in users.shards:
        for chunk in plan_chunks(shard.population.counts, d, _EXAMPLES_BYTES):
            for first in range(0, len(chunk.users), most):
                yield design_of(shard.population, Chunk(users=chunk.users[first : first + most], length=chunk.length))


def _batches(users: Users, rank: int) -> Iterable[Batch]:
    return (form_of(design, second_moments_suffice=True) for design in _designs(users, rank))


def _local(solver: str, sparsity: int, ridge: float) -> LocalSettings:
    return LocalSettings(solver=solver, sparsity=sparsity, ridge=ridge, num_alternations=5, num_steps=10)


def personal(users: Users, released: Released, setting: Setting, local: Setting) -> Array:
    """`n x d`, beta + U w + b of every user."""
    settings = _local(setting["solver"], setting["sparsity"], local["local_ridge"])
    return users.theta(lambda batch: released.beta + fit(around(batch, released.beta), released.U, settings).theta)


RIVAL = Rival(
    key="amht_lrs",
    settings=_settings,
    train=train,
    local_settings=tuple({"local_ridge": ridge} for ridge in (0.1, 0.3, 1.0, 3.0, 6.0, 15.0)),
    personal=personal,
    personal_numbers=lambda dimension, setting: setting["rank"] + 2 * setting["sparsity"],
)
