"""One Gaussian release of an integer vector: the only place where contributions are summed.

Guarantee, to one user under the zero-out relation: where each user's integers have L2 norm at most
`grid_scale`, the result is a Gaussian release of noise multiplier z up to `delta_fp`, because for an integer
S, S + rint(n) = rint(S + n) is post-processing of S + n, also where n is wider than z says. A user of up to
s nodes moves s summands: that enters the accounting (mu = s/z), never the noise.
"""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from common.errors import UmbelError
from common.model import IntArray
from privacy import discrete
from privacy.entropy import TAU, NoiseSource
from privacy.lines import DISCRETE_NOISE
from privacy.participation import checked_noise_multiplier, is_noiseless

# Sum and noise each below 2^62, so that their sum is an int64.
_LARGEST_SUM = 2**62
# The square of one user's coordinate, which clients sum, must fit as well.
_LARGEST_GRID_SCALE = 2**31
_NO_NOISE = "none"


def release(
    contributions: Iterable[IntArray],
    *,
    size: int,
    noise_multiplier: str,
    grid_scale: int,
    source: NoiseSource,
) -> IntArray:
    """The noised sum of the contributions: rint(z·K·g) + Σ contributions.

    The sum starts from the noise, so an un-noised total exists nowhere, not even between two statements.

    Args:
        contributions: `size` int64 each, already checked against what a node may send.
        size: Number of coordinates D.
        noise_multiplier: z as the ledger spells it; noise has standard deviation z·K on the grid.
        grid_scale: K, the largest norm of one user's integers.
        source: Where noise comes from; `NoNoise` for "0" and for nothing else.

    Returns:
        `size` int64.

    Raises:
        ValueError: If noise multiplier and source do not agree on whether there is noise, or a contribution
            is not a vector of `size` int64.
    """
    total = source.rounded_gaussian(_noise_stddev(noise_multiplier, grid_scale, source), size)
    for contribution in contributions:
        if contribution.dtype != np.int64 or contribution.shape != (size,):
            raise ValueError(
                f"Expected {size} int64, got dtype={contribution.dtype}, shape={contribution.shape}. "
                "Check contributions where they arrive."
            )
        total += contribution
    return total


def check_capacity(max_users: int, grid_scale: int) -> None:
    """Refuse a configuration in which sums could leave 64 bits; called once, before any round.

    Args:
        max_users: Users on all nodes; each adds at most `grid_scale` to a coordinate.
        grid_scale: K.

    Raises:
        UmbelError: If `max_users`·K or the square of K does not fit.
    """
    if max_users < 1 or not 1 <= grid_scale <= _LARGEST_GRID_SCALE:
        raise UmbelError(f"Expected 1 <= max_users and 1 <= grid_scale <= 2^31, got {max_users=}, {grid_scale=}.")
    if max_users * grid_scale >= _LARGEST_SUM:
        raise UmbelError(f"Expected max_users * grid_scale < 2^62, got {max_users=}, {grid_scale=}. Lower one.")


def coordinate_distance(noise: str, noise_multiplier: str, grid_scale: int) -> float:
    """How far one coordinate of a release's noise is from a rounded Gaussian, in total variation; an upper bound.

    Args:
        noise: As the ledger spells it.
        noise_multiplier: z, likewise.
        grid_scale: K.
    """
    if noise != DISCRETE_NOISE:
        return TAU
    return TAU + discrete.distance(checked_noise_multiplier(noise_multiplier) * grid_scale)


def distance_of(event: Mapping[str, Any]) -> float:
    """The same for all coordinates of the release that a mechanism event pays for."""
    coordinates = sum(group["size"] for group in event["groups"])
    return float(coordinates * coordinate_distance(event["noise"], event["noise_multiplier"], event["grid_scale"]))


def delta_fp(epsilon: float, distance: float) -> float:
    """What inexact noise adds to delta: (1 + e^epsilon) times the distance from the ideal releases.

    Each of the two neighbours' distributions is within `distance`, the sum of `distance_of` all releases, of its
    ideal in total variation; inf where e^epsilon is no longer a float.
    """
    try:
        return (1 + math.exp(epsilon)) * distance
    except OverflowError:
        return math.inf


def check_delta_fp(epsilon: float, delta: float, distance: float) -> None:
    """Refuse a run whose noise is not exact enough for its delta; a run that promises nothing passes.

    Raises:
        UmbelError: If `delta_fp` is more than a hundredth of `delta`.
    """
    added = delta_fp(epsilon, distance)
    if epsilon != math.inf and not added <= delta / 100:
        raise UmbelError(
            f"Expected a budget at which the noise's finite precision adds at most a hundredth of {delta=}, got "
            f"{epsilon=}, at which it adds {added:.3g}. Lower privacy.epsilon; with privacy.noise='discrete' less is "
            "possible than with 'rounded'."
        )


def _noise_stddev(noise_multiplier: str, grid_scale: int, source: NoiseSource) -> Fraction:
    """z·K, exactly as the ledger says."""
    noiseless = is_noiseless(noise_multiplier)
    if noiseless != (source.name == _NO_NOISE):
        raise ValueError(
            f'Expected noise_multiplier "0" exactly where the source is "none", got {noise_multiplier=}, '
            f"source={source.name!r}. Noise and its accounting must agree."
        )
    return Fraction(0) if noiseless else checked_noise_multiplier(noise_multiplier) * grid_scale
