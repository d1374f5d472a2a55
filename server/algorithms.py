"""How the server learns: what it asks for in a round, and what it makes of the release.

Both algorithms run in the same loop, under the same ledger. A round's work follows from the state alone, so a run that
is resumed asks for what it would have asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from common.config import AmhtConfig, Config
from common.data import DataSchema
from common.errors import UmbelError
from common.model import Array, IntArray, SharedModel
from common.task import Task, Work
from privacy.layout import Layout, layout_of_event
from server.initialization import initial_model, prior_noise_variance, regularized_moment, widened
from server.layout import contribution_layout
from server.least_squares import random_directions
from server.networks import NetworkGradient, NetworkStart, NetworkState
from server.rounds import ServerState, apply_round, initial_state, public_metric
from server.statistics import (
    StatisticsState,
    apply_moment,
    apply_statistics,
    first_moment_norm,
    first_statistics_norm,
    first_statistics_state,
)

State = ServerState | StatisticsState | NetworkState

_STARTED_ELAPSED = 2.0
"""Noise-weighted steps that a released model is taken to have behind it, so that the first step from it is half of a
new run's: it has noise of its own, which later releases average out, and they must not put more in its place."""


class Algorithm(Protocol):
    """A way to learn the shared model from releases."""

    def first_state(self, schema: DataSchema, rng: np.random.Generator) -> State:
        """Before the first round, from public knowledge alone."""

    def task(self, state: Any) -> Task:
        """What the next round asks of nodes."""

    def metric(self, state: Any) -> Array:
        """`d x d`, the public matrix that goes with the task."""

    def step(self, state: Any, noised: IntArray, event: Mapping[str, Any]) -> State:
        """After a release, which was made as `event` says."""

    @property
    def personal_task(self) -> Task:
        """How devices personalize with the last model."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Gradient ascent on the users' average log marginal likelihood: the default.

    Attributes:
        family: Loss family.
        rank: Columns r of U.
        sparsity: Cap on the nonzeros of b.
        clipping_norm: A public constant, or None to adapt it.
        start: A released model to start from, of this rank or a smaller one; None for public facts alone.
    """

    family: str
    rank: int
    sparsity: int
    clipping_norm: float | None
    start: SharedModel | None = None

    def first_state(self, schema: DataSchema, rng: np.random.Generator) -> ServerState:
        """See `Algorithm`."""
        moment = schema.feature_second_moment
        state = initial_state(
            first_model(schema, self.rank, self.family, rng), regularized_moment(moment), self.clipping_norm
        )
        if self.start is None:
            return state
        # the bounds of its variances stay those around the public first guess
        return replace(state, model=widened(self.start, self.rank, moment, rng), elapsed=_STARTED_ELAPSED)

    def task(self, state: ServerState) -> Task:
        """See `Algorithm`."""
        return self.personal_task

    def metric(self, state: ServerState) -> Array:
        """See `Algorithm`."""
        return public_metric(state, self.family)

    def step(self, state: ServerState, noised: IntArray, event: Mapping[str, Any]) -> ServerState:
        """See `Algorithm`."""
        return apply_round(
            state,
            noised,
            layout=layout_of_event(event),
            clipping_norm=float(event["clipping_norm"]),
            noise_multiplier=float(event["noise_multiplier"]),
            denominator=int(event["denominator"]),
            adapt_clipping=self.clipping_norm is None,
            family=self.family,
            sparsity=self.sparsity,
        )

    @property
    def personal_task(self) -> Task:
        """See `Algorithm`."""
        return Task(family=self.family, sparsity=self.sparsity)


@dataclass(frozen=True, kw_only=True)
class AmhtLrs:
    """Alternating minimization with hard thresholding, as published (arXiv:2210.03505), under our mechanism.

    Attributes:
        rank: Columns r of U.
        sparsity: Cap k on the nonzeros of b.
        settings: The configuration's.
        rounds: Releases of the whole run, among which sample splitting divides a user's examples.
        clipping_norm: A public constant, or None to adapt it.
        start: A released model to start from, of this rank or a smaller one, instead of an initialization.
    """

    rank: int
    sparsity: int
    settings: AmhtConfig
    rounds: int
    clipping_norm: float | None
    start: SharedModel | None = None

    def first_state(self, schema: DataSchema, rng: np.random.Generator) -> StatisticsState:
        """See `Algorithm`."""
        model = first_model(schema, self.rank, "squared", rng)
        if self.start is not None:
            model = widened(self.start, self.rank, schema.feature_second_moment, rng)
            U, norm = model.U, first_statistics_norm(model)
        elif self.settings.initialization == "random":
            U = random_directions(schema.dimension, self.rank, rng)
            norm = first_statistics_norm(model)
        else:
            U, norm = model.U, first_moment_norm(model, self.settings.initialization)
        model = replace(model, U=np.linalg.qr(U)[0])
        norm = norm if self.clipping_norm is None else self.clipping_norm
        return first_statistics_state(model, regularized_moment(schema.feature_second_moment), norm)

    def task(self, state: StatisticsState) -> Task:
        """See `Algorithm`."""
        fold = (state.server_round % self.rounds, self.rounds) if self.settings.sample_splitting else (0, 1)
        task = self.personal_task.model_copy(update={"fold": fold})
        if state.server_round == 0 and self.start is None and self.settings.initialization != "random":
            return task.model_copy(update={"work": "moment", "moment": self.settings.initialization})
        return task.model_copy(update={"work": "statistics"})

    def metric(self, state: StatisticsState) -> Array:
        """See `Algorithm`."""
        return state.inverse_root

    def step(self, state: StatisticsState, noised: IntArray, event: Mapping[str, Any]) -> StatisticsState:
        """See `Algorithm`."""
        layout, denominator = layout_of_event(event), int(event["denominator"])
        if event["initialization"]:
            norm = first_statistics_norm(state.model) if self.clipping_norm is None else self.clipping_norm
            return apply_moment(state, noised, layout=layout, denominator=denominator, next_clipping_norm=norm)
        return apply_statistics(
            state,
            noised,
            layout=layout,
            clipping_norm=float(event["clipping_norm"]),
            noise_multiplier=float(event["noise_multiplier"]),
            denominator=denominator,
            adapt_clipping=self.clipping_norm is None,
        )

    @property
    def personal_task(self) -> Task:
        """See `Algorithm`."""
        return Task(family="squared", sparsity=self.sparsity, fitting=self.settings.fitting)


def algorithm_of(config: Config, start: SharedModel | None = None, network: NetworkStart | None = None) -> Algorithm:
    """The algorithm that a configuration names.

    Args:
        config: Of the run.
        start: The released model that it starts from, if any.
        network: Where it starts, for a run that trains a network.
    """
    model, clipping = config.model, config.privacy.clipping
    norm = None if clipping == "adaptive" else float(clipping)
    if config.network.module is not None:
        if network is None:
            raise UmbelError(
                "Expected the start of a network for a run with network.module, got none. Restore its file."
            )
        return NetworkGradient(
            family=model.family,
            rank=model.rank,
            sparsity=model.sparsity,
            clipping_norm=norm,
            settings=config.network,
            start=network,
        )
    if config.training.algorithm == "gradient":
        return Gradient(family=model.family, rank=model.rank, sparsity=model.sparsity, clipping_norm=norm, start=start)
    return AmhtLrs(
        rank=model.rank,
        sparsity=model.sparsity,
        settings=config.amht,
        rounds=config.training.rounds,
        clipping_norm=norm,
        start=start,
    )


def first_model(schema: DataSchema, rank: int, family: str, rng: np.random.Generator) -> SharedModel:
    """Where training starts, from public knowledge alone."""
    noise_variance = prior_noise_variance(schema.target_range, family)
    return initial_model(schema.feature_second_moment, rank, noise_variance, rng)


def layout_of_task(task: Task, dimension: int, rank: int, *, private: bool) -> Layout:
    """The layout of a round's contributions.

    Args:
        task: The round's.
        dimension: Number of features d of a linear model.
        rank: Columns r of its U.
        private: Whether there will be noise.
    """
    if task.adapters is not None:
        return contribution_layout(task.adapters.trained, 0, private=private, work=task.work)
    return contribution_layout(dimension, rank, private=private, work=task.work)


def largest_layout(config: Config, dimension: int, *, private: bool, network: NetworkStart | None = None) -> Layout:
    """The layout with the most coordinates that a run's rounds have."""
    if network is not None:
        return contribution_layout(network.architecture.trained_size, 0, private=private, work="network")
    works: tuple[Work, ...] = ("gradient",)
    if config.training.algorithm == "amht-lrs":
        works = ("moment", "statistics")
    layouts = (contribution_layout(dimension, config.model.rank, private=private, work=work) for work in works)
    return max(layouts, key=lambda layout: layout.size)
