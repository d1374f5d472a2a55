"""A round as a pure function: the released, noised means in, the next server state out.

Everything here is post-processing of a release (it may be published), so it costs nothing, and nothing here could
see an un-noised number. The step is gradient ascent on the users' average log marginal likelihood in (U, beta), in
the metric R R' that a typical user's own estimate has as covariance; it shrinks where the release says that the
gradient has fallen to the noise.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from common.model import Array, SharedModel
from privacy.clipping import may_adapt, next_clipping_norm
from privacy.layout import Layout, split_groups

CLIPPING_BOUNDS = (1e-2, 1e3)
"""Public bounds of the clipping norm, in units of the gradient in the metric."""
MOMENTUM = 0.5
STEP_DECAY = 0.5
LEAST_PROGRESS = 0.2
_LATE = 4.0
"""`elapsed` from which on U gives back the energy of its noise; before, noise also helps to find new directions."""
_RELIABILITY_EXAMPLES = 10.0
_RELIABILITY_BOUNDS = (0.2, 0.9)
_FIRST_EFFECTIVE_EXAMPLES = 20.0
_NOISE_VARIANCE_BOUNDS = (1e-4, 4.0)
_B_VARIANCE_BOUNDS = (1e-6, 1e3)
_TYPICAL_SCORE = 0.2
_SCORE_BOUNDS = (-0.63, 0.5)
_LEAST_PRESENCE = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """All that the server carries from round to round; every field is a function of releases and public constants.

    Attributes:
        server_round: Rounds applied so far.
        model: The current prior.
        velocity: `d x (r+1)`, momentum of (U, beta).
        elapsed: Noise-weighted number of steps so far; the step size is 1 / (1 + elapsed / 2).
        U_noise: Variance of the noise in each coordinate of U in the metric, R^-1 U, that has not been given back.
        reliability_sum: Sum over rounds of the released mean reliability m / (m + 10).
        effective_examples: Examples of a typical user, from the released reliability.
        clipping_norm: C of the next round.
        first_noise_variance: Where noise_variance started; it stays within public bounds around it.
        inverse_moment: `d x d`, inverse of the regularized public second moment of the features.
    """

    server_round: int
    model: SharedModel
    velocity: Array
    elapsed: float
    U_noise: float
    reliability_sum: float
    effective_examples: float
    clipping_norm: float
    first_noise_variance: float
    inverse_moment: Array


@dataclass(frozen=True, kw_only=True)
class ScalarMeans:
    """The released means of the users' scalars, in the users' own units.

    Attributes:
        bit: Mean of 1{|x| <= C} - 1/2.
        present: Share of the (expected) users that took part.
        reliability: Mean of m / (m + 10) over those who took part, within public bounds.
        residual: Mean residual score.
        b_score: Mean b score.
        stddev: Standard deviation of the noise in each.
    """

    bit: float
    present: float
    reliability: float
    residual: float
    b_score: float
    stddev: float

    @classmethod
    def of(cls, means: Array, layout: Layout, noise_multiplier: float, denominator: int) -> "ScalarMeans":
        """From the mean of a release's last group."""
        to_own = math.sqrt(layout.groups[1].size) / 2  # scalars_to_ball multiplied by 2 / sqrt(c)
        bit, presence, reliability, residual, b_score = (float(mean) for mean in means * to_own)
        present = max(2 * presence, _LEAST_PRESENCE)
        return cls(
            bit=bit,
            present=present,
            reliability=float(np.clip(reliability / present + 0.5, *_RELIABILITY_BOUNDS)),
            residual=residual,
            b_score=b_score,
            stddev=to_own * noise_multiplier / (layout.groups[1].share * denominator),
        )

    def next_noise_variance(self, variance: float, first: float) -> float:
        """After the residual score, within public bounds around the first."""
        scale = 4 / (self.present * self.reliability)
        low, high = (bound * first for bound in _NOISE_VARIANCE_BOUNDS)
        return float(np.clip(variance * _factor(scale * self.residual, scale * self.stddev), low, high))

    def next_b_variance(self, variance: float, first: float) -> float:
        """After the b score, likewise."""
        scale = 2 / self.present
        low, high = (bound * first for bound in _B_VARIANCE_BOUNDS)
        return float(np.clip(variance * _factor(scale * self.b_score, scale * self.stddev), low, high))


def initial_state(model: SharedModel, regularized_moment: Array, clipping_norm: float | None) -> ServerState:
    """Before the first round.

    Args:
        model: From `server.initialization`.
        regularized_moment: Public S, `d x d`, positive definite.
        clipping_norm: A public constant, or None for the prior scale sqrt(d max(r, 1)) / 2.
    """
    d, r = model.U.shape
    return ServerState(
        server_round=0,
        model=model,
        velocity=np.zeros((d, r + 1)),
        elapsed=0.0,
        U_noise=0.0,
        reliability_sum=0.0,
        effective_examples=_FIRST_EFFECTIVE_EXAMPLES,
        clipping_norm=0.5 * math.sqrt(d * max(r, 1)) if clipping_norm is None else clipping_norm,
        first_noise_variance=model.noise_variance,
        inverse_moment=np.asarray(np.linalg.inv(regularized_moment), np.float64),
    )


def public_metric(state: ServerState, family: str) -> Array:
    """`d x d` lower triangular R with R R' = U U' + s2 / m S^-1, the covariance of a typical user's own estimate.

    s2 is the noise variance, or 4 for the logistic family: one over its largest curvature.
    """
    model = state.model
    noise_variance = model.noise_variance if family == "squared" else 4.0
    spread = noise_variance / state.effective_examples * state.inverse_moment
    return np.asarray(np.linalg.cholesky(model.U @ model.U.T + spread), np.float64)


def apply_round(
    state: ServerState,
    noised: np.ndarray[tuple[int], np.dtype[np.int64]],
    *,
    layout: Layout,
    clipping_norm: float,
    noise_multiplier: float,
    denominator: int,
    adapt_clipping: bool,
    family: str,
    sparsity: int,
) -> ServerState:
    """Take one step from a released sum.

    Args:
        state: Before the round.
        noised: `D` int64, the release: sum over users plus Gaussian noise, on the grid.
        layout: Groups and grid of the release.
        clipping_norm: C that the users clipped with.
        noise_multiplier: z of the release; 0 without noise.
        denominator: Users of the nodes invited, whoever answered; times q of a sampled run.
        adapt_clipping: Whether the configuration lets the clipping norm follow the released bits.
        family: Loss family; only squared loss has a noise variance to learn.
        sparsity: Cap on nonzeros of b while training; 0 leaves b_variance alone.

    Returns:
        After the round.
    """
    model, metric = state.model, public_metric(state, family)
    d, r = model.U.shape
    unit_mean, scalar_mean = split_groups(noised, layout, denominator)
    gradient = clipping_norm * unit_mean.reshape(r + 1, d).T
    noise_stddev = noise_multiplier * clipping_norm / (layout.groups[0].share * denominator)
    # the true mean is no longer than C: noise that is cannot be signal, and would feed back through the metric (and
    # with coins, more heads than expected are no signal either)
    gradient = gradient * min(1.0, clipping_norm / max(float(np.linalg.norm(gradient)), clipping_norm))
    signal = signal_share(gradient, noise_stddev)
    elapsed = state.elapsed + max(1 - signal, LEAST_PROGRESS)
    step = 1 / (1 + STEP_DECAY * elapsed)
    velocity = MOMENTUM * signal * _kept_velocity(state.velocity, gradient, metric) + metric @ gradient
    U = model.U + step * velocity[:, :r]
    # a share `signal` of a step corrects what earlier noise has left in U; then the step adds its own
    noise_energy = (1 - signal) * float((gradient**2).sum())
    U_noise = (1 - signal * step) ** 2 * state.U_noise + step**2 * noise_energy / gradient.size
    if r and elapsed >= _LATE and U_noise > 0:
        U, U_noise = _without_noise_energy(U, U_noise, metric), 0.0

    scalars = ScalarMeans.of(scalar_mean, layout, noise_multiplier, denominator)
    reliability_sum = state.reliability_sum + scalars.reliability
    typical = reliability_sum / (state.server_round + 1)
    noise_variance, b_variance = model.noise_variance, model.b_variance
    if family == "squared":
        noise_variance = scalars.next_noise_variance(noise_variance, state.first_noise_variance)
    if sparsity:
        b_variance = scalars.next_b_variance(b_variance, state.first_noise_variance)
    updated = SharedModel(
        beta=model.beta + step * velocity[:, r],
        U=U,
        b_variance=b_variance,
        noise_variance=noise_variance,
    )
    if adapt_clipping and may_adapt(denominator, noise_multiplier):
        clipping_norm = next_clipping_norm(clipping_norm, scalars.bit, bounds=CLIPPING_BOUNDS)
    return replace(
        state,
        server_round=state.server_round + 1,
        model=updated,
        velocity=velocity,
        elapsed=elapsed,
        U_noise=U_noise,
        reliability_sum=reliability_sum,
        effective_examples=_RELIABILITY_EXAMPLES * typical / (1 - typical),
        clipping_norm=clipping_norm,
    )


def _kept_velocity(velocity: Array, gradient: Array, metric: Array) -> Array:
    """The velocity, or zeros where the released gradient points against it.

    A first guess of U that is too large has to shrink, and momentum would carry it through zero to the other side.

    Args:
        velocity: `d x (r+1)`, in the units of (U, beta).
        gradient: `d x (r+1)` R'D, the release in the metric.
        metric: `d x d` R.
    """
    # gradient scheme of section 3.2 of arXiv:1204.3982; <velocity, D> = <R^-1 velocity, R'D>
    along = float((np.linalg.solve(metric, velocity) * gradient).sum())
    return velocity if along >= 0 else np.zeros_like(velocity)


def _without_noise_energy(U: Array, variance: float, metric: Array) -> Array:
    """U with singular values as they were, on average, before noise was added; 0 where noise explains them.

    Noise of that variance a coordinate adds d variance I to W'W, W = R^-1 U. A prior as wide as its noise would make
    every user's estimate noisier than it need be.

    Args:
        U: `d x r`, r >= 1.
        variance: Of the noise in each coordinate of W.
        metric: `d x d` R.
    """
    # the debiased spectrum of a spiked model: E|W q|^2 = |signal q|^2 + d variance for a unit vector q
    left, singular, right = np.linalg.svd(np.linalg.solve(metric, U), full_matrices=False)
    kept = np.sqrt(np.maximum(singular**2 - len(U) * variance, 0.0))
    return np.asarray(metric @ ((left * kept) @ right))


def _factor(score: float, stddev: float) -> float:
    """What a variance is multiplied by: the EM step 1 + score, damped where the release's noise drowns it.

    The damping is the weight of an observation of standard deviation `stddev` against a step of its own size, or
    of `_TYPICAL_SCORE` where it is smaller: 1 without noise.
    """
    score = float(np.clip(score, *_SCORE_BOUNDS))
    size = max(abs(score), _TYPICAL_SCORE)
    return float((1 + score) ** (size**2 / (size**2 + stddev**2)))


def signal_share(gradient: Array, noise_stddev: float) -> float:
    """Share of the released gradient's squared norm that its known noise does not explain, in [0, 1]."""
    energy = float((gradient**2).sum())
    return max(0.0, 1 - gradient.size * noise_stddev**2 / energy) if energy > 0 else 0.0
