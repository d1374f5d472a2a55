"""Two accountants of Poisson-sampled Gaussian releases: opacus' PRV, which says how far it may be off, and RDP.

Both are asked with plain floats that were validated before: given NaN, opacus sums a series without end and RDP
returns epsilon 0.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

PRV_ERROR = 0.01
"""How far opacus' bounds lie below and above its estimate of epsilon, which is the default there."""
FOURIER_ERROR = 2.0**-52
"""Composing T releases by Fourier transform, as opacus and dp_accounting do, puts at most T times this onto delta or
takes it off: five times what a test against the exact Gaussian sees."""
_PRV_DELTA_ERROR = 1e-3  # of delta, likewise
_MOST_POINTS = 2**23
_ABSL_LOG = logging.getLogger("absl")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Equal Gaussian releases, to each of which a user contributes with the same probability.

    Attributes:
        noise_multiplier: Of each release, at sensitivity 1.
        sampling_probability: In (0, 1]; 1 where nothing is left to chance.
        count: How many.
    """

    noise_multiplier: float
    sampling_probability: float = 1.0
    count: int = 1


@dataclass(frozen=True)
class _GaussianLoss:
    """The privacy loss of Gaussian noise without sampling: normal, of mean mu²/2 and variance mu².

    Opacus' own formula divides by zero here: a sampled loss is never below log(1 − q), which is log 0 at q = 1, and
    exp(t) + q − 1 rounds to 0 for losses t below −36. What it returns is right all the same (a test compares them).
    """

    mu: float

    def cdf(self, t: Any) -> Any:
        from scipy.special import ndtr  # noqa: PLC0415 (needs the extra `simulate`)

        return ndtr((t - self.mu * self.mu / 2) / self.mu)


@contextmanager
def warnings_refused() -> Iterator[None]:
    """Let no accountant go on after a warning: it is an exception in here."""
    import numpy as np  # noqa: PLC0415 (not needed to import the accountants' names)

    with warnings.catch_warnings(), np.errstate(divide="warn", invalid="warn", over="warn"):
        warnings.simplefilter("error")
        yield


def prv_bounds(releases: Sequence[Sampled], delta: float) -> tuple[float, float]:
    """Lower and upper bound of epsilon by opacus' PRV accountant (Gopi et al. 2021, arXiv:2106.02848).

    The steps are those of `opacus.accountants.PRVAccountant`, but for two parts: the width of the grid comes from
    dp_accounting's RDP, where opacus' own takes seconds at much noise, and releases without sampling bring their
    own distribution (`_GaussianLoss`).

    Raises:
        ValueError: If the grid would be too large, or what comes out is no number.
        Exception: Whatever opacus raises.
    """
    from opacus.accountants.analysis import prv  # noqa: PLC0415 (imports torch)

    total, delta_error = sum(release.count for release in releases), _PRV_DELTA_ERROR * delta
    with warnings_refused():
        # Remark 5.6 of arXiv:2106.02848, with opacus' reserve of 3.
        single = max(rdp_bound([replace(release, count=1)], delta_error / (8 * total)) for release in releases)
        width = 3 + max(rdp_bound(releases, delta_error / 4), single, PRV_ERROR)
        mesh = PRV_ERROR / math.sqrt(total * math.log(12 / delta_error) / 2)
        if not 2 * width / mesh <= _MOST_POINTS:
            raise ValueError(f"Expected at most {_MOST_POINTS} points for PRV, got {2 * width / mesh:.3g}.")
        domain = prv.Domain.create_aligned(-width, width, mesh)
        truncated = [
            prv.TruncatedPrivacyRandomVariable(_loss(each, prv), domain.t_min, domain.t_max) for each in releases
        ]
        discrete = [prv.discretize(each, domain) for each in truncated]
        composed = prv.compose_heterogeneous(discrete, [release.count for release in releases])
        lower, _, upper = composed.compute_epsilon(delta, delta_error, PRV_ERROR)
    if not -math.inf < lower <= upper < math.inf:
        raise ValueError(f"Expected bounds from PRV, got {lower} and {upper}.")
    return max(0.0, float(lower)), max(0.0, float(upper))


def rdp_bound(releases: Sequence[Sampled], delta: float) -> float:
    """Epsilon by dp_accounting's Rényi accountant: loose, and never below the true one."""
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415 (slow to import)

    accountant = RdpAccountant()
    with _quiet():
        for release in releases:
            accountant.compose(sampled_event(release), release.count)
        return float(accountant.get_epsilon(delta))


def sampled_event(release: Sampled) -> Any:
    """One of these releases as a dp_accounting event.

    Its noise is a Python float and nothing is composed inside the sampling: given int or float32, dp_accounting
    0.6.0 counts a composition in there as a single release.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent  # noqa: PLC0415 (slow to import)

    gaussian = GaussianDpEvent(float(release.noise_multiplier))
    if release.sampling_probability == 1:
        return gaussian
    return PoissonSampledDpEvent(float(release.sampling_probability), gaussian)


def _loss(release: Sampled, prv: Any) -> Any:
    if release.sampling_probability == 1:
        return _GaussianLoss(1 / release.noise_multiplier)
    return prv.PoissonSubsampledGaussianPRV(release.sampling_probability, release.noise_multiplier)


@contextmanager
def _quiet() -> Iterator[None]:
    """RDP logs each fractional order whose series it gave up; without them it is looser, and no less a bound."""
    level = _ABSL_LOG.level
    _ABSL_LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _ABSL_LOG.setLevel(level)
