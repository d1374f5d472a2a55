"""The recipe, slow and plain: one user at a time, dense covariance matrices, exact integers.

Every number comes from the definition: posteriors from conditioning a joint Gaussian written out in full, evidence
from the density of y, gradients from finite differences, the grid from fractions. Nothing is shared with the code
that it checks but the record of the released prior.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from common.model import SharedModel

Array = Any
SCALE_PRIOR = 10.0


@dataclass(frozen=True, kw_only=True, eq=False)
class User:
    """One user's examples.

    Attributes:
        X: `m x d`.
        y: `m`.
        weight: `m`, positive: an example of weight c counts as c examples, so its noise variance is s2 / c.
    """

    X: Array
    y: Array
    weight: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """One user's posterior, every field written out.

    Attributes:
        w: `r`.
        b: `d`, zeros outside the support.
        support: Features in the order of their choice.
        share: Of b_variance that each of them has as its prior variance.
        scale: tau.
        theta: `d`.
        q: `d`, X' Cov(y)^-1 (y - X beta).
        H: `d x d`, X' Cov(y)^-1 X.
        precision: `(r+s) x (r+s)`, of (w, b on its support).
        squared_error: Posterior expectation of the weighted |y - X theta|^2.
    """

    w: Array
    b: Array
    support: tuple[int, ...]
    share: tuple[float, ...]
    scale: float
    theta: Array
    q: Array
    H: Array
    precision: Array
    squared_error: float


def covariance(user: User, model: SharedModel, scale: float, b_prior: Array) -> Array:
    """Cov(y) = s2 diag(1 / weight) + tau X U U'X' + X diag(b_prior) X', `b_prior` the `d` prior variances of b."""
    XU = user.X @ model.U
    return np.diag(model.noise_variance / user.weight) + scale * XU @ XU.T + (user.X * b_prior) @ user.X.T


def log_evidence(user: User, model: SharedModel, scale: float, b_prior: Array) -> float:
    """Log density of y with w and b integrated out: N(X beta, Cov(y))."""
    if not len(user.y):
        return 0.0
    C, e = covariance(user, model, scale, b_prior), user.y - user.X @ model.beta
    return float(-0.5 * (e @ np.linalg.solve(C, e) + np.linalg.slogdet(C)[1] + len(e) * math.log(2 * math.pi)))


def personal_scale(user: User, model: SharedModel, steps: int = 1) -> float:
    """tau after an EM step from 1 with 10 pseudo-observations around 1: E[w'w] by conditioning w on y."""
    d, r = model.U.shape
    scale = 1.0
    for _ in range(steps):
        cross = scale * (user.X @ model.U)  # Cov(y, w)
        gain = np.linalg.solve(covariance(user, model, scale, np.zeros(d)), cross).T
        mean = gain @ (user.y - user.X @ model.beta)
        spread = scale * np.eye(r) - gain @ cross
        scale = (SCALE_PRIOR + float(mean @ mean) + float(np.trace(spread))) / (SCALE_PRIOR + r)
    return scale


def choose(
    user: User, model: SharedModel, scale: float, sparsity: int, least_probability: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Greedily add the feature whose b ~ N(0, b_variance) raises the log evidence most.

    p = 1 / (1 + exp(odds - rise)) is its probability of being nonzero; nothing more enters once that is below
    `least_probability`. It enters with the share of b_variance with which its posterior mean is p times the mean that
    it has with all of b_variance: the average over its being nonzero or not.
    """
    d = len(model.beta)
    odds = math.log(max(d - sparsity, 1) / max(sparsity, 1))
    b_prior = np.zeros(d)
    support: list[int] = []
    shares: list[float] = []
    for _ in range(sparsity):
        now = log_evidence(user, model, scale, b_prior)
        rises = {
            j: log_evidence(user, model, scale, b_prior + model.b_variance * np.eye(d)[j]) - now
            for j in range(d)
            if j not in support
        }
        best = max(rises, key=lambda j: rises[j])
        p = 1 / (1 + math.exp(odds - rises[best]))
        if p < least_probability:
            break
        column = user.X[:, best]
        known = model.b_variance * float(column @ np.linalg.solve(covariance(user, model, scale, b_prior), column))
        support.append(best)
        shares.append(p / (1 + (1 - p) * known))
        b_prior[best] = shares[-1] * model.b_variance
    return tuple(support), tuple(shares)


def posterior(user: User, model: SharedModel, sparsity: int, least_probability: float = 0.0) -> Posterior:
    """Condition theta on y under the prior with the chosen support."""
    d, r = model.U.shape
    scale = personal_scale(user, model)
    support, share = choose(user, model, scale, sparsity, least_probability)
    b_prior = np.zeros(d)
    b_prior[list(support)] = model.b_variance * np.array(share)
    C = covariance(user, model, scale, b_prior)
    prior = scale * model.U @ model.U.T + np.diag(b_prior)  # Cov(theta)
    e = user.y - user.X @ model.beta
    q = user.X.T @ np.linalg.solve(C, e)
    mean = model.beta + prior @ q
    design = np.hstack([user.X @ model.U, user.X[:, list(support)]])
    information = design.T @ (user.weight[:, None] * design) / model.noise_variance
    precision = information + np.diag([1 / scale] * r + [1 / b_prior[j] for j in support])
    residual = user.y - user.X @ mean
    squares = user.weight * (residual**2 + np.einsum("mp,pm->m", design, np.linalg.solve(precision, design.T)))
    return Posterior(
        w=scale * model.U.T @ q,
        b=b_prior * q,
        support=support,
        share=share,
        scale=scale,
        theta=mean,
        q=q,
        H=user.X.T @ np.linalg.solve(C, user.X),
        precision=precision,
        squared_error=float(squares.sum()),
    )


def finite_differences(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central differences of a scalar function, entry by entry."""
    gradient = np.empty_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


def marginal_gradient(user: User, model: SharedModel, scale: float, b_prior: Array) -> Array:
    """`d x (r+1)`, gradient of the log evidence in (U, beta) at fixed tau and b_prior, by finite differences."""

    def evidence(shared: Array) -> float:
        moved = SharedModel(
            beta=shared[:, -1], U=shared[:, :-1], b_variance=model.b_variance, noise_variance=model.noise_variance
        )
        return log_evidence(user, moved, scale, b_prior)

    return finite_differences(evidence, np.column_stack([model.U, model.beta]))


def logistic_objective(user: User, model: SharedModel, *, scale: float, w: Array, b: Array, b_prior: Array) -> float:
    """Negative log posterior of (w, b) under logistic loss, up to a constant; b is written out in `d` numbers."""
    eta = user.X @ (model.beta + model.U @ w + b)
    loss = float(user.weight @ (np.logaddexp(0, eta) - user.y * eta))
    inside = b_prior > 0
    return loss + float(w @ w) / (2 * scale) + float((b[inside] ** 2 / b_prior[inside]).sum()) / 2


def logistic_gradient(
    user: User, model: SharedModel, *, scale: float, w: Array, b: Array, b_prior: Array
) -> tuple[Array, Array]:
    """Gradient of `logistic_objective` in w (`r`) and in b on its support."""
    eta = user.X @ (model.beta + model.U @ w + b)
    p = np.array([1 / (1 + math.exp(-t)) if t > 0 else math.exp(t) / (1 + math.exp(t)) for t in eta])
    slope = user.X.T @ (user.weight * (p - user.y))
    inside = b_prior > 0
    return model.U.T @ slope + w / scale, slope[inside] + b[inside] / b_prior[inside]


def clipped_on_grid(x: Sequence[float], clipping_norm: float, share: float, grid_scale: int) -> list[Fraction]:
    """share K x / max(C, |x|) before truncation, to 200 bits; zeros where an entry is not finite."""
    if not all(math.isfinite(value) for value in x):
        return [Fraction(0)] * len(x)
    exact = [Fraction(value) for value in x]
    norm = square_root(sum((value * value for value in exact), Fraction(0)))
    return [value * Fraction(share) * grid_scale / max(norm, Fraction(clipping_norm)) for value in exact]


def square_root(value: Fraction, bits: int = 200) -> Fraction:
    """The square root of a fraction of any size, to so many bits."""
    if not value:
        return Fraction(0)
    # an even power of two brings the numerator's root to `bits` bits
    shift = max(0, bits + (value.denominator.bit_length() - value.numerator.bit_length()) // 2 + 1)
    return Fraction(math.isqrt((value.numerator << 2 * shift) // value.denominator), 1 << shift)


def squared_norm(row: Array) -> int:
    """Sum of squares in Python integers."""
    return sum(int(value) ** 2 for value in row)
