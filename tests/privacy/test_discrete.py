"""Discrete Gaussian noise by OpenDP: of the right law, close enough to what is charged, never the same twice.

Statistical tests fail by chance at most once in a million runs each, and a scale wrong by 2 % fails them.
"""

import math
import os
from fractions import Fraction
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from common.errors import UmbelError
from privacy import discrete
from privacy.discrete import DiscreteNoise, discrete_gaussian, distance, require_opendp, widened
from privacy.gaussian import delta_of_epsilon

needs_opendp = pytest.mark.skipif(find_spec("opendp") is None, reason="needs the package opendp: umbel[exact-noise]")
FAILURE_RATE = 1e-6
SIZE = 300_000
SCALE = Fraction("13.361201") * 2**16
SCALES = st.fractions(16, 10**12, max_denominator=10**6)


@cache
def samples():
    """Many samples at a scale as releases have it."""
    return DiscreteNoise().rounded_gaussian(SCALE, SIZE)


# What is charged


@given(scale=SCALES)
def test_widened_is_the_least_float_that_is_wide_enough(scale):
    """The float's own square, exactly, covers the variance of rounding, and the next smaller one's does not."""
    t = widened(scale)
    assert Fraction(t) ** 2 >= scale**2 + Fraction(1, 12) > Fraction(math.nextafter(t, 0)) ** 2


def total_variation(sigma_square, t_square):
    """Between rint(σ·g) and N_Z(0, t²), to 50 digits."""
    sigma = mpmath.sqrt(sigma_square)
    last = int(25 * sigma)
    weights = [mpmath.exp(-(n**2) / (2 * t_square)) for n in range(last + 1)]
    whole = weights[0] + 2 * mpmath.fsum(weights[1:])
    tails = [mpmath.erfc((n - mpmath.mpf(1) / 2) / sigma / mpmath.sqrt(2)) / 2 for n in range(last + 2)]
    gaps = [abs(tails[n] - tails[n + 1] - weights[n] / whole) for n in range(last + 1)]
    return (gaps[0] + 2 * mpmath.fsum(gaps[1:])) / 2


@pytest.mark.parametrize("scale", [16, 17.3, 40, 150])
def test_distance_bounds_the_total_variation(scale):
    """The proved bound is above the true distance, less than ten times, and fails for noise that is not widened."""
    with mpmath.workdps(50):
        t_square = mpmath.mpf(widened(Fraction(scale))) ** 2
        actual = total_variation(t_square - mpmath.mpf(1) / 12, t_square)
        assert actual < distance(Fraction(scale)) < 10 * actual
        assert total_variation(mpmath.mpf(scale) ** 2, mpmath.mpf(scale) ** 2) > 10 * distance(Fraction(scale))


def test_constant_of_the_proof():
    """Fourth and fifth derivatives, and the discrete Gaussian's own normalisation, fit into 2^-8 from 16 on."""
    for scale in (16, 17, 100, 1e4):
        normalisation = 1.05 * math.exp(-2 * math.pi**2 * scale**2)
        derivatives = (math.sqrt(24) / scale**4 + math.sqrt(120) / scale**5) / 1440
        assert derivatives + normalisation <= distance(Fraction(scale))


@pytest.mark.parametrize("shift", [4, 16, 40])
def test_one_coordinate_costs_no_more_than_is_charged(shift):
    """The exact delta of a shifted discrete Gaussian is at most the Gaussian's of the unwidened scale and delta_fp."""
    scale = 16
    t = widened(Fraction(scale))
    n = np.arange(-40 * scale, 40 * scale + shift + 1)
    with mpmath.workdps(50):
        exponents = [mpmath.exp(-(mpmath.mpf(int(k)) ** 2) / (2 * mpmath.mpf(t) ** 2)) for k in n]
        whole = mpmath.fsum(exponents)
        for epsilon in (0.0, 0.1, 0.5, 1.0, 3.0):
            factor = mpmath.exp(epsilon)
            pairs = zip(exponents[:-shift], exponents[shift:], strict=True)
            actual = mpmath.fsum(max(p - factor * q, 0) for q, p in pairs) / whole
            slack = (1 + factor) * distance(Fraction(scale))
            assert actual <= delta_of_epsilon(epsilon, shift / scale) + slack


# What OpenDP draws


@needs_opendp
def test_opendp_agrees_on_rho():
    """OpenDP's own privacy map of the noise that is drawn has no more zCDP than the report says, and hardly less."""
    from opendp.domains import atom_domain, vector_domain
    from opendp.measurements import make_gaussian
    from opendp.metrics import l2_distance
    from opendp.mod import enable_features

    enable_features("contrib")
    space = vector_domain(atom_domain(T="i64")), l2_distance(T="f64")
    for z in ("0.65", "1", "13.361201"):
        rho = make_gaussian(*space, widened(Fraction(z) * 2**16)).map(2.0**16)
        assert 1 - 1e-9 < 2 * rho * float(z) ** 2 <= 1


def chi_square(drawn, scale):
    """p-value of samples against P[N = n] proportional to exp(-n²/(2·scale²))."""
    last = math.ceil(4 * scale)
    n = np.arange(-60 * last, 60 * last + 1)
    law = np.exp(-(n**2) / (2 * scale**2))
    folded = np.bincount(np.clip(n, -last, last) + last, law / law.sum())
    observed = np.bincount(np.clip(drawn, -last, last) + last, minlength=2 * last + 1)
    return stats.chisquare(observed, folded * drawn.size).pvalue


@needs_opendp
@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_law_of_small_scales(scale):
    """Every integer has the probability of the formula, and no other scale's within 2 %."""
    drawn = discrete_gaussian(scale, SIZE)
    assert chi_square(drawn, scale) > FAILURE_RATE
    assert chi_square(drawn, scale * 1.02) < FAILURE_RATE
    assert chi_square(drawn, scale * 0.98) < FAILURE_RATE


def variance_fits(drawn, scale):
    """Whether the mean square is one of `scale`'s, but for one time in a million."""
    total = float(((drawn / float(scale)) ** 2).sum())
    return stats.chi2.ppf(FAILURE_RATE / 2, drawn.size) < total < stats.chi2.isf(FAILURE_RATE / 2, drawn.size)


@needs_opendp
def test_scale_of_releases():
    """Noise has the standard deviation that the ledger says, and would be told from one 2 % off; its mean is zero."""
    assert variance_fits(samples(), SCALE)
    assert not variance_fits(samples(), SCALE * Fraction("1.02"))
    assert not variance_fits(samples(), SCALE * Fraction("0.98"))
    assert abs(samples().mean() / float(SCALE)) * math.sqrt(SIZE) < stats.norm.isf(FAILURE_RATE / 2)


def kolmogorov_smirnov(scale):
    return stats.kstest(samples() / float(scale), special.ndtr, method="asymp").pvalue


@needs_opendp
def test_kolmogorov_smirnov():
    """Where the grid is too fine to be seen the noise is normal, and would be told from a scale 4 % off."""
    assert kolmogorov_smirnov(SCALE) > FAILURE_RATE
    assert kolmogorov_smirnov(SCALE * Fraction("1.04")) < FAILURE_RATE
    assert kolmogorov_smirnov(SCALE * Fraction("0.96")) < FAILURE_RATE


@needs_opendp
@pytest.mark.parametrize("threshold", [3, 4])
def test_tails(threshold):
    """As many samples lie beyond 3 and 4 standard deviations as should, on both sides."""
    for side in (samples(), -samples()):
        law = stats.binom(SIZE, stats.norm.sf(threshold))
        assert law.ppf(FAILURE_RATE / 2) <= int((side > threshold * float(SCALE)).sum()) <= law.isf(FAILURE_RATE / 2)


# Freshness


def assert_uncorrelated(x, y):
    assert abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(len(x)) < stats.norm.isf(FAILURE_RATE / 2)


@needs_opendp
def test_coordinates_and_releases_are_independent():
    """Neither neighbouring coordinates nor two releases go together, in value or in size."""
    half = SIZE // 2
    for x, y in ((samples()[:-1], samples()[1:]), (samples()[:half], samples()[half:])):
        assert_uncorrelated(x, y)
        assert_uncorrelated(np.abs(x), np.abs(y))


@needs_opendp
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_draws_other_noise():
    """After a fork parent and child do not share noise."""
    source, scale = DiscreteNoise(), SCALE * 2**20
    source.rounded_gaussian(scale, 4)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, source.rounded_gaussian(scale, 4).tobytes())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        theirs = np.frombuffer(pipe.read(), np.int64)
    os.waitpid(child, 0)
    assert theirs.shape == (4,)
    assert not (theirs == source.rounded_gaussian(scale, 4)).any()


# The source


@needs_opendp
def test_source():
    """Any number of int64, none included, under the ledger's name."""
    assert DiscreteNoise().name == "opendp (discrete Gaussian)"
    for size in (0, 1, 5):
        noise = DiscreteNoise().rounded_gaussian(SCALE, size)
        assert (noise.shape, noise.dtype) == ((size,), np.int64)


@needs_opendp
@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-20), Fraction(159, 10), Fraction(2**62, 20)])
def test_refuses_scales_without_a_bound(scale):
    """No noise where the distance is not bounded, or where samples might leave 62 bits."""
    with pytest.raises(ValueError, match="16 <= scale"):
        DiscreteNoise().rounded_gaussian(scale, 1)


@needs_opendp
@settings(max_examples=20, deadline=None)
@given(scale=SCALES)
def test_noise_asked_for_is_widened(scale):
    """OpenDP is asked for the widened scale, not for the ledger's."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discrete, "discrete_gaussian", lambda t, size: asked.append(t) or np.zeros(size, np.int64))
        DiscreteNoise().rounded_gaussian(scale, 2)
    assert asked == [widened(scale)]


def no_package(_):
    raise PackageNotFoundError


@pytest.mark.parametrize(("version", "found"), [(no_package, "none"), (lambda _: "0.14.1", "0.14.1")])
def test_names_a_package_that_is_missing_or_biased(version, found, monkeypatch):
    """Without OpenDP, or with one whose sampler was biased, there is an error with key, value and remedy."""
    monkeypatch.setattr(discrete, "version", version)
    with pytest.raises(UmbelError, match=rf"privacy.noise='discrete', found {found}\. Run pip install .*exact-noise"):
        DiscreteNoise()


def test_later_versions_will_do(monkeypatch):
    """Versions are compared as numbers."""
    for version in ("0.15.0", "0.100.0", "1.0.0"):
        monkeypatch.setattr(discrete, "version", lambda _, version=version: version)
        require_opendp()
