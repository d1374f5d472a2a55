"""An attack on the mechanism of a run: canary users through the server's own code, and what their scores refute.

Nobody's data are used: everybody but the canaries contributes zeros. A canary has a random direction of the greatest
length that one user may have, known to the attack, and takes part in all rounds or in none by a fair coin. The attack
sees the run as its releases show it ("all"), or nothing but the last model ("last").
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import UmbelError, VerificationError
from common.files import write_durably
from common.linalg import svec
from common.model import Array, IntArray, SharedModel
from privacy.accounting import gdp_epsilon
from privacy.audit.estimators import (
    LowerBound,
    auroc,
    clopper_pearson_bound,
    gaussian_bound,
    one_run_bound,
    tpr_at_fpr,
)
from privacy.audit.verify import verify
from privacy.entropy import NoiseSource, SeededNoise, SystemNoise
from privacy.layout import Layout, layout_of_event, split_groups, to_grid
from privacy.ledger_state import Event
from privacy.mechanism import release
from privacy.participation import is_noiseless
from privacy.report import installed_version
from server.algorithms import Algorithm, State, algorithm_of
from server.initialization import tie_breaker
from server.settings import RunSettings, load_run
from umbel.auditing import find_target

Threat = Literal["all", "last"]
Coins = npt.NDArray[np.bool_]

CONFIDENCE = 0.95
"""That all bounds of an audit hold together; each has a third of the error probability."""
FEWEST_CANARIES = 40
_METHODS = (clopper_pearson_bound, one_run_bound, gaussian_bound)
_FPR = 1e-2
_DROWNING_NOISE = 5.0
_COORDINATES_PER_CANARY = 8
# Costs in coordinates of noise, of which some ten million a second are drawn: of a release, of a step of the server,
# and of what solves for U.
_RELEASE_COST = 4_000
_STEP_COST = 8_000
_SOLVED_PER_COORDINATE = 50
_AFFORDABLE = 150_000_000
_COORDINATES_AT_ONCE = 10_000_000
_SLICE_COORDINATES = 500_000


@dataclass(frozen=True, kw_only=True)
class Trials:
    """How canaries are spread over repetitions of the run.

    Attributes:
        repetitions: Times that all rounds are run.
        per_repetition: Canaries in each of them; 1 makes all scores independent.
    """

    repetitions: int
    per_repetition: int

    @property
    def canaries(self) -> int:
        """Number of canaries altogether."""
        return self.repetitions * self.per_repetition


def empirical_audit(
    run_root: Path, *, canaries: int = 1000, threat: Threat = "all", seed: int | None = None
) -> dict[str, Any]:
    """Attack the mechanism of a run as often as there are canaries, and write down what that refutes.

    Args:
        run_root: The run's folder; for the threat "all" its `release` folder is enough.
        canaries: How many; a few more are used where they are spread evenly over repetitions.
        threat: What the attack sees: "all" releases, or the "last" model.
        seed: Makes the audit repeatable; by default all randomness is the operating system's.

    Returns:
        What is written to `empirical.json` in the release folder, as documented for `--format json`.

    Raises:
        UmbelError: If the run has no noise or no rounds, cannot be read, or a number is out of range.
        VerificationError: If its ledger is not valid.
    """
    result = attack_run(run_root, canaries=canaries, threat=threat, seed=seed)
    write_result(run_root, result)
    return result


def write_result(run_root: Path, result: Mapping[str, Any]) -> Path:
    """Write `empirical.json` into the release folder of a run, and say where it is.

    Raises:
        StorageError: If the disk fails.
    """
    path = _release_folder(run_root) / "empirical.json"
    write_durably(path, json.dumps(result, indent=1).encode())
    return path


def attack_run(
    run_root: Path, *, canaries: int = 1000, threat: Threat = "all", seed: int | None = None
) -> dict[str, Any]:
    """`empirical_audit` that writes nothing."""
    started = time.perf_counter()
    if canaries < FEWEST_CANARIES or threat not in ("all", "last"):
        raise UmbelError(
            f"Expected canaries >= {FEWEST_CANARIES} and a threat of 'all' or 'last', got {canaries=}, {threat=}. "
            "Correct them."
        )
    if not run_root.is_dir():
        raise UmbelError(f"Expected a run folder, got {run_root}. Name the folder that the run was written to.")
    mechanism = mechanism_of(run_root)
    events, s, delta = mechanism.events, mechanism.max_nodes_per_user, mechanism.delta
    settings = load_run(run_root) if threat == "last" else None
    trials = spread(canaries, events, last=threat == "last")
    scores, included = attack(events, trials, max_nodes_per_user=s, settings=settings, seed=seed)
    return {
        "umbel": installed_version("umbel"),
        "run": mechanism.run,
        "ledger_id": mechanism.ledger_id,
        "ledger_head": mechanism.ledger_head,
        "canaries": trials.canaries,
        "repetitions": trials.repetitions,
        "threat": threat,
        "noise_multiplier": events[0]["noise_multiplier"],
        "rounds": len(events),
        "coordinates": max(layout_of_event(event).size for event in events),
        "seed": seed,
        **refutations(
            scores,
            included,
            epsilon=gdp_epsilon([event["noise_multiplier"] for event in events], delta, s),
            delta=delta,
            shared=trials.per_repetition > 1,
        ),
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What a run claims to have done.

    Attributes:
        run: Its name; None where nothing says whose folder it is, for all rounds of the ledger.
        ledger_id: The ledger's own name.
        ledger_head: "sequence:head", at which the rounds were read.
        events: That it was charged for.
        max_nodes_per_user: s.
        delta: The ledger's.
    """

    run: str | None
    ledger_id: str
    ledger_head: str
    events: tuple[Event, ...]
    max_nodes_per_user: int
    delta: float


def mechanism_of(run_root: Path) -> Mechanism:
    """What a run was charged for.

    Raises:
        UmbelError: If there is nothing to attack.
        VerificationError: If the ledger is not valid.
    """
    target = find_target(run_root)
    found = verify(target.ledger)
    if found.status == "failed":
        raise VerificationError(f"Expected a valid ledger, got line {found.line} of {target.ledger}: {found.reason}")
    run = None if target.releases is None else target.releases.run
    events = tuple(entry.event for entry in found.rounds if run in (None, entry.run))
    if not events:
        raise UmbelError(f"Expected rounds of run={run!r} in {target.ledger}, got none. Audit a run that has begun.")
    if any(is_noiseless(event["noise_multiplier"]) for event in events):
        raise UmbelError("Expected a run with noise, got one without. It claims nothing that could be refuted.")
    if any(event["sampling"] != "none" for event in events):
        raise UmbelError("Expected a run without sampling, got one with. Its claim is not a Gaussian's: no audit yet.")
    return Mechanism(
        run=run,
        ledger_id=str(found.genesis["ledger_id"]),
        ledger_head=f"{found.sequence}:{found.head}",
        events=events,
        max_nodes_per_user=int(found.genesis["max_nodes_per_user"]),
        delta=float(found.genesis["delta"]),
    )


def spread(canaries: int, events: Sequence[Event], *, last: bool) -> Trials:
    """One canary in each repetition where that can be afforded, else as few as can.

    Args:
        canaries: How many are wanted.
        events: The rounds of a repetition.
        last: Whether the server's steps are taken, which is most of the work then.
    """
    affordable = max(1, _AFFORDABLE // sum(_cost(layout_of_event(event), last=last) for event in events))
    per_repetition = min(math.ceil(canaries / affordable), most_together(events, last=last))
    return Trials(repetitions=math.ceil(canaries / per_repetition), per_repetition=per_repetition)


def most_together(events: Sequence[Event], *, last: bool) -> int:
    """Canaries that one repetition has room for before they drown each other: D/8 below z = 5, else D.

    Half of n canaries are in, so others add a variance of n / (2 D) to a score of variance z^2. A canary that keeps its
    direction hears the same others in every round, so that rounds count as one with z / sqrt(rounds).

    Args:
        events: The rounds of a repetition.
        last: Whether canaries keep their directions.
    """
    sizes = [layout_of_event(event).size for event in events]
    noise = min(float(event["noise_multiplier"]) for event in events) / (math.sqrt(len(events)) if last else 1)
    room = min(sizes) // _COORDINATES_PER_CANARY if noise < _DROWNING_NOISE else min(sizes)
    return max(1, min(room, _COORDINATES_AT_ONCE // max(sizes)))


def _cost(layout: Layout, *, last: bool) -> int:
    """Of one round, in coordinates of noise."""
    if not last:
        return layout.size + _RELEASE_COST
    solved = sum(group.size for group in layout.groups if group.name == "V")
    return layout.size + _RELEASE_COST + _STEP_COST + solved**3 // _SOLVED_PER_COORDINATE


def attack(
    events: Sequence[Event],
    trials: Trials,
    *,
    max_nodes_per_user: int = 1,
    settings: RunSettings | None = None,
    seed: int | None = None,
) -> tuple[Array, Coins]:
    """Run the rounds with canaries in and out, and score each canary.

    Args:
        events: The rounds, as the ledger has them.
        trials: How many canaries, in how many repetitions.
        max_nodes_per_user: s; a canary contributes from as many nodes.
        settings: The run whose last model is all that is seen; None where all releases are.
        seed: Of all randomness; None for the operating system's.

    Returns:
        A score for each canary, and whether it was in.
    """
    rng = np.random.default_rng(seed)
    source: NoiseSource = SystemNoise() if seed is None else SeededNoise(seed, 0)
    included = rng.random((trials.repetitions, trials.per_repetition)) < 0.5
    largest = max(layout_of_event(event).size for event in events)
    at_once = max(1, _COORDINATES_AT_ONCE // (largest * trials.per_repetition))
    scores = np.empty(included.shape)
    for start in range(0, trials.repetitions, at_once):
        part = slice(start, start + at_once)
        replay = _Replay(rng=rng, source=source, included=included[part], max_nodes_per_user=max_nodes_per_user)
        scores[part] = replay.of_releases(events) if settings is None else replay.of_last_model(events, settings)
    return scores.ravel(), included.ravel()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Replay:
    """Repetitions of a run's rounds with canaries.

    Attributes:
        rng: Draws directions.
        source: Draws noise.
        included: `repetitions x canaries`, who is in.
        max_nodes_per_user: How many nodes a canary contributes from.
    """

    rng: np.random.Generator
    source: NoiseSource
    included: Coins
    max_nodes_per_user: int

    def of_releases(self, events: Sequence[Event]) -> Array:
        """Scores from all releases: inner products with the canary's directions, weighted by 1 / z^2.

        A new direction in every round keeps apart what other canaries add to a score; with independent noise the sum
        is the likelihood-ratio test of the one canary.
        """
        scores, total = np.zeros(self.included.shape), 0.0
        for event in events:
            layout, denominator = layout_of_event(event), int(event["denominator"])
            weight = float(event["noise_multiplier"]) ** -2
            canaries = self._canaries(layout)
            for i, noised in enumerate(self._released(canaries, layout, event)):
                scores[i] += weight * (canaries[i] @ _in_unit_ball(noised, layout, denominator) / layout.grid_scale)
            total += weight
        return scores / (total * self.max_nodes_per_user)

    def of_last_model(self, events: Sequence[Event], settings: RunSettings) -> Array:
        """Scores from the last model alone: how far it lies from the public first one along the canary's direction.

        A canary keeps its direction, so that its steps add up.
        """
        config, schema = settings.config, settings.schema
        algorithm = algorithm_of(config, None if settings.start is None else settings.start.model, settings.network)
        first = algorithm.first_state(schema, tie_breaker(settings.run, config.privacy.seed))
        states: list[State] = [first] * len(self.included)
        of_layout: dict[Layout, IntArray] = {}
        for event in events:
            layout = layout_of_event(event)
            if layout not in of_layout:
                of_layout[layout] = self._canaries(layout)
            for i, noised in enumerate(self._released(of_layout[layout], layout, event)):
                states[i] = algorithm.step(states[i], noised, event)
        layout = layout_of_event(events[-1])
        canaries = of_layout[layout]
        shifts = [_visible_shift(algorithm, first, state.model, layout) for state in states]
        return np.stack([rows @ shift for rows, shift in zip(canaries, shifts, strict=True)]) / layout.grid_scale

    def _canaries(self, layout: Layout) -> IntArray:
        """`repetitions x canaries x D` int64: a uniform direction in every group's ball, at its surface."""
        rows = np.empty((self.included.size, layout.size), np.int64)
        at_once = max(1, _SLICE_COORDINATES // layout.size)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            blocks = [self.rng.standard_normal((len(part), group.size)) for group in layout.groups]
            part[:] = to_grid([block / np.linalg.norm(block, axis=1, keepdims=True) for block in blocks], layout)
        return rows.reshape(*self.included.shape, layout.size)

    def _released(self, canaries: IntArray, layout: Layout, event: Event) -> Iterator[IntArray]:
        """The release of each repetition."""
        for rows, inside in zip(canaries, self.included, strict=True):
            yield release(
                (row for row in rows[inside] for _ in range(self.max_nodes_per_user)),
                size=layout.size,
                noise_multiplier=event["noise_multiplier"],
                grid_scale=layout.grid_scale,
                source=self.source,
            )


def refutations(
    scores: Array, included: Coins, *, epsilon: float, delta: float, shared: bool = False
) -> dict[str, Any]:
    """What the scores of canaries say against a claim of (epsilon, delta).

    All lower bounds hold together at the confidence that is reported, so that a correct mechanism raises an alarm in
    one audit of twenty at most.

    Args:
        scores: `n`, one a canary.
        included: `n`, who was in.
        epsilon: Claimed.
        delta: Claimed.
        shared: Whether canaries were in a repetition together.
    """
    scores_in, scores_out = scores[included], scores[~included]
    each = 1 - (1 - CONFIDENCE) / len(_METHODS)
    bounds = [method(scores_in, scores_out, delta=delta, confidence=each) for method in _METHODS]
    found = tpr_at_fpr(scores_in, scores_out, fpr=_FPR, confidence=CONFIDENCE)
    area = auroc(scores_in, scores_out, confidence=CONFIDENCE)
    return {
        "claimed": {"epsilon": epsilon, "delta": delta},
        "confidence": CONFIDENCE,
        "bounds": [_plain(bound, shared=shared) for bound in bounds],
        "tpr_at_fpr": {"fpr": _FPR, "tpr": found.value, "low": found.low, "high": found.high},
        "auroc": {"value": area.value, "low": area.low, "high": area.high},
        "alarm": any(bound.epsilon > epsilon for bound in bounds),
    }


def _plain(bound: LowerBound, *, shared: bool) -> dict[str, Any]:
    return {
        "name": bound.name,
        "epsilon": bound.epsilon,
        "confidence": bound.confidence,
        "assumes": f"{bound.assumes} ({'several canaries' if shared else 'one canary'} in a repetition)",
    }


def _in_unit_ball(noised: IntArray, layout: Layout, denominator: int) -> Array:
    """The release in units of one user's unit ball, from the groups' means as the server takes them.

    Args:
        noised: `D` int64.
        layout: Groups, shares and K.
        denominator: Users of the nodes invited.
    """
    means = split_groups(noised, layout, denominator)
    return np.concatenate(
        [mean * (group.share * denominator) for mean, group in zip(means, layout.groups, strict=True)]
    )


def _visible_shift(algorithm: Algorithm, first: State, model: SharedModel, layout: Layout) -> Array:
    """`D`, what the last model shows of the sum of all releases; zeros where it shows nothing.

    An attack, so it may guess: whatever it computes, the bounds hold.

    Args:
        algorithm: Of the run.
        first: Before the first round, public.
        model: The last one.
        layout: Of the last release.
    """
    seen, start = np.zeros(layout.size), 0
    for group in layout.groups:
        part = seen[start : start + group.size]
        if group.name == "model":
            # the first step was R times the gradient; later metrics are not public to somebody who sees this only
            change = np.column_stack([model.U - first.model.U, model.beta - first.model.beta])
            part[:] = np.linalg.solve(algorithm.metric(first), change).T.ravel()
        elif group.name == "V":
            part[:] = model.U.T.ravel()  # vec(U) = A^-1 V
        elif group.name == "moment":
            Q = np.linalg.qr(np.linalg.solve(algorithm.metric(first), model.U))[0]
            part[:] = svec((Q @ Q.T)[None])[0]
        start += group.size
    return seen


def _release_folder(run_root: Path) -> Path:
    return run_root / "release" if (run_root / "release").is_dir() else run_root
