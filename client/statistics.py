"""What a user contributes to AMHT-LRS: the statistics that U is solved from, and second moments for its start.

Guarantee to one user, under zero-out: see `privacy.layout`; clipping is per user and in integers.
"""

from typing import Any

from array_api_compat import array_namespace

from client.alternation import LocalFit
from client.batches import Batch, Design
from common.linalg import apply, dot, svec, transpose, triangle
from common.task import Moment
from privacy.layout import Layout, clip_to_ball, cross_norm, scalars_to_ball, to_grid

Array = Any


def statistics(batch: Batch, fit: LocalFit) -> tuple[Array, Array]:
    """A (`n x dr x dr`) and V (`n x dr`) with which |y - X (U w + b)|^2 = u'A u - 2 V'u + constant, u = vec(U).

    vec is column-major: A = (w w') kron (X'X) acts on U as X'X U w w' only if the columns of U lie one after another.
    """
    xp = array_namespace(fit.w)
    G, V = _second_moments(batch, fit)
    n, d = fit.b.shape
    size = fit.w.shape[1] * d
    # line "U" of AMHT-LRS (arXiv:2210.03505): A = sum_i (w_i w_i') kron (X_i'X_i), V = sum_i X_i'(y_i - X_i b_i) w_i'
    outer = fit.w[:, :, None] * fit.w[:, None, :]
    return xp.reshape(outer[:, :, None, :, None] * G[:, None, :, None, :], (n, size, size)), V


def _second_moments(batch: Batch, fit: LocalFit) -> tuple[Array, Array]:
    """X'X (`n x d x d`), and V = vec(X'(y - X b) w') (`n x dr`), column-major."""
    xp = array_namespace(fit.w)
    n, d = fit.b.shape
    G = batch.products(xp.eye(d, dtype=fit.b.dtype, device=fit.b.device))
    residual = batch.cross - apply(G, fit.b)
    return G, xp.reshape(fit.w[:, :, None] * residual[:, None, :], (n, fit.w.shape[1] * d))


def _packed_statistics(batch: Batch, fit: LocalFit) -> tuple[Array, Array]:
    """svec(A) and V, without A written out."""
    xp = array_namespace(fit.w)
    G, V = _second_moments(batch, fit)
    n, d = fit.b.shape
    r = fit.w.shape[1]
    row, column, factor = triangle(r * d, like=fit.w)
    outer = xp.reshape(fit.w[:, :, None] * fit.w[:, None, :], (n, r * r))
    entries = xp.take(xp.reshape(G, (n, d * d)), (row % d) * d + column % d, axis=1)
    weights = xp.take(outer, (row // d) * r + column // d, axis=1)
    return weights * entries * factor, V


def second_moment(design: Design, kind: Moment) -> Array:
    """`n x d x d`, a moment of each user's examples whose leading eigenvectors point along U.

    "moments" is sum_j y_j^2 x_j x_j' / m. "pair-moments" is the mean of y_i y_j x_i x_j' over pairs i != j,
    (v v' - sum_j y_j^2 x_j x_j') / (m (m - 1)) with v = X'y: its mean is theta theta' (for features of second moment
    I) with neither noise nor the fourth moment of x in it. Zero for users with too few examples.

    Args:
        design: Examples; weights count as so many copies.
        kind: Which.
    """
    xp = array_namespace(design.X)
    v, count = design.cross, design.count
    squares = transpose(design.X) @ ((design.weight * design.y * design.y)[:, :, None] * design.X)
    if kind == "moments":
        enough, number = count > 0, count
    else:
        enough, number = count >= 2, count * (count - 1)
        squares = v[:, :, None] * v[:, None, :] - squares
    mean = squares / xp.where(enough, number, xp.ones_like(number))[:, None, None]
    return xp.where(enough[:, None, None], mean, xp.zeros_like(mean))


def contribute_statistics(batch: Batch, fit: LocalFit, *, clipping_norm: float, layout: Layout) -> Array:
    """`n x D` int64, each user's svec(A), V and scalars on the grid; zeros without examples or finite numbers.

    A and V of a user are scaled by one factor, min(1, C / |A|_F, C' / |V|) with C' = `cross_norm(C, d)`: it is a weight
    of that user's examples, so that the solution of A vec(U) = V stays a least squares solution.

    Args:
        batch: Examples of n users.
        fit: Their w and b.
        clipping_norm: C.
        layout: Groups A, V and scalars (clip bit, presence).
    """
    xp = array_namespace(fit.w)
    A, V = _packed_statistics(batch, fit)
    # V in units in which it may be as long as A
    both, joint = xp.concat([A, V / cross_norm(1.0, fit.b.shape[1])], axis=1), A.shape[1]
    # norms in units of the largest entry: nothing overflows that is finite
    top = xp.max(xp.abs(both), axis=-1)
    usable = xp.isfinite(top) & (batch.count > 0)
    top = xp.where(usable & (top > 0), top, xp.ones_like(top))
    direction = xp.where(usable[:, None], both, xp.zeros_like(both)) / top[:, None]
    A, V = direction[:, :joint], direction[:, joint:]
    norm = xp.sqrt(xp.maximum(dot(A, A), dot(V, V)))
    within = norm <= clipping_norm / top
    factor = xp.where(within, top / clipping_norm, 1 / xp.where(norm > 0, norm, xp.ones_like(norm)))
    numbers = _scalars(within, usable, like=fit.w)
    return to_grid((A * factor[:, None], V * factor[:, None], numbers), layout)


def contribute_moment(design: Design, kind: Moment, whitening: Array, *, clipping_norm: float, layout: Layout) -> Array:
    """`n x D` int64, each user's svec(W M W') and scalars on the grid; zeros without examples or finite numbers.

    Args:
        design: Examples of n users.
        kind: Of the second moment M.
        whitening: `d x d` W, public.
        clipping_norm: C, for the Frobenius norm of W M W'.
        layout: Groups moment and scalars (clip bit, presence).
    """
    xp = array_namespace(design.X)
    moment = svec(whitening @ second_moment(design, kind) @ transpose(whitening))
    usable = xp.all(xp.isfinite(moment), axis=-1) & (design.count > 0)
    unit, within = clip_to_ball(xp.where(usable[:, None], moment, xp.zeros_like(moment)), clipping_norm)
    return to_grid((unit, _scalars(within, usable, like=design.X)), layout)


def _scalars(within: Array, usable: Array, *, like: Array) -> Array:
    """`n x 2`, clip bit 1{norm <= C} - 1/2 and presence 1/2, in their ball; zeros for who has nothing to say."""
    xp = array_namespace(like)
    bit = xp.astype(within, like.dtype) - 0.5
    values = xp.stack([bit, xp.full_like(bit, 0.5)], axis=-1) * xp.astype(usable, like.dtype)[:, None]
    return scalars_to_ball(values)
