"""Bounds from canaries' scores: against slow plain versions, how often they are wrong, and what they notice."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest, multivariate_normal, norm
from sklearn.metrics import roc_auc_score

from privacy.audit.estimators import (
    _at_least,
    _at_most,
    _gaussian_area,
    _one_run_p_value,
    auroc,
    clopper_pearson_bound,
    gaussian_bound,
    one_run_bound,
    tpr_at_fpr,
)
from privacy.gaussian import epsilon_of_mu

METHODS = (clopper_pearson_bound, one_run_bound, gaussian_bound)
DELTA = 1e-5
AUDITS = 400
FALSE_FAILURE = 1e-6
EACH = 1 - 0.05 / 3


def scores(seed, *, canaries=500, shift=1.0, transform=lambda x: x):
    """Scores in and out by fair coins, N(shift, 1) and N(0, 1) before `transform`."""
    rng = np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    x = transform(rng.standard_normal(canaries) + shift * included)
    return x[included], x[~included]


def most_wrong(rate, trials=AUDITS):
    """So many wrong statements of `trials`, each wrong with probability `rate`, are exceeded once in a million."""
    return int(binom.ppf(1 - FALSE_FAILURE, trials, rate))


def squashed(x):
    return np.tanh(4 * (x - 0.5))


def coarse(x):
    return np.round(x)


def loud(x):
    """Every score in a scale of its own, as after a normalization by what else is in a release."""
    return x * np.exp(np.random.default_rng(len(x)).standard_normal(x.shape))


@pytest.mark.parametrize(
    "transform", [lambda x: x, squashed, coarse, loud], ids=["plain", "squashed", "coarse", "loud"]
)
@pytest.mark.parametrize("shift", [0.25, 1.0, 2.0])
def test_a_true_claim_is_refuted_no_more_often_than_stated(shift, transform):
    """On a mechanism that is exactly mu-GDP each bound exceeds the exact epsilon at its error rate at most.

    400 seeds; a correct bound fails this with probability 1e-6.
    """
    claim = epsilon_of_mu(shift, DELTA)
    found = [scores(seed, shift=shift, transform=transform) for seed in range(AUDITS)]
    for method in METHODS:
        wrong = sum(method(*pair, delta=DELTA, confidence=EACH).epsilon > claim for pair in found)
        assert wrong <= most_wrong(1 - EACH), method


@pytest.mark.parametrize("method", [clopper_pearson_bound, one_run_bound])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_randomized_response_is_refuted_no_more_often_than_stated(method, epsilon):
    """The mechanism on which nothing is to be gained but by chance, at the error rate of a single bound."""

    def answers(seed):
        rng = np.random.default_rng(seed)
        included = rng.random(500) < 0.5
        honest = rng.random(500) < 1 / (1 + math.exp(-epsilon))
        x = (included == honest) + 1e-3 * rng.random(500)
        return x[included], x[~included]

    found = np.array([method(*answers(seed), delta=1e-9, confidence=0.8).epsilon for seed in range(AUDITS)])
    assert (found > epsilon).sum() <= most_wrong(0.2)
    assert found.max() > 0.6 * epsilon


def test_the_best_threshold_without_a_price_would_be_noticed():
    """The mistake of choosing the threshold on the scores it is judged by alarms far too often for the test above."""

    def careless(scores_in, scores_out):
        thresholds = np.concatenate([scores_in, scores_out])
        rates = [(x[:, None] > thresholds).sum(0) for x in (scores_in, scores_out)]
        true, false = (count[rates[0] > 0] for count in rates)
        tpr = beta.ppf(0.05, true, scores_in.size - true + 1)
        fpr = beta.ppf(0.95, false + 1, scores_out.size - false)
        return (norm.ppf(tpr) - norm.ppf(fpr)).max()

    audits = 100
    wrong = sum(careless(*scores(seed, canaries=1000)) > 1.0 for seed in range(audits))
    assert wrong > most_wrong(0.05, audits)


@pytest.mark.parametrize(("noise", "alarms"), [(0.7, (0, 0, 40)), (0.5, (0, 0, 40)), (0.3, (0, 15, 40))])
def test_planted_faults_are_found(noise, alarms):
    """At a claim for z = 1, of 40 audits with 1000 canaries as many as expected alarm where the noise is less."""
    claim = epsilon_of_mu(1.0, DELTA)
    found = [scores(seed, canaries=1000, shift=1 / noise) for seed in range(40)]
    for method, expected in zip(METHODS, alarms, strict=True):
        assert sum(method(*pair, delta=DELTA, confidence=EACH).epsilon > claim for pair in found) >= expected, method


def test_bounds_come_close_to_the_truth():
    """With many canaries no bound is far below what its method can find."""
    pair = scores(0, canaries=20_000)
    epsilon = [method(*pair, delta=DELTA).epsilon for method in METHODS]
    assert all(found > least for found, least in zip(epsilon, (1.8, 1.4, 4.1), strict=True))
    assert max(epsilon) <= epsilon_of_mu(1.0, DELTA)


def test_scores_that_tell_nothing_refute_nothing():
    """Equal scores give epsilon 0, whichever way round and in whatever order."""
    for method in METHODS:
        assert method(np.zeros(300), np.zeros(200), delta=DELTA).epsilon == 0
        assert method(np.zeros(200), np.zeros(300), delta=DELTA).epsilon == 0
        low, high = scores(1, canaries=400, shift=-3.0)
        if method is not clopper_pearson_bound:
            assert method(low, high, delta=DELTA).epsilon == 0


def test_perfect_scores_are_bounded_by_the_number_of_canaries():
    """Where nothing is hidden the bounds are finite, and rise with the number of canaries."""
    for method in METHODS:
        few, many = (method(np.ones(n), np.zeros(n), delta=DELTA).epsilon for n in (100, 2000))
        assert 1 < few < many < math.inf


@pytest.mark.parametrize("method", METHODS)
def test_only_the_order_of_scores_counts(method):
    """A rising function of the scores changes no bound; neither does the order in which canaries are listed."""
    scores_in, scores_out = scores(2, shift=1.5)
    expected = method(scores_in, scores_out, delta=DELTA)
    assert method(np.exp(scores_in), np.exp(scores_out), delta=DELTA) == expected
    assert method(scores_in[::-1], scores_out[::-1], delta=DELTA) == expected


@pytest.mark.parametrize("method", METHODS)
def test_more_confidence_and_less_delta_cost_epsilon(method):
    """A bound falls with the confidence asked for."""
    pair = scores(3, canaries=2000, shift=2.0)
    bounds = [method(*pair, delta=DELTA, confidence=c).epsilon for c in (0.9, 0.95, 0.99, 0.999)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1] > 0


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (1, 10), (10, 10), (37, 500), (499, 500)])
def test_binomial_bounds_are_those_of_scipy(hits, trials):
    """One-sided Clopper–Pearson, as scipy's exact interval has it."""
    interval = binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert _at_least(hits, trials, 0.025) == pytest.approx(interval.low, abs=1e-9)
    assert _at_most(hits, trials, 0.025) == pytest.approx(interval.high, abs=1e-9)


@pytest.mark.parametrize(("guesses", "right"), [(1, 1), (10, 0), (50, 40), (200, 199), (1000, 700)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_one_run_p_value_is_the_theorem(guesses, right, epsilon, delta):
    """The sum of Theorem 5.2 of arXiv:2305.08846, term by term."""
    q = 1 / (1 + math.exp(-epsilon))
    terms = [(binom.cdf(right - 1, guesses, q) - binom.cdf(right - i - 1, guesses, q)) / i for i in range(1, right + 1)]
    expected = binom.sf(right - 1, guesses, q) + 2 * 1000 * delta * max(terms, default=0.0)
    assert _one_run_p_value(1000, guesses, right, epsilon, delta) == pytest.approx(expected, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3, 1.0, 3.0])
def test_the_area_has_the_moments_of_gaussian_scores(shift):
    """Mean and variance against the bivariate normal distribution function."""
    h = shift / math.sqrt(2)
    both = multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf([h, h])
    mean = norm.cdf(h)
    variance = (mean * (1 - mean) + (29 + 39) * (both - mean**2)) / (30 * 40)
    assert _gaussian_area(shift, 30, 40) == pytest.approx((mean, math.sqrt(variance)), rel=1e-4)


def test_auroc_is_that_of_scikit_learn():
    """With and without ties, and inside its own interval."""
    for transform in (lambda x: x, coarse):
        scores_in, scores_out = scores(4, transform=transform)
        labels = [True] * scores_in.size + [False] * scores_out.size
        found = auroc(scores_in, scores_out)
        assert found.value == pytest.approx(roc_auc_score(labels, np.concatenate([scores_in, scores_out])), abs=1e-12)
        assert found.low < found.value < found.high


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_intervals_hold_the_truth(shift):
    """The 95 % intervals of AUROC and of TPR at FPR 1e-2 miss in 5 % of 400 audits, up to a chance of 1e-6."""
    area, rate = norm.cdf(shift / math.sqrt(2)), norm.cdf(shift + norm.ppf(0.01))
    missed = [0, 0]
    for seed in range(AUDITS):
        pair = scores(seed, shift=shift, canaries=1500)
        found = auroc(*pair), tpr_at_fpr(*pair, fpr=0.01)
        for i, (interval, truth) in enumerate(zip(found, (area, rate), strict=True)):
            missed[i] += not interval.low <= truth <= interval.high
            assert interval.low <= interval.value <= interval.high
    assert max(missed) <= most_wrong(0.05)
    assert missed[0] > 0


def test_the_rate_at_a_false_positive_rate_that_canaries_cannot_show():
    """With too few canaries for one in a hundred, the interval says that little is known."""
    found = tpr_at_fpr(*scores(5, canaries=60), fpr=0.01)
    assert found.low == 0
    assert found.high > 0.3
    perfect = tpr_at_fpr(np.ones(5000), np.zeros(5000), fpr=0.01)
    assert perfect.value == perfect.high == 1
    assert perfect.low > 0.99


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("scores_in", "scores_out", "wrong"),
    [
        ([1.0], [0.0, 0.0], {}),
        ([1.0, math.nan], [0.0, 0.0], {}),
        ([[1.0, 1.0]], [[0.0, 0.0]], {}),
        ([1.0, 1.0], [0.0, 0.0], {"delta": 0.0}),
        ([1.0, 1.0], [0.0, 0.0], {"confidence": 1.0}),
    ],
)
def test_bad_scores_are_refused(method, scores_in, scores_out, wrong):
    """Too few scores, NaN, another shape, a delta or a confidence out of range."""
    with pytest.raises(ValueError, match="Expected"):
        method(scores_in, scores_out, **({"delta": DELTA} | wrong))
