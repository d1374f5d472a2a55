"""What a rival is to the comparison, and the linear algebra that several of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from client.batches import Batch
from common.linalg import apply, apply_transposed, dot, inverse_positive
from common.model import Array
from privacy.entropy import NoNoise, SystemNoise
from server.initialization import initial_model, prior_noise_variance
from umbel.baselines import Mechanism, Users, loss_gradient
from umbel.plan import least_noise

Setting = Mapping[str, Any]
MOST_SETTINGS = 6
"""The tuning effort of every rival: so many trained settings, and for each so many of what a user does alone."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a rival may spend in all its releases.

    Attributes:
        epsilon: None without privacy.
        delta: Of the guarantee.
    """

    epsilon: float | None
    delta: float

    def mechanism(self, releases: int) -> Mechanism:
        """The least noise, by the exact accountant, with which so many releases cost the budget; fresh each time."""
        if self.epsilon is None:
            return Mechanism(noise_multiplier="0", rounds=releases, noise=NoNoise)
        return Mechanism(
            noise_multiplier=_least_noise(self.epsilon, self.delta, releases), rounds=releases, noise=SystemNoise
        )


@lru_cache(maxsize=256)
def _least_noise(epsilon: float, delta: float, releases: int) -> str:
    return least_noise(epsilon, delta, releases, 1)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row of the comparison.

    Attributes:
        key: Its name in the cells.
        settings: Of the data's dimension: what may be trained, the most promising first.
        train: From users, budget, setting and a generator for public ties to whatever is released.
        local_settings: What each user may do alone with the released; costs no privacy.
        personal: From users, the released, setting and local setting to `n x d` parameters.
        personal_numbers: Of dimension and setting: how many numbers a user keeps.
        releases: Of a setting: how many releases it takes.
        is_released: Whether anything is: otherwise it is the same at every epsilon, and its cells have none.
    """

    key: str
    settings: Callable[[int], Sequence[Setting]]
    train: Callable[[Users, Budget, Setting, np.random.Generator], Any]
    local_settings: Sequence[Setting]
    personal: Callable[[Users, Any, Setting, Setting], Array]
    personal_numbers: Callable[[int, Setting], int]
    releases: Callable[[Setting], int] = lambda setting: int(setting["rounds"])
    is_released: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Every user's least squares in r coordinates around what is shared.

    Attributes:
        w: `n x r`.
        gradient: `n x d`, X'(y - X theta) that is left.
    """

    w: Array
    gradient: Array


def fit_heads(batch: Batch, U: Array, beta: Array, penalty: float) -> Heads:
    """w = argmin |y - X (beta + U w)|^2 + penalty |w|^2 of each user."""
    r = U.shape[1]
    moments = batch.products(np.concatenate([U.T, beta[None, :]]))
    UG, e = moments[:, :r, :], batch.cross - moments[:, r, :]
    w = apply(
        inverse_positive(UG @ U + penalty * np.eye(r)), apply_transposed(np.broadcast_to(U, (len(e), *U.shape)), e)
    )
    return Heads(w=w, gradient=e - apply_transposed(UG, w))


def personal_heads(users: Users, U: Array, beta: Array, penalty: float) -> Array:
    """`n x d`, beta + U w."""
    return users.theta(lambda batch: beta + fit_heads(batch, U, beta, penalty).w @ U.T)


def descend(batch: Batch, gradient: Array, metric: Array, steps: int) -> Array:
    """`n x d` displacement in the metric: steepest descent on each user's squared loss, with exact line searches.

    Args:
        batch: The users.
        gradient: `n x d`, X'(y - X theta) where they start.
        metric: `d x d` M; theta moves by M times the displacement.
        steps: How many.
    """
    moved = np.zeros_like(gradient)
    for _ in range(steps):
        g = gradient @ metric
        along = g @ metric.T
        image = batch.products(along[:, None, :])[:, 0, :]
        curvature = dot(along, image)
        length = np.where(curvature > 0, dot(g, g) / np.where(curvature > 0, curvature, 1.0), 0.0)[:, None]
        moved = moved + length * g
        gradient = gradient - length * image
    return moved


def residual_gradient(batch: Batch, theta: Array, users: Users) -> Array:
    """`n x d`, X'(y - X theta)."""
    return loss_gradient(batch, theta, users.shards[0].family)


def public_directions(users: Users, rank: int, rng: np.random.Generator) -> Array:
    """`d x r` orthonormal: where umbel starts as well."""
    schema = users.shards[0].schema
    variance = prior_noise_variance(schema.target_range, "squared")
    U = initial_model(schema.feature_second_moment, rank, variance, rng).U
    return orthonormal(U)[0]


def orthonormal(U: Array) -> tuple[Array, Array]:
    """Q and R of U = Q R, R with a positive diagonal."""
    Q, R = np.linalg.qr(U)
    signs = np.where(np.diag(R) < 0, -1.0, 1.0)
    return Q * signs, signs[:, None] * R


def local_penalties(*penalties: float) -> tuple[dict[str, float], ...]:
    """Local settings that differ in their penalty."""
    return tuple({"local_penalty": penalty} for penalty in penalties)
