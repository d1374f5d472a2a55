"""Updating what a device keeps: the posterior of (w, b on its support) given the released prior and all so far.

theta = beta + U w + b. In the coordinates c = (w, b_S) an example x is (U'x, x_S) with offset x'beta, and the released
prior is c ~ N(0, diag(prior_precision)^-1): 1 / tau for w, 1 / (share v) for b. Since forgetting gives back as much of
the prior as it takes (client/incremental.py), H_t is always the prior's precision plus what the examples said, so that
the prior of a coordinate can be changed later without them (`reweighed`): tau follows the user, and a feature's share
of b's variance follows its posterior probability of being nonzero, as in client/personalize.py.

The support changes by evidence. For one inside, the examples of the past are in H; it leaves when the evidence is
against it. For one outside the past is gone: what is known of it is what the new examples say with all else
integrated out, and it takes a free place, or the place of a feature for which there is less evidence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from client.batches import Design
from client.incremental import Examples, Posterior, Update, update
from client.personalize import SCALE_PRIOR, evidence_gain, log_prior_odds
from common.families import Family
from common.linalg import apply, apply_transposed, dot, inverse_positive, one_hot, trace, transpose
from common.model import PersonalState, SharedModel

Array = Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Personal:
    """Posteriors of n users of a released model.

    Attributes:
        posterior: Over (w, b on the support), `n x (r+k)`; full precision.
        support: `n x k` int64, -1 where unused.
        prior_precision: `n x (r+k)`, the diagonal prior that is inside the precision.
    """

    posterior: Posterior
    support: Array
    prior_precision: Array

    def theta(self, model: SharedModel) -> Array:
        """`n x d`, beta + U w + b."""
        r = model.rank
        theta = model.beta[None, :] + apply(model.U, self.posterior.mean[:, :r])
        for slot in range(self.support.shape[1]):
            theta = theta + one_hot(self.support[:, slot], model.dimension) * self.posterior.mean[:, r + slot, None]
        return theta

    def scale(self, model: SharedModel) -> Array:
        """`n`, tau."""
        xp = array_namespace(self.prior_precision)
        first = self.prior_precision[:, 0] if model.rank else xp.ones(self.support.shape[0], dtype=model.U.dtype)
        return 1 / first

    def state(self, model: SharedModel) -> PersonalState:
        """As the device store keeps it; `share` of it has no place there yet."""
        r = model.rank
        return PersonalState(
            w=self.posterior.mean[:, :r],
            support=self.support,
            b=self.posterior.mean[:, r:],
            scale=self.scale(model),
            precision=self.posterior.precision,
            theta=self.theta(model),
        )

    def share(self, model: SharedModel) -> Array:
        """`n x k`, the share of b's variance in each slot's prior; 0 where unused."""
        xp = array_namespace(self.prior_precision)
        share = 1 / (model.b_variance * self.prior_precision[:, model.rank :])
        return xp.where(self.support >= 0, share, 0.0)


def released_prior(model: SharedModel, n: int, *, sparsity: int) -> Personal:
    """n users of whom nothing is known: w ~ N(0, I), no support."""
    xp = array_namespace(model.U)
    like = {"dtype": model.U.dtype, "device": model.U.device}
    p = model.rank + sparsity
    level = xp.ones((n, p), **like)
    level[:, model.rank :] = 1 / model.b_variance
    eye = xp.eye(p, **like)[None, :, :]
    return Personal(
        posterior=Posterior(mean=xp.zeros((n, p), **like), precision=level[:, :, None] * eye),
        support=xp.full((n, sparsity), -1, dtype=xp.int64, device=model.U.device),
        prior_precision=level,
    )


def from_state(state: PersonalState, model: SharedModel, *, share: Array | None = None) -> Personal:
    """What the store kept, as a posterior to go on from.

    Args:
        state: Of n users, computed with `model`.
        model: The prior they were computed with.
        share: `n x k`, `Solution.share`. Without it each b counts as certain to be nonzero in the prior, which is
            nearly so for those that are, and lets the improbable ones leave sooner.
    """
    xp = array_namespace(state.w)
    certain = xp.ones_like(state.b) if share is None else xp.where(share > 0, share, xp.ones_like(share))
    scale = xp.ones_like(state.w) * state.scale[:, None]
    return Personal(
        posterior=Posterior(mean=xp.concat([state.w, state.b], axis=1), precision=state.precision),
        support=state.support,
        prior_precision=xp.concat([1 / scale, 1 / (model.b_variance * certain)], axis=1),
    )


def with_slots(personal: Personal, model: SharedModel, sparsity: int) -> Personal:
    """The same posteriors with room for `sparsity` entries of b, at least as many as before; the new ones are free."""
    xp = array_namespace(personal.support)
    n, k = personal.support.shape
    wider = released_prior(model, n, sparsity=sparsity - k)
    r = model.rank
    old, new = personal.posterior.precision, wider.posterior.precision[:, r:, r:]
    corner = xp.zeros((n, r + k, sparsity - k), dtype=old.dtype, device=old.device)
    precision = xp.concat([xp.concat([old, corner], axis=2), xp.concat([transpose(corner), new], axis=2)], axis=1)
    mean = xp.concat([personal.posterior.mean, wider.posterior.mean[:, r:]], axis=1)
    return Personal(
        posterior=Posterior(mean=mean, precision=precision),
        support=xp.concat([personal.support, wider.support], axis=1),
        prior_precision=xp.concat([personal.prior_precision, wider.prior_precision[:, r:]], axis=1),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PersonalUpdate:
    """Posteriors after new examples; see `client.incremental.Update`."""

    personal: Personal
    converged: Array
    iterations: Array


def update_personal(
    before: Personal,
    design: Design,
    model: SharedModel,
    *,
    family: Family,
    forgetting: float = 1.0,
    change_support: bool = True,
) -> PersonalUpdate:
    """Posteriors of n users after new examples.

    Users without examples, and users whose numbers are not finite, keep theirs to the bit.

    Args:
        before: What is kept, or `released_prior` for new users.
        design: The new examples, all d features.
        model: The prior behind `before`.
        family: Loss family.
        forgetting: delta of `client.incremental.update`; what is forgotten goes back to the released prior.
        change_support: Whether tau, the shares and the support follow the evidence; otherwise they stay, and for
            squared loss at forgetting 1 the result is that of all examples at once, exactly.
    """
    first = _conditioned(before, design, model, family=family, forgetting=forgetting)
    if not change_support:
        return _kept(first, before)
    after = Personal(posterior=first.posterior, support=before.support, prior_precision=before.prior_precision)
    chosen = _followed(after, model)
    if before.support.shape[1]:
        chosen = _grown(chosen, _marginal(after, design, model, family), model)
    moved = with_prior(before, chosen.support, chosen.prior_precision)
    return _kept(_conditioned(moved, design, model, family=family, forgetting=forgetting), before, moved)


def examples_of(design: Design, model: SharedModel, support: Array) -> Examples:
    """The examples in the coordinates (w, b_S): X = [X U, X_S], offset = X beta."""
    return Examples(
        X=coordinates(design.X, model, support),
        y=design.y,
        weight=design.weight,
        offset=(design.X @ model.beta[:, None])[:, :, 0],
    )


def coordinates(X: Array, model: SharedModel, support: Array) -> Array:
    """`n x m x (r+k)`, [X U, X_S] of `X` (`n x m x d`); zeros for an unused slot."""
    xp = array_namespace(X)
    n, m, _ = X.shape
    at = xp.clip(support, 0, None)[:, None, :] + xp.zeros((n, m, 1), dtype=xp.int64, device=X.device)
    picked = xp.where((support >= 0)[:, None, :], xp.take_along_axis(X, at, axis=2), 0.0)
    return xp.concat([X @ model.U, picked], axis=2)


def with_prior(before: Personal, support: Array, prior_precision: Array) -> Personal:
    """The same past under another prior, on another support.

    A slot whose feature changes is conditioned on b = 0 for the feature that leaves, and starts at its prior for the
    one that enters. Everything else is exact: the examples' part of the precision, and precision times mean (the
    prior's mean being 0), do not depend on the prior.
    """
    xp = array_namespace(prior_precision)
    r = prior_precision.shape[1] - support.shape[1]
    n = support.shape[0]
    always = xp.ones((n, r), dtype=xp.bool, device=support.device)
    stays = xp.concat([always, before.support == support], axis=1)
    both = stays[:, :, None] & stays[:, None, :]
    eye = xp.eye(stays.shape[1], dtype=prior_precision.dtype, device=prior_precision.device)[None, :, :]
    H, mean = before.posterior.precision, before.posterior.mean
    information = H - before.prior_precision[:, :, None] * eye
    natural = xp.where(stays, apply(H, mean), 0.0)
    return _under(xp.where(both, information, 0.0), natural, support, prior_precision, before)


def _under(information: Array, natural: Array, support: Array, prior_precision: Array, kept: Personal) -> Personal:
    """What examples said (precision and precision times mean), under a prior; `kept` where it is unchanged."""
    xp = array_namespace(natural)
    eye = xp.eye(natural.shape[1], dtype=natural.dtype, device=natural.device)[None, :, :]
    H = information + prior_precision[:, :, None] * eye
    mean = apply(inverse_positive(H), natural)
    same = xp.all(kept.prior_precision == prior_precision, axis=-1) & xp.all(kept.support == support, axis=-1)
    return Personal(
        posterior=kept.posterior.where(same, Posterior(mean=mean, precision=H)),
        support=support,
        prior_precision=prior_precision,
    )


def follow_evidence(personal: Personal, model: SharedModel) -> Personal:
    """The same past with tau and the shares as it suggests them; a feature with evidence against it leaves."""
    chosen = _followed(personal, model)
    return with_prior(personal, chosen.support, chosen.prior_precision)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chosen:
    """A support (`n x k`), the prior precision of (w, b) for it, and each slot's evidence gain (-inf if unused)."""

    support: Array
    prior_precision: Array
    gain: Array


def _followed(personal: Personal, model: SharedModel) -> _Chosen:
    """What the evidence in a posterior makes of its own tau, shares and support."""
    xp = array_namespace(personal.prior_precision)
    r, v = model.rank, model.b_variance
    H, prior = personal.posterior.precision, personal.prior_precision
    eye = xp.eye(prior.shape[1], dtype=prior.dtype, device=prior.device)[None, :, :]
    natural = apply(H, personal.posterior.mean)

    def under(other: Array) -> tuple[Array, Array]:
        V = inverse_positive(H + (other - prior)[:, :, None] * eye)
        return V, apply(V, natural)

    V, c = under(xp.concat([xp.ones_like(prior[:, :r]), prior[:, r:]], axis=1))
    # one EM step from tau = 1, as in client.personalize
    scale = (SCALE_PRIOR + dot(c[:, :r], c[:, :r]) + trace(V[:, :r, :r])) / (SCALE_PRIOR + r)
    level = xp.ones_like(prior[:, :r]) / scale[:, None]
    V, c = under(xp.concat([level, prior[:, r:]], axis=1))
    variance = xp.linalg.diagonal(V)[:, r:]
    # gradient and curvature at b_j = 0 of the log marginal likelihood, all other coordinates integrated out
    q, curvature = c[:, r:] / variance, xp.clip(1 / variance - prior[:, r:], 0.0, None)
    gain = evidence_gain(q, curvature, v)
    stays = (personal.support >= 0) & (gain > 0)
    b_level = xp.where(stays, 1 / (v * _share(gain, curvature, model, stays.shape[1])), 1 / v)
    return _Chosen(
        support=xp.where(stays, personal.support, -1),
        prior_precision=xp.concat([level, b_level], axis=1),
        gain=xp.where(stays, gain, -xp.inf),
    )


def _share(gain: Array, curvature: Array, model: SharedModel, sparsity: int) -> Array:
    """The share of b's variance at which its mean is the mean if nonzero times the probability that it is."""
    xp = array_namespace(gain)
    odds = log_prior_odds(model.dimension, sparsity)
    probable = 1 / (1 + xp.exp(xp.clip(odds - gain, -700.0, 700.0)))
    return probable / (1 + (1 - probable) * model.b_variance * curvature)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Marginal:
    """The new examples' log marginal likelihood in b, at the optimum of what is in the model and with that integrated.

    Attributes:
        q: `n x d`, its gradient, X'(residual).
        curvature: `n x d`, diagonal of H = X'DX - X'DZ V Z'DX.
        column: `n` features -> `n x d`, their columns of H.
        inside: `n x d` bool, features that have a slot.
    """

    q: Array
    curvature: Array
    column: Callable[[Array], Array]
    inside: Array


def _marginal(after: Personal, design: Design, model: SharedModel, family: Family) -> _Marginal:
    xp = array_namespace(design.X)
    examples = examples_of(design, model, after.support)
    Z = examples.X
    weight = xp.where(design.weight > 0, design.weight, 0.0) / model.noise_variance
    eta = apply(Z, after.posterior.mean) + examples.offset
    D = weight * family.curvature(eta)
    rows = transpose(Z * D[:, :, None]) @ design.X
    mixed = inverse_positive(after.posterior.precision) @ rows
    users = xp.arange(D.shape[0], device=D.device)
    inside = xp.zeros((D.shape[0], model.dimension), dtype=xp.bool, device=D.device)
    for slot in range(after.support.shape[1]):
        inside = inside | (one_hot(after.support[:, slot], model.dimension) > 0)

    def column(feature: Array) -> Array:
        own = apply_transposed(design.X, D * design.X[users, :, feature])
        return own - apply_transposed(rows, mixed[users, :, feature])

    return _Marginal(
        q=apply_transposed(design.X, weight * family.residual(eta, design.y)),
        curvature=apply_transposed(design.X * design.X, D) - xp.sum(mixed * rows, axis=1),
        column=column,
        inside=inside,
    )


def _grown(chosen: _Chosen, marginal: _Marginal, model: SharedModel) -> _Chosen:
    """Features that the new examples speak for, the best first, in free places or those of weaker ones."""
    xp = array_namespace(marginal.q)
    q, curvature, taken = marginal.q, xp.clip(marginal.curvature, 0.0, None), marginal.inside
    n, d = q.shape
    k, v = chosen.support.shape[1], model.b_variance
    users, slots = xp.arange(n, device=q.device), xp.arange(k, device=q.device)[None, :]
    left, right = (xp.zeros((n, k, d), dtype=q.dtype, device=q.device) for _ in range(2))
    for step in range(k):
        gain = xp.where(taken, -xp.inf, evidence_gain(q, curvature, v))
        pick, place = xp.argmax(gain, axis=-1), xp.argmin(chosen.gain, axis=-1)
        best = gain[users, pick]
        enters = (best > 0) & (best > chosen.gain[users, place])  # never where it is NaN
        if not xp.any(enters):
            break
        share = xp.where(enters, _share(best, curvature[users, pick], model, k), 1.0)
        chosen = _placed(chosen, (slots == place[:, None]) & enters[:, None], pick, best, 1 / (v * share))
        # Sherman-Morrison, as in client.personalize: the next feature is judged with this one in
        column = marginal.column(pick) - apply_transposed(right, left[users, :, pick])
        column = xp.where(enters[:, None], column, 0.0)
        variance = v * share
        scaled = (variance / (1 + variance * column[users, pick]))[:, None] * column
        q = q - scaled * q[users, pick][:, None]
        curvature = xp.clip(curvature - scaled * column, 0.0, None)
        left[:, step, :], right[:, step, :] = scaled, column
        taken = taken | ((one_hot(pick, d) > 0) & enters[:, None])
    return chosen


def _placed(chosen: _Chosen, here: Array, feature: Array, gain: Array, level: Array) -> _Chosen:
    """A feature (`n`) with its gain and prior precision in the slot where `here` (`n x k`) is true."""
    xp = array_namespace(gain)
    r = chosen.prior_precision.shape[1] - here.shape[1]
    b_level = xp.where(here, level[:, None], chosen.prior_precision[:, r:])
    return _Chosen(
        support=xp.where(here, feature[:, None], chosen.support),
        prior_precision=xp.concat([chosen.prior_precision[:, :r], b_level], axis=1),
        gain=xp.where(here, gain[:, None], chosen.gain),
    )


def _conditioned(before: Personal, design: Design, model: SharedModel, *, family: Family, forgetting: float) -> Update:
    return update(
        before.posterior,
        examples_of(design, model, before.support),
        family=family,
        forgetting=forgetting,
        prior_precision=before.prior_precision,
        noise_variance=model.noise_variance,
    )


def _kept(found: Update, before: Personal, moved: Personal | None = None) -> PersonalUpdate:
    """The update, except where it is none."""
    xp = array_namespace(before.support)
    moved = before if moved is None else moved
    # not converged within the limit is still an update; no iterations is a quiet user, and not finite keeps the past
    changed = (found.iterations > 0) & found.finite
    return PersonalUpdate(
        personal=Personal(
            posterior=found.posterior.where(changed, before.posterior),
            support=xp.where(changed[:, None], moved.support, before.support),
            prior_precision=xp.where(changed[:, None], moved.prior_precision, before.prior_precision),
        ),
        converged=found.converged,
        iterations=found.iterations,
    )
