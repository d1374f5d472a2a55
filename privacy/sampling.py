"""How users come to contribute to a release, as events and schedules spell it: "none", or {"poisson": "0.1"}.

"none" is no sampling: everybody contributes to every release. With "poisson" each user's own device tosses a coin
for each release and contributes on heads, of probability q; what that is worth is in `privacy.amplification`, which
needs the schedule that is kept here: fixed and charged as a whole in the run's START line, before anything else of
the ledger was charged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from privacy.participation import checked_noise_multiplier, limit_units

NO_SAMPLING = "none"
MOST_ROUNDS = 1_000_000
_PROBABILITY = re.compile(r"0\.[0-9]{1,18}", re.ASCII)
_AMOUNT = re.compile(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,18})?|inf", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SampledRun:
    """What the START line of a sampled run says; all of it is charged there, for ever.

    Attributes:
        run: Its name.
        noise_multiplier: z of each release.
        sampling_probability: q.
        rounds: How many releases.
        capped_mu_max: What the ledger's runs without sampling may cost one (user, node), all of them together.
        amplified_epsilon: Of the run together with them, at the ledger's delta.
    """

    run: str
    noise_multiplier: str
    sampling_probability: str
    rounds: int
    capped_mu_max: str
    amplified_epsilon: str


def is_sampling(value: object) -> bool:
    """Whether this is one of the two forms, with 0 < q < 1."""
    return value == NO_SAMPLING or (
        isinstance(value, dict) and value.keys() == {"poisson"} and is_probability(value["poisson"])
    )


def is_probability(value: object) -> bool:
    """Whether this is a decimal string above 0 and below 1."""
    return isinstance(value, str) and _PROBABILITY.fullmatch(value) is not None and Fraction(value) > 0


def poisson(sampling_probability: str | None) -> str | dict[str, str]:
    """The form for this q; None is no sampling."""
    return NO_SAMPLING if sampling_probability is None else {"poisson": sampling_probability}


def probability_of(sampling: Any) -> Fraction | None:
    """q of a form that is one, exactly; None without sampling."""
    return None if sampling == NO_SAMPLING else Fraction(sampling["poisson"])


def sampled_run(run: str, schedule: Mapping[str, Any]) -> SampledRun | None:
    """What a START line's schedule says about sampling; None for a run without.

    Raises:
        ValueError: If it says something that is none of the forms, or not all that is charged.
    """
    sampling, rounds = schedule.get("sampling", NO_SAMPLING), schedule.get("rounds")
    if not is_sampling(sampling):
        raise ValueError(f"Expected sampling 'none' or {{'poisson': '0.1'}}, got {sampling=}.")
    if sampling == NO_SAMPLING:
        return None
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS:
        raise ValueError(f"Expected 1 <= rounds <= {MOST_ROUNDS} of a sampled run, got {rounds=}.")
    checked_noise_multiplier(schedule.get("noise_multiplier"))  # type: ignore[arg-type]  # it checks that, too
    for name in ("capped_mu_max", "amplified_epsilon"):
        value = schedule.get(name)
        if not isinstance(value, str) or _AMOUNT.fullmatch(value) is None:
            raise ValueError(f"Expected {name} of a sampled run as a decimal string, got {value!r}.")
    return SampledRun(
        run=run,
        noise_multiplier=schedule["noise_multiplier"],
        sampling_probability=sampling["poisson"],
        rounds=rounds,
        capped_mu_max=schedule["capped_mu_max"],
        amplified_epsilon=schedule["amplified_epsilon"],
    )


def check_charge(run: SampledRun, *, epsilon: str, limit: float) -> None:
    """Whether what a sampled run says it costs is within a ledger's budget; the accountants are asked elsewhere.

    Args:
        run: The run.
        epsilon: Of the GENESIS line; "inf" for a ledger that promises nothing.
        limit: Of the GENESIS line's mu_max, in units; inf likewise.

    Raises:
        ValueError: If it is not, or is without limit where the ledger has one.
    """
    infinite = [value == "inf" for value in (run.capped_mu_max, run.amplified_epsilon, epsilon)]
    if any(infinite):
        within = all(infinite)
    else:
        within = limit_units(run.capped_mu_max) <= limit and Fraction(run.amplified_epsilon) <= Fraction(epsilon)
    if not within:
        raise ValueError(
            f"Expected a sampled run within epsilon={epsilon}, got amplified_epsilon={run.amplified_epsilon} and "
            f"capped_mu_max={run.capped_mu_max}."
        )
