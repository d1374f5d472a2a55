"""The posterior of every user given the released prior: one solver for training, new users and folding in.

theta_i = beta + U w_i + b_i with w_i ~ N(0, tau_i I) and at most `sparsity` nonzeros of b_i ~ N(0, b_variance),
chosen greedily by evidence. w is eliminated exactly (it is always in the active set), so that q and H below are the
gradient and curvature of the log marginal likelihood, and each choice of a feature is an exact rank-one update:
orthogonal matching pursuit in which a feature enters with so much variance that its mean is the average over its being
nonzero or not, by its posterior probability. While training only probable features enter, since improbable ones would
explain away what U has to learn; a model that is to predict averages over them (docs/decisions has the measurement).

Source: the linear algebra is Gaussian conditioning; the greedy step is the marginal likelihood gain of one basis
function of Tipping and Faul, "Fast marginal likelihood maximisation for sparse Bayesian models" (2003), eq. 20-25,
with the prior variance fixed; the probability is the logistic function of that gain less the log prior odds. The
scale tau_i is one EM step of a N(0, tau I) prior with an inverse-gamma prior of 10 pseudo-observations around 1.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from array_api_compat import array_namespace

from client.batches import Batch, Design
from common.families import Family
from common.linalg import apply, apply_transposed, dot, inverse_positive, one_hot, trace, transpose
from common.model import PersonalState, SharedModel

Array = Any
SCALE_PRIOR = 10.0
"""Pseudo-observations behind tau = 1: a user needs a lot of evidence to leave the released scale."""
WHILE_TRAINING = 0.5
"""Least probability of being nonzero with which a feature enters b while U is being learned."""
_NEWTON_STEPS = 6
_NEWTON_STEPS_AFTER_CHOICE = 6
_STEP_SIZES = (0.1, 0.3, 1.0)
_LEAST_CURVATURE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Marginal:
    """The users' log marginal likelihood, with w and the active set of b integrated out.

    Attributes:
        q: `n x d`, X' Cov(y)^-1 (y - X beta), its gradient in beta.
        curvature: `n x d`, diagonal of H = X' Cov(y)^-1 X; empty if there is no sparse part.
        rows: `n x p x d`, and
        mixing: `n x r x p`: tau U'H = mixing @ rows, the posterior variance's part of the gradient in U.
    """

    q: Array
    curvature: Array
    rows: Array
    mixing: Array

    @property
    def UH(self) -> Array:
        """`n x r x d`, tau U'H written out."""
        return self.mixing @ self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Posteriors of n users.

    Attributes:
        w: `n x r`, posterior means.
        support: `n x k` int64, -1 where unused.
        share: `n x k`, b has prior variance `share * b_variance` there: so much that the mean of b is averaged over its
            being nonzero or not, given the features chosen before.
        b: `n x k`, 0 where unused.
        scale: `n`, tau.
        theta: `n x d`, beta + U w + b.
        marginal: The marginal likelihood, with w and the chosen features of b integrated out.
        precision: `n x (r+k) x (r+k)`, joint posterior precision of (w, b), or empty if not asked for.
        squared_error: `n`, posterior expectation of |y - X theta|^2.
    """

    w: Array
    support: Array
    share: Array
    b: Array
    scale: Array
    theta: Array
    marginal: Marginal
    precision: Array
    squared_error: Array

    def state(self) -> PersonalState:
        """What the device keeps."""
        return PersonalState(
            w=self.w, support=self.support, b=self.b, scale=self.scale, precision=self.precision, theta=self.theta
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _LowRank:
    """Gaussian conditioning in the r coordinates of w: U'G, K = U'GU / s2, A = (K + I / tau)^-1."""

    UG: Array
    K: Array
    A: Array
    scale: Array
    w: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Which features are in b: `n x k` of them (-1 where unused), and with which share of b's variance."""

    support: Array
    share: Array

    def variance(self, model: SharedModel) -> Array:
        """`n x d`, prior variance of b at each feature, 0 outside the support."""
        xp = array_namespace(self.share)
        n, k = self.support.shape
        total = xp.zeros((n, model.dimension), dtype=self.share.dtype, device=self.share.device)
        for slot in range(k):
            total = total + one_hot(self.support[:, slot], model.dimension) * self.share[:, slot, None]
        return total * model.b_variance


def log_prior_odds(dimension: int, sparsity: int) -> float:
    """Log odds against a feature being among a user's nonzeros, if `sparsity` of `dimension` are."""
    return math.log(max(dimension - sparsity, 1) / max(sparsity, 1))


def evidence_gain(q: Array, curvature: Array, b_variance: float) -> Array:
    """Log marginal likelihood gained by letting one feature's b be N(0, b_variance) instead of zero.

    For gradient q_j and curvature h_j: (v q_j^2 / (1 + v h_j) - log(1 + v h_j)) / 2, v the prior variance.
    """
    xp = array_namespace(q)
    ratio = 1 + b_variance * curvature
    return (b_variance / 2) * q * q / ratio - xp.log(ratio) / 2


def solve(
    batch: Batch,
    model: SharedModel,
    *,
    sparsity: int,
    least_probability: float = 0.0,
    choice: Choice | None = None,
    with_precision: bool = False,
) -> Solution:
    """Posterior under squared loss, or under a quadratic approximation of another loss.

    Args:
        batch: Examples of n users.
        model: The released prior, in arrays of the batch's library.
        sparsity: Cap on nonzeros of b; 0 leaves the sparse part out.
        least_probability: With which a feature may enter b.
        choice: Features to use instead of choosing.
        with_precision: Also compute the joint precision of (w, b).

    Returns:
        The posteriors; a user whose numbers are not finite has NaN there, and nobody else has.
    """
    xp = array_namespace(model.U)
    s2 = model.noise_variance
    low_rank, before = _eliminate(batch, model, with_curvature=sparsity > 0)
    chosen, after = _pursue(
        batch, model, low_rank, before, sparsity=sparsity, least_probability=least_probability, choice=choice
    )
    # posterior means are prior covariance times the gradient of the log marginal likelihood
    w = low_rank.scale[:, None] * apply(transpose(model.U), after.q) if sparsity else low_rank.w
    theta = model.beta[None, :] + apply(model.U, w)
    # E|y - X theta|^2 = |y - X E theta|^2 + s2 (tr(tau U'HU) + sum of H_jj times b's prior variance)
    spread = trace(after.mixing @ (after.rows @ model.U))
    b = w[:, :0]
    if sparsity:
        variance = chosen.variance(model)
        theta_b = variance * after.q
        theta = theta + theta_b
        b = xp.take_along_axis(theta_b, xp.clip(chosen.support, 0, None), axis=-1) * (chosen.support >= 0)
        spread = spread + dot(after.curvature, variance)
    # X'(y - X theta) = s2 q, so that |y - X theta|^2 needs no second look at the examples
    residual = batch.square - dot(theta, batch.cross + s2 * after.q)
    squared_error = xp.where(residual > 0, residual, xp.zeros_like(residual)) + s2 * spread
    return Solution(
        w=w,
        support=chosen.support,
        share=chosen.share,
        b=b,
        scale=low_rank.scale,
        theta=theta,
        marginal=after,
        precision=_precision(batch, low_rank, chosen, model) if with_precision else low_rank.K[:, :0, :0],
        squared_error=squared_error,
    )


def _eliminate(batch: Batch, model: SharedModel, *, with_curvature: bool) -> tuple[_LowRank, Marginal]:
    """Integrate w out: its posterior, and the marginal likelihood that the sparse part is chosen by."""
    xp = array_namespace(model.U)
    U, s2, r = model.U, model.noise_variance, model.rank
    moments = batch.products(xp.concat([transpose(U), model.beta[None, :]], axis=0))
    UG, e = moments[:, :r, :], batch.cross - moments[:, r, :]
    K, h = (UG @ U) / s2, apply(transpose(U), e) / s2
    A, scale = _scale_by_em(K, h)
    w = apply(A, h)
    curvature = batch.diagonal / s2 - xp.sum((A @ UG) * UG, axis=1) / s2**2 if with_curvature else e[:, :0]
    q = (e - apply_transposed(UG, w)) / s2
    # tau U'H = A U'G / s2, since I - A K = A / tau
    marginal = Marginal(q=q, curvature=curvature, rows=UG, mixing=A / s2)
    return _LowRank(UG=UG, K=K, A=A, scale=scale, w=w), marginal


def _scale_by_em(K: Array, h: Array) -> tuple[Array, Array]:
    """A = (K + I / tau)^-1 and the personal variance tau, by one EM step from 1 (more gain nothing)."""
    xp = array_namespace(K)
    r = h.shape[1]
    eye = xp.eye(r, dtype=K.dtype, device=K.device)[None, :, :]
    A = inverse_positive(K + eye)
    w = apply(A, h)
    scale = (SCALE_PRIOR + dot(w, w) + trace(A)) / (SCALE_PRIOR + r)
    return inverse_positive(K + eye / scale[:, None, None]), scale


def _pursue(
    batch: Batch,
    model: SharedModel,
    low_rank: _LowRank,
    before: Marginal,
    *,
    sparsity: int,
    least_probability: float,
    choice: Choice | None,
) -> tuple[Choice, Marginal]:
    """Add features to b one by one, the most probable first; exact rank-one updates."""
    xp = array_namespace(before.q)
    d, r, s2, v = model.dimension, model.rank, model.noise_variance, model.b_variance
    n = before.q.shape[0]
    like = {"dtype": before.q.dtype, "device": before.q.device}
    support = xp.full((n, sparsity), -1, dtype=xp.int64, device=before.q.device)
    share = xp.zeros((n, sparsity), **like)
    if not sparsity:
        return Choice(support=support, share=share), before
    odds = log_prior_odds(d, sparsity)
    users = xp.arange(n, device=before.q.device)
    features = xp.arange(d, device=before.q.device)[None, :]
    q, curvature = before.q, before.curvature
    taken = xp.zeros((n, d), dtype=xp.bool, device=before.q.device)
    # H = G / s2 - left' right, a row for each direction that is integrated out: first w's, then b's
    left, right = xp.zeros((n, r + sparsity, d), **like), xp.zeros((n, r + sparsity, d), **like)
    left[:, :r, :] = low_rank.UG / s2**2
    right[:, :r, :] = low_rank.A @ low_rank.UG
    for step in range(sparsity):
        if choice is None:
            gain = xp.where(taken, -xp.inf, evidence_gain(q, curvature, v))
            best = xp.argmax(gain, axis=-1)
            probable = 1 / (1 + xp.exp(odds - gain[users, best]))  # a gain is never far below zero
            pick = xp.where(probable >= least_probability, best, -1)  # never where it is NaN
        else:
            pick, part = choice.support[:, step], choice.share[:, step]
        used = pick >= 0
        if not xp.any(used):
            break  # nor will any later feature be, for anybody
        at = pick * used  # an unused pick reads feature 0, to no effect
        if choice is None:
            # the share c with which b's mean is p times its mean if nonzero: c v h / (1 + c v h) = p v h / (1 + v h)
            part = probable / (1 + (1 - probable) * v * xp.clip(curvature[users, at], 0.0, None))
        part = xp.where(used, part, 0.0)
        support[:, step], share[:, step] = pick, part
        here = r + step
        column = batch.column(at) / s2 - apply_transposed(right[:, :here, :], left[users, :here, at])
        # Sherman-Morrison: b_j ~ N(0, p v) in Cov(y) lowers H by p v / (1 + p v H_jj) times column column'
        variance = v * part
        column = xp.where(used[:, None], column, 0.0)  # 0 times infinity would be NaN
        scaled = (variance / (1 + variance * column[users, at]))[:, None] * column
        q = q - scaled * q[users, at][:, None]
        curvature = curvature - scaled * column
        left[:, here, :] = scaled
        right[:, here, :] = column
        taken = taken | (features == pick[:, None])
    # all rows, also unused ones: a product's shape, and so its rounding, must not depend on who else is in the batch
    lowering = transpose(left[:, r:, :] @ model.U) * low_rank.scale[:, None, None]
    after = Marginal(
        q=q,
        curvature=curvature,
        rows=xp.concat([before.rows, right[:, r:, :]], axis=1),
        mixing=xp.concat([before.mixing, -lowering], axis=2),
    )
    return Choice(support=support, share=share), after


def _precision(batch: Batch, low_rank: _LowRank, chosen: Choice, model: SharedModel) -> Array:
    """Joint precision [U, E_S]' G [U, E_S] / s2 + diag(1 / tau, 1 / (p v)); an unused slot keeps 1 / v alone."""
    xp = array_namespace(model.U)
    d, k = model.dimension, chosen.support.shape[1]
    like = {"dtype": low_rank.K.dtype, "device": low_rank.K.device}
    top = low_rank.K + xp.eye(model.rank, **like)[None, :, :] / low_rank.scale[:, None, None]
    if not k:
        return top
    E = xp.stack([one_hot(chosen.support[:, step], d) for step in range(k)], axis=1)
    mixed = (E @ transpose(low_rank.UG)) / model.noise_variance
    corner = (batch.products(E) @ transpose(E)) / model.noise_variance
    share = xp.where(chosen.share > 0, chosen.share, xp.ones_like(chosen.share))
    corner = corner + xp.eye(k, **like)[None, :, :] / (model.b_variance * share)[:, None, :]
    rows = xp.concat([top, transpose(mixed)], axis=-1), xp.concat([mixed, corner], axis=-1)
    return xp.concat(rows, axis=1)


def personalize(
    batch: Batch,
    model: SharedModel,
    *,
    family: Family,
    sparsity: int,
    least_probability: float = 0.0,
    with_precision: bool = False,
) -> Solution:
    """Posterior of n users given the released prior, for any loss family.

    Squared loss is solved exactly. Others by Newton's method on the log posterior of (w, b) with a fixed number of
    steps and a per-user choice among fixed step sizes that never lets the posterior fall; b's support is chosen once,
    by evidence under the Laplace approximation at the mode without b.

    Args:
        batch: Examples; a `Design` for families other than squared.
        model: The released prior.
        family: Loss family.
        sparsity: Cap on nonzeros of b.
        least_probability: With which a feature may enter b: `WHILE_TRAINING`, or 0 to predict.
        with_precision: Also compute the joint precision of (w, b).
    """
    if family.name == "squared":
        return solve(
            batch, model, sparsity=sparsity, least_probability=least_probability, with_precision=with_precision
        )
    if not isinstance(batch, Design):
        raise TypeError(f"Expected a Design for family={family.name}, got {type(batch).__name__}.")
    xp = array_namespace(model.U)
    like = {"dtype": model.U.dtype, "device": model.U.device}
    n = batch.y.shape[0]
    point = _Point(w=xp.zeros((n, model.rank), **like), b=xp.zeros((n, model.dimension), **like))
    none = Choice(support=xp.zeros((n, 0), dtype=xp.int64, device=model.U.device), share=point.w[:, :0])
    for _ in range(_NEWTON_STEPS):
        point = _newton_step(batch, model, family, point, none)
    chosen = none
    if sparsity:
        working = _working(batch, model, family, point)
        found = solve(working, model, sparsity=sparsity, least_probability=least_probability)
        chosen = Choice(support=found.support, share=found.share)
        for _ in range(_NEWTON_STEPS_AFTER_CHOICE):
            point = _newton_step(batch, model, family, point, chosen)
    working = _working(batch, model, family, point)
    solution = solve(working, model, sparsity=sparsity, choice=chosen, with_precision=with_precision)
    # what is kept is a point whose posterior was checked, not the last Newton step, which may overshoot
    point = _newton_step(batch, model, family, point, chosen)
    b = xp.take_along_axis(point.b, xp.clip(solution.support, 0, None), axis=-1) * (solution.support >= 0)
    return replace(solution, w=point.w, b=b, theta=point.theta(model))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Point:
    """Where Newton's method stands: w (`n x r`) and b written out (`n x d`)."""

    w: Array
    b: Array

    def theta(self, model: SharedModel) -> Array:
        return model.beta[None, :] + apply(model.U, self.w) + self.b

    def towards(self, other: "_Point", step: float) -> "_Point":
        return _Point(w=self.w + step * (other.w - self.w), b=self.b + step * (other.b - self.b))


def _working(batch: Design, model: SharedModel, family: Family, point: _Point) -> Design:
    """Newton's weighted least squares: targets eta + residual / curvature, weights times the curvature."""
    xp = array_namespace(batch.X)
    eta = apply(batch.X, point.theta(model))
    # far out on the logistic curve p(1-p) underflows; the floor keeps the target finite and only damps the step
    curvature = xp.clip(family.curvature(eta), _LEAST_CURVATURE, None)
    return replace(batch, y=eta + family.residual(eta, batch.y) / curvature, weight=batch.weight * curvature)


def _newton_step(batch: Design, model: SharedModel, family: Family, point: _Point, chosen: Choice) -> _Point:
    """The longest of a few step sizes that does not raise the negative log posterior, each user for itself."""
    xp = array_namespace(batch.X)
    working = _working(batch, model, family, point)
    solution = solve(working, model, sparsity=chosen.support.shape[1], choice=chosen)
    target = _Point(w=solution.w, b=solution.theta - model.beta[None, :] - apply(model.U, solution.w))
    variance = chosen.variance(model)
    b_precision = xp.where(variance > 0, 1 / xp.where(variance > 0, variance, xp.ones_like(variance)), 0.0)

    def objective(at: _Point) -> Array:
        loss = xp.sum(batch.weight * family.loss(apply(batch.X, at.theta(model)), batch.y), axis=-1)
        return loss + dot(at.w, at.w) / (2 * solution.scale) + dot(b_precision * at.b, at.b) / 2

    start = objective(point)
    best = point
    for step in _STEP_SIZES:  # increasing: the last that passes stays
        candidate = point.towards(target, step)
        better = (objective(candidate) <= start * (1 + 1e-12))[:, None]  # rounding must not refuse the last steps
        best = _Point(w=xp.where(better, candidate.w, best.w), b=xp.where(better, candidate.b, best.b))
    return best
