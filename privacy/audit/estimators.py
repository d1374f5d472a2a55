"""Lower bounds on epsilon, and other measures of an attack, from the scores it gave to canaries.

A canary is a user who was in or out of a mechanism's input by a fair coin of its own; its score is a number that the
attack computes from the output, higher where it believes the canary was in. A mechanism that is (epsilon,
delta)-differentially private limits how well scores can tell the two apart, so telling them apart better refutes its
claim. Pure functions on arrays; what each bound rests on, beyond the fair coins, is in its `assumes`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, betaincinv, gammaln, ndtr, ndtri, owens_t

from common.model import Array
from privacy.gaussian import epsilon_of_mu

_GUESSED_SHARES = (1 / 8, 1 / 2)
"""Shares of the canaries that the one-run auditor guesses, fixed in advance; each pays for all."""
_THRESHOLD_RANKS = (1 / 512, 1 / 128, 1 / 32, 1 / 8)
"""Ranks of the scores that serve as thresholds, as shares of their number."""
_LARGEST_SHIFT = 40.0
_LARGEST_EPSILON = 100.0
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """A statement "epsilon is at least this", wrong with probability 1 - confidence at most.

    Attributes:
        name: Of the method.
        epsilon: At the delta it was asked for; 0 where nothing can be said.
        confidence: Of this bound by itself.
        assumes: What it rests on.
    """

    name: str
    epsilon: float
    confidence: float
    assumes: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its two-sided confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def clopper_pearson_bound(scores_in: Array, scores_out: Array, *, delta: float, confidence: float = 0.95) -> LowerBound:
    """Epsilon from the error rates at a threshold: log((TPR - delta) / FPR), or log((TNR - delta) / FNR).

    A threshold is one of the other kind's own scores, of a rank fixed in advance, so that the rate of errors above it
    has an exact bound (that of Clopper and Pearson for the scores beyond it) and so has the rate of hits, of scores
    that had no part in the choice. All thresholds of both kinds share the error probability evenly.

    Args:
        scores_in: `n` scores of canaries that were in.
        scores_out: `m` scores of canaries that were out.
        delta: Of the claim.
        confidence: That the bound holds.

    Raises:
        ValueError: If there are fewer than two scores of a kind, one is NaN, or a number is out of range.
    """
    scores_in, scores_out = _checked(scores_in, scores_out, delta=delta, confidence=confidence)
    each = (1 - confidence) / (4 * len(_THRESHOLD_RANKS))
    epsilon = 0.0
    for hits, errors in ((scores_in, scores_out), (-scores_out, -scores_in)):
        highest_first = -np.sort(-errors)
        for share in _THRESHOLD_RANKS:
            rank = math.ceil(share * errors.size)
            hit_rate = _at_least((hits > highest_first[rank - 1]).sum(), hits.size, each) - delta
            if hit_rate > 0:
                epsilon = max(epsilon, math.log(hit_rate / _at_most(rank - 1, errors.size, each)))
    return LowerBound(
        name="clopper-pearson",
        epsilon=epsilon,
        confidence=confidence,
        assumes="canaries do not influence each other's scores; nothing of the mechanism",
    )


def one_run_bound(scores_in: Array, scores_out: Array, *, delta: float, confidence: float = 0.95) -> LowerBound:
    """Epsilon from the number of right guesses about all canaries together (arXiv:2305.08846, Theorem 5.2).

    The highest scores are guessed to be in, as many of the lowest to be out. It is tried for a few numbers of guesses
    that depend on the number of canaries alone, which share the error probability evenly.

    Args:
        scores_in: `n` scores of canaries that were in.
        scores_out: `m` scores of canaries that were out.
        delta: Of the claim.
        confidence: That the bound holds.

    Raises:
        ValueError: If there are fewer than two scores of a kind, one is NaN, or a number is out of range.
    """
    scores_in, scores_out = _checked(scores_in, scores_out, delta=delta, confidence=confidence)
    scores = np.concatenate([scores_in, scores_out])
    # ties are broken against the auditor, so that the order of the arguments gives nothing away
    order = np.lexsort((np.arange(scores.size) < scores_in.size, -scores))
    was_in = (order < scores_in.size).astype(np.int64)
    each = (1 - confidence) / len(_GUESSED_SHARES)
    epsilons = []
    for share in _GUESSED_SHARES:
        half = int(share * scores.size) // 2
        right = int(was_in[:half].sum() + (1 - was_in[scores.size - half :]).sum())
        epsilons.append(_largest_refuted(scores.size, 2 * half, right, delta, each))
    return LowerBound(
        name="one-run",
        epsilon=max(epsilons),
        confidence=confidence,
        assumes="nothing beyond the fair coins: canaries may be in one run together",
    )


def gaussian_bound(scores_in: Array, scores_out: Array, *, delta: float, confidence: float = 0.95) -> LowerBound:
    """Epsilon from the area under the ROC curve, for a mechanism whose trade-off curve is a Gaussian's.

    A post-processing of mu-GDP releases has an ROC curve below that of N(0, 1) against N(mu, 1) everywhere, whatever
    its scores are distributed like. So the number of pairs (in, out) in the right order is stochastically smaller than
    between Gaussian scores, and mu is refuted where that number lies too far above its Gaussian distribution.

    Args:
        scores_in: `n` scores of canaries that were in.
        scores_out: `m` scores of canaries that were out.
        delta: Of the claim.
        confidence: That the bound holds.

    Raises:
        ValueError: If there are fewer than two scores of a kind, one is NaN, or a number is out of range.
    """
    scores_in, scores_out = _checked(scores_in, scores_out, delta=delta, confidence=confidence)
    quantile = float(ndtri(confidence))
    shift = _shift_at(_area(scores_in, scores_out), scores_in.size, scores_out.size, quantile)
    return LowerBound(
        name="gaussian",
        epsilon=epsilon_of_mu(max(0.0, shift), delta),
        confidence=confidence,
        assumes="the mechanism's trade-off curve is a Gaussian's; canaries do not influence each other's scores; "
        "the number of correctly ordered pairs is normal",
    )


def tpr_at_fpr(scores_in: Array, scores_out: Array, *, fpr: float, confidence: float = 0.95) -> Interval:
    """True-positive rate at the threshold with this false-positive rate, with a distribution-free interval.

    The interval's ends are exact binomial bounds at two thresholds between which, by the order statistics of
    `scores_out`, the one with this false-positive rate lies.

    Args:
        scores_in: `n` scores of canaries that were in.
        scores_out: `m` scores of canaries that were out.
        fpr: False-positive rate in (0, 1).
        confidence: Of the interval.

    Raises:
        ValueError: If there are fewer than two scores of a kind, one is NaN, or a number is out of range.
    """
    scores_in, scores_out = _checked(scores_in, scores_out, delta=fpr, confidence=confidence)
    quarter = (1 - confidence) / 4
    highest_first = -np.sort(-scores_out)
    counts = np.arange(scores_out.size)
    below = bdtr(counts, scores_out.size, fpr)  # P(at most j false positives at the true threshold)
    # the k-th highest score is above the true threshold exactly if k scores at least are
    strict = int((below <= quarter).sum())
    lenient = int((below < 1 - quarter).sum()) + 1
    sure = (scores_in > highest_first[strict - 1]).sum() if strict else 0
    possible = (scores_in > highest_first[lenient - 1]).sum() if lenient <= scores_out.size else scores_in.size
    threshold = highest_first[int(fpr * scores_out.size)]
    return Interval(
        value=float((scores_in > threshold).mean()),
        low=_at_least(sure, scores_in.size, quarter),
        high=_at_most(possible, scores_in.size, quarter),
    )


def auroc(scores_in: Array, scores_out: Array, *, confidence: float = 0.95) -> Interval:
    """Probability that a canary that was in scores higher than one that was out; ties count half.

    The interval inverts the statistic's normal approximation with the variance of Gaussian scores.

    Args:
        scores_in: `n` scores of canaries that were in.
        scores_out: `m` scores of canaries that were out.
        confidence: Of the interval.

    Raises:
        ValueError: If there are fewer than two scores of a kind, one is NaN, or a number is out of range.
    """
    scores_in, scores_out = _checked(scores_in, scores_out, delta=0.5, confidence=confidence)
    quantile = float(ndtri((1 + confidence) / 2))
    area, sizes = _area(scores_in, scores_out), (scores_in.size, scores_out.size)
    low, high = _shift_at(area, *sizes, quantile), -_shift_at(1 - area, *sizes, quantile)
    return Interval(value=area, low=float(ndtr(low / math.sqrt(2))), high=float(ndtr(high / math.sqrt(2))))


def _checked(scores_in: Array, scores_out: Array, *, delta: float, confidence: float) -> tuple[Array, Array]:
    scores_in, scores_out = np.asarray(scores_in, np.float64), np.asarray(scores_out, np.float64)
    fewest = min(scores_in.size, scores_out.size)
    if fewest < 2 or scores_in.ndim != 1 or scores_out.ndim != 1:
        raise ValueError(f"Expected two scores of each kind at least, got {fewest}. Use more canaries.")
    if np.isnan(scores_in).any() or np.isnan(scores_out).any():
        raise ValueError("Expected scores that are numbers, got NaN.")
    if not 0 < delta < 1 or not 0 < confidence < 1:
        raise ValueError(f"Expected rates and confidence in (0, 1), got {delta=}, {confidence=}.")
    return scores_in, scores_out


def _at_least(hits: int, trials: int, error: float) -> float:
    """Clopper and Pearson's lower bound of a binomial probability; wrong with probability `error` at most."""
    return float(betaincinv(hits, trials - hits + 1, error)) if hits else 0.0


def _at_most(hits: int, trials: int, error: float) -> float:
    """The upper bound that goes with `_at_least`."""
    return 1 - _at_least(trials - hits, trials, error)


def _largest_refuted(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon, of those bisected, at which so many right guesses have probability `error` at most.

    Any epsilon that is refuted is a lower bound, because (epsilon, delta)-DP implies it for every larger epsilon.
    """
    if guesses == 0:
        return 0.0
    return max(0.0, _bisect(lambda e: _one_run_p_value(canaries, guesses, right, e, delta) < error, _LARGEST_EPSILON))


def _one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on P(at least `right` of `guesses` right) under (epsilon, delta)-DP, for guesses made from the output.

    Theorem 5.2 of arXiv:2305.08846: with W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)), it is
    P(W >= v) + 2 m delta max_i P(v > W >= v - i) / i.
    """
    k = np.arange(guesses + 1)
    choices = gammaln(guesses + 1) - gammaln(k + 1) - gammaln(guesses - k + 1)
    # log q and log(1 - q) without cancellation
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    probability = np.exp(choices + k * log_right + (guesses - k) * log_wrong)
    tail = float(probability[right:].sum())
    below = np.cumsum(probability[:right][::-1])
    worst = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return tail + 2 * canaries * delta * worst


def _area(scores_in: Array, scores_out: Array) -> float:
    """Share of pairs (in, out) in the right order; ties count half."""
    ordered = np.sort(scores_out)
    lower, upper = np.searchsorted(ordered, scores_in, "left"), np.searchsorted(ordered, scores_in, "right")
    return float((lower + upper).sum() / (2 * scores_in.size * scores_out.size))


def _shift_at(area: float, num_in: int, num_out: int, quantile: float) -> float:
    """The largest mu that `area` refutes: it lies `quantile` standard deviations above what N(mu, 1) makes likely."""

    def refuted(shift: float) -> bool:
        expected, stddev = _gaussian_area(shift, num_in, num_out)
        return area - expected > quantile * stddev

    return _bisect(refuted, _LARGEST_SHIFT, low=-_LARGEST_SHIFT)


def _gaussian_area(shift: float, num_in: int, num_out: int) -> tuple[float, float]:
    """Mean and standard deviation of the area where scores are N(shift, 1) and N(0, 1).

    The variance is that of a two-sample U-statistic, with the probability that one score lies below two independent
    ones of the other kind: two normals of correlation 1/2, both below h = shift / sqrt(2), which is
    Phi(h) - 2 T(h, 1/sqrt(3)) with Owen's T (Owen 1956, equation 3.4).
    """
    h = shift / math.sqrt(2)
    mean = float(ndtr(h))
    both = mean - 2 * float(owens_t(h, 1 / math.sqrt(3)))
    variance = (mean * (1 - mean) + (num_in + num_out - 2) * (both - mean**2)) / (num_in * num_out)
    return mean, math.sqrt(max(variance, 0.0))


def _bisect(holds: Callable[[float], bool], high: float, *, low: float = 0.0) -> float:
    """The upper end of where `holds` does: a point at which it holds, or `low`."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
