"""The public facts of a ledger or a finished run, collected for a privacy report.

Reads what may be published (a ledger, the release folder of a run) and nothing else: no raw data, no configuration,
no key. All numbers are recomputed from the ledger's lines, for the worst-case user of the whole ledger, and rounded
against us. Page and files are made by `privacy.report_page`.
"""

import dataclasses
import json
import math
import platform
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UmbelError, VerificationError
from common.files import unpack
from privacy.accounting import PrivacySpent, mu_curve
from privacy.attacked import Attacked, attacked
from privacy.audit.losses import losses_at
from privacy.audit.releases import Releases, run_of, verify_release
from privacy.audit.verify import Anchor, Verification, verify
from privacy.disclosure import SIGNATURE_LIMITS, UNPROTECTED, Viewpoint, tuning_note, who_sees_what
from privacy.gaussian import epsilon_of_mu
from privacy.lines import parse_line
from privacy.mechanism import delta_fp, distance_of
from privacy.participation import is_noiseless, is_unlimited, max_contributions
from privacy.promise import promise_of_ledger, reasons_against
from privacy.release_files import Attendance, EmpiricalAudit, RoundMetrics, read_empirical, read_metrics
from privacy.rounds import Event, Round
from privacy.sampling import SampledRun

FORMAT = 2
"""Of `report.json`."""
_DELTAS = (1e-5, 1e-6, 1e-7, 1e-9)
_MOST_POINTS = 200
_EDGE_POINTS = 60
_MOST_ROUNDS = 10_000  # a record of each, beyond which reports would take gigabytes
_COINS_UNPROTECTED = (
    "Who contributed to a round of the sampled run, from whoever sees the messages of nodes before the noise: from a "
    "node with one user they are zeros or not. Coins hide it from those who see releases only, and so does epsilon."
)
_PACKAGES = ("umbel", "numpy", "scipy", "flwr", "cryptography", "dp-accounting", "opacus")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The verdict on the ledger.

    Attributes:
        status: "verified" only against the owner's public key.
        line: Number of the line that failed, from 1, or None.
        reason: Why it failed, or an empty string.
        lines: Valid lines, by type.
        sequence: Number of the last valid line, from 0.
        head: The head after it, hex.
        public_keys: Every key, hex; the last is in force.
        torn_bytes: Bytes after the last complete line, which count for nothing.
        first_time: When the first line was written, UTC.
        last_time: When the last valid line was written, UTC.
        releases_found: How many committed releases of the run are in its folder, with their SHA-256; None for a
            bare ledger.
    """

    status: str
    line: int | None
    reason: str
    lines: Mapping[str, int]
    sequence: int
    head: str
    public_keys: tuple[str, ...]
    torn_bytes: int
    first_time: str
    last_time: str
    releases_found: int | None


@dataclass(frozen=True, kw_only=True)
class AtDelta:
    """The whole ledger's epsilon at one delta, by each accountant.

    Attributes:
        delta: What the others are for.
        epsilon: Exact, rounded up.
        replace_one_epsilon: Exact, where neighbours swap one user's data.
        pld_epsilon: By privacy-loss distributions.
        prv_epsilon: By privacy random variables, an upper bound.
        rdp_epsilon: By the Rényi accountant, which is looser. Of these three, None is "not computed".
    """

    delta: float
    epsilon: float
    replace_one_epsilon: float
    pld_epsilon: float | None = None
    prv_epsilon: float | None = None
    rdp_epsilon: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Epsilon at the budget's delta after so many charged rounds of the ledger."""

    number: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """One charged round.

    Attributes:
        number: Among all charged rounds of the ledger, from 1.
        run: The run that charged it.
        server_round: Its number in that run.
        sequence: Number of the RESERVE line.
        noise_multiplier: z, as the ledger spells it.
        clipping_norm: C, as the ledger spells it.
        shares: Radius of each group's ball.
        coordinates: D, of all groups together.
        grid_scale: K.
        denominator: What the noised sum is divided by, public.
        sampling: "none", or how users were sampled.
        cap: How often one user's filter admits a round like this, or None without a limit.
        noise: Where noise came from.
        initialization: Whether it made the first model.
        invited_users: Users on the nodes that were invited.
        outcome: What became of the charge.
        attendance: Of nodes; None where it is not known.
        residual_scale: Standard deviation of what personal models leave unexplained, as the noised sums up to this
            round estimate it; None where it is not known.
    """

    number: int
    run: str
    server_round: int
    sequence: int
    noise_multiplier: str
    clipping_norm: str
    shares: Mapping[str, str]
    coordinates: int
    grid_scale: int
    denominator: int
    sampling: str
    cap: int | None
    noise: str
    initialization: bool
    invited_users: int
    outcome: str
    attendance: Attendance | None
    residual_scale: float | None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The released model, as its own file describes it."""

    family: str
    dimension: int
    rank: int
    sparsity: int
    feature_names: tuple[str, ...]
    ledger_head: str


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """Everything a report says; public facts only.

    Attributes:
        not_private: Why nothing is promised; empty where something is.
        population: Whose privacy is counted.
        ledger_id: The ledger's own name.
        unit: What is protected.
        neighboring_relation: What one user's data is compared with.
        max_nodes_per_user: s.
        mu_max: What the filter of one user on one node admits in all, as mu; inf without a limit. With a sampled run,
            what all runs without sampling may cost.
        population_size: Registered users, or None.
        users_per_node: The most users that one node hosts, or None.
        budget_epsilon: What may be spent; inf where nothing is promised.
        budget_delta: Its delta.
        spent: By the worst-case user, over the whole ledger.
        at_deltas: The same at several deltas, by each accountant.
        delta_fp: What finite precision adds to delta.
        curve: Epsilon over rounds, with lost lines where they were charged, those after the last round with it; all of
            them up to 200, then a selection.
        verification: Of the ledger.
        run: The run this report is of, or None.
        runs: Public bodies of the START lines.
        num_rounds: How many rounds were charged.
        num_lost: How many lines were lost, each of which is charged as a round.
        rounds: All of them up to 10,000, then a selection.
        model: The released model, or None.
        empirical: What an attack on the run has shown, or None where there was none.
        empirical_remarks: What a reader of it must know: that the run went on since, that its claim was another.
        foreign_empirical: Why the attack in the folder is not this run's, which is why it is not shown; empty where it
            is, or where there is none.
        who_sees_what: A table in words.
        unprotected: What epsilon does not cover.
        signature_limits: What a signature cannot show.
        tuning: Whether the choice of settings is covered.
        versions: Of the software that wrote this report.
    """

    not_private: tuple[str, ...]
    population: str
    ledger_id: str
    unit: str
    neighboring_relation: str
    max_nodes_per_user: int
    mu_max: float
    population_size: int | None
    users_per_node: int | None
    budget_epsilon: float
    budget_delta: float
    spent: PrivacySpent
    at_deltas: tuple[AtDelta, ...]
    delta_fp: float
    curve: tuple[CurvePoint, ...]
    verification: Verified
    run: str | None
    runs: Mapping[str, Mapping[str, Any]]
    num_rounds: int
    num_lost: int
    rounds: tuple[RoundFacts, ...]
    model: ModelFacts | None
    empirical: EmpiricalAudit | None
    empirical_remarks: tuple[str, ...]
    foreign_empirical: tuple[str, ...]
    who_sees_what: tuple[Viewpoint, ...]
    unprotected: tuple[str, ...]
    signature_limits: tuple[str, ...]
    tuning: str
    versions: Mapping[str, str]

    @property
    def is_sampled(self) -> bool:
        """Whether one of the ledger's runs is: epsilon then counts on coins, and `mu` and `rho` do not."""
        return any(body["schedule"].get("sampling", "none") != "none" for body in self.runs.values())

    @property
    def statement(self) -> str:
        """What is promised to whom, in one sentence."""
        if self.verification.status == "failed":
            return f"Nothing can be said about the users of “{self.population}”: the ledger does not verify."
        return promise_of_ledger(
            self.spent.epsilon,
            self.spent.delta,
            population=self.population,
            rounds=self.num_rounds,
            lost=self.num_lost,
            runs=len(self.runs),
            max_nodes_per_user=self.max_nodes_per_user,
            is_sampled=self.is_sampled,
            reasons_against=self.not_private,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; what is infinite is null."""
        plain: dict[str, Any] = _plain(
            {"format": FORMAT, "statement": self.statement, **dataclasses.asdict(self)},
        )
        return plain


def report_of(run_root: Path, *, public_key: str | None = None, anchor: Anchor | None = None) -> PrivacyReport:
    """The report of a finished run, from its release folder.

    Args:
        run_root: The run folder.
        public_key: The owner's key, hex, if it is known from elsewhere.
        anchor: A head that the ledger must have had.

    Raises:
        UmbelError: If the run has no release yet, or a file of it cannot be read.
        VerificationError: If the ledger does not even begin with a valid line.
    """
    release = run_root / "release"
    ledger = release / "ledger.jsonl"
    if not ledger.exists():
        raise UmbelError(f"Expected a finished run, got no {ledger}. Resume the run, or report on its ledger.")
    model_path = release / "model.safetensors"
    arrays, facts = unpack(model_path) if model_path.exists() else ({}, {})
    run = run_of(release)
    releases = Releases(folder=release / "rounds", run=run)
    checked = verify_release(ledger, releases, public_key=public_key, anchor=anchor)
    return _report(
        ledger,
        checked,
        run=run,
        releases_found=sum(
            entry.release_digest is not None and releases.holds(entry) for entry in checked.rounds.of_run(run or "")
        ),
        metrics=read_metrics(release / "metrics.jsonl"),
        model=_model_facts(arrays, facts) if arrays else None,
        empirical=read_empirical(release / "empirical.json"),
    )


def report_of_ledger(path: Path, *, public_key: str | None = None, anchor: Anchor | None = None) -> PrivacyReport:
    """The report of a ledger that comes without a run.

    Raises:
        UmbelError: If it cannot be read.
        VerificationError: If it does not even begin with a valid line.
    """
    checked = verify(path, public_key=public_key, anchor=anchor)
    return _report(path, checked, run=None, releases_found=None, metrics={}, model=None, empirical=None)


def read_evaluation(run_root: Path) -> dict[str, Any] | None:
    """What a simulation computed from raw data, or None where there is none; never part of a `PrivacyReport`.

    Raises:
        UmbelError: If the file is not as umbel wrote it.
    """
    path = run_root / "evaluation" / "results.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        if not {"metric", "error", "baselines"} <= found.keys():
            raise ValueError("not all of its sections are there")
    except (OSError, ValueError, AttributeError) as error:
        raise UmbelError(f"Expected {path} as umbel wrote it, got something else. Restore or remove it.") from error
    return dict(found)


def _report(
    ledger: Path,
    checked: Verification,
    *,
    run: str | None,
    releases_found: int | None,
    metrics: Mapping[int, RoundMetrics],
    model: ModelFacts | None,
    empirical: EmpiricalAudit | None,
) -> PrivacyReport:
    genesis = checked.genesis
    if not genesis:
        raise VerificationError(f"Expected a ledger, got {ledger}: {checked.reason} There is nothing to report.")
    registry = checked.registry or {}
    delta, s = float(genesis["delta"]), int(genesis["max_nodes_per_user"])
    attack = (
        Attacked(empirical=None) if empirical is None else attacked(empirical, ledger=ledger, checked=checked, run=run)
    )
    multipliers, num_rounds = checked.noise_multipliers, len(checked.rounds)
    mu = mu_curve(multipliers, s)
    last = len(mu) - 1  # what was lost after the last round counts with it

    def spent_by(number: int) -> float:
        return mu[last if number == num_rounds else checked.rounds.charged_by(number - 1) - 1]

    total, at_deltas = _losses(multipliers, mu[-1] if mu else 0.0, delta, s, checked.sampled)
    distance, has_statistics = _shape(checked.rounds.events())
    reasons = reasons_against(checked.rounds.events(), genesis["mu_max"])
    return PrivacyReport(
        not_private=reasons,
        population=genesis["population"],
        ledger_id=genesis["ledger_id"],
        unit=genesis["unit"],
        neighboring_relation=genesis["neighboring_relation"],
        max_nodes_per_user=s,
        mu_max=float(checked.mu_limit),
        population_size=registry.get("population_size"),
        users_per_node=registry.get("users_per_node"),
        budget_epsilon=float(genesis["epsilon"]),
        budget_delta=delta,
        spent=total,
        at_deltas=at_deltas,
        delta_fp=delta_fp(total.epsilon, distance) if distance else 0.0,
        curve=tuple(
            # a sampled run is charged before its first round, with all that others may spend
            CurvePoint(number=n, epsilon=total.epsilon if checked.sampled else epsilon_of_mu(spent_by(n), delta))
            for n in shown_rounds(num_rounds)
        ),
        verification=_verified(ledger, checked, releases_found),
        run=run,
        runs=dict(checked.runs),
        num_rounds=num_rounds,
        num_lost=checked.rounds.num_lost,
        rounds=tuple(
            _round_facts(number, entry, checked.mu_limit, metrics if entry.run == run else {})
            for number in (range(1, num_rounds + 1) if num_rounds <= _MOST_ROUNDS else shown_rounds(num_rounds))
            for entry in (checked.rounds[number - 1],)
        ),
        model=model,
        empirical=attack.empirical,
        empirical_remarks=attack.remarks,
        foreign_empirical=attack.foreign,
        who_sees_what=who_sees_what(registry.get("users_per_node"), is_private=not reasons, statistics=has_statistics),
        unprotected=UNPROTECTED if checked.sampled is None else (*UNPROTECTED, _COINS_UNPROTECTED),
        signature_limits=SIGNATURE_LIMITS,
        tuning=tuning_note(len(checked.runs), num_rounds),
        versions=_versions(),
    )


def _shape(events: Iterable[Event]) -> tuple[float, bool]:
    """How far all releases' noise is from ideal, and whether one of them has the statistics of AMHT-LRS."""
    distance, has_statistics = 0.0, False
    for event in events:
        distance += distance_of(event)
        has_statistics = has_statistics or any(group["name"] == "A" for group in event["groups"])
    return distance, has_statistics


def _verified(ledger: Path, checked: Verification, releases_found: int | None) -> Verified:
    with ledger.open("rb") as lines:
        first = next(lines)
        # one by one: a long ledger does not fit in memory
        (last,) = deque(islice(lines, checked.num_lines - 1), maxlen=1) or (first,)
    return Verified(
        status=checked.status,
        line=checked.line,
        reason=checked.reason,
        lines=dict(checked.counts),
        sequence=checked.sequence,
        head=checked.head,
        public_keys=checked.public_keys,
        torn_bytes=checked.torn_bytes,
        first_time=parse_line(first.rstrip(b"\n")).time,
        last_time=parse_line(last.rstrip(b"\n")).time,
        releases_found=releases_found,
    )


def _round_facts(number: int, entry: Round, mu_max: str, metrics: Mapping[int, RoundMetrics]) -> RoundFacts:
    event, found = entry.event, metrics.get(entry.server_round)
    return RoundFacts(
        number=number,
        run=entry.run,
        server_round=entry.server_round,
        sequence=entry.sequence,
        noise_multiplier=event["noise_multiplier"],
        clipping_norm=event["clipping_norm"],
        shares={group["name"]: group["share"] for group in event["groups"]},
        coordinates=sum(group["size"] for group in event["groups"]),
        grid_scale=event["grid_scale"],
        denominator=event["denominator"],
        sampling=event["sampling"] if event["sampling"] == "none" else f"Poisson, q = {event['sampling']['poisson']}",
        cap=_cap(mu_max, event["noise_multiplier"]) if event["sampling"] == "none" else None,
        noise=event["noise"],
        initialization=event["initialization"],
        invited_users=entry.invited_users,
        outcome=_outcome(entry),
        attendance=found.attendance if found else None,
        residual_scale=found.residual_scale if found else None,
    )


def _outcome(entry: Round) -> str:
    if entry.release_digest is not None:
        return "released"
    return "charged, nothing released" if entry.abort_code is None else f"charged, aborted: {entry.abort_code}"


@lru_cache(maxsize=256)
def _cap(mu_max: str, noise_multiplier: str) -> int | None:
    if is_unlimited(mu_max) or is_noiseless(noise_multiplier):
        return None
    return max_contributions(mu_max, noise_multiplier)


def _losses(
    multipliers: Sequence[str], mu: float, delta: float, s: int, sampled: SampledRun | None
) -> tuple[PrivacySpent, tuple[AtDelta, ...]]:
    """What was spent, at the ledger's delta and at several."""
    deltas, inf = sorted({*_DELTAS, delta}, reverse=True), math.inf
    # whatever delta is, which need not be one accountants accept where nothing is promised
    if mu == inf or (sampled is not None and is_unlimited(sampled.capped_mu_max)):
        total = PrivacySpent(
            epsilon=inf, delta=delta, mu=inf, rho=inf, replace_one_epsilon=inf, pld_epsilon=inf, rdp_epsilon=inf
        )
        return total, tuple(AtDelta(delta=each, epsilon=inf, replace_one_epsilon=inf) for each in deltas)
    rows = losses_at(deltas, mu=mu, noise_multipliers=multipliers, s=s, sampled=sampled)["at_deltas"]
    at_deltas = tuple(AtDelta(**row) for row in rows)
    return _total(at_deltas[deltas.index(delta)], mu), at_deltas


def _total(at: AtDelta, mu: float) -> PrivacySpent:
    if at.pld_epsilon is None or at.rdp_epsilon is None:
        raise UmbelError("Expected dp-accounting for a report, got none. Run pip install -e '.[simulate]'.")
    return PrivacySpent(
        epsilon=at.epsilon,
        delta=at.delta,
        mu=mu,
        rho=mu * mu / 2,
        replace_one_epsilon=at.replace_one_epsilon,
        pld_epsilon=at.pld_epsilon,
        rdp_epsilon=at.rdp_epsilon,
        prv_epsilon=at.prv_epsilon,
    )


def shown_rounds(count: int) -> list[int]:
    """Which of `count` rounds, from 1, a long report shows: the first, the last, and some in between."""
    if count <= _MOST_POINTS:
        return list(range(1, count + 1))
    between = _MOST_POINTS - 2 * _EDGE_POINTS
    middle = {_EDGE_POINTS + round(i * (count - 2 * _EDGE_POINTS) / between) for i in range(1, between)}
    return sorted({*range(1, _EDGE_POINTS + 1), *middle, *range(count - _EDGE_POINTS + 1, count + 1)})


def _model_facts(arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> ModelFacts:
    dimension, rank = arrays["U"].shape
    return ModelFacts(
        family=str(facts.get("family")),
        dimension=int(dimension),
        rank=int(rank),
        sparsity=int(facts.get("sparsity", 0)),
        feature_names=tuple(map(str, facts.get("feature_names", ()))),
        ledger_head=str(facts.get("ledger_head")),
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: installed_version(name) for name in _PACKAGES}}


def installed_version(package: str) -> str:
    """Of a package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
