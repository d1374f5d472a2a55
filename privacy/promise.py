"""The promise in one sentence, the same wherever it is printed: report, command line, audit.

It speaks of one user, all of whose contributions are compared with zeros (the zero-out relation), and means
P[S] <= e^epsilon P'[S] + delta and P'[S] <= e^epsilon P[S] + delta for every set S of things that the releases could
show. delta is part of that inequality: it is not the chance that the factor is exceeded.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from privacy.lines import SEEDED_NOISE
from privacy.participation import is_unlimited
from privacy.rounding import counted, rounded_up

NOTHING_PROMISED = "NOT PRIVATE: nothing is promised to anybody. Publish nothing of this run."
_LARGEST_FACTOR_SHOWN = 20.0


def promise(
    releases: str, epsilon: float, delta: float, *, max_nodes_per_user: int = 1, is_sampled: bool = False
) -> str:
    """What releases with noise promise.

    Args:
        releases: What epsilon counts, in words that begin the sentence: "Everything released …".
        epsilon: Of all of it together, finite.
        delta: What epsilon is for.
        max_nodes_per_user: On how many nodes one user's data may be.
        is_sampled: Whether epsilon counts on coins of the users' devices.
    """
    coins = "; so is each user's device, to toss the coins of sampled rounds and keep them secret" * is_sampled
    factor = f" = {rounded_up(math.exp(epsilon))}" if epsilon < _LARGEST_FACTOR_SHOWN else ""
    nodes = "" if max_nodes_per_user == 1 else f", from up to {max_nodes_per_user} nodes,"
    return (
        f"{releases} is differentially private for each single user with ε = {rounded_up(epsilon)} and "
        f"δ = {rounded_up(delta)}: the probability of anything it could show is at most e^ε{factor} times what it "
        f"would be if all contributions of that user{nodes} were zeros, plus δ, and the other way round (the "
        f"zero-out relation); the server that adds the noise is trusted (central trust){coins}."
    )


def promise_of_ledger(
    epsilon: float | None,
    delta: float,
    *,
    population: str,
    rounds: int,
    runs: int,
    lost: int = 0,
    max_nodes_per_user: int = 1,
    is_sampled: bool = False,
    reasons_against: Sequence[str] = (),
) -> str:
    """What the whole ledger promises.

    Args:
        epsilon: Spent by all of its charged rounds; None or inf without noise.
        delta: What epsilon is for.
        population: Whose ledger it is.
        rounds: Charged rounds.
        runs: Started runs.
        lost: Lines that RESTORE lines stand for.
        max_nodes_per_user: On how many nodes one user's data may be.
        is_sampled: Whether one of the runs is sampled.
        reasons_against: Of the function of that name; nothing is promised if there is one.
    """
    if reasons_against:
        return f"No user of “{population}” is promised anything: {'; '.join(reasons_against)}."
    if not rounds + lost:
        return f"Nothing has been released about the users of “{population}” from this ledger yet."
    if epsilon is None or math.isinf(epsilon):
        raise ValueError("Expected a finite epsilon where there is no reason against a promise, got inf.")
    releases = (
        f"Everything released about the users of “{population}” so far, counting the whole ledger "
        f"({counted(rounds, 'charged round')} of {counted(runs, 'run')}{lost_as_well(lost)}),"
    )
    return promise(releases, epsilon, delta, max_nodes_per_user=max_nodes_per_user, is_sampled=is_sampled)


def lost_as_well(lost: int) -> str:
    """That lines which a RESTORE line stands for were counted too; nothing where none was lost."""
    return f" and {counted(lost, 'lost line')}, each charged as a round" if lost else ""


def reasons_against(events: Iterable[Mapping[str, Any]], mu_max: str) -> tuple[str, ...]:
    """Why a ledger's rounds promise nothing; empty where they promise something.

    Args:
        events: The mechanism events of all its RESERVE lines.
        mu_max: Of its GENESIS line.
    """
    sources = Counter(str(event["noise"]) for event in events)
    total = counted(sources.total(), "charged round")
    reasons = []
    if count := sources["none"]:
        reasons.append(f"{count:,} of {total} had no noise")
    if count := sources[SEEDED_NOISE]:
        reasons.append(f"{count:,} of {total} drew the noise from a seed, and whoever knows the seed can subtract it")
    if not reasons and is_unlimited(mu_max):
        reasons.append("the ledger has no budget, so nothing limits what will be released")
    return tuple(reasons)
