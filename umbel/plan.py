"""What a run would cost, before any data is touched: noise, budget curve, and what a ledger has left."""

import math
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import UmbelError
from privacy.accounting import SMALLEST_DELTA, mu_curve
from privacy.amplification import Schedule, amplified_curve, checked_probability, least_noise_sampled
from privacy.gaussian import epsilon_of_mu, replace_one
from privacy.ledger import PrivacyLedger
from privacy.participation import cost_units, is_noiseless, mu_max_string, noise_multiplier_for
from privacy.promise import reasons_against
from privacy.rounding import rounded_up
from server.sampling import check_unused, is_unused

DEFAULT_DELTA = 1e-6
MOST_POINTS = 500
"""Rounds at which the curve is computed, about 2 ms each."""
MOST_ROUNDS = 1_000_000
"""So many are planned in some ten seconds; nobody trains longer."""
MOST_SAMPLED_POINTS = 8
"""Rounds at which a sampled curve is computed, up to seconds each."""
NO_NOISE = "0"
SAMPLING_REQUIRES = (
    "Amplified numbers hold if each user's own device tosses the coin of each round and keeps it secret, "
    "and if noise, sampling probability and number of rounds are fixed before the first round."
)


def forecast(
    *,
    epsilon: float | None,
    noise_multiplier: str | None,
    delta: float | None,
    rounds: int,
    max_nodes_per_user: int | None = None,
    users: int | None = None,
    ledger_path: Path | None = None,
    sampling_probability: str | None = None,
) -> dict[str, Any]:
    """The plan of a run, as documented for `--format json`.

    Args:
        epsilon: The budget; None to go by `noise_multiplier`.
        noise_multiplier: z of each release, "0" for none; None to find the least within `epsilon`.
        delta: For both; by default min(1e-6, 1 / (10 users)).
        rounds: How many releases.
        max_nodes_per_user: s; by default the ledger's, or 1.
        users: How many, where known; by default the ledger's.
        ledger_path: An existing ledger to be charged.
        sampling_probability: q, as in "0.1" or ".1": also say what coins of the users' devices would buy.

    Raises:
        UmbelError: If a number is out of range or the ledger was made for another s.
    """
    if not 1 <= rounds <= MOST_ROUNDS:
        raise UmbelError(f"Expected 1 <= rounds <= {MOST_ROUNDS}, got {rounds=}. Correct --rounds.")
    ledger = None if ledger_path is None else PrivacyLedger.open(ledger_path)
    if ledger is not None:
        users = users or (ledger.registry or {}).get("population_size")
    s = _nodes_per_user(max_nodes_per_user, ledger)
    delta, notes = resolve_delta(delta, users)
    q = None if sampling_probability is None else spelled_probability(sampling_probability)
    try:
        z = least_noise(epsilon, delta, rounds, s) if noise_multiplier is None else noise_multiplier
        mu = mu_curve([z] * rounds, s)
        sampled = None if q is None else _sampled(q, z, rounds, epsilon=epsilon, delta=delta, s=s)
    except ValueError as error:
        raise UmbelError(_with_remedy(str(error))) from error
    curve = {t: epsilon_of_mu(mu[t - 1], delta) for t in points(rounds, MOST_POINTS)}
    if sampled is not None:
        for point in sampled["curve"]:
            point["epsilon_unamplified"] = curve.get(point["round"]) or epsilon_of_mu(mu[point["round"] - 1], delta)
        notes += _sampling_notes(sampled)
    if sampled is not None and ledger is not None and not is_unused(ledger):
        notes.append(f"{ledger.path} has charges, so it takes no sampled run: that needs a ledger of its own.")
    left = None if ledger is None else room(ledger, z, rounds)
    if left is not None and left["not_private"]:
        notes.append(f"{left['path']} is NOT PRIVATE: {'; '.join(left['reasons_against'])}.")
    return {
        "epsilon_budget": epsilon,
        "epsilon": _finite(curve[rounds]),
        "delta": delta,
        "rounds": rounds,
        "max_nodes_per_user": s,
        "users": users,
        "noise_multiplier": z,
        "mu": _finite(mu[-1]),
        "replace_one_epsilon": _finite(replace_one(mu[-1], delta)),
        "curve": [{"round": t, "epsilon": _finite(spent)} for t, spent in curve.items()],
        "not_private": is_noiseless(z),
        "ledger": left,
        "sampling": sampled,
        "notes": notes,
    }


def forecast_of(config: Config) -> dict[str, Any]:
    """The plan of a simulation: its data need not exist, and its ledger is looked at where it does.

    Raises:
        UmbelError: If the ledger belongs to another population, or as `forecast`.
    """
    data, privacy = config.data, config.privacy
    path = Path(config.run.ledger) if config.run.ledger else None
    exists = path is not None and path.exists()
    private = privacy.epsilon != "none"
    plan = forecast(
        epsilon=float(privacy.epsilon) if private else None,
        noise_multiplier=None if private else NO_NOISE,
        delta=privacy.delta,
        rounds=config.training.rounds,
        max_nodes_per_user=privacy.max_nodes_per_user,
        users=data.synthetic.users if data.source == "synthetic" else None,
        ledger_path=path if exists else None,
        sampling_probability=privacy.sampling_probability,
    )
    name = Path(data.source).name
    if exists and plan["ledger"]["population"] != name:
        raise UmbelError(
            f"Expected the ledger of {name}, got {path} of {plan['ledger']['population']}. "
            "Name the ledger of these users."
        )
    if exists and privacy.sampling_probability is not None:
        check_unused(PrivacyLedger.open(Path(str(path))))
        left = plan["ledger"]
        budget = math.inf if left["epsilon"] is None else left["epsilon"]
        left["fits"] = float(privacy.epsilon) <= budget and plan["delta"] <= left["delta"]
        left["affordable_rounds"] = config.training.rounds if left["fits"] else 0
    if path is not None and not exists:
        plan["notes"].append(f"{path} is new: it starts with the whole budget.")
    return {**plan, "not_private": plan["not_private"] or privacy.seed is not None}


def spelled_probability(text: str) -> str:
    """A probability as the ledger spells it: ".1" is "0.1", as in a configuration.

    Raises:
        UmbelError: If it is none.
    """
    spelled = f"0{text}" if text.startswith(".") else text
    try:
        checked_probability(spelled)
    except ValueError as error:
        raise UmbelError(
            f"{error} Write --sampling-probability as a decimal number above 0 and up to 1, such as 0.1."
        ) from error
    return spelled


def room(ledger: PrivacyLedger, noise_multiplier: str, rounds: int) -> dict[str, Any]:
    """What an open ledger has spent and left, and whether so many more releases fit.

    Where the ledger promises nothing, what was spent and what is left are void: None.
    """
    delta, budget = float(ledger.genesis["delta"]), float(ledger.genesis["epsilon"])
    reasons = reasons_against(ledger.events(), ledger.genesis["mu_max"])
    spent = math.inf if reasons else ledger.epsilon_spent(delta)
    affordable = affordable_rounds(ledger, noise_multiplier)
    return {
        "path": str(ledger.path),
        "population": ledger.genesis["population"],
        "epsilon": _finite(budget),
        "delta": delta,
        "epsilon_spent": _finite(spent),
        "epsilon_left": None if reasons else max(0.0, budget - spent),
        "affordable_rounds": _finite(affordable),
        "fits": affordable >= rounds,
        "not_private": bool(reasons),
        "reasons_against": list(reasons),
    }


def affordable_rounds(ledger: PrivacyLedger, noise_multiplier: str) -> float:
    """How many more releases with this noise the ledger's budget allows."""
    if math.isinf(ledger.limit_units):
        return math.inf
    if is_noiseless(noise_multiplier):
        return 0
    return max(0, int(ledger.limit_units - ledger.capped_units) // cost_units(noise_multiplier))


def points(rounds: int, most: int) -> list[int]:
    """At most so many rounds, evenly spread, the last among them."""
    count = min(rounds, most)
    return [-(-rounds * i // count) for i in range(1, count + 1)]


def _nodes_per_user(given: int | None, ledger: PrivacyLedger | None) -> int:
    if ledger is None:
        return given or 1
    recorded = int(ledger.genesis["max_nodes_per_user"])
    if given not in (None, recorded):
        raise UmbelError(
            f"Expected max_nodes_per_user={recorded} as in {ledger.path}, got max_nodes_per_user={given}. Leave it out."
        )
    return recorded


def resolve_delta(given: float | None, users: int | None) -> tuple[float, list[str]]:
    """The delta to plan for, and what a reader should know about it."""
    delta, notes = given, []
    if delta is None:
        delta = DEFAULT_DELTA if users is None else min(DEFAULT_DELTA, 1 / (10 * users))
        notes.append(f"delta={delta:g} by default.")
    if not SMALLEST_DELTA <= delta < 1:
        raise UmbelError(
            f"Expected {SMALLEST_DELTA} <= delta < 1, got {delta=}. Choose one below 1/users, such as 1e-6."
        )
    if users is not None and delta >= 1 / users:
        notes.append(
            f"delta={delta:g} is not below 1/users={1 / users:.3g}: "
            "it would allow one user's data to be published outright. Choose a smaller one."
        )
    return delta, notes


def _with_remedy(problem: str) -> str:
    """A multiplier that cannot be read is told how it is written; other problems say themselves what to do."""
    unreadable = "noise_multiplier to be a decimal string" in problem
    return f"{problem} Write it as in 4 or 0.75; 0 is no noise." if unreadable else problem


def least_noise(epsilon: float | None, delta: float, rounds: int, s: int, q: str | None = None) -> str:
    """The least noise multiplier with which so many rounds, sampled with probability q or not, cost at most epsilon.

    Raises:
        ValueError: If there is no such budget.
    """
    if epsilon is None or not 0 < epsilon < math.inf:
        raise ValueError(f"Expected 0 < epsilon < inf, got {epsilon=}. Choose a budget, or a noise multiplier.")
    if q is not None:
        return least_noise_sampled(epsilon, delta, rounds, q, s=s)
    return noise_multiplier_for(rounds, mu_max_string(epsilon, delta, s))


def _sampled(q: str, z: str, rounds: int, *, epsilon: float | None, delta: float, s: int) -> dict[str, Any]:
    """What Poisson-sampled rounds would cost at the same noise, and which noise they would need."""
    if is_noiseless(z):
        raise UmbelError("Expected noise to amplify, got none. Leave out --sampling-probability.")
    schedule = Schedule(noise_multiplier=z, sampling_probability=q, rounds=rounds)
    curve = amplified_curve(schedule, delta, points(rounds, MOST_SAMPLED_POINTS), s=s, with_replace_one=True)
    whole = curve[rounds]
    needed = None if epsilon is None else least_noise_sampled(epsilon, delta, rounds, q, s=s)
    return {
        "sampling_probability": q,
        "expected_contributions": schedule.expected_contributions,
        "epsilon": whole.epsilon,
        "replace_one_epsilon": whole.replace_one_epsilon,
        "prv_lower": whole.prv_lower,
        "prv_upper": whole.prv_upper,
        "rdp_epsilon": whole.rdp_epsilon,
        "curve": [{"round": t, "epsilon": point.epsilon} for t, point in curve.items()],
        "noise_multiplier": needed,
        "noise_multiplier_unamplified": z,
        # a release is divided by the users expected in it, of whom sampling leaves the share q
        "relative_noise": None if needed is None else float(needed) / float(q) / float(z),
        "supported": True,
        "requires": SAMPLING_REQUIRES,
    }


def _sampling_notes(sampled: dict[str, Any]) -> list[str]:
    q = sampled["sampling_probability"]
    pairs = "; ".join(
        f"{point['round']}: {rounded_up(point['epsilon'])} / {rounded_up(point['epsilon_unamplified'])}"
        for point in sampled["curve"]
    )
    notes = [
        f"With sampling probability {q} a user contributes {sampled['expected_contributions']:g} times on average.",
        f"Epsilon at this noise with / without sampling, after round {pairs}.",
    ]
    if sampled["noise_multiplier"] is not None:
        ratio = sampled["relative_noise"]
        notes.append(
            f"The budget would need noise multiplier {sampled['noise_multiplier']} instead of "
            f"{sampled['noise_multiplier_unamplified']}; as only a share {q} of the users is in each release, their "
            f"mean then has {ratio:.3g} times the noise of a run without sampling."
        )
    return [*notes, SAMPLING_REQUIRES]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
