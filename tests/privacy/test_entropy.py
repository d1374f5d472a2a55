"""The noise: exactly rounded, of the right distribution, never the same twice.

Statistical tests fail by chance at most once in a million runs each, and a scale wrong by 2 % fails them.
"""

import math
import os
import random
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from privacy.entropy import (
    TAU,
    KeyStream,
    NoNoise,
    SeededNoise,
    SystemNoise,
    exact_magnitude,
    round_words,
    tail_bounds,
)

FAILURE_RATE = 1e-6
SIZE = 10**6
SCALE = Fraction("13.361201") * 2**16
WORDS = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def normals():
    """A million samples at a scale where rounding is invisible, in units of the scale."""
    return SystemNoise().rounded_gaussian(SCALE, SIZE) / float(SCALE)


# Exactness


def words(*values):
    return np.array(values, np.uint64)


def ideal(scale, exponent, mantissa):
    """rint(scale·g) to 60 digits, for the number in the middle of what these words leave open."""
    with mpmath.workdps(60):
        zeros = (exponent & -exponent).bit_length() - 1
        v = mpmath.mpf(2**64 + (mantissa | 1)) / 2 ** (65 + zeros)
        g = mpmath.findroot(lambda x: mpmath.log(mpmath.erfc(x)) - mpmath.log(v), float(special.erfcinv(float(v))))
        exact = mpmath.mpf(scale.numerator) / scale.denominator * g * mpmath.sqrt(2)
        return int(mpmath.nint(exact)) * (1 - 2 * (mantissa & 1))


def no_more():
    raise AssertionError("more bits were asked for")


@given(
    exponent=WORDS.filter(bool),
    mantissa=WORDS,
    scale=st.fractions(Fraction(1, 20), 10**12, max_denominator=10**6),
)
@example(exponent=1, mantissa=2**64 - 1, scale=Fraction(3))
@example(exponent=2**63, mantissa=0, scale=Fraction(10**9))
@settings(max_examples=150, deadline=None)
def test_rounds_like_sixty_digits(exponent, mantissa, scale):
    """The integer is the one that 60 digits of the same random number give."""
    actual = round_words(scale, words(exponent), words(mantissa), lambda: 2**63)
    assert actual.tolist() == [ideal(scale, exponent, mantissa)]


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([Fraction(1, 20), Fraction(3), SCALE, SCALE * 2**14]))
@settings(max_examples=8, deadline=None)
def test_slow_path_is_the_fast_path(seed, scale):
    """Settling every coordinate exactly gives what the guarded float64 computation gives on the same bits."""
    stream = KeyStream(seed.to_bytes(32))
    first, second = stream.words(500), stream.words(500)
    fast = round_words(scale, first, second, no_more)
    slow = round_words(scale, first, second, stream.word, relative_guard=1.0)
    assert fast.tolist() == slow.tolist()


def on_the_boundary(scale, n):
    """The words of the interval of U in which scale·g = n + 1/2 lies."""
    with mpmath.workdps(60):
        tail = mpmath.erfc((n + mpmath.mpf(1) / 2) * scale.denominator / scale.numerator / mpmath.sqrt(2))
        zeros = int(mpmath.floor(-mpmath.log(tail, 2)))
        return 2**zeros, (int(mpmath.floor(tail * 2 ** (zeros + 64))) - 2**63) * 2


@pytest.mark.parametrize("scale", [Fraction(3), SCALE, Fraction(10**12)])
@pytest.mark.parametrize("normal", [0.0, 0.001, 1.0, 4.0, 8.5])
def test_a_sample_on_the_boundary_is_decided_by_the_bits_that_follow(scale, normal):
    """Where the first 128 bits do not say on which side of a half-integer the sample is, further ones do."""
    n = int(normal * scale)
    exponent, mantissa = on_the_boundary(scale, n)
    below = round_words(scale, words(exponent), words(mantissa), lambda: 2**64 - 1)
    above = round_words(scale, words(exponent), words(mantissa), lambda: 0)
    assert (below.tolist(), above.tolist()) == ([n], [n + 1])


def test_sign_is_the_last_bit():
    """The last bit of the second word is the sign and nothing else."""
    stream = KeyStream(bytes(32))
    first, second = stream.words(1000), stream.words(1000)
    plus = round_words(SCALE, first, second & ~np.uint64(1), stream.word)
    minus = round_words(SCALE, first, second | np.uint64(1), stream.word)
    assert (plus >= 0).all()
    assert plus.tolist() == (-minus).tolist()


def test_a_word_of_zeros_goes_on_to_the_next():
    """Tails do not end at 2^-64: 64 zeros are followed by more of them."""
    further = iter([0, 2, *[2**63] * 5])
    actual = round_words(SCALE, words(0), words(0), lambda: next(further))
    with mpmath.workdps(60):
        g = mpmath.findroot(lambda x: mpmath.log(mpmath.erfc(x / mpmath.sqrt(2))) + 130 * mpmath.log(2), 13)
        expected = float(g * SCALE.numerator / SCALE.denominator)
    assert abs(actual[0] - expected) <= 0.5 + 1e-6


def test_magnitudes_stay_within_62_bits():
    """An absurdly rare sample is cut off where a sum with it is still an int64."""
    zeros = iter([0] * 8 + [1] + [2**63] * 20)
    largest_scale = Fraction(2**62 - 1, 20)
    assert round_words(largest_scale, words(0), words(0), lambda: next(zeros)).tolist() == [2**62]


@pytest.mark.parametrize("guess", [0, 1, 600, 10**6, 10**9])
def test_search_finds_the_same_from_any_guess(guess):
    """The exact search does not trust the guess it starts from."""

    class Known:
        low, bits = 2**63 + 12345, 64

    expected = exact_magnitude(SCALE, Known(), 590_000)
    assert exact_magnitude(SCALE, Known(), guess) == expected
    assert abs(expected / float(SCALE) + special.ndtri(0.25)) < 1e-5


def test_tail_bounds_enclose_the_integral():
    """Bounds of the tail enclose its integral, computed without erfc, and are close to each other."""
    for n in (0, 1, 5, 20, 27):
        lower, upper = tail_bounds(Fraction(3), n, 200, 164)
        with mpmath.workdps(60):
            x = mpmath.mpf(2 * n + 1) / 6
            density = mpmath.quad(lambda t: mpmath.exp(-t * t / 2), [x, x + 1, x + 3, x + 8, x + 20])
            tail = density * mpmath.sqrt(2 / mpmath.pi) * mpmath.mpf(2) ** 200
        assert lower < tail < upper
        assert upper - lower <= 2 * (int(tail) >> 130) + 4


def test_ndtri_is_ten_times_better_than_the_guard_needs():
    """The assumption of the proof: scipy's Φ^-1 has relative error below 1e-13 wherever it is asked."""
    choice = random.Random(0)  # noqa: S311 (test points)
    uniforms = []
    for zeros in range(64):
        mantissas = [0, 1, 2**52 - 1, *(choice.randrange(2**52) for _ in range(12))]
        mantissas += [2**52 - 1 - choice.randrange(2**bits) for bits in range(4, 52, 6)]
        uniforms += [(2**52 + mantissa) * 2.0 ** (-54 - zeros) for mantissa in mantissas]
    with mpmath.workdps(40):
        for u in uniforms:
            actual = mpmath.mpf(float(special.ndtri(u)))
            # One step of Newton's method from a point this close leaves an error of its square.
            correction = (mpmath.ncdf(actual) - u) / mpmath.npdf(actual)
            assert abs(correction) <= 1e-13 * abs(actual)


def test_tau_bounds_what_the_proof_leaves():
    """Non-repeating blocks and the cut at 20 standard deviations are within TAU for any number of samples."""
    for samples in (1, 2, 31, 32, 33, 1000, 2**12):
        assert (2 * samples + 64) ** 2 / 2**129 + samples * 2 * stats.norm.sf(20) <= samples * TAU


# Distribution


def test_standard_deviation(normals):
    """Standard deviation and mean are right within 0.5 % of the scale (seven and five standard errors)."""
    assert normals.std() == pytest.approx(1.0, abs=5e-3)
    assert normals.mean() == pytest.approx(0.0, abs=5e-3)


def kolmogorov_smirnov(samples):
    """p-value of samples against the standard normal law."""
    return stats.kstest(samples, special.ndtr, method="asymp").pvalue


def test_kolmogorov_smirnov(normals):
    """The samples are normal, and would be told from normal samples of a scale 2 % off."""
    assert kolmogorov_smirnov(normals) > FAILURE_RATE
    assert kolmogorov_smirnov(normals / 1.02) < FAILURE_RATE
    assert kolmogorov_smirnov(normals / 0.98) < FAILURE_RATE


def chi_square(samples, scale):
    """p-value of integer samples against the exact cell probabilities of rint(scale·g)."""
    last = round(4 * scale)
    edges = np.arange(-last, last) + 0.5
    expected = np.diff(np.concatenate([[0.0], special.ndtr(edges / scale), [1.0]])) * samples.size
    observed = np.bincount(np.clip(samples, -last, last) + last, minlength=2 * last + 1)
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(3)])
def test_cells_of_small_scales(scale):
    """Every integer has the probability of its cell, and no other scale's within 2 %."""
    samples = SystemNoise().rounded_gaussian(scale, SIZE)
    assert chi_square(samples, float(scale)) > FAILURE_RATE
    assert chi_square(samples, float(scale) * 1.02) < FAILURE_RATE
    assert chi_square(samples, float(scale) * 0.98) < FAILURE_RATE


def test_cells_of_the_slow_path():
    """The exact search alone gives every integer the probability of its cell."""
    stream = KeyStream(os.urandom(32))
    args = stream.words(20_000), stream.words(20_000), stream.word
    samples = round_words(Fraction(3), *args, relative_guard=1.0)
    assert chi_square(samples, 3.0) > FAILURE_RATE


@pytest.mark.parametrize("threshold", [3, 4, 5])
def test_tails(normals, threshold):
    """As many samples lie beyond 3, 4 and 5 standard deviations as should, on both sides."""
    for side in (normals, -normals):
        count = int((side > threshold).sum())
        law = stats.binom(SIZE, stats.norm.sf(threshold))
        assert law.ppf(FAILURE_RATE / 2) <= count <= law.isf(FAILURE_RATE / 2)


def test_tails_go_beyond_what_53_bits_reach():
    """The exponent floats: sixty trailing zeros in the first word are more than 8.9 standard deviations."""
    assert round_words(SCALE, words(2**60), words(0), no_more)[0] > 8.9 * SCALE


# Independence


def assert_uncorrelated(x, y):
    """Correlation of n independent pairs is below 4.9/sqrt(n) but for one time in a million."""
    assert abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(len(x)) < stats.norm.isf(FAILURE_RATE / 2)


@pytest.mark.parametrize("lag", [1, 2, 2**12])
def test_coordinates_are_independent(normals, lag):
    """Neither values nor sizes of coordinates go together: neighbours, or places under the next key."""
    assert_uncorrelated(normals[:-lag], normals[lag:])
    assert_uncorrelated(np.abs(normals[:-lag]), np.abs(normals[lag:]))


def test_releases_are_independent(normals):
    """A second call shares nothing with the first."""
    again = SystemNoise().rounded_gaussian(SCALE, SIZE)
    assert_uncorrelated(normals, again)
    assert_uncorrelated(np.abs(normals), np.abs(again))


def test_keys_differ_within_a_release():
    """Samples of one key do not come back under the next."""
    actual = SystemNoise().rounded_gaussian(SCALE * 2**20, 2 * 2**12)
    assert not np.array_equal(actual[: 2**12], actual[2**12 :])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_draws_other_noise():
    """After a fork parent and child do not share noise."""
    source = SystemNoise()
    source.rounded_gaussian(SCALE, 4)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, source.rounded_gaussian(SCALE * 2**20, 4).tobytes())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        theirs = np.frombuffer(pipe.read(), np.int64)
    os.waitpid(child, 0)
    assert theirs.shape == (4,)
    assert not (theirs == source.rounded_gaussian(SCALE * 2**20, 4)).any()


# Sources


def test_key_stream_is_aes_in_counter_mode():
    """Words are AES-256-CTR's, each handed out once, in order."""
    key = bytes(range(32))
    expected = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(40))
    stream = KeyStream(key)
    actual = [*stream.words(3).tolist(), stream.word(), *stream.words(1).tolist()]
    assert actual == np.frombuffer(expected, "<u8").tolist()


def test_seeded_noise_repeats():
    """The same seed, stream and call give the same noise; any other of the three gives other noise."""

    def draw(seed, stream, calls=1):
        source = SeededNoise(seed, stream)
        return [source.rounded_gaussian(SCALE, 3).tolist() for _ in range(calls)][-1]

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2, calls=2) == draw(1, 2, calls=2)
    assert len({tuple(noise) for noise in (draw(1, 2), draw(2, 2), draw(1, 3), draw(1, 2, calls=2))}) == 4


def test_seeded_noise_is_the_same_on_every_machine():
    """Golden numbers, from this code: a seeded simulation can be compared across machines and engines."""
    assert SeededNoise(1, 2).rounded_gaussian(Fraction(1000), 4).tolist() == [1128, 893, 1338, -972]


def test_names_say_what_protects():
    """The ledger's names; only one of them protects."""
    names = [SystemNoise().name, SeededNoise(0, 0).name, NoNoise().name]
    assert names == ["aes-256-ctr", "seeded (NOT PRIVATE)", "none"]


def test_no_noise_is_zero():
    """Without noise there are zeros."""
    assert NoNoise().rounded_gaussian(Fraction(0), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1), Fraction(2**62, 20)])
def test_refuses_scales_that_do_not_fit(scale):
    """No scale, a negative one, and one whose samples might leave 62 bits are errors."""
    with pytest.raises(ValueError, match="0 < scale"):
        SystemNoise().rounded_gaussian(scale, 1)


def test_sizes():
    """Any number of samples, none included."""
    for size in (0, 1, 2**12 - 1, 2**12, 2**12 + 1):
        noise = SystemNoise().rounded_gaussian(SCALE, size)
        assert (noise.shape, noise.dtype) == ((size,), np.int64)
