"""Going on under a newly released model, without the examples that the old posterior was made from.

Two ways. What the examples said about a user is kept in the old posterior, in its own coordinates c (theta = beta_old +
A_old c, A_old = [U_old, E_S]): dividing the old prior out leaves a Gaussian pseudo-observation of them. Under the new
model a user's theta has old coordinates A_old^+ (theta - beta_old), so the pseudo-observation is conditioned on like
any other (`refold`). It is exact where the new thetas lie in the old span, and otherwise silent about what the examples
said across it. Or the device keeps the examples' second moments X'DX besides (`gram_after`), d(d+3)/2 numbers a user,
from which any model's posterior follows (`refold_gram`): exactly for squared loss, and for others by the quadratic
approximation at the point where each example was used.
"""

import math
from typing import Any

from array_api_compat import array_namespace

from client.batches import Design, Gram
from client.incremental import Posterior
from client.personal_update import Personal, follow_evidence
from client.personalize import Solution, solve
from common.families import Family
from common.linalg import apply, apply_transposed, dot, inverse_positive, one_hot, transpose
from common.model import SharedModel

Array = Any
LARGEST_GRAM = 64
"""Features up to which a device may keep X'DX: 2,144 numbers a user."""
_LEAST_CURVATURE = 1e-6


def refold(
    old: Personal,
    old_model: SharedModel,
    new_model: SharedModel,
    *,
    family: Family,
    metric: Array | None = None,
    adapt: bool = True,
) -> Personal:
    """The old posterior's pseudo-observation under the new prior.

    Args:
        old: Posteriors under `old_model`.
        old_model: Released before.
        new_model: Released now, of the same features; its rank may differ.
        metric: `d x d` in which A_old^+ is the nearest point of the old span: the public second moment of the features
            measures distances as an average user's examples do. The identity without it.
        adapt: Whether tau and the shares follow the evidence under the new prior.

    Returns:
        Posteriors on the same support.
    """
    xp = array_namespace(new_model.U)
    H, prior = old.posterior.precision, old.prior_precision
    A_old, A_new = _directions(old_model, old.support), _directions(new_model, old.support)
    root = xp.eye(old_model.dimension, dtype=H.dtype, device=H.device)
    root = root if metric is None else transpose(xp.linalg.cholesky(metric))
    inverse = xp.linalg.pinv(root[None, :, :] @ A_old) @ root
    change = xp.zeros_like(A_old[:, :, 0]) + (new_model.beta - old_model.beta)[None, :]
    moved, T = apply(inverse, change), inverse @ A_new
    scale = old.scale(old_model)
    # across the old span: what beta moved, and U at the w that the prior expects
    across = root @ (A_new - A_old @ T)[:, :, : new_model.rank]
    away = apply(root, change - apply(A_old, moved))
    missed = dot(away, away) + scale * xp.sum(xp.sum(across * across, axis=-1), axis=-1)
    # the old noise variance is inside both, the new one weighs the same residuals, and what was missed adds to it
    theta = apply(root, old.theta(old_model))
    noise = _working_variance(family, new_model, dot(theta, theta))
    ratio = old_model.noise_variance / new_model.noise_variance * (noise / (noise + missed))
    information = ratio[:, None, None] * (H - _diagonal(prior))
    natural = ratio[:, None] * apply(H, old.posterior.mean)
    level = old.prior_precision[:, old_model.rank :] * (old_model.b_variance / new_model.b_variance)
    ones = xp.ones((H.shape[0], new_model.rank), dtype=H.dtype, device=H.device)
    new_prior = xp.concat([ones / scale[:, None], level], axis=1)
    precision = transpose(T) @ information @ T + _diagonal(new_prior)
    mean = apply(inverse_positive(precision), apply_transposed(T, natural - apply(information, moved)))
    found = Personal(
        posterior=Posterior(mean=mean, precision=precision), support=old.support, prior_precision=new_prior
    )
    return follow_evidence(found, new_model) if adapt else found


def _working_variance(family: Family, model: SharedModel, spread: Array) -> Array:
    """Variance of an example's working response where the predictor's variance over examples is `spread` (`n`).

    The noise's own, or for the logistic family 1 / E p (1 - p) ~ 4 sqrt(1 + pi spread / 8).
    """
    if family.name == "squared":
        return model.noise_variance + 0 * spread
    return 4 * (1 + math.pi / 8 * spread) ** 0.5


def gram_after(before: Gram | None, design: Design, theta: Array, *, family: Family, forgetting: float = 1.0) -> Gram:
    """Second moments of all examples so far, older ones discounted: delta G + X'DX, delta v + X'Dz, ...

    z = eta + residual / D is the working response at `theta`; for squared loss it is y and D is the weight, and nothing
    is approximated. Users without examples, or whose numbers are not finite, keep theirs to the bit.

    Args:
        before: The moments so far; None for none.
        design: The new examples.
        theta: `n x d`, the users' coefficients after them.
        family: Loss family.
        forgetting: delta, as in the posterior's update.

    Raises:
        ValueError: If there are more than `LARGEST_GRAM` features.
    """
    xp = array_namespace(design.X)
    d = design.X.shape[-1]
    if d > LARGEST_GRAM:
        raise ValueError(f"Expected at most {LARGEST_GRAM} features to keep X'DX of, got {d}. Refold without it.")
    weight = xp.where(design.weight > 0, design.weight, 0.0)
    if family.name == "squared":
        D, response = weight, design.y
    else:
        eta = apply(design.X, theta)
        curvature = xp.clip(family.curvature(eta), _LEAST_CURVATURE, None)
        D, response = weight * curvature, eta + family.residual(eta, design.y) / curvature
    G = transpose(design.X) @ (D[:, :, None] * design.X)
    v, square, count = apply_transposed(design.X, D * response), dot(D * response, response), xp.sum(weight, axis=-1)
    if before is None:
        zero = xp.zeros_like(v)
        before = Gram(G=xp.zeros_like(G), v=zero, square=zero[:, 0], count=zero[:, 0])
    sound = xp.isfinite(square) & xp.all(xp.isfinite(G), axis=(1, 2)) & xp.all(xp.isfinite(v), axis=-1)
    used = sound & xp.any(design.weight > 0, axis=-1)
    return Gram(
        G=xp.where(used[:, None, None], forgetting * before.G + G, before.G),
        v=xp.where(used[:, None], forgetting * before.v + v, before.v),
        square=xp.where(used, forgetting * before.square + square, before.square),
        count=xp.where(used, forgetting * before.count + count, before.count),
    )


def refold_gram(gram: Gram, model: SharedModel, *, sparsity: int) -> Personal:
    """The posterior under a model given all examples' second moments, as if they were all still here."""
    return of_solution(solve(gram, model, sparsity=sparsity, with_precision=True), model)


def of_solution(solution: Solution, model: SharedModel) -> Personal:
    """A posterior of `client.personalize` (with its precision) to go on from."""
    xp = array_namespace(solution.w)
    share = xp.where(solution.share > 0, solution.share, xp.ones_like(solution.share))
    scale = xp.ones_like(solution.w) * solution.scale[:, None]
    return Personal(
        posterior=Posterior(mean=xp.concat([solution.w, solution.b], axis=1), precision=solution.precision),
        support=solution.support,
        prior_precision=xp.concat([1 / scale, 1 / (model.b_variance * share)], axis=1),
    )


def _directions(model: SharedModel, support: Array) -> Array:
    """`n x d x (r+k)`, [U, E_S]; a column of zeros for an unused slot."""
    xp = array_namespace(model.U)
    n, k = support.shape
    U = xp.zeros((n, 1, 1), dtype=model.U.dtype, device=model.U.device) + model.U[None, :, :]
    columns = [one_hot(support[:, slot], model.dimension)[:, :, None] for slot in range(k)]
    return xp.concat([U, *columns], axis=2)


def _diagonal(values: Array) -> Array:
    xp = array_namespace(values)
    return values[:, :, None] * xp.eye(values.shape[1], dtype=values.dtype, device=values.device)[None, :, :]
