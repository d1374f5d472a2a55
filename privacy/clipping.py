"""The clipping norm that follows the median of the users' norms (Andrew et al. 2021, arXiv:1905.03871).

Every user adds one bit to the release: 1/2 where its vector is no longer than C before the clip, else −1/2.
Their noised mean says whether C is above the median, and C moves by a factor. Nothing is charged for it
beyond the release itself, of which the bits are coordinates: with s_model² + s_bit² = 1 the release's
coordinate is s_bit·2b (so that |2b| <= 1), its noise z means

    z_Δ = z / s_model      on the clipped vectors, in units of their norm bound, and
    σ_b = z / (2·s_bit)    on the sum of bits; with c = 2·s_bit for the factor on the bit, σ_b = z/c,

and z^-2 = (s_model² + s_bit²)/z² = z_Δ^-2 + (2σ_b)^-2, which is Theorem 1 of the paper.
"""

import math

# Below this many users per unit of z the noised mean bit is mostly noise.
_USERS_PER_NOISE = 33


def split_noise(noise_multiplier: float, *, bit_share: float) -> tuple[float, float]:
    """(z_Δ, σ_b): the noise on the vectors and on the sum of bits, where both share one release.

    Args:
        noise_multiplier: z of the release.
        bit_share: s_bit in (0, 1), the share of the unit ball that the bit has; the vector has the rest.

    Raises:
        ValueError: If `bit_share` is not strictly between 0 and 1.
    """
    if not 0 < bit_share < 1:
        raise ValueError(f"Expected 0 < bit_share < 1, got {bit_share=}.")
    return noise_multiplier / math.sqrt(1 - bit_share**2), noise_multiplier / (2 * bit_share)


def may_adapt(cohort: int, noise_multiplier: float) -> bool:
    """Whether so many invited users outweigh the noise: cohort >= 33·z; never where z is not a number."""
    return cohort >= _USERS_PER_NOISE * noise_multiplier


def next_clipping_norm(
    clipping_norm: float,
    noised_bit_mean: float,
    *,
    bounds: tuple[float, float],
    learning_rate: float = 0.5,
) -> float:
    """C·exp(−η·b̃) within public bounds, b̃ the noised mean of 1{‖x‖ <= C} − 1/2 over the invited users.

    The target is the median: an absent user counts as 0, in the middle, so dropouts slow C down but do not
    draw it away, as they would for any other quantile. Post-processing of a release; it costs nothing.

    Args:
        clipping_norm: C of the release.
        noised_bit_mean: b̃; noise may take it beyond [−1/2, 1/2], where the true mean is, and it is taken
            back. Not a number counts as 0.
        bounds: Public lower and upper bound of C.
        learning_rate: η.

    Returns:
        C of the next release, finite and within bounds.

    Raises:
        ValueError: If not 0 < lower <= upper < inf, or `clipping_norm` is not positive and finite.
    """
    lower, upper = bounds
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"Expected 0 < lower <= upper < inf, got {bounds=}.")
    if not 0 < clipping_norm < math.inf:
        raise ValueError(f"Expected 0 < clipping_norm < inf, got {clipping_norm=}.")
    mean = 0.0 if math.isnan(noised_bit_mean) else min(max(noised_bit_mean, -0.5), 0.5)
    return min(max(clipping_norm * math.exp(-learning_rate * mean), lower), upper)
