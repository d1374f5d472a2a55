"""The sparse part of a user by iterative hard thresholding: a gradient step, then only the largest entries are kept.

Source: the thresholding pass of AMHT-LRS (arXiv:2210.03505). Two departures. The step is normalised, as in Blumensath
and Davies, "Normalized iterative hard thresholding: guaranteed stability and performance" (2010): the constant step
1 / m diverges where examples are no more than features. And the schedule of thresholds needs constants that nobody
knows, so unless it is asked for the `sparsity` largest entries are kept and each user stops on its own.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from array_api_compat import array_namespace

from client.batches import Batch
from common.linalg import dot

Array = Any
_STANDSTILL = 1e-16
"""Squared change, relative to the squared size, at which a user's value counts as final."""
_SETTLED = 1e-14
"""Squared gradient on the support, relative to all of it, below which the support has nothing more to gain."""
_SAFE_STEP = 0.99
_SHORTER_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The published schedule: threshold alpha + c1 (gamma + beta / sqrt(k)), with gamma updated at every step.

    Attributes:
        alpha: Bound on the largest error of X'(y - X theta) / m, entry by entry.
        beta: Bound on the error of U w in the L2 norm.
        gamma: Bound on the error of b at the start, entry by entry.
        c1: Factor below 1/2 by which errors shrink.
    """

    alpha: float
    beta: float
    gamma: float
    c1: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse:
    """Sparse least squares of n users.

    Attributes:
        value: `n x d`, at most `sparsity` nonzeros in each row.
        converged: `n` bool, whether value and support stopped changing.
        num_steps: Steps made for the slowest user of the batch.
    """

    value: Array
    converged: Array
    num_steps: int


class CurvatureProduct(Protocol):
    """Products with each user's own positive semidefinite H."""

    def __call__(self, x: Array, users: Array | None = None, /) -> Array:
        """`n x d`, H times the rows of `x`; of those users only, if any are given."""


def rows_of(record: Any, users: Array | None) -> Any:
    """A record of arrays with a leading axis of users, with some of the users only."""
    if users is None:
        return record
    return replace(record, **{field.name: getattr(record, field.name)[users, ...] for field in fields(record)})


def largest(x: Array, count: int) -> Array:
    """`n x count` int64, where each row's largest magnitudes are, the largest first; ties go to the lower index."""
    xp = array_namespace(x)
    n, d = x.shape
    features = xp.arange(d, device=x.device)[None, :]
    left = xp.abs(x)
    picks = xp.zeros((n, min(count, d)), dtype=xp.int64, device=x.device)
    for slot in range(picks.shape[1]):
        pick = xp.argmax(left, axis=-1)
        picks[:, slot] = pick
        left = xp.where(features == pick[:, None], -xp.inf, left)
    return picks


def keep_largest(x: Array, sparsity: int) -> Array:
    """`n x d`, the `sparsity` largest magnitudes of each row of `x` and zeros elsewhere."""
    xp = array_namespace(x)
    return xp.where(_mask(x, sparsity), x, xp.zeros_like(x))


def _mask(x: Array, sparsity: int) -> Array:
    """`n x d` bool, where the largest magnitudes are."""
    xp = array_namespace(x)
    features = xp.arange(x.shape[1], device=x.device)[None, :]
    picks = largest(x, sparsity)
    mask = xp.zeros(x.shape, dtype=xp.bool, device=x.device)
    for slot in range(picks.shape[1]):
        mask = mask | (features == picks[:, slot, None])
    return mask


def sparse_part(
    batch: Batch,
    fixed: Array,
    *,
    sparsity: int,
    num_steps: int,
    thresholds: Thresholds | None = None,
    start: Array | None = None,
) -> Sparse:
    """argmin over b of |y - X (fixed + b)|^2 with at most `sparsity` nonzeros.

    Args:
        batch: Examples of n users.
        fixed: `n x d`, U w.
        sparsity: Cap on nonzeros of b.
        num_steps: Most steps.
        thresholds: The published schedule; None keeps the largest entries and stops each user when it stands still.
        start: `n x d`, b to start from; zeros if None.
    """

    def gram(x: Array, users: Array | None = None) -> Array:
        return rows_of(batch, users).products(x[:, None, :])[:, 0, :]

    cross = batch.cross - gram(fixed)
    return sparse_least_squares(gram, cross, sparsity=sparsity, num_steps=num_steps, thresholds=thresholds, start=start)


def sparse_least_squares(
    gram: CurvatureProduct,
    cross: Array,
    *,
    sparsity: int,
    num_steps: int,
    thresholds: Thresholds | None = None,
    start: Array | None = None,
) -> Sparse:
    """argmin over b of b'Hb / 2 - cross'b with at most `sparsity` nonzeros.

    Args:
        gram: Products with H.
        cross: `n x d`.
        sparsity: Cap on nonzeros of b.
        num_steps: Most steps.
        thresholds: See `sparse_part`.
        start: See `sparse_part`.
    """
    xp = array_namespace(cross)
    b = xp.zeros_like(cross) if start is None else keep_largest(start, sparsity)
    gradient = cross if start is None else cross - gram(b)
    moving = xp.ones(b.shape[:1], dtype=xp.bool, device=b.device)
    gamma = 0.0 if thresholds is None else thresholds.gamma
    steps = 0
    while steps < num_steps and bool(xp.any(moving)):
        steps += 1
        support, size = _normalised_step(gram, b, gradient, sparsity)
        if thresholds is None:
            change, curved = _descend(gram, b, gradient, support=support, size=size, sparsity=sparsity)
        else:
            c, (delta, gamma) = b + size[:, None] * gradient, _schedule(thresholds, gamma, sparsity)
            change = keep_largest(xp.where(xp.abs(c) > delta, c, xp.zeros_like(c)), sparsity) - b
            curved = gram(change)
        b = xp.where(moving[:, None], b + change, b)
        gradient = xp.where(moving[:, None], gradient - curved, gradient)
        if thresholds is None or steps == num_steps:  # a schedule runs to its end: the next threshold is another one
            moving = moving & (dot(change, change) > _STANDSTILL * dot(b, b))  # NaN stands still as well
    return Sparse(value=b, converged=~moving & xp.all(xp.isfinite(b), axis=-1), num_steps=steps)


def _schedule(thresholds: Thresholds, gamma: float, sparsity: int) -> tuple[float, float]:
    """The threshold of this step and gamma of the next: the pass of AMHT-LRS (arXiv:2210.03505)."""
    # Delta = alpha + c1 (gamma + beta / sqrt(k)); gamma <- 2 c1 gamma + 2 (alpha + c1 beta / sqrt(k))
    fixed = thresholds.alpha + thresholds.c1 * thresholds.beta / math.sqrt(max(sparsity, 1))
    return fixed + thresholds.c1 * gamma, 2 * thresholds.c1 * gamma + 2 * fixed


def _normalised_step(gram: CurvatureProduct, b: Array, gradient: Array, sparsity: int) -> tuple[Array, Array]:
    """The current support (`n x d` bool) and the step |g_S|^2 / |X g_S|^2 that is exact along g_S.

    Blumensath and Davies 2010, eq. 13. Where b is zero, or its support has nothing more to gain, S are the largest
    entries of the gradient.
    """
    xp = array_namespace(b)
    zeros = xp.zeros_like(b)
    support = b != 0
    on_support = xp.where(support, gradient, zeros)
    settled = ~(dot(on_support, on_support) > _SETTLED * dot(gradient, gradient))
    if bool(xp.any(settled)):
        support = xp.where(settled[:, None], _mask(gradient, sparsity), support)
    along = xp.where(support, gradient, zeros)
    curvature = dot(along, gram(along))
    positive = curvature > 0
    size = dot(along, along) / xp.where(positive, curvature, xp.ones_like(curvature))
    return support, xp.where(positive | xp.isnan(curvature), size, 0.0)


def _descend(
    gram: CurvatureProduct, b: Array, gradient: Array, *, support: Array, size: Array, sparsity: int
) -> tuple[Array, Array]:
    """The change of b, and H times it: a step that changes the support is shortened until the error cannot rise.

    Blumensath and Davies 2010, eq. 14: such a step is at most 0.99 |change|^2 / |X change|^2.
    """
    xp = array_namespace(b)
    change = keep_largest(b + size[:, None] * gradient, sparsity) - b
    curved = gram(change)
    users = xp.arange(b.shape[0], device=b.device)
    new, bent = change, curved
    for _ in range(_SHORTER_STEPS):
        elsewhere = xp.any((b[users, :] + new != 0) & ~support[users, :], axis=-1)
        length, bend = dot(new, new), dot(new, bent)
        too_long = elsewhere & (size * bend > _SAFE_STEP * length)
        if not bool(xp.any(too_long)):
            break
        limit = _SAFE_STEP * length[too_long] / bend[too_long]
        # only those users are looked at again
        users, size = users[too_long], xp.minimum(size[too_long] / 2, limit)
        new = keep_largest(b[users, :] + size[:, None] * gradient[users, :], sparsity) - b[users, :]
        bent = gram(new, users)
        change[users, :], curved[users, :] = new, bent
    return change, curved
