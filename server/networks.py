"""How the server learns the shared part of a network: releases in, the next state out; NumPy only, and post-processing.

The state's model has the whole shared vector as `beta` (see `common.architecture`) and a `U` of no columns, so that
checkpoints, broadcasts and releases are those of every other run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from common.architecture import Architecture
from common.config import NetworkConfig
from common.data import DataSchema
from common.errors import UmbelError
from common.files import pack, unpack, write_durably
from common.model import Array, IntArray, SharedModel
from common.task import Adapters, Task
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.layout import Layout, layout_of_event, split_groups
from server.initialization import prior_noise_variance
from server.rounds import ScalarMeans, signal_share

CLIPPING_BOUNDS = (1e-4, 1e4)
"""Public bounds of the clipping norm, in units of the gradient or of the parameters."""
FIRST_CLIPPING_NORM = 10.0
MOMENTUM = 0.8
STEP_DECAY = 0.3
LEAST_PROGRESS = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkStart:
    """Where training starts: public, and the same bytes for everybody.

    Attributes:
        architecture: Of the network.
        shared: `D` float64.
        digest: SHA-256 of the file, hex.
    """

    architecture: Architecture
    shared: Array
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkState:
    """All that the server carries from round to round; a function of releases and public constants.

    Attributes:
        server_round: Rounds applied so far.
        model: `beta` is the shared vector.
        velocity: Momentum of its trained part, in clipping norms.
        elapsed: Noise-weighted number of steps so far.
        clipping_norm: C of the next round.
        first_noise_variance: Where noise_variance started; it stays within public bounds around it.
    """

    server_round: int
    model: SharedModel
    velocity: Array
    elapsed: float
    clipping_norm: float
    first_noise_variance: float


@dataclass(frozen=True, kw_only=True)
class NetworkGradient:
    """Ascent along the users' average cross-fitted gradient, or moves, of a network's shared part.

    Attributes:
        family: Loss family.
        rank: r of every adapted layer.
        sparsity: k of every adapted layer.
        clipping_norm: A public constant, or None to adapt it.
        settings: The configuration's.
        start: Where it starts.
    """

    family: str
    rank: int
    sparsity: int
    clipping_norm: float | None
    settings: NetworkConfig
    start: NetworkStart

    def first_state(self, schema: DataSchema, rng: np.random.Generator) -> NetworkState:
        """See `server.algorithms.Algorithm`."""
        shared = self.start.shared
        noise_variance = prior_noise_variance(schema.target_range, self.family)
        return NetworkState(
            server_round=0,
            model=SharedModel(
                beta=shared,
                U=np.zeros((shared.size, 0)),
                b_variance=self.settings.b_variance,
                noise_variance=noise_variance,
            ),
            velocity=np.zeros(self.start.architecture.trained_size),
            elapsed=0.0,
            clipping_norm=FIRST_CLIPPING_NORM if self.clipping_norm is None else self.clipping_norm,
            first_noise_variance=noise_variance,
        )

    def task(self, state: NetworkState) -> Task:
        """See `server.algorithms.Algorithm`."""
        return self.personal_task

    def metric(self, state: NetworkState) -> Array:
        """None: gradients are clipped as they are."""
        return np.zeros((0, 0))

    def step(self, state: NetworkState, noised: IntArray, event: Mapping[str, Any]) -> NetworkState:
        """See `server.algorithms.Algorithm`."""
        return apply_network_round(
            state,
            noised,
            layout=layout_of_event(event),
            clipping_norm=float(event["clipping_norm"]),
            noise_multiplier=float(event["noise_multiplier"]),
            denominator=int(event["denominator"]),
            adapt_clipping=self.clipping_norm is None,
            # a gradient is a direction; what users have moved is a length too
            step_size=self.settings.step_size * (1.0 if self.settings.local_steps == 1 else state.clipping_norm),
            family=self.family,
            sparsity=self.start.architecture.sparsity,
        )

    @property
    def personal_task(self) -> Task:
        """See `server.algorithms.Algorithm`."""
        settings, architecture = self.settings, self.start.architecture
        adapters = Adapters(
            architecture=architecture.digest,
            layers=settings.layers,
            rank=self.rank,
            form=settings.form,
            train_base=settings.train_base,
            trained=architecture.trained_size,
            steps=settings.steps,
            local_steps=settings.local_steps,
            local_step_size=settings.local_step_size,
        )
        return Task(family=self.family, sparsity=self.sparsity, work="network", adapters=adapters)


def apply_network_round(
    state: NetworkState,
    noised: IntArray,
    *,
    layout: Layout,
    clipping_norm: float,
    noise_multiplier: float,
    denominator: int,
    adapt_clipping: bool,
    step_size: float,
    family: str,
    sparsity: int,
) -> NetworkState:
    """Take one step from a released sum.

    Args:
        state: Before the round.
        noised: The release: sum over users plus Gaussian noise, on the grid.
        layout: Groups and grid of the release.
        clipping_norm: C that the users clipped with.
        noise_multiplier: z of the release; 0 without noise.
        denominator: Users of the nodes invited, whoever answered; times q of a sampled run.
        adapt_clipping: Whether the configuration lets the clipping norm follow the released bits.
        step_size: How far the first step goes if all users agree.
        family: Loss family; only squared loss has a noise variance to learn.
        sparsity: Cap on nonzeros of b; 0 leaves b_variance alone.
    """
    model = state.model
    mean, scalar_mean = split_groups(noised, layout, denominator)
    # the true mean is no longer than 1: noise that is cannot be signal
    mean = mean / max(float(np.linalg.norm(mean)), 1.0)
    signal = signal_share(mean, noise_multiplier / (layout.groups[0].share * denominator))
    elapsed = state.elapsed + max(1 - signal, LEAST_PROGRESS)
    velocity = MOMENTUM * signal * state.velocity + mean
    shared = model.beta.copy()
    shared[shared.size - mean.size :] += step_size / (1 + STEP_DECAY * elapsed) * velocity
    scalars = ScalarMeans.of(scalar_mean, layout, noise_multiplier, denominator)
    first = state.first_noise_variance
    updated = replace(
        model,
        beta=shared,
        noise_variance=scalars.next_noise_variance(model.noise_variance, first)
        if family == "squared"
        else model.noise_variance,
        b_variance=scalars.next_b_variance(model.b_variance, first) if sparsity else model.b_variance,
    )
    if adapt_clipping and may_adapt(denominator, noise_multiplier):
        clipping_norm = next_clipping_norm(clipping_norm, scalars.bit, bounds=CLIPPING_BOUNDS)
    return replace(
        state,
        server_round=state.server_round + 1,
        model=updated,
        velocity=velocity,
        elapsed=elapsed,
        clipping_norm=clipping_norm,
    )


def first_shared(architecture: Architecture, base: Array, *, U_scale: float, rng: np.random.Generator) -> Array:
    """`D`, a base with random U whose columns have length `U_scale`: public, so it costs nothing.

    Args:
        architecture: Of the network.
        base: `P`.
        U_scale: By how much a typical w, of length 1, moves a layer.
        rng: Random, and harmless.
    """
    parts = [np.asarray(base, np.float64)]
    for layer in architecture.layers:
        U = rng.standard_normal((layer.d, layer.rank))
        parts.append((U / np.linalg.norm(U, axis=0) * U_scale).reshape(-1))
    return np.concatenate(parts)


def save_network_start(path: Path, architecture: Architecture, shared: Array) -> None:
    """Write where training starts."""
    write_durably(path, pack({"shared": shared}, {"architecture": architecture.encode()}))


def read_network_start(path: Path) -> NetworkStart:
    """Inverse of `save_network_start`.

    Raises:
        UmbelError: If it is another file.
    """
    arrays, facts = unpack(path)
    try:
        architecture, shared = Architecture.decode(facts["architecture"]), arrays["shared"]
    except KeyError as error:
        raise UmbelError(
            f"Expected the start of a network at {path}, got another file of umbel's. Restore it."
        ) from error
    if shared.shape != (architecture.shared_size,):
        raise UmbelError(
            f"Expected {architecture.shared_size} shared numbers in {path}, got {shared.shape}. Restore it."
        )
    return NetworkStart(architecture=architecture, shared=shared, digest=sha256(path.read_bytes()).hexdigest())
