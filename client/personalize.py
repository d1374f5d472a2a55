"""The posterior of every user given the released prior: one solver for training, new users and folding in.

theta_i = beta + U w_i + b_i with w_i ~ N(0, tau_i I) and at most `sparsity` nonzeros of b_i ~ N(0, b_variance),
chosen greedily by evidence. w is eliminated exactly (it is always in the active set), so that q and H below are the
gradient and curvature of the log marginal likelihood, and each choice of a feature is an exact rank-one update:
orthogonal matching pursuit with a Bayesian stopping rule.

Source: the linear algebra is Gaussian conditioning; the greedy step is the marginal likelihood gain of one basis
function of Tipping and Faul, "Fast marginal likelihood maximisation for sparse Bayesian models" (2003), eq. 20-25,
with the prior variance fixed and the log prior odds as threshold; the scale tau_i is one EM step of a
N(0, tau I) prior with an inverse-gamma prior of 10 pseudo-observations around 1.
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
_NEWTON_STEPS = 6
_NEWTON_STEPS_AFTER_CHOICE = 3
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
        b: `n x k`, 0 where unused.
        scale: `n`, tau.
        theta: `n x d`, beta + U w + b.
        before: The marginal likelihood without b.
        gain: `n x d`, log evidence that a first nonzero of b at each feature would gain; empty if `sparsity` is 0.
        after: The marginal likelihood with b's active set.
        precision: `n x (r+k) x (r+k)`, joint posterior precision of (w, b), or empty if not asked for.
        squared_error: `n`, posterior expectation of |y - X theta|^2.
    """

    w: Array
    support: Array
    b: Array
    scale: Array
    theta: Array
    before: Marginal
    gain: Array
    after: Marginal
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
class _Sparse:
    """b's active set: features (`n x k`, -1 unused), their indicator (`n x d`) and the first step's gains."""

    support: Array
    taken: Array
    gain: Array
    after: Marginal


def log_prior_odds(dimension: int, sparsity: int) -> float:
    """Log odds against a feature being among a user's nonzeros, if `sparsity` of `dimension` are."""
    return math.log(max(dimension - sparsity, 1) / max(sparsity, 1))


def evidence_gain(q: Array, curvature: Array, b_variance: float) -> Array:
    """Log marginal likelihood gained by letting one feature's b be N(0, b_variance) instead of zero.

    For gradient q_j and curvature h_j: (v q_j^2 / (1 + v h_j) - log(1 + v h_j)) / 2, v the prior variance.
    """
    xp = array_namespace(q)
    spread = b_variance * curvature
    return (b_variance * q * q / (1 + spread) - xp.log1p(spread)) / 2


def solve(
    batch: Batch,
    model: SharedModel,
    *,
    sparsity: int,
    support: Array | None = None,
    with_precision: bool = False,
) -> Solution:
    """Posterior under squared loss, or under a quadratic approximation of another loss.

    Args:
        batch: Examples of n users.
        model: The released prior, in arrays of the batch's library.
        sparsity: Cap on nonzeros of b; 0 leaves the sparse part out.
        support: `n x k`, features to use instead of choosing (-1: none).
        with_precision: Also compute the joint precision of (w, b).

    Returns:
        The posteriors; a user whose numbers are not finite has NaN there, and nobody else has.
    """
    xp = array_namespace(model.U)
    s2, v = model.noise_variance, model.b_variance
    low_rank, before = _eliminate(batch, model, with_curvature=sparsity > 0)
    sparse = _pursue(batch, model, low_rank, before, sparsity=sparsity, support=support)
    after = sparse.after
    # posterior means are prior covariance times the gradient of the log marginal likelihood
    w = low_rank.scale[:, None] * (after.q @ model.U) if sparsity else low_rank.w
    theta = model.beta[None, :] + w @ transpose(model.U)
    # E|y - X theta|^2 = |y - X E theta|^2 + s2 (tr(tau U'HU) + v sum of H_jj over the active set)
    spread = trace(after.mixing @ (after.rows @ model.U))
    b = w[:, :0]
    if sparsity:
        theta_b = v * after.q * sparse.taken
        theta = theta + theta_b
        b = xp.take_along_axis(theta_b, xp.clip(sparse.support, 0, None), axis=-1) * (sparse.support >= 0)
        spread = spread + v * dot(after.curvature, sparse.taken)
    # X'(y - X theta) = s2 q, so that |y - X theta|^2 needs no second look at the examples
    residual = batch.square - dot(theta, batch.cross + s2 * after.q)
    squared_error = xp.where(residual > 0, residual, xp.zeros_like(residual)) + s2 * spread
    return Solution(
        w=w,
        support=sparse.support,
        b=b,
        scale=low_rank.scale,
        theta=theta,
        before=before,
        gain=sparse.gain,
        after=after,
        precision=_precision(batch, low_rank, sparse.support, model) if with_precision else low_rank.K[:, :0, :0],
        squared_error=squared_error,
    )


def _eliminate(batch: Batch, model: SharedModel, *, with_curvature: bool) -> tuple[_LowRank, Marginal]:
    """Integrate w out: its posterior, and the marginal likelihood that the sparse part is chosen by."""
    xp = array_namespace(model.U)
    U, s2, r = model.U, model.noise_variance, model.rank
    moments = batch.products(xp.concat([transpose(U), model.beta[None, :]], axis=0))
    UG, e = moments[:, :r, :], batch.cross - moments[:, r, :]
    K, h = (UG @ U) / s2, (e @ U) / s2
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
    support: Array | None,
) -> _Sparse:
    """Add features to b one by one while their evidence beats the log prior odds; exact rank-one updates."""
    xp = array_namespace(before.q)
    d, r, s2, v = model.dimension, model.rank, model.noise_variance, model.b_variance
    n = before.q.shape[0]
    like = {"dtype": before.q.dtype, "device": before.q.device}
    picks = xp.full((n, sparsity), -1, dtype=xp.int64, device=before.q.device)
    if not sparsity:
        return _Sparse(support=picks, taken=before.q[:, :0], gain=before.q[:, :0], after=before)
    threshold = log_prior_odds(d, sparsity)
    users = xp.arange(n, device=before.q.device)
    features = xp.arange(d, device=before.q.device)[None, :]
    q, curvature = before.q, before.curvature
    taken = xp.zeros((n, d), dtype=xp.bool, device=before.q.device)
    gain = first_gain = evidence_gain(q, curvature, v)
    # H = G / s2 - left' right, a row for each direction that is integrated out: first w's, then b's
    left, right = xp.zeros((n, r + sparsity, d), **like), xp.zeros((n, r + sparsity, d), **like)
    left[:, :r, :] = low_rank.UG / s2**2
    right[:, :r, :] = low_rank.A @ low_rank.UG
    for step in range(sparsity):
        if support is not None:
            pick = support[:, step]
        else:
            if step:
                gain = xp.where(taken, -xp.inf, evidence_gain(q, curvature, v))
            best = xp.argmax(gain, axis=-1)
            pick = xp.where(gain[users, best] > threshold, best, -1)
        used = pick >= 0
        if not xp.any(used):
            continue
        picks[:, step] = pick
        at = pick * used  # an unused pick reads feature 0, to no effect
        here = r + step
        column = batch.column(at) / s2 - apply_transposed(right[:, :here, :], left[users, :here, at])
        # Sherman-Morrison: b_j ~ N(0, v) in Cov(y) lowers H by v / (1 + v H_jj) times column column'
        scaled = (v / (1 + v * column[users, at]) * used)[:, None] * column
        q = q - scaled * q[users, at][:, None]
        curvature = curvature - scaled * column
        left[:, here, :] = scaled
        right[:, here, :] = column
        taken = taken | (features == pick[:, None])
    lowering = transpose(left[:, r:, :] @ model.U) * low_rank.scale[:, None, None]
    after = Marginal(
        q=q,
        curvature=curvature,
        rows=xp.concat([before.rows, right[:, r:, :]], axis=1),
        mixing=xp.concat([before.mixing, -lowering], axis=2),
    )
    return _Sparse(support=picks, taken=xp.astype(taken, q.dtype), gain=first_gain, after=after)


def _precision(batch: Batch, low_rank: _LowRank, support: Array, model: SharedModel) -> Array:
    """Joint precision [U, E_S]' G [U, E_S] / s2 + diag(1 / tau, 1 / v); an unused slot keeps 1 / v alone."""
    xp = array_namespace(model.U)
    d, k = model.dimension, support.shape[1]
    like = {"dtype": low_rank.K.dtype, "device": low_rank.K.device}
    top = low_rank.K + xp.eye(model.rank, **like)[None, :, :] / low_rank.scale[:, None, None]
    if not k:
        return top
    E = xp.stack([one_hot(support[:, step], d) for step in range(k)], axis=1)
    mixed = (E @ transpose(low_rank.UG)) / model.noise_variance
    corner = (batch.products(E) @ transpose(E)) / model.noise_variance
    corner = corner + xp.eye(k, **like)[None, :, :] / model.b_variance
    rows = xp.concat([top, transpose(mixed)], axis=-1), xp.concat([mixed, corner], axis=-1)
    return xp.concat(rows, axis=1)


def personalize(
    batch: Batch,
    model: SharedModel,
    *,
    family: Family,
    sparsity: int,
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
        with_precision: Also compute the joint precision of (w, b).
    """
    if family.name == "squared":
        return solve(batch, model, sparsity=sparsity, with_precision=with_precision)
    if not isinstance(batch, Design):
        raise TypeError(f"Expected a Design for family={family.name}, got {type(batch).__name__}.")
    xp = array_namespace(model.U)
    like = {"dtype": model.U.dtype, "device": model.U.device}
    n = batch.y.shape[0]
    point = _Point(w=xp.zeros((n, model.rank), **like), b=xp.zeros((n, model.dimension), **like))
    support = None
    for _ in range(_NEWTON_STEPS):
        point = _newton_step(batch, model, family, point, sparsity=0, support=None)
    if sparsity:
        support = solve(_working(batch, model, family, point), model, sparsity=sparsity).support
        for _ in range(_NEWTON_STEPS_AFTER_CHOICE):
            point = _newton_step(batch, model, family, point, sparsity=sparsity, support=support)
    working = _working(batch, model, family, point)
    return solve(working, model, sparsity=sparsity, support=support, with_precision=with_precision)


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


def _newton_step(
    batch: Design, model: SharedModel, family: Family, point: _Point, *, sparsity: int, support: Array | None
) -> _Point:
    """The longest of a few step sizes that does not raise the negative log posterior, each user for itself."""
    xp = array_namespace(batch.X)
    solution = solve(_working(batch, model, family, point), model, sparsity=sparsity, support=support)
    b = solution.theta - model.beta[None, :] - apply(model.U, solution.w)
    target = _Point(w=solution.w, b=b)

    def objective(at: _Point) -> Array:
        loss = xp.sum(batch.weight * family.loss(apply(batch.X, at.theta(model)), batch.y), axis=-1)
        return loss + dot(at.w, at.w) / (2 * solution.scale) + dot(at.b, at.b) / (2 * model.b_variance)

    start = objective(point)
    best = point
    for step in _STEP_SIZES:  # increasing: the last that passes stays
        candidate = point.towards(target, step)
        better = (objective(candidate) <= start)[:, None]
        best = _Point(w=xp.where(better, candidate.w, best.w), b=xp.where(better, candidate.b, best.b))
    return best
