"""Several runs together: what they have cost the same users, over one ledger or several.

Runs of one ledger are in each of its copies, so the longest copy counts and the others must be its beginning. Ledgers
of one population add up: their mu in squares, for Gaussian releases compose so, also when each is chosen after seeing
the others.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UmbelError, VerificationError
from privacy.accounting import total_mu
from privacy.audit.findings import FAILED, Finding, find_target, inspect, keys_of
from privacy.audit.losses import checked_deltas, losses_at, void
from privacy.participation import UNITS
from privacy.promise import lost_as_well, promise, reasons_against
from privacy.rounding import counted

ANOTHER_LEDGER = (
    "A ledger that is not named here is invisible: whatever else was released about the same people must be added by "
    "hand, mu in squares."
)
_SEVERITY = (FAILED, 3, 5, 0)
_MUST_AGREE = ("population", "unit", "neighboring_relation")


def audit_together(
    paths: Iterable[str | Path],
    *,
    public_key: str | Collection[str] | None = None,
    deltas: Iterable[float] = (),
    all_signatures: bool = False,
) -> dict[str, Any]:
    """Verify several runs or ledgers of the same users, and recompute what they have cost together.

    Args:
        paths: Run folders, their `release` folders, or ledgers.
        public_key: The owners', hex or files; each ledger must have one of them.
        deltas: To recompute epsilon for; by default the smallest of the ledgers' own.
        all_signatures: Check each line's signature, not only the last.

    Raises:
        UmbelError: If a ledger cannot be read, or populations, units or relations differ.
        VerificationError: If two copies of a ledger are no beginning of one another.
    """
    wanted, keys = checked_deltas(deltas), keys_of(public_key)
    findings = [inspect(find_target(Path(path)), public_keys=keys, all_signatures=all_signatures) for path in paths]
    return compose(findings, wanted)


def compose(findings: Sequence[Finding], deltas: tuple[float, ...] = ()) -> dict[str, Any]:
    """Several targets' audits as one, as documented for `--format json`.

    Args:
        findings: The verdicts, at least one.
        deltas: To recompute epsilon for; none for the smallest of the ledgers' own.

    Raises:
        UmbelError: If populations, units or relations differ, or accountants contradict each other.
        VerificationError: If a ledger does not even begin with a valid line, or two copies of one differ.
    """
    ledgers = _ledgers(findings)
    _check_same_users(ledgers)
    _check_sampling(ledgers)
    worst = min(findings, key=lambda finding: _SEVERITY.index(finding.exit_code))
    privacy = _privacy(ledgers, deltas) if worst.is_good else None
    void_total = privacy is not None and privacy["not_private"]
    genesis = ledgers[0].found.genesis
    return {
        "status": f"{worst.status}, NOT PRIVATE" if void_total else worst.status,
        "exit_code": worst.exit_code,
        **{name: genesis[name] for name in _MUST_AGREE},
        "targets": [_target_row(finding) for finding in findings],
        "ledgers": [_ledger_row(finding) for finding in ledgers],
        "runs": _run_rows(ledgers, findings, is_void=privacy is None or void_total),
        "privacy": privacy,
        "note": ANOTHER_LEDGER,
    }


def _ledgers(findings: Sequence[Finding]) -> list[Finding]:
    """The longest copy of each ledger, once the others are seen to be its beginning."""
    longest: dict[str, Finding] = {}
    for finding in findings:
        if not finding.found.genesis:
            raise VerificationError(
                f"Expected a ledger, got {finding.target.ledger}, line {finding.line}: {finding.reason}"
            )
        name = str(finding.found.genesis["ledger_id"])
        known = longest.setdefault(name, finding)
        if known is finding:
            continue
        _check_prefix(known, finding)
        if finding.found.sequence > known.found.sequence:
            longest[name] = finding
    return list(longest.values())


def _check_prefix(first: Finding, second: Finding) -> None:
    """Refuse two copies of which neither begins with the other."""
    lines = min(first.found.num_lines, second.found.num_lines)
    with first.target.ledger.open("rb") as ours, second.target.ledger.open("rb") as theirs:
        for number in range(1, lines + 1):
            if ours.readline() != theirs.readline():
                raise VerificationError(
                    f"Expected one ledger {first.found.genesis['ledger_id']}, got a fork: {first.target.ledger} and "
                    f"{second.target.ledger} differ from line {number} on. Ask the owner which one was published."
                )


def _check_same_users(ledgers: Sequence[Finding]) -> None:
    first = ledgers[0]
    for other in ledgers[1:]:
        for name in _MUST_AGREE:
            ours, theirs = first.found.genesis[name], other.found.genesis[name]
            if ours != theirs:
                raise UmbelError(
                    f"Expected ledgers of the same users, got {name}={ours!r} in {first.target.ledger} and "
                    f"{name}={theirs!r} in {other.target.ledger}. Their losses do not add: audit them one by one."
                )


def _check_sampling(ledgers: Sequence[Finding]) -> None:
    """Refuse to add ledgers of which one has a sampled run: only what was fixed beforehand composes with it."""
    for ledger in ledgers:
        if ledger.found.sampled is not None and len(ledgers) > 1:
            raise UmbelError(
                f"Expected one ledger where a run is sampled, got {len(ledgers)} and a sampled run in "
                f"{ledger.target.ledger}. Audit them one by one."
            )


def _privacy(ledgers: Sequence[Finding], deltas: tuple[float, ...]) -> dict[str, Any]:
    """What all ledgers together have cost the user who contributed to everything; void without a promise."""
    all_genesis = [finding.found.genesis for finding in ledgers]
    wanted = checked_deltas(deltas, default=min(float(genesis["delta"]) for genesis in all_genesis))
    several = {int(genesis["max_nodes_per_user"]) for genesis in all_genesis}
    losses = losses_at(
        wanted,
        mu=_mu(_units(finding) for finding in ledgers),
        noise_multipliers=_all_multipliers(ledgers) if len(several) == 1 else None,
        s=max(several),
        sampled=ledgers[0].found.sampled,
    )
    reasons = list(dict.fromkeys(reason for finding in ledgers for reason in _reasons(finding)))
    if reasons:
        losses = void(losses)
    return {
        **losses,
        "max_nodes_per_user": max(several),
        "not_private": bool(reasons),
        "reasons_against": reasons,
        "promise": _promise(ledgers, losses["epsilon"], wanted[0], max(several), reasons),
    }


def _promise(ledgers: Sequence[Finding], epsilon: float | None, delta: float, s: int, reasons: list[str]) -> str:
    population = ledgers[0].found.genesis["population"]
    if reasons or epsilon is None:
        return f"No user of “{population}” is promised anything: {'; '.join(reasons)}."
    rounds = counted(sum(len(finding.found.rounds) for finding in ledgers), "charged round")
    lost = lost_as_well(sum(finding.found.rounds.num_lost for finding in ledgers))
    runs = counted(sum(len(finding.found.runs) for finding in ledgers), "run")
    releases = (
        f"Everything released about the users of “{population}” so far, counting {rounds} of {runs} on "
        f"{counted(len(ledgers), 'ledger')}{lost},"
    )
    is_sampled = ledgers[0].found.sampled is not None
    return promise(releases, epsilon, delta, max_nodes_per_user=s, is_sampled=is_sampled)


def _reasons(finding: Finding) -> tuple[str, ...]:
    return reasons_against(finding.found.rounds.events(), finding.found.genesis["mu_max"])


def _target_row(finding: Finding) -> dict[str, Any]:
    return {
        "path": str(finding.target.path),
        "ledger_id": finding.found.genesis["ledger_id"],
        "run": finding.target.run,
        "status": finding.status,
        "exit_code": finding.exit_code,
        "line": finding.line,
        "reason": finding.reason,
    }


def _ledger_row(finding: Finding) -> dict[str, Any]:
    found, genesis = finding.found, finding.found.genesis
    is_void = bool(_reasons(finding))
    return {
        "ledger_id": genesis["ledger_id"],
        "ledger": str(finding.target.ledger),
        "lines": found.num_lines,
        "head": f"{found.sequence}:{found.head}",
        "public_key": found.public_keys[-1],
        "rounds": len(found.rounds),
        "epsilon_budget": None if genesis["epsilon"] == "inf" else float(genesis["epsilon"]),
        "delta_budget": float(genesis["delta"]),
        "mu": None if is_void else found.mu_spent,
        "not_private": is_void,
    }


def _run_rows(ledgers: Sequence[Finding], findings: Sequence[Finding], *, is_void: bool) -> list[dict[str, Any]]:
    """Every run of every ledger, named or not: all of them have cost something."""
    folders = {
        (finding.found.genesis["ledger_id"], finding.target.run): str(finding.target.path) for finding in findings
    }
    total = sum(map(_units, ledgers))
    rows = []
    for finding in ledgers:
        genesis = finding.found.genesis
        s = int(genesis["max_nodes_per_user"])
        for run in finding.found.runs:
            multipliers = finding.found.rounds.noise_multipliers(run)
            mu = None if is_void else total_mu(multipliers, s)
            rows.append(
                {
                    "run": run,
                    "ledger_id": genesis["ledger_id"],
                    "path": folders.get((genesis["ledger_id"], run)),
                    "rounds": len(multipliers),
                    "noise_multipliers": list(dict.fromkeys(multipliers)),
                    "mu": mu,
                    # mu adds in squares, so these shares and that of lost lines add up to 1
                    "mu_share": None if mu is None or not total else mu * mu * UNITS / total,
                }
            )
    return rows


def _units(finding: Finding) -> float:
    """s² Σ ceil(2^50 / z²): mu² in units of 2^-50."""
    return int(finding.found.genesis["max_nodes_per_user"]) ** 2 * finding.found.spent_units


def _mu(units: Iterable[float]) -> float:
    total = sum(units)
    return math.nextafter(math.sqrt(total / UNITS), math.inf) if total else 0.0


def _all_multipliers(ledgers: Sequence[Finding]) -> list[str]:
    return [z for finding in ledgers for z in finding.found.noise_multipliers]
