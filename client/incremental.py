"""Updating a posterior with new examples instead of training again: the past is a quadratic around its own optimum.

    theta_t = argmin sum_j weight_j loss(y_j, x_j'theta + offset_j)
                     + (delta/2) (theta - theta_{t-1})' H_{t-1} (theta - theta_{t-1}) + (1 - delta)/2 theta' R theta
    H_t = delta H_{t-1} + X'DX + (1 - delta) R,   D = diag(weight_j loss''_j) at theta_t,   H_0 = R

with delta the forgetting factor and R = diag(prior_precision), 0 at an intercept that is to be left alone. Sources:
arXiv:2108.13299 (sequential Bayesian update by a quadratic approximation) and arXiv:2010.05154, eq. 5-8 (forgetting).

The same function serves a device, whose coordinates are (w, b on its support) under the released prior
(client/personal_update.py), and plain random effects, whose coordinates are an entity's features (client/entities.py).
Batched over users or entities, each computed by products of its own: a result is the same bits whoever else is there.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from array_api_compat import array_namespace

from common.families import Family, expit
from common.linalg import apply, apply_transposed, dot, inverse_positive, transpose

Array = Any
Curvature = Literal["full", "diagonal", "diagonal-simple"]
CHUNK_BYTES = 2**20
"""Examples worked on at a time: bounds the memory, and nothing else depends on it; a quarter of it is slower."""
_MAX_ITERATIONS = 50
_MAX_HALVINGS = 40
_ARMIJO = 1e-4
_MARGIN_TOLERANCE = 1e-5
_ROUNDING = 1e-14


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """What is known of n users or entities: N(mean, precision^-1) over p coordinates each.

    Attributes:
        mean: `n x p`.
        precision: `n x p x p`, or `n x p` if diagonal. A coordinate that a user does not have has mean 0 and any
            positive precision.
    """

    mean: Array
    precision: Array

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal is kept."""
        return bool(self.precision.ndim == 2)

    @property
    def full_precision(self) -> Array:
        """`n x p x p`, also where the diagonal is kept."""
        return _diagonal_matrix(self.precision) if self.is_diagonal else self.precision

    def where(self, mask: Array, other: "Posterior") -> "Posterior":
        """Users of `self` where `mask` (`n` bool), else of `other`; to the bit."""
        xp = array_namespace(self.mean)
        wide = (slice(None), *[None] * (self.precision.ndim - 1))
        return Posterior(
            mean=xp.where(mask[:, None], self.mean, other.mean),
            precision=xp.where(mask[wide], self.precision, other.precision),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """New examples of n users in the posterior's coordinates, padded with finite examples of weight 0.

    Attributes:
        X: `n x m x p`.
        y: `n x m`; 0 or 1 for the logistic family.
        weight: `n x m`; an example counts if its weight is positive.
        offset: `n x m`, the score of everything that is not updated: a fixed effect, other entities, X beta.
    """

    X: Array
    y: Array
    weight: Array
    offset: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """Posteriors after new examples.

    Attributes:
        posterior: Of all users. Users without examples, and users whose numbers were not finite, keep theirs as it
            was, to the bit.
        converged: `n` bool, whether the mean is the optimum; False also where a result was not finite.
        finite: `n` bool; where it is False the new examples were not used.
        iterations: `n` int64, Newton steps taken; 0 without new examples.
    """

    posterior: Posterior
    converged: Array
    finite: Array
    iterations: Array


def ridge(p: int, prior_precision: float, *, like: Array, intercept: int | None = None) -> Array:
    """`p`, the diagonal R of the update: `prior_precision`, and 0 at the column `intercept`, which is left alone."""
    xp = array_namespace(like)
    column = xp.arange(p, device=like.device)
    level = xp.full((p,), prior_precision, dtype=like.dtype, device=like.device)
    return level if intercept is None else xp.where(column == intercept, xp.zeros_like(level), level)


def fresh(n: int, p: int, prior_precision: Array | float, *, like: Array, curvature: Curvature = "full") -> Posterior:
    """Posteriors of n entities of whom nothing is known: mean 0, H_0 = diag(prior_precision).

    `prior_precision` is positive for every coordinate, also for an intercept: otherwise one whose examples all have
    the same label would have no finite optimum. It is a number, `p` or `n x p`.
    """
    xp = array_namespace(like)
    zeros = xp.zeros((n, p), dtype=like.dtype, device=like.device)
    precision = zeros + prior_precision
    return Posterior(mean=zeros, precision=precision if curvature != "full" else _diagonal_matrix(precision))


def update(
    prior: Posterior,
    examples: Examples,
    *,
    family: Family,
    forgetting: float,
    prior_precision: Array | float,
    curvature: Curvature = "full",
    noise_variance: float = 1.0,
    max_iterations: int = _MAX_ITERATIONS,
) -> Update:
    """Posteriors after `examples`, the past being `prior`.

    Newton's method with exact curvature; a step is halved until the objective falls enough. It stops when a full step
    moves no margin by more than 1e-5, after which, convergence being quadratic, theta is the optimum to about 1e-10.

    Numbers that overflow are their own user's; callers who do not want NumPy's warnings about them silence these.

    Args:
        prior: theta_{t-1}, H_{t-1}.
        examples: The new ones only.
        family: `squared` (half the squared error over `noise_variance`) or `logistic`.
        forgetting: delta in [0, 1]; 1 keeps all of the past.
        prior_precision: R: a number, `p` or `n x p`. At delta = 1 it has no effect.
        curvature: What is kept of H_t: all of it, the precisions 1 / diag(H_t^-1) that give each coordinate its own
            variance, or diag(H_t), which ignores correlation and is overconfident where there is any.
        noise_variance: Of an example, for the squared family.
        max_iterations: Newton steps at most.
    """
    if not 0 <= forgetting <= 1:
        raise ValueError(f"Expected 0 <= forgetting <= 1, got {forgetting=}.")
    if curvature not in {"full", "diagonal", "diagonal-simple"}:
        raise ValueError(f"Expected curvature full, diagonal or diagonal-simple, got {curvature=}.")
    xp = array_namespace(prior.mean)
    n, m, p = examples.X.shape
    R = prior_precision + xp.zeros_like(prior.mean)
    size = max(1, CHUNK_BYTES // (8 * max(p, 1) * max(m, p, 1)))
    parts = []
    for start in range(0, max(n, 1), size):
        rows = slice(start, start + size)
        problem = _problem(prior, examples, R, rows, forgetting=forgetting, noise_variance=noise_variance)
        parts.append(_solve(problem, family, curvature, max_iterations))
    found = Optimum(**{name: xp.concat([getattr(part, name) for part in parts]) for name in Optimum.__annotations__})
    return kept_where_nothing_new(found, prior, examples.weight, curvature)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """The objective sum weight loss(X c + offset) + (c - center)'P(c - center)/2 + slope'(c - center)."""

    X: Array
    y: Array
    weight: Array
    offset: Array
    center: Array
    P: Array
    slope: Array

    def take(self, rows: Array) -> "_Problem":
        fields = (self.X, self.y, self.weight, self.offset, self.center, self.P, self.slope)
        X, y, weight, offset, center, P, slope = (field[rows, ...] for field in fields)
        return _Problem(X=X, y=y, weight=weight, offset=offset, center=center, P=P, slope=slope)


def _problem(
    prior: Posterior, examples: Examples, R: Array, rows: slice, *, forgetting: float, noise_variance: float
) -> _Problem:
    """The objective of some users, its arrays laid out alike whatever they were cut from."""
    xp = array_namespace(prior.mean)
    arrays = (prior.mean, prior.precision, R, examples.X, examples.y, examples.weight, examples.offset)
    center, past, R, X, y, weight, offset = (_contiguous(array[rows, ...]) for array in arrays)
    forgotten = (1 - forgetting) * R
    P = forgetting * past
    P = _diagonal_matrix(P + forgotten) if prior.is_diagonal else P + _diagonal_matrix(forgotten)
    return _Problem(
        X=X,
        y=y,
        weight=xp.where(weight > 0, weight / noise_variance, xp.zeros_like(weight)),
        offset=offset,
        center=center,
        P=P,
        slope=forgotten * center,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """What Newton's method found, NaN where something was not finite."""

    mean: Array
    precision: Array
    converged: Array
    iterations: Array


def _solve(problem: _Problem, family: Family, curvature: Curvature, max_iterations: int) -> Optimum:
    """Newton's method for every user; those who are done are taken out of the work."""
    xp = array_namespace(problem.X)
    n = problem.center.shape[0]
    device = problem.center.device
    mean = problem.center + 0.0
    converged, iterations = xp.zeros(n, dtype=xp.bool, device=device), xp.zeros(n, dtype=xp.int64, device=device)
    rows, left, at = xp.arange(n, device=device), problem, mean
    for _ in range(max_iterations):
        if not rows.shape[0]:
            break
        at, finished, stuck = _newton_step(left, family, at)
        mean[rows, ...] = at
        iterations[rows] = iterations[rows] + 1
        converged[rows] = finished
        more = xp.nonzero(~(finished | stuck))[0]
        if more.shape[0] < rows.shape[0]:
            rows, left, at = rows[more], left.take(more), at[more, ...]
    H = _hessian(problem, family, mean)
    return Optimum(mean=mean, precision=reduced(H, curvature), converged=converged, iterations=iterations)


def _newton_step(problem: _Problem, family: Family, at: Array) -> tuple[Array, Array, Array]:
    """The next point, who is finished, and who cannot go on (no step lowers the objective, or not finite)."""
    xp = array_namespace(at)
    eta = apply(problem.X, at) + problem.offset
    residual = problem.weight * family.residual(eta, problem.y)
    past = apply(problem.P, at - problem.center) + problem.slope
    gradient = past - apply_transposed(problem.X, residual)
    H = _curved(problem, problem.weight * family.curvature(eta))
    step = -_solved(H, gradient)
    along = apply(problem.X, step)
    sound = xp.isfinite(dot(step, gradient)) & xp.isfinite(xp.sum(along, axis=-1))
    if family.name == "squared":  # the objective is its own quadratic approximation
        return xp.where(sound[:, None], at + step, xp.nan), sound, ~sound
    line = _Line(
        eta=eta,
        along=along,
        slope=dot(step, gradient),
        linear=dot(step, past),
        quadratic=dot(step, apply(problem.P, step)) / 2,
    )
    length = _step_length(problem, family, line, sound)
    taken = xp.where(sound[:, None], at + length[:, None] * step, xp.nan)
    # padded examples have no margin
    moved = (problem.weight > 0) & (xp.abs(along) > _MARGIN_TOLERANCE)
    finished = sound & (length == 1) & ~xp.any(moved, axis=-1)
    return taken, finished, ~sound | (length == 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Line:
    """The objective along a step, less its value at the start: margins eta + t along, and t linear + t^2 quadratic.

    `slope` (`n`) is its derivative at the start.
    """

    eta: Array
    along: Array
    slope: Array
    linear: Array
    quadratic: Array


def _step_length(problem: _Problem, family: Family, line: _Line, sound: Array) -> Array:
    """`n`, the first of 1, 1/2, 1/4, ... at which the objective falls as Armijo asks; 0 if there is none.

    The loss is compared example by example and the quadratic in closed form, so that little cancels.
    """
    xp = array_namespace(line.eta)
    before = family.loss(line.eta, problem.y)
    rounding = _ROUNDING * xp.sum(problem.weight * before, axis=-1)
    length = xp.ones_like(line.slope)
    refused = sound
    for _ in range(_MAX_HALVINGS):
        after = family.loss(line.eta + length[:, None] * line.along, problem.y)
        change = xp.sum(problem.weight * (after - before), axis=-1)
        change = change + length * (line.linear + length * line.quadratic)
        refused = sound & ~(change <= _ARMIJO * length * line.slope + rounding)
        if not xp.any(refused):
            return length
        length = xp.where(refused, length / 2, length)
    return xp.where(refused, xp.zeros_like(length), length)


def _hessian(problem: _Problem, family: Family, at: Array) -> Array:
    return _curved(problem, problem.weight * family.curvature(apply(problem.X, at) + problem.offset))


def _curved(problem: _Problem, D: Array) -> Array:
    return problem.P + transpose(problem.X) @ (D[:, :, None] * problem.X)


def _solved(H: Array, g: Array) -> Array:
    """`n x p`, H^-1 g; a matrix that cannot be solved with is its own user's NaN."""
    xp = array_namespace(H)
    try:
        return xp.linalg.solve(H, g[:, :, None])[:, :, 0]
    except Exception:  # each library has its own error for this
        if H.shape[0] == 1:
            return xp.full_like(g, xp.nan)
        half = H.shape[0] // 2
        return xp.concat([_solved(H[:half, ...], g[:half, ...]), _solved(H[half:, ...], g[half:, ...])])


def reduced(H: Array, curvature: Curvature) -> Array:
    """What is kept of H."""
    xp = array_namespace(H)
    if curvature == "full":
        return H
    if curvature == "diagonal":
        return 1 / xp.linalg.diagonal(inverse_positive(H))
    return xp.linalg.diagonal(H) + 0.0


def kept_where_nothing_new(found: Optimum, prior: Posterior, weight: Array, curvature: Curvature) -> Update:
    """The optimum, except for users without examples or with numbers that are not finite, who keep their prior."""
    xp = array_namespace(prior.mean)
    axes = tuple(range(1, found.precision.ndim))
    finite = xp.all(xp.isfinite(found.mean), axis=-1) & xp.all(xp.isfinite(found.precision), axis=axes)
    quiet = ~xp.any(weight > 0, axis=-1)
    before = prior.precision
    if prior.is_diagonal != (curvature != "full"):
        before = prior.full_precision if prior.is_diagonal else reduced(before, curvature)
    new = Posterior(mean=found.mean, precision=found.precision)
    return Update(
        posterior=new.where(finite & ~quiet, Posterior(mean=prior.mean, precision=before)),
        converged=quiet | (found.converged & finite),
        finite=quiet | finite,
        iterations=xp.where(quiet, xp.zeros_like(found.iterations), found.iterations),
    )


def score(posterior: Posterior, X: Array) -> Array:
    """`n x m`, x'mean of the examples `X` (`n x m x p`): what other entities' updates take as part of their offset."""
    return apply(_contiguous(X), posterior.mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The linear predictor of each example under a posterior.

    Attributes:
        mean: `n x m`, x'mean + offset.
        stddev: `n x m`, sqrt(x'H^-1 x): of the predictor, without the example's own noise.
    """

    mean: Array
    stddev: Array

    def probability(self) -> Array:
        """`n x m`, probability of a 1 with the uncertainty averaged over, for the logistic family.

        E expit(N(m, s^2)) ~ expit(m / sqrt(1 + pi s^2 / 8)): MacKay (1992), "The evidence framework applied to
        classification networks", eq. 10.
        """
        return expit(self.mean / (1 + math.pi / 8 * self.stddev * self.stddev) ** 0.5)


def predict(posterior: Posterior, X: Array, offset: Array | float = 0.0) -> Prediction:
    """Mean and standard deviation of the linear predictors of `X` (`n x m x p`).

    A precision that is not positive definite is NaN in `stddev` for its own user.
    """
    xp = array_namespace(X)
    X = _contiguous(X)
    if posterior.is_diagonal:
        spread = X * (1 / posterior.precision)[:, None, :]
    else:
        spread = X @ inverse_positive(posterior.precision)
    return Prediction(mean=apply(X, posterior.mean) + offset, stddev=xp.sqrt(xp.sum(spread * X, axis=-1)))


def sample(posterior: Posterior, standard_normal: Array) -> Array:
    """`n x p` coefficients drawn from N(mean, precision^-1).

    Args:
        posterior: Of n users.
        standard_normal: `n x p` draws from N(0, I), the randomness.
    """
    xp = array_namespace(posterior.mean)
    if posterior.is_diagonal:
        return posterior.mean + standard_normal / xp.sqrt(posterior.precision)
    covariance = inverse_positive(posterior.precision)
    sound = xp.all(xp.isfinite(covariance), axis=(1, 2))[:, None, None]
    eye = xp.eye(posterior.mean.shape[1], dtype=covariance.dtype, device=covariance.device)[None, :, :]
    L = xp.linalg.cholesky(xp.where(sound, posterior.precision, eye))
    # H = L L', so H^-1 L z = L^-T z has covariance H^-1
    return posterior.mean + apply(covariance, apply(L, standard_normal))


def thompson_scores(posterior: Posterior, X: Array, standard_normal: Array, offset: Array | float = 0.0) -> Array:
    """`n x m` scores of `X` under one draw of each user's coefficients: the largest is the one to show."""
    return apply(_contiguous(X), sample(posterior, standard_normal)) + offset


def _diagonal_matrix(values: Array) -> Array:
    xp = array_namespace(values)
    return values[:, :, None] * xp.eye(values.shape[1], dtype=values.dtype, device=values.device)[None, :, :]


def _contiguous(X: Array) -> Array:
    """`X` in row-major order: how a product rounds depends on the layout, which must not depend on a gather."""
    xp = array_namespace(X)
    return xp.reshape(xp.asarray(xp.reshape(X, (-1,)), copy=True), X.shape)
