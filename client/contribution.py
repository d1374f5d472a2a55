"""From posteriors to one clipped integer vector a user: what a node sums and sends.

The model group is the exact gradient of the user's log marginal likelihood in (U, beta), taken in a public metric;
the scalars group holds numbers that every user bounds by construction. Both are functions of that user's data, the
broadcast and public constants only.

Guarantee to one user, under zero-out: see `privacy.layout`; clipping is per user and in integers.
"""

from typing import Any

from array_api_compat import array_namespace

from client.batches import Batch
from client.personalize import Choice, Solution, evidence_gain, log_prior_odds
from common.families import Family, expit
from common.model import SharedModel
from privacy.layout import Layout, clip_to_ball, scalars_to_ball, to_grid

Array = Any
_LEAST_REMAINDER = 1e-9
RELIABILITY_EXAMPLES = 10.0
"""A user's scalars count m / (m + 10): how far m examples determine that user."""


def marginal_gradient(solution: Solution) -> Array:
    """`n x (r+1) x d`, transposed gradient of each user's log marginal likelihood in (U, beta).

    d/dU = q w' - tau H U (the second term is the posterior variance of w, which a plug-in estimate would miss),
    d/dbeta = q.
    """
    xp = array_namespace(solution.w)
    marginal, w = solution.marginal, solution.w
    rows = xp.concat([marginal.rows, marginal.q[:, None, :]], axis=1)
    # one product of each user's own: [-mixing, w; 0, 1] [rows; q]
    factors = xp.zeros((w.shape[0], w.shape[1] + 1, rows.shape[1]), dtype=w.dtype, device=w.device)
    factors[:, :-1, :-1] = -marginal.mixing
    factors[:, :-1, -1] = w
    factors[:, -1, -1] = 1.0
    return factors @ rows


def scalars(
    batch: Batch, solution: Solution, model: SharedModel, unclipped: Array, *, family: Family, sparsity: int
) -> Array:
    """`n x 5` numbers in [-1/2, 1/2], in the order of `SCALARS`; a user without examples sends zeros.

    The clip bit is 1{|x| <= C} - 1/2; presence is 1/2; reliability is m / (m + 10) - 1/2; the residual score says
    whether the residuals are larger than the noise variance predicts, the b score whether the nonzeros of b are.
    """
    xp = array_namespace(solution.w)
    count = batch.count
    present = xp.astype(count > 0, solution.w.dtype)
    reliability = count / (count + RELIABILITY_EXAMPLES)
    residual_score = xp.zeros_like(count)
    if family.name == "squared":
        per_example = solution.squared_error / xp.where(count > 0, count, xp.ones_like(count))
        residual_score = xp.clip(per_example / model.noise_variance - 1, -1, 2) * reliability / 4
    b_score = xp.zeros_like(count) if not sparsity else _b_score(solution, model, sparsity)
    bit = xp.astype(unclipped, solution.w.dtype) - 0.5
    columns = [bit, xp.full_like(count, 0.5), reliability - 0.5, residual_score, b_score]
    return xp.stack(columns, axis=-1) * present[:, None]


def _b_score(solution: Solution, model: SharedModel, sparsity: int) -> Array:
    """Derivative of the log evidence of the sparse part in log b_variance, per allowed nonzero, cut to [-1/2, 1/2].

    Each feature is in or out with the prior odds of `log_prior_odds`, given what the others explain: q_j and h_j are
    the gradient and curvature without feature j, which for a feature that is in follow from those with it (Tipping and
    Faul 2003, eq. 23). With gain g_j and p_j = expit(g_j - odds) the derivative is
    sum_j p_j (v q_j^2 / (1 + v h_j)^2 - v h_j / (1 + v h_j)) / 2.
    """
    xp = array_namespace(solution.w)
    v, marginal = model.b_variance, solution.marginal
    chosen = Choice(support=solution.support, share=solution.share)
    # 1 - s h is 1 / (1 + s h_j) > 0, but for rounding where a feature is known almost exactly
    without = 1 / xp.clip(1 - chosen.variance(model) * marginal.curvature, _LEAST_REMAINDER, None)
    q, h = marginal.q * without, marginal.curvature * without
    responsibility = expit(evidence_gain(q, h, v) - log_prior_odds(model.dimension, sparsity))
    spread = v * h
    slope = (v * q * q / (1 + spread) - spread) / (1 + spread) / 2
    score = xp.clip(xp.sum(responsibility * slope, axis=-1) / sparsity, -0.5, 0.5)
    return xp.where(xp.isnan(score), 0.0, score)


def contribute(
    batch: Batch,
    solution: Solution,
    model: SharedModel,
    metric: Array,
    *,
    family: Family,
    sparsity: int,
    clipping_norm: float,
    layout: Layout,
) -> Array:
    """`n x D` int64, each user's clipped vector on the grid; zeros for a user without examples or finite numbers.

    Args:
        batch: The users' examples.
        solution: Their posteriors under `model`.
        model: The prior of this round.
        metric: `d x d` R; the gradient is clipped as R'D, so that a step R R'D is scale free.
        family: Loss family; only squared loss has a residual score.
        sparsity: Cap on nonzeros of b while training.
        clipping_norm: C, in units of the gradient in the metric.
        layout: Groups and grid of the release.
    """
    xp = array_namespace(solution.w)
    gradient = marginal_gradient(solution) @ metric  # (R'D)'
    x = xp.reshape(gradient, (gradient.shape[0], -1))
    unit, unclipped = clip_to_ball(x, clipping_norm)
    numbers = scalars_to_ball(scalars(batch, solution, model, unclipped, family=family, sparsity=sparsity))
    return to_grid((unit, numbers), layout)
