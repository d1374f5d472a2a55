"""Where noise comes from: Gaussian variables of a rational scale, rounded exactly to integers.

The ideal sample is N = rint(s·Φ^-1(U)) for a uniform *real* U and a *rational* s. It is drawn without
approximation: the first 128 random bits decide N wherever s·|Φ^-1(U)|, in float64, is clear of every
half-integer by a guard wider than all errors; the few other coordinates are settled with as many more bits
as it takes, against bounds of Φ at the half-integer. `docs/noise.md` has the proof and the bound `TAU`.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import count
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from mpmath import libmp
from scipy.special import ndtri

from common.model import Array, IntArray
from privacy.lines import SEEDED_NOISE, SYSTEM_NOISE

Words = npt.NDArray[np.uint64]

TAU: Final = 2.0**-114
"""Total-variation distance per coordinate from the ideal sample, AES-256 being a random permutation."""

_MAX_MAGNITUDE = 2**62
_MAX_NORMAL = 20
# At least ten times the largest relative error of `ndtri` (a test measures it), and of s·g in float64.
_RELATIVE_GUARD = 1e-12
# Φ^-1 moves by at most Mills' ratio sqrt(pi/2) times the 2^-52 by which U is truncated.
_ABSOLUTE_GUARD = 2.0**-50
# Samples of one key: blocks of one key never repeat, which a short stream hides (docs/noise.md).
_SAMPLES_PER_KEY = 2**12
_WORD_BITS = 64


class NoiseSource(Protocol):
    """Something that noise is drawn from; its name goes into the ledger and the report."""

    @property
    def name(self) -> str:
        """How the ledger calls it."""
        ...

    def rounded_gaussian(self, scale: Fraction, size: int) -> IntArray:
        """`size` independent integers rint(scale·g), g standard normal, up to what `delta_fp` counts."""
        ...


class SystemNoise:
    """Noise that protects: AES-256 in counter mode under keys that are fresh in every call and never kept.

    Keys come from the operating system inside the call, so processes after a fork do not share noise.
    """

    name = SYSTEM_NOISE

    def rounded_gaussian(self, scale: Fraction, size: int) -> IntArray:
        """`size` independent integers rint(scale·g), g standard normal."""
        return rounded_normals(scale, size, (os.urandom(32) for _ in count()))


class SeededNoise:
    """Noise that anyone with the seed can subtract: for reproducible simulations, NOT PRIVATE.

    Equal `seed`, `stream` and number of earlier calls give equal noise. `stream` tells releases apart: it is
    the sequence number of the ledger line that pays for the release.
    """

    name = SEEDED_NOISE

    def __init__(self, seed: int, stream: int) -> None:
        self._label = f"umbel, seeded noise, NOT PRIVATE: {seed} {stream}"
        self._calls = 0

    def rounded_gaussian(self, scale: Fraction, size: int) -> IntArray:
        """`size` integers rint(scale·g) that are a function of the seed."""
        label = f"{self._label} {self._calls}"
        self._calls += 1
        return rounded_normals(scale, size, (hashlib.sha256(f"{label} {i}".encode()).digest() for i in count()))


class NoNoise:
    """No noise at all, for runs that promise nothing."""

    name = "none"

    def rounded_gaussian(self, scale: Fraction, size: int) -> IntArray:
        """`size` zeros, whatever the scale."""
        return np.zeros(size, np.int64)


class KeyStream:
    """Random bits of one key, each handed out once."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def words(self, size: int) -> Words:
        """The next `size` words of 64 bits."""
        return np.frombuffer(self._encryptor.update(bytes(8 * size)), "<u8").astype(np.uint64, copy=False)

    def word(self) -> int:
        """The next 64 bits."""
        return int.from_bytes(self._encryptor.update(bytes(8)), "little")


def rounded_normals(scale: Fraction, size: int, keys: Iterator[bytes]) -> IntArray:
    """`size` independent integers rint(scale·g), exactly rounded, from as many keys as it takes.

    Raises:
        ValueError: If `scale` is not positive, or so large that a sample might not fit 64 bits, or `size`
            is negative.
    """
    if not 0 < scale * _MAX_NORMAL < _MAX_MAGNITUDE:
        raise ValueError(f"Expected 0 < scale < 2^62/20, got {scale=}. Use a smaller grid_scale.")
    noise = np.empty(size, np.int64)
    for start in range(0, size, _SAMPLES_PER_KEY):
        part, stream = noise[start : start + _SAMPLES_PER_KEY], KeyStream(next(keys))
        part[:] = round_words(scale, stream.words(part.size), stream.words(part.size), stream.word)
    return noise


def round_words(
    scale: Fraction,
    exponents: Words,
    mantissas: Words,
    more: Callable[[], int],
    *,
    relative_guard: float = _RELATIVE_GUARD,
) -> IntArray:
    """rint(±scale·g) for g = −Φ^-1(V/2), with V the real number in (0, 1) that the random words begin.

    V = 2^-e · 0.1m…: e counts the trailing zeros of the first word, going on to further words should it be
    all zeros; m… is the second word without its last bit, which is the sign, then whatever `more` returns.

    Args:
        scale: The rational scale s > 0.
        exponents: `n` random words.
        mantissas: `n` random words.
        more: Returns 64 more random bits.
        relative_guard: How close, relative to itself, s·g may come to a half-integer and still be trusted.

    Returns:
        `n` int64.
    """
    normals = _half_normals(exponents, mantissas)
    scaled = normals * float(scale)
    rounded = np.rint(scaled)
    guard = scaled * relative_guard + float(scale) * _ABSOLUTE_GUARD
    clear = (0.5 - np.abs(scaled - rounded) > guard) & (exponents != 0)
    magnitudes = np.where(clear, rounded, 0).astype(np.int64)
    for i in np.flatnonzero(~clear):
        uniform = Uniform.begin(int(exponents[i]), int(mantissas[i]), more)
        magnitudes[i] = min(exact_magnitude(scale, uniform, int(scaled[i])), _MAX_MAGNITUDE)
    signs = 1 - 2 * (mantissas & np.uint64(1)).astype(np.int64)
    return magnitudes * signs


def _half_normals(exponents: Words, mantissas: Words) -> Array:
    """−Φ^-1(V/2) in float64, V truncated to 53 significant bits; anything where the exponent's word is 0."""
    lowest = (exponents & (~exponents + np.uint64(1))).astype(np.float64)
    lowest[exponents == 0] = 2.0**_WORD_BITS
    significand = ((mantissas >> np.uint64(12)) | np.uint64(2**52)).astype(np.float64)
    normals: Array = -ndtri(significand * 2.0**-54 / lowest)
    return normals


class Uniform:
    """A uniform real number in (0, 1) of which the first bits are known: it is in [low, low + 1)·2^-bits."""

    def __init__(self, low: int, bits: int, more: Callable[[], int]) -> None:
        self.low, self.bits, self._more = low, bits, more

    @classmethod
    def begin(cls, exponent: int, mantissa: int, more: Callable[[], int]) -> "Uniform":
        """The number that these two words begin."""
        zeros = 0
        while exponent == 0:
            zeros, exponent = zeros + _WORD_BITS, more()
        zeros += (exponent & -exponent).bit_length() - 1
        return cls(2**63 | mantissa >> 1, zeros + _WORD_BITS, more)

    def refine(self) -> None:
        """Learn 64 more bits."""
        self.low, self.bits = self.low << _WORD_BITS | self._more(), self.bits + _WORD_BITS


def exact_magnitude(scale: Fraction, uniform: Uniform, guess: int) -> int:
    """rint(scale·g), g = −Φ^-1(V/2): the least n with V > P(scale·|g| > n + 1/2), searched from a guess."""
    low, high, step = guess - 1, guess, 1
    while _exceeds(uniform, scale, high):
        low, high, step = high, high + step, 2 * step
    step = 1
    while low >= 0 and not _exceeds(uniform, scale, low):
        low, high, step = max(low - step, -1), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _exceeds(uniform, scale, middle) else (low, middle)
    return high


def _exceeds(uniform: Uniform, scale: Fraction, n: int) -> bool:
    """Whether scale·g > n + 1/2, that is V < P(scale·|g| > n + 1/2), learning of V until it is decided."""
    while True:
        lower, upper = tail_bounds(scale, n, uniform.bits, uniform.low.bit_length() + _WORD_BITS)
        if uniform.low + 1 <= lower:
            return True
        if uniform.low >= upper:
            return False
        uniform.refine()


def tail_bounds(scale: Fraction, n: int, bits: int, precision: int) -> tuple[int, int]:
    """Integers on both sides of 2^bits·P(scale·|g| > n + 1/2) = 2^bits·erfc(x), x = (n + 1/2)/(scale·√2).

    The slack of 2^(24 − precision) covers the rounding of x, whose relative error erfc multiplies by at most
    1 + 2x² (below 2^23 as long as |g| < 2000), and that of erfc itself.
    """
    square = (2 * n + 1) ** 2 / (8 * scale**2)
    x = libmp.mpf_sqrt(libmp.from_rational(square.numerator, square.denominator, precision), precision)
    tail = int(libmp.to_int(libmp.mpf_shift(libmp.mpf_erfc(x, precision), bits)))
    slack = (tail >> (precision - 24)) + 2
    return tail - slack, tail + slack
