"""Where training starts: from public knowledge alone, so that it costs no privacy."""

import math
from dataclasses import replace
from hashlib import sha256

import numpy as np

from common.model import Array, SharedModel

_INITIAL_SHARE = 0.2
"""Share of the noise variance that U explains at the start, x'UU'x on a typical example."""
_TIE_BREAK = 1e-4
_NO_DIRECTION = 1e-9
"""Singular values of U below this share of the largest are rounding: noise has taken that direction away."""
_B_SHARE = 0.1
"""Prior variance of a nonzero of b, in noise variances (features are at most about 1)."""


def regularized_moment(S: Array) -> Array:
    """The public second moment of the features, bounded away from singular.

    Args:
        S: `d x d`, positive semidefinite, from a public item table or declared ranges.

    Returns:
        S + .01 diag(S) + .1 tr(S)/d I.
    """
    d = len(S)
    regularized: Array = S + 0.01 * np.diag(np.diag(S)) + 0.1 * np.trace(S) / d * np.eye(d)
    return regularized


def initial_model(
    feature_second_moment: Array, rank: int, noise_variance: float, rng: np.random.Generator
) -> SharedModel:
    """beta = 0 and U along the leading principal directions of the public features.

    Args:
        feature_second_moment: S, `d x d`, public.
        rank: Number of columns of U.
        noise_variance: First guess, from the declared range of the target; 4, one over the largest curvature, for
            the logistic family only scales U and b.
        rng: Breaks ties between equal eigenvalues, at random.

    Returns:
        A prior under which x'U w has a fifth of the noise variance on a typical example.
    """
    S = regularized_moment(feature_second_moment)
    U = _leading(S, rank, np.eye(len(S)), rng)
    if rank:
        U = U * math.sqrt(_INITIAL_SHARE * noise_variance / np.trace(U.T @ S @ U))
    return SharedModel(beta=np.zeros(len(S)), U=U, b_variance=_B_SHARE * noise_variance, noise_variance=noise_variance)


def widened(model: SharedModel, rank: int, feature_second_moment: Array, rng: np.random.Generator) -> SharedModel:
    """A released model with more columns of U, to start a run of a larger rank from.

    They are the leading principal directions of the public features among those that U does not span, of the scale
    that they would have in the first model of a new run with this rank and the released noise variance.

    Args:
        model: Released, of at most this rank.
        rank: Number of columns to have.
        feature_second_moment: S, `d x d`, public.
        rng: Breaks ties between equal eigenvalues, at random.
    """
    missing = rank - model.rank
    if missing <= 0:
        return model
    S = regularized_moment(feature_second_moment)
    left, values = model.gauge()
    spanned = left[:, values > _NO_DIRECTION * values.max(initial=0.0)]
    V = _leading(S, missing, np.eye(len(S)) - spanned @ spanned.T, rng)
    V = V * math.sqrt(_INITIAL_SHARE * missing / rank * model.noise_variance / np.trace(V.T @ S @ V))
    return replace(model, U=np.concatenate([model.U, V], axis=1))


def _leading(S: Array, count: int, within: Array, rng: np.random.Generator) -> Array:
    """`d x count`, orthonormal leading directions of S in the range of the projection `within`, `d x d`."""
    # wide enough for every library to find the same directions, and one sign for each
    tie_break = np.diag(rng.random(len(S))) * _TIE_BREAK * np.trace(S) / len(S)
    _, vectors = np.linalg.eigh(within @ (S + tie_break) @ within)
    U = vectors[:, len(S) - count :]
    return U * np.where(np.take_along_axis(U, np.abs(U).argmax(axis=0)[None, :], axis=0) < 0, -1.0, 1.0)


def tie_breaker(run: str, seed: int | None) -> np.random.Generator:
    """Breaks ties between equal directions by the run's public name, or by a seed where one is given.

    A run that is resumed, and the baselines that a run is compared with, so start in the same place.
    """
    text = run if seed is None else f"seed {seed}"
    return np.random.default_rng(int.from_bytes(sha256(text.encode()).digest()[:8]))


def prior_noise_variance(target_range: tuple[float, float], family: str) -> float:
    """First noise variance from the declared range: (range / 4)^2; 1 for families without one."""
    if family != "squared":
        return 1.0
    low, high = target_range
    return ((high - low) / 4) ** 2
