"""AMHT-LRS on the server: exact U from released, noised statistics. Pure functions; post-processing only.

The published algorithm (arXiv:2210.03505) has no fixed effect and no scale in U: beta is zero and U orthonormal after
every round. What is released are the statistics themselves, of which A has (dr)^2 numbers of noise that do not shrink
as the fit improves; docs/decisions/003 has what that costs.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from common.linalg import unsvec
from common.model import Array, IntArray, SharedModel
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.layout import Layout, cross_norm, split_groups
from server.least_squares import leading_directions, solve_for_U

CLIPPING_BOUNDS = (1e-6, 1e11)
"""As nodes accept by default, and a ledger spells with all digits."""
_TYPICAL_EXAMPLES = 20.0
_FIRST_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, eq=False)
class StatisticsState:
    """All that the server carries from round to round, functions of releases and public constants.

    Attributes:
        server_round: Rounds applied so far.
        model: beta = 0 and U with orthonormal columns; the variances are first guesses that stay.
        clipping_norm: C of the next round.
        inverse_root: `d x d` S^(-1/2), of the regularized public second moment of the features.
    """

    server_round: int
    model: SharedModel
    clipping_norm: float
    inverse_root: Array


def first_statistics_state(model: SharedModel, regularized_moment: Array, clipping_norm: float) -> StatisticsState:
    """Before the first round.

    Args:
        model: beta = 0 and an orthonormal U.
        regularized_moment: Public S, `d x d`, positive definite.
        clipping_norm: C of the first round.
    """
    values, vectors = np.linalg.eigh(regularized_moment)
    return StatisticsState(
        server_round=0,
        model=model,
        clipping_norm=clipping_norm,
        inverse_root=(vectors / np.sqrt(values)) @ vectors.T,
    )


def first_moment_norm(model: SharedModel, kind: str) -> float:
    """C of the release of second moments, a public constant: about the size of a typical user's, at prior scale.

    In the metric of S a pair moment is about theta theta' with |theta|^2 no more than the variance of y; a sum of
    y^2 x x' has that variance in all d directions.
    """
    return _within_bounds(model.noise_variance * (1.0 if kind == "pair-moments" else math.sqrt(model.dimension)))


def first_statistics_norm(model: SharedModel) -> float:
    """C of the first release of statistics: a quarter of a typical user's |A|, at prior scale.

    |A| = |w|^2 |X'X|, with |X'X| about m tr(S) / sqrt(d) and |w|^2 no more than the variance of y over tr(S) / d. A
    norm that is too small only makes users weigh alike, one that is too large adds noise.
    """
    return _within_bounds(_FIRST_SHARE * model.noise_variance * _TYPICAL_EXAMPLES * math.sqrt(model.dimension))


def _within_bounds(clipping_norm: float) -> float:
    low, high = CLIPPING_BOUNDS
    return min(max(clipping_norm, low), high)


def apply_moment(
    state: StatisticsState, noised: IntArray, *, layout: Layout, denominator: int, next_clipping_norm: float
) -> StatisticsState:
    """U along the leading directions of the released second moment.

    Args:
        state: Before the round.
        noised: `D` int64, the release.
        layout: Groups and grid of the release.
        denominator: Users of the nodes invited; times q of a sampled run.
        next_clipping_norm: C of the first release of statistics.
    """
    moment, _ = split_groups(noised, layout, denominator)
    M = unsvec(moment[None, :], state.model.dimension)[0]
    U = leading_directions(M, state.model.rank, state.inverse_root)
    model = replace(state.model, U=U)
    return replace(state, server_round=state.server_round + 1, model=model, clipping_norm=next_clipping_norm)


def apply_statistics(
    state: StatisticsState,
    noised: IntArray,
    *,
    layout: Layout,
    clipping_norm: float,
    noise_multiplier: float,
    denominator: int,
    adapt_clipping: bool,
) -> StatisticsState:
    """U from the released statistics: A vec(U) = V with A's eigenvalues floored at the edge of its noise, then QR.

    Args:
        state: Before the round.
        noised: `D` int64, the release: sum over users plus Gaussian noise, on the grid.
        layout: Groups and grid of the release.
        clipping_norm: C that the users clipped with.
        noise_multiplier: z of the release; 0 without noise.
        denominator: Users of the nodes invited, whoever answered; times q of a sampled run.
        adapt_clipping: Whether the clipping norm follows the released bits.
    """
    d, r = state.model.U.shape
    A, V, scalars = split_groups(noised, layout, denominator)
    # each user's truncation to the grid moves a coordinate by up to one step, all in one direction
    noise_stddev = clipping_norm / layout.groups[0].share * (noise_multiplier / denominator + 1 / layout.grid_scale)
    U = solve_for_U(
        unsvec(clipping_norm * A[None, :], d * r)[0],
        cross_norm(clipping_norm, d) * V,
        d,
        r,
        noise_stddev=noise_stddev,
    )
    if adapt_clipping and may_adapt(denominator, noise_multiplier):
        bit = float(scalars[0]) * math.sqrt(len(scalars)) / 2  # scalars_to_ball multiplied by the inverse
        clipping_norm = next_clipping_norm(clipping_norm, bit, bounds=CLIPPING_BOUNDS)
    model = replace(state.model, U=U)
    return replace(state, server_round=state.server_round + 1, model=model, clipping_norm=clipping_norm)
