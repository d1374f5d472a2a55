"""Updating the personal part of a network with new examples, instead of fitting it to all of them again.

    c_t = argmin sum_j weight_j loss(y_j, f(x_j; base + U w + b))
                 + (delta/2) (c - c_{t-1})' H_{t-1} (c - c_{t-1}) + (1 - delta)/2 c' R c,   c = (w, b on its support)
    H_t = delta H_{t-1} + J'DJ + (1 - delta) R,   H_0 = R = diag(1 for w, 1 / b_variance for b)

with J the derivative of the outputs f in c and D the second derivative of the losses in the outputs, both at c_t: the
update of `client.incremental`, with the network around a point in place of X. Sources: arXiv:2108.13299 (sequential
Bayesian update by a quadratic approximation) and arXiv:2010.05154, eq. 5-8 (forgetting). Where they have the Hessian
we have the Gauss-Newton one: it leaves out the network's own curvature, and is positive definite wherever it is taken.
For a last linear layer the two are the same, and under squared loss at delta = 1 the result is that of all examples at
once.

The support of b stays what it was, unlike that of `client.personal_update`: new evidence neither opens a place nor
closes one. `client.network_fit` chooses it, for a user's first examples or for all of them again.

Batched over users, each computed by products of its own; who is finished stays as it is while others go on.
"""

from dataclasses import dataclass, replace

import torch

from client.incremental import Curvature, Optimum, Posterior, Update, kept_where_nothing_new, reduced
from client.network_fit import Examples, Likelihood, LocalNetworks, NetworkFit, prior_precision, solved
from common.linalg import apply, dot
from common.networks import AdaptedNetwork

Tensor = torch.Tensor
_MAX_STEPS = 30
_MAX_HALVINGS = 20
_ARMIJO = 0.3
"""Share of a step's slope by which the objective must fall. A network may be twice as curved as Gauss-Newton has it; a
small share would take steps across the valley from one side to the other, and half of the users would not converge."""
_TOLERANCE = 1e-4
"""Squared length of a last step, in posterior standard deviations; half of it is what it gains, in nats."""
_ROUNDING = 1e-6
"""Of a sum of losses, which a network gives in float32."""


def posterior_of(found: NetworkFit) -> Posterior:
    """What a fit found, as a past to go on from: `n x (R+K)` and `n x (R+K) x (R+K)`."""
    return Posterior(mean=torch.cat([found.w, found.b], 1), precision=found.precision)


def theta_of(network: AdaptedNetwork, shared: Tensor, posterior: Posterior, support: Tensor) -> Tensor:
    """`n x P`, base + U w + b at the mean.

    Args:
        network: Its functions.
        shared: `D`, or `n x D`.
        posterior: Over (w, b) of n users.
        support: `n x K`, places in the base, -1 where unused.
    """
    w, b = posterior.mean.to(shared.dtype).split([network.architecture.rank, support.shape[1]], 1)
    return network.personal_theta(shared, w, support, b)


def update_network(
    network: AdaptedNetwork,
    shared: Tensor,
    prior: Posterior,
    support: Tensor,
    examples: Examples,
    *,
    likelihood: Likelihood,
    b_variance: float,
    forgetting: float,
    curvature: Curvature = "full",
    max_steps: int = _MAX_STEPS,
) -> Update:
    """Posteriors of n users over (w, b) after `examples`, the past being `prior`.

    Gauss-Newton's method; a step is halved until the objective falls enough. It stops after a step of at most 0.01
    posterior standard deviations. Numbers of a user that are not finite leave that user's past as it was.

    Args:
        network: Its functions.
        shared: `D`, or `n x D`: the shared part that the past was computed with.
        prior: c_{t-1}, `n x (R+K)`, and H_{t-1}, `n x (R+K) x (R+K)` or, if diagonal, `n x (R+K)`. The result has
            its dtype; products of examples are float32, whatever is solved for float64.
        support: `n x K`, places of b in the base, -1 where unused; they stay.
        examples: The new ones only.
        likelihood: Of an example.
        b_variance: Prior variance of a nonzero of b.
        forgetting: delta in [0, 1]; 1 keeps all of the past.
        curvature: What is kept of H_t, as in `client.incremental.update`.
        max_steps: Gauss-Newton steps at most.
    """
    if not 0 <= forgetting <= 1:
        raise ValueError(f"Expected 0 <= forgetting <= 1, got {forgetting=}.")
    if curvature not in {"full", "diagonal", "diagonal-simple"}:
        raise ValueError(f"Expected curvature full, diagonal or diagonal-simple, got {curvature=}.")
    weight = torch.where(examples.weight > 0, examples.weight, 0.0)
    model = LocalNetworks(network, shared, replace(examples, weight=weight), likelihood)
    center, past = prior.mean.to(torch.float64), prior.full_precision.to(torch.float64)
    R = prior_precision(center[:, : network.architecture.rank], support, b_variance)
    forgotten = (1 - forgetting) * R
    problem = _Problem(
        model=model,
        support=support,
        center=center,
        P=forgetting * past + torch.diag_embed(forgotten),
        slope=forgotten * center,
    )
    found = _solve(problem, max_steps)
    kept = Optimum(
        mean=found.mean.to(prior.mean.dtype),
        precision=reduced(found.precision, curvature).to(prior.mean.dtype),
        converged=found.converged,
        iterations=found.iterations,
    )
    return kept_where_nothing_new(kept, prior, examples.weight, curvature)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """The objective sum weight loss + (c - center)'P(c - center)/2 + slope'(c - center), of c = (w, b on support)."""

    model: LocalNetworks
    support: Tensor
    center: Tensor
    P: Tensor
    slope: Tensor

    def losses(self, c: Tensor) -> Tensor:
        """`n x m`, times their weights."""
        model = self.model
        eta = model.network.each(model.theta(*self._parts(c)), model.examples.X)
        losses: Tensor = model.examples.weight * model.likelihood.loss(eta, model.examples.y)
        return losses.to(torch.float64)

    def past(self, c: Tensor) -> Tensor:
        """`n x p`, gradient of all but the losses."""
        found: Tensor = apply(self.P, c - self.center) + self.slope
        return found

    def system(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """`n x p` gradient and `n x p x p` Gauss-Newton Hessian."""
        w, support, b = self._parts(c)
        gradient, gram = self.model.linearized(w, support, b).system(support)
        return gradient.to(torch.float64) + self.past(c), gram.to(torch.float64) + self.P

    def _parts(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        R = self.model.network.architecture.rank
        c = c.to(self.model.examples.X.dtype)
        return c[:, :R], self.support, c[:, R:]


def _solve(problem: _Problem, max_steps: int) -> Optimum:
    """Gauss-Newton for every user with examples."""
    c = problem.center
    active = (problem.model.examples.weight > 0).any(1)
    converged, iterations = torch.zeros_like(active), torch.zeros_like(active, dtype=torch.int64)
    for _ in range(max_steps):
        if not active.any():
            break
        gradient, H = problem.system(c)
        step = solved(H, -gradient)
        decrement = -dot(step, gradient)
        sound = torch.isfinite(decrement)
        finished = sound & (decrement <= _TOLERANCE)
        length = _step_length(problem, c, step, decrement, searched=active & sound & ~finished)
        moved = torch.where(sound[:, None], c + length[:, None] * step, torch.nan)
        c = torch.where(active[:, None], moved, c)
        iterations += active
        converged |= active & finished
        active = active & sound & ~finished & (length > 0)
    precision = problem.system(c)[1] if iterations.any() else problem.P
    return Optimum(mean=c, precision=precision, converged=converged, iterations=iterations)


def _step_length(problem: _Problem, c: Tensor, step: Tensor, decrement: Tensor, *, searched: Tensor) -> Tensor:
    """`n`, the first of 1, 1/2, 1/4, ... at which the objective falls as Armijo asks; 0 if there is none.

    It is 1 for users who are not `searched` (`n` bool): those at the end, whose losses no longer tell points apart.

    The losses are compared example by example and the quadratic in closed form, so that little cancels.
    """
    before = problem.losses(c)
    rounding = _ROUNDING * before.sum(1)
    linear, quadratic = dot(step, problem.past(c)), dot(step, apply(problem.P, step)) / 2
    length, refused = torch.ones_like(decrement), searched
    for _ in range(_MAX_HALVINGS):
        change = (problem.losses(c + length[:, None] * step) - before).sum(1)
        change = change + length * (linear + length * quadratic)
        refused = refused & ~(change <= rounding - _ARMIJO * length * decrement)
        if not refused.any():
            return length
        length = torch.where(refused, length / 2, length)
    return torch.where(refused, 0.0, length)
