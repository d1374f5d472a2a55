"""What a release folder says beside its ledger: a line of metrics for each round, and what an attack has shown.

Both are public: the metrics follow from noised sums that were charged, the attack used made-up users. Neither is
signed, so a report shows them and bases no promise on them. Whether an attack was made on the run that it lies beside,
`privacy.attacked` asks the ledger.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common.errors import UmbelError
from privacy.accounting import SMALLEST_DELTA


@dataclass(frozen=True, kw_only=True)
class Attendance:
    """How many nodes were invited to a round, how many answered, and the public codes of the refusals."""

    invited: int
    answered: int
    refusals: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """One round's line of metrics.

    Attributes:
        attendance: Of nodes; None where the line does not say.
        residual_scale: Standard deviation of what personal models leave unexplained on users' own training examples, as
            the noised sums so far estimate it; in units of the target. None where the line does not say.
    """

    attendance: Attendance | None
    residual_scale: float | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RefutedBelow:
    """A lower bound on epsilon: with this confidence, and if its assumptions hold, the truth is not below it."""

    name: str
    epsilon: float
    confidence: float
    assumes: str


@dataclass(frozen=True, kw_only=True)
class EmpiricalAudit:
    """An attack on the mechanism of a run with made-up users.

    Attributes:
        run: The run that was attacked; None for all rounds of a ledger, or where the file does not say.
        ledger_id: Its ledger's own name; None where the file does not say, as of before umbel wrote it down.
        ledger_head: The ledger's head at the time, "sequence:head".
        version: Of the umbel that attacked.
        canaries: How many users were made up.
        threat: What the attack saw: "all" releases, or the "last" model.
        rounds: Of the run, as it was attacked.
        noise_multiplier: What the ledger claimed of the first of them.
        claimed_epsilon: What the ledger claims for these rounds.
        claimed_delta: Its delta.
        confidence: With which all bounds hold together.
        bounds: On epsilon, from below.
        fpr: False positive rate of `tpr`.
        tpr: Share of the canaries that were in and were found, where `fpr` of the others were taken to be in.
        auroc: Probability that one who was in has a higher score than one who was not.
        alarm: Whether a bound is above what is claimed.
    """

    run: str | None
    ledger_id: str | None
    ledger_head: str | None
    version: str | None
    canaries: int
    threat: str
    rounds: int
    noise_multiplier: str | None
    claimed_epsilon: float
    claimed_delta: float
    confidence: float
    bounds: tuple[RefutedBelow, ...]
    fpr: float
    tpr: Estimate
    auroc: Estimate
    alarm: bool

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """From what `umbel audit --empirical` has written; the alarm follows from the bounds.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another kind.
            ValueError: If a number is none.
        """
        bounds = tuple(
            RefutedBelow(
                name=str(bound["name"]),
                epsilon=_number(bound["epsilon"]),
                confidence=_number(bound["confidence"]),
                assumes=str(bound["assumes"]),
            )
            for bound in found["bounds"]
        )
        claimed, tpr, auroc = found["claimed"], found["tpr_at_fpr"], found["auroc"]
        epsilon, confidence = _number(claimed["epsilon"]), _number(found["confidence"])
        delta = _number(claimed["delta"])
        if not (0 < confidence < 1 and SMALLEST_DELTA <= delta < 1):
            raise ValueError(
                f"Expected 0 < confidence < 1, {SMALLEST_DELTA} <= delta < 1, got {confidence=}, {delta=}."
            )
        return cls(
            run=_text(found, "run"),
            ledger_id=_text(found, "ledger_id"),
            ledger_head=_text(found, "ledger_head"),
            version=_text(found, "umbel"),
            canaries=int(found["canaries"]),
            threat=str(found["threat"]),
            rounds=int(found["rounds"]),
            noise_multiplier=_text(found, "noise_multiplier"),
            claimed_epsilon=epsilon,
            claimed_delta=delta,
            confidence=confidence,
            bounds=bounds,
            fpr=_number(tpr["fpr"]),
            tpr=Estimate(value=_number(tpr["tpr"]), low=_number(tpr["low"]), high=_number(tpr["high"])),
            auroc=Estimate(value=_number(auroc["value"]), low=_number(auroc["low"]), high=_number(auroc["high"])),
            alarm=any(bound.epsilon > epsilon for bound in bounds),
        )


def read_metrics(path: Path) -> dict[int, RoundMetrics]:
    """By round; a line that is torn or not a round's is no reason to have no report."""
    found: dict[int, RoundMetrics] = {}
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for line in lines:
            try:
                numbers = json.loads(line)
                number = int(numbers["round"])
            except (ValueError, KeyError, TypeError):
                continue
            found[number] = RoundMetrics(attendance=_attendance(numbers), residual_scale=_residual_scale(numbers))
    return found


def read_empirical(path: Path) -> EmpiricalAudit | None:
    """What an attack on the run has shown, or None where there was none.

    Raises:
        UmbelError: If the file is not as umbel wrote it.
    """
    if not path.exists():
        return None
    try:
        return EmpiricalAudit.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UmbelError(
            f"Expected {path} as umbel wrote it, got something else. Remove it, or audit the run again."
        ) from error


def _attendance(numbers: Mapping[str, Any]) -> Attendance | None:
    try:
        refusals = {str(code): int(count) for code, count in numbers["refusals"].items()}
        return Attendance(invited=int(numbers["invited"]), answered=int(numbers["answered"]), refusals=refusals)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _residual_scale(numbers: Mapping[str, Any]) -> float | None:
    try:
        return math.sqrt(_number(numbers["noise_variance"]))
    except (ValueError, KeyError, TypeError):
        return None


def _text(found: Mapping[str, Any], name: str) -> str | None:
    value = found.get(name)
    if not isinstance(value, str | None):
        raise TypeError(f"Expected a text as {name}, got {value!r}.")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"Expected a finite number of at least 0, got {value!r}.")
    return float(value)
