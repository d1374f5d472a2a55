"""What Poisson-sampled releases cost: each user's own device tosses a coin per release, and heads contribute.

Amplified numbers hold under two conditions that a capped run does not need. Secrecy of the coins: they stay on the
device, and what an answer looks like does not tell heads from tails. A fixed schedule: noise multiplier, sampling
probability and number of rounds are written down before the first round, because no filter that lets them be chosen
on the way is known for privacy-loss distributions. Flower's own sampling, of a fixed number of those connected, is
no such coin.

A schedule is data, as the ledger spells it. Its epsilon is dp_accounting's PLD, which is accepted only between
opacus' PRV lower bound and RDP; whatever fails, warns or is no number is refused. Unit, relation and the meaning of
s are those of `privacy.accounting`.

A user on s nodes has a coin on each, so sensitivity s under one coin (z/s, which is right without sampling) would
claim too little: at z = 0.5, q = 0.01 two coins show heads almost twice as often as one. The noise of a release is
the sum of s parts of variance z²/s, one for each node, so the release is no more than what s releases at z/√s tell,
each with its own coin. At q = 1 this is z/s again.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from common.errors import UmbelError
from privacy.accounting import SMALLEST_DELTA
from privacy.gaussian import mu_of_epsilon
from privacy.participation import SMALLEST_NOISE_MULTIPLIER, checked_noise_multiplier, limit_units
from privacy.prv import FOURIER_ERROR, PRV_ERROR, Sampled, prv_bounds, rdp_bound, warnings_refused

MOST_PARTS = 20
"""Schedules and noise multipliers in one ledger: 200 distinct ones take dp_accounting half a minute."""
MOST_ROUNDS = 1_000_000
_INTERVAL = 1e-4
_FINER = 10
_RETRY_ABOVE = 1.02  # PLD over PRV's estimate, the middle of its bounds
_EXACTLY_ENOUGH = 10.0  # an interval of 1e-4 up to this epsilon, and in proportion beyond
_MOST_POINTS = 3_000_000
_RDP_SLACK = 1e-6
_FELT = 1e-3  # of delta
_MILLION = 10**6
_STEPS = 2_000  # a least noise multiplier is found to one part in so many
_PROBABILITY = re.compile(r"0(\.[0-9]{1,18})?|1(\.0{1,18})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rounds of one Poisson-sampled run, fixed before the first of them.

    Attributes:
        noise_multiplier: z of each release, the ledger's decimal string.
        sampling_probability: q, with which each user contributes to a release; a decimal string too.
        rounds: How many releases.
    """

    noise_multiplier: str
    sampling_probability: str
    rounds: int

    def __post_init__(self) -> None:
        """Check the numbers, which no accountant does.

        Raises:
            ValueError: If not 0.05 <= noise_multiplier, 0 < sampling_probability <= 1 or 1 <= rounds <= 1,000,000.
        """
        checked_noise_multiplier(self.noise_multiplier)
        checked_probability(self.sampling_probability)
        _check_integer("rounds", self.rounds, MOST_ROUNDS)

    @property
    def expected_contributions(self) -> float:
        """How often one user contributes on average: q times rounds."""
        return float(Fraction(self.sampling_probability) * self.rounds)


@dataclass(frozen=True, kw_only=True)
class AmplifiedSpent:
    """The worst-case user's loss by the accountants of sampled releases, zero-out unless named otherwise.

    Attributes:
        epsilon: By PLD, accepted: what counts.
        delta: What it is for.
        interval: PLD's grid.
        prv_lower: Opacus' PRV says that epsilon is not below this,
        prv_upper: nor above this.
        rdp_epsilon: By RDP, loose.
        replace_one_epsilon: By PLD where neighbours swap one user's data; None where it was not asked for.
    """

    epsilon: float
    delta: float
    interval: float
    prv_lower: float
    prv_upper: float
    rdp_epsilon: float
    replace_one_epsilon: float | None = None


def checked_probability(sampling_probability: str) -> Fraction:
    """The sampling probability as an exact fraction.

    Raises:
        ValueError: If it is not a decimal string in (0, 1] of at most 18 decimals.
    """
    if not isinstance(sampling_probability, str) or _PROBABILITY.fullmatch(sampling_probability) is None:
        raise ValueError(
            f"Expected sampling_probability to be a decimal string such as '0.01', got {sampling_probability!r}."
        )
    q = Fraction(sampling_probability)
    if q == 0:
        raise ValueError(f"Expected 0 < sampling_probability <= 1, got {sampling_probability=}.")
    return q


def amplified(
    schedules: Sequence[Schedule],
    delta: float,
    *,
    capped_mu_max: str = "0",
    s: int = 1,
    with_replace_one: bool = False,
) -> AmplifiedSpent:
    """What all Poisson-sampled runs of a ledger cost, with its capped runs.

    Args:
        schedules: Each whole, whether or not all of its rounds took place.
        delta: For epsilon.
        capped_mu_max: What a user's filter on one node admits over all capped runs, a decimal string: together
            they are one Gaussian release at 1/mu_max, however they were chosen on the way. "0" for none.
        s: On how many nodes a user may be.
        with_replace_one: Also find epsilon where neighbours swap one user's data, which takes as long again.

    Raises:
        ValueError: If a number is out of range.
        UmbelError: If the accountants fail, warn or contradict each other, or opacus is not installed.
    """
    releases = _releases(schedules, delta, capped_mu_max, s)
    found = _accepted(releases, delta)
    return replace(found, replace_one_epsilon=_replace_one(releases, found)) if with_replace_one else found


def amplified_curve(
    schedule: Schedule,
    delta: float,
    points: Iterable[int],
    *,
    before: Sequence[Schedule] = (),
    capped_mu_max: str = "0",
    s: int = 1,
    with_replace_one: bool = False,
) -> dict[int, AmplifiedSpent]:
    """`amplified` after each of some rounds of `schedule`, charged after those of `before`.

    All of them on the grid of the last one, so that the curve does not go down where a finer grid sets in. Only the
    schedule's last round comes `with_replace_one`.

    Raises:
        ValueError: If a point is not a round of the schedule, or as `amplified`.
        UmbelError: As `amplified`.
    """
    chosen = list(points)
    if not all(type(t) is int and 1 <= t <= schedule.rounds for t in chosen):
        raise ValueError(f"Expected rounds from 1 to {schedule.rounds}, got points={chosen}.")
    whole = amplified([*before, schedule], delta, capped_mu_max=capped_mu_max, s=s, with_replace_one=with_replace_one)
    curve = {}
    for t in chosen:
        if t == schedule.rounds:
            curve[t] = whole
            continue
        releases = _releases([*before, replace(schedule, rounds=t)], delta, capped_mu_max, s)
        curve[t] = _bracketed(releases, delta, whole.interval)
        _accept(curve[t], releases)
    return curve


def least_noise_sampled(epsilon: float, delta: float, rounds: int, sampling_probability: str, *, s: int = 1) -> str:
    """The least noise multiplier, of six decimals, at which so many sampled rounds cost at most epsilon.

    PRV's estimate (where that is within PRV's own error, PLD's) finds it, to one part in 2000; then it is raised until
    PLD, which is never below, is within epsilon and accepted.

    Raises:
        ValueError: If a number is out of range.
        UmbelError: If the accountants refuse on the way.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"Expected 0 < epsilon < inf, got {epsilon=}.")
    _check_integer("max_nodes_per_user", s, MOST_ROUNDS)

    def schedule(millionths: int) -> Schedule:
        z = f"{millionths // _MILLION}.{millionths % _MILLION:06d}"
        return Schedule(noise_multiplier=z, sampling_probability=sampling_probability, rounds=rounds)

    def releases(millionths: int) -> list[Sampled]:
        return _releases([schedule(millionths)], delta, "0", s)

    def estimate(millionths: int) -> float:
        asked = releases(millionths)
        with _refusing(asked, delta):
            lower, upper = prv_bounds(asked, delta) if epsilon > PRV_ERROR else (0.0, math.inf)
            if lower > 0:
                return (lower + upper) / 2
            # below its error PRV cannot tell one epsilon from another, and PLD, which is slow with little noise, can
            return upper if upper <= epsilon else _by_pld(asked, delta, _INTERVAL)

    least = math.isqrt(int(SMALLEST_NOISE_MULTIPLIER**2 * _MILLION**2) * s - 1) + 1
    # enough without sampling, too; RDP, which is looser, is not asked for more, nor for what it cannot tell either
    enough = max(least, math.ceil(_MILLION * s * math.sqrt(rounds) / mu_of_epsilon(epsilon, delta)))
    high = min(enough, max(least, _MILLION // 4)) if epsilon > PRV_ERROR else enough
    while high < enough and rdp_bound(releases(high), delta) > epsilon:
        high = min(enough, 2 * high)
    found = _least(estimate, epsilon, least, high)
    while (cost := _accepted(releases(found), delta).epsilon) > epsilon:
        found = math.ceil(found * max(1 + 1 / _STEPS, cost / epsilon))
    return schedule(found).noise_multiplier


def _least(cost: Callable[[int], float], target: float, least: int, high: int) -> int:
    """The smallest integer from `least` on, to one part in `_STEPS`, at which a falling cost is within target.

    Bisection at the point where a power law through both ends meets the target, because costs take seconds.
    `high` has to be within target.
    """
    low, below = least - 1, math.inf
    above = cost(high)
    while high - low > (step := max(1, high // _STEPS)):
        middle = min(max(_meeting(low, below, high, above, target) + step // 2, low + 1), high - 1)
        for aim in (middle, middle - step):
            if not low < aim < high:
                continue
            if (value := cost(aim)) > target:
                low, below = aim, value
                break
            high, above = aim, value
    return high


def _meeting(low: int, below: float, high: int, above: float, target: float) -> int:
    """Where the power law through (low, below) and (high, above) comes to target; at half of high at the least."""
    exponent = math.log(below / above) / math.log(high / low) if math.isfinite(below) and above > 0 else 1.0
    return int(max(high / 2, high * (max(above, target * 1e-3) / target) ** (1 / exponent)))


def _releases(schedules: Sequence[Schedule], delta: float, capped_mu_max: str, s: int) -> list[Sampled]:
    """Everything in a ledger as accountants take it, once it is seen to be in range."""
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(f"Expected {SMALLEST_DELTA} <= delta < 1, got {delta=}.")
    _check_integer("max_nodes_per_user", s, MOST_ROUNDS)
    if not 1 <= len(schedules) <= MOST_PARTS:
        raise ValueError(f"Expected 1 to {MOST_PARTS} schedules, got {len(schedules)}.")
    releases = [
        Sampled(
            noise_multiplier=_part_of_noise(schedule.noise_multiplier, s),
            sampling_probability=min(1.0, math.nextafter(float(Fraction(schedule.sampling_probability)), 1)),
            count=schedule.rounds * s,
        )
        for schedule in schedules
    ]
    if limit_units(capped_mu_max) > 0:
        mu = s * math.nextafter(float(Fraction(capped_mu_max)), math.inf)
        releases.append(Sampled(noise_multiplier=1 / mu))
    return releases


def _part_of_noise(noise_multiplier: str, s: int) -> float:
    part = float(checked_noise_multiplier(noise_multiplier)) / math.sqrt(s)
    if part < SMALLEST_NOISE_MULTIPLIER:
        raise ValueError(f"Expected 0.05 <= noise_multiplier/sqrt(s), got {noise_multiplier=} and {s=}. Add noise.")
    return part if s == 1 else math.nextafter(part, 0)


def _accepted(releases: Sequence[Sampled], delta: float) -> AmplifiedSpent:
    """What the accountants say, on a finer grid where the usual one is too coarse; refused unless they agree."""
    with _refusing(releases, delta):
        interval = _INTERVAL * max(1.0, rdp_bound(releases, delta) / _EXACTLY_ENOUGH)
    found = _bracketed(releases, delta, interval)
    estimate = (found.prv_lower + found.prv_upper) / 2
    too_coarse = found.epsilon > min(_RETRY_ABOVE * estimate, found.rdp_epsilon)
    if too_coarse and found.rdp_epsilon * _FINER / interval <= _MOST_POINTS:
        found = _bracketed(releases, delta, interval / _FINER)
    _accept(found, releases)
    return found


def _bracketed(releases: Sequence[Sampled], delta: float, interval: float) -> AmplifiedSpent:
    """What the three accountants say, by themselves."""
    with _refusing(releases, delta):
        lower, upper = prv_bounds(releases, delta)
        return AmplifiedSpent(
            epsilon=_by_pld(releases, delta, interval),
            delta=delta,
            interval=interval,
            prv_lower=lower,
            prv_upper=upper,
            rdp_epsilon=rdp_bound(releases, delta),
        )


def _by_pld(releases: Sequence[Sampled], delta: float, interval: float) -> float:
    rounding = _rounding(releases)
    if rounding > delta / 2:
        raise ValueError(f"Expected delta >= {2 * rounding:.3g} for so many rounds")
    with warnings_refused():
        return float(_pld(releases, interval, swapped=False).get_epsilon_for_delta(delta - rounding))


def _rounding(releases: Sequence[Sampled]) -> float:
    """What Fourier transforms may have put onto PLD's delta, or taken off it."""
    return FOURIER_ERROR * sum(release.count for release in releases)


def _accept(found: AmplifiedSpent, releases: Sequence[Sampled]) -> None:
    """Refuse a PLD outside of its bracket; comparisons are written so that NaN is outside.

    Raises:
        UmbelError: Naming the numbers.
    """
    if not found.prv_lower - PRV_ERROR <= found.epsilon <= found.rdp_epsilon + _RDP_SLACK < math.inf:
        raise UmbelError(
            f"Expected prv_lower - {PRV_ERROR} <= epsilon <= rdp_epsilon, got prv_lower={found.prv_lower:.6g}, "
            f"epsilon={found.epsilon:.6g}, rdp_epsilon={found.rdp_epsilon:.6g} for {_spelled(releases)}. "
            "Install the pinned dp-accounting and opacus, or plan without sampling."
        )


def _replace_one(releases: Sequence[Sampled], found: AmplifiedSpent) -> float:
    """Epsilon where a user's data is swapped: one coin, and the contribution on the other side.

    Not below `found`, of which it is the general case, nor above what two steps of it cost, out and in: those are
    (2e, (1 + exp(e))·delta(e)).
    """
    interval = max(found.interval, _INTERVAL)  # a finer one takes seconds, and what is coarse is only more
    with _refusing(releases, found.delta), warnings_refused():
        delta = found.delta - _rounding(releases)
        epsilon = float(_pld(releases, interval, swapped=True).get_epsilon_for_delta(delta))
        single = _pld(releases, interval, swapped=False)
        twice = (1 + math.exp(min(epsilon / 2, 700.0))) * float(single.get_delta_for_epsilon(epsilon / 2))
        # at half of epsilon two steps must not be cheaper than the swap they bound
        if not (found.epsilon - _RDP_SLACK <= epsilon < math.inf and (epsilon == 0 or twice >= delta * (1 - _FELT))):
            raise ValueError(f"Expected replace-one between one step and two, got {epsilon} over {found.epsilon}")
    return epsilon


def _pld(releases: Sequence[Sampled], interval: float, *, swapped: bool) -> Any:
    composed = None
    for release in releases:
        # nothing is composed inside of the sampling, where dp_accounting 0.6.0 may count it once
        part = _single(release.noise_multiplier, release.sampling_probability, interval, swapped)
        part = part.self_compose(release.count) if release.count > 1 else part
        composed = part if composed is None else composed.compose(part)
    return composed


@lru_cache(maxsize=32)
def _single(noise_multiplier: float, sampling_probability: float, interval: float, swapped: bool) -> Any:
    """The privacy-loss distribution of one release, which takes longer to find than its composition."""
    from dp_accounting import NeighboringRelation  # noqa: PLC0415 (slow to import)
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415 (as above)

    relation = NeighboringRelation.REPLACE_ONE if swapped else NeighboringRelation.ADD_OR_REMOVE_ONE
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sampling_probability,
        neighboring_relation=relation,
    )


@contextmanager
def _refusing(releases: Sequence[Sampled], delta: float) -> Iterator[None]:
    """Whatever an accountant raises, or warns of, is a refusal that names what it was asked."""
    if find_spec("opacus") is None:
        raise UmbelError('Expected opacus to check sampled rounds, found none. Run: pip install "umbel[audit]"')
    try:
        yield
    except Exception as error:
        raise UmbelError(
            f"Expected accountants to bear {_spelled(releases)} at {delta=}, got {type(error).__name__}: {error}. "
            "Plan with more noise, fewer rounds or a larger delta, or without sampling."
        ) from error


def _spelled(releases: Sequence[Sampled]) -> str:
    return " and ".join(
        f"{each.count} releases at noise_multiplier={each.noise_multiplier:.6g}, q={each.sampling_probability:.6g}"
        for each in releases
    )


def _check_integer(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"Expected {name} to be an integer from 1 to {most}, got {name}={value!r}.")
