"""Discrete Gaussian noise, drawn exactly by OpenDP: the optional backend.

N_Z(0, t²) has P[N = n] proportional to exp(−n²/(2t²)), n any integer (Canonne, Kamath & Steinke 2020,
arXiv:2004.00010, Definition 1), and OpenDP draws it with integers alone (Algorithms 1 to 3 there).

Its (epsilon, delta) are not exactly a Gaussian's: over several coordinates they depend on the direction in which a
user moves the sum. So nothing is claimed of them. Noise is drawn a little wider than s = z·K instead, with
t² >= s² + 1/12, and is then within `distance` of rint(σ·g) for a σ >= s, g standard normal: post-processing of the
Gaussian release of which the ledger speaks. `docs/noise.md` has the proof.
"""

import math
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from common.errors import UmbelError
from common.model import IntArray
from privacy.lines import DISCRETE_NOISE

# Samplers before 0.14.2 are biased (opendp issue 2638); since 0.15 random bits come from RAND_priv_bytes.
_LEAST_VERSION = (0, 15)
_LEAST_SCALE = 16
_MAX_MAGNITUDE = 2**62
_MAX_NORMAL = 20


class DiscreteNoise:
    """Noise that protects: OpenDP's discrete Gaussian, on random bits from OpenSSL, which nobody can seed.

    OpenSSL's generator notices a fork, so parent and child do not share noise.

    Raises:
        UmbelError: If OpenDP is not installed, or too old.
    """

    name = DISCRETE_NOISE

    def __init__(self) -> None:
        require_opendp()

    def rounded_gaussian(self, scale: Fraction, size: int) -> IntArray:
        """`size` independent integers, each within `distance(scale)` of the law of rint(σ·g) for a σ >= scale.

        Raises:
            ValueError: If `scale` is below 16, or so large that a sample might not fit 62 bits.
        """
        if not (scale >= _LEAST_SCALE and scale * _MAX_NORMAL < _MAX_MAGNITUDE):
            raise ValueError(f"Expected 16 <= scale < 2^62/20, got {scale=}. Use another grid_scale.")
        return np.clip(discrete_gaussian(widened(scale), size), -_MAX_MAGNITUDE, _MAX_MAGNITUDE)


def require_opendp() -> None:
    """Check that the package is there.

    Raises:
        UmbelError: If it is not, or too old.
    """
    try:
        found = version("opendp")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(int(part) for part in found.split(".")[:2]) < _LEAST_VERSION:
        raise UmbelError(
            f"Expected the package opendp of at least 0.15 with privacy.noise='discrete', found {found}. "
            "Run pip install -e '.[exact-noise]' in the checkout, or use privacy.noise='rounded'."
        )


def widened(scale: Fraction) -> float:
    """The least float64 t with t² >= scale² + 1/12: rounding to integers adds the variance 1/12."""
    variance = scale**2 + Fraction(1, 12)
    t = math.sqrt(variance)
    while Fraction(t) ** 2 >= variance:
        t = math.nextafter(t, 0.0)
    while Fraction(t) ** 2 < variance:
        t = math.nextafter(t, math.inf)
    return t


def distance(scale: Fraction) -> float:
    """Total variation of one widened sample from rint(σ·g), σ² = t² − 1/12 >= scale²: 2^-8·scale^-4 (docs/noise.md).

    1, which is always true, below the scale of 16 at which the proof begins.
    """
    return float(1 / (256 * scale**4)) if scale >= _LEAST_SCALE else 1.0


def discrete_gaussian(scale: float, size: int) -> IntArray:
    """`size` independent samples of N_Z(0, scale²), exactly: OpenDP takes the float as the rational that it is."""
    from opendp.domains import atom_domain, vector_domain  # noqa: PLC0415 (needs the extra `exact-noise`)
    from opendp.measurements import make_gaussian  # noqa: PLC0415 (likewise)
    from opendp.metrics import l2_distance  # noqa: PLC0415 (likewise)
    from opendp.mod import enable_features  # noqa: PLC0415 (likewise)

    enable_features("contrib")
    release = make_gaussian(vector_domain(atom_domain(T="i64")), l2_distance(T="f64"), scale)
    return np.array(release([0] * size), np.int64)
