"""What `umbel audit` and `umbel ledger` say: the audit of the published files, the model recomputed, the attack."""

import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UmbelError
from privacy.accounting import mu_curve
from privacy.audit.composition import compose
from privacy.audit.findings import FAILED, Finding, Target, document, find_ledger, find_target, inspect, keys_of
from privacy.audit.losses import checked_deltas
from privacy.ledger import PrivacyLedger
from privacy.promise import reasons_against
from privacy.rounds import Round

__all__ = ["Attack", "audit", "find_ledger", "find_target", "ledger_contents"]
_NO_MODEL = {"status": "not recomputed", "reason": "the audit did not get that far."}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An empirical audit that is wanted.

    Attributes:
        canaries: How many users are made up.
        threat: What the attack sees: "all" releases, or the "last" model.
    """

    canaries: int = 1000
    threat: Literal["last", "all"] = "all"


def audit(
    paths: Sequence[Path],
    *,
    public_keys: Collection[str] = (),
    anchor: str | None = None,
    deltas: Sequence[float] = (),
    all_signatures: bool = False,
    require_model: bool = False,
    attack: Attack | None = None,
) -> dict[str, Any]:
    """What `umbel audit` prints: one target's audit, or that of several together.

    Args:
        paths: Run folders, their `release` folders, or ledgers; at least one.
        public_keys: The owners', hex or files.
        anchor: A head that somebody remembers, "sequence:head"; of one target only.
        deltas: To recompute epsilon for; by default the ledger's.
        all_signatures: Check each line's signature, not only the last.
        require_model: Fail what has no model that could be recomputed.
        attack: Also attack the mechanism of the run, and write what that shows; of one run only, not of a bare ledger.

    Returns:
        As documented for `--format json`; its `exit_code` is the verdict.

    Raises:
        UmbelError: If a ledger cannot be read, a number is out of range, or targets do not add up.
    """
    wanted, keys = checked_deltas(deltas), keys_of(public_keys)
    if len(paths) > 1 and (anchor is not None or attack is not None):
        name = "--anchor" if attack is None else "--empirical"
        raise UmbelError(f"Expected one run with {name}, got {len(paths)}. Audit them one by one, or leave it out.")
    checked = [
        _checked(path, keys, anchor, all_signatures=all_signatures, require_model=require_model) for path in paths
    ]
    if len(checked) > 1:
        together = compose([finding for finding, _ in checked], wanted)
        targets = [row | {"model": model} for row, (_, model) in zip(together["targets"], checked, strict=True)]
        return together | {"targets": targets}
    ((finding, model),) = checked
    found = document(finding, wanted) | {"model": model, "empirical": None}
    return found if attack is None else _attacked(found, finding, attack)


def _checked(
    path: Path, keys: Collection[str], anchor: str | None, *, all_signatures: bool, require_model: bool
) -> tuple[Finding, dict[str, Any] | None]:
    """The verdict on one target, its model included; None instead of a model for a bare ledger."""
    finding = inspect(find_target(path), public_keys=keys, anchor=anchor, all_signatures=all_signatures)
    check = None if finding.target.releases is None else _check_model(finding)
    status, reason = ("not recomputed", "a ledger alone has none.") if check is None else check.values()
    if finding.is_good and require_model and status == "not recomputed":
        status, reason = "differs", f"Expected a model that can be recomputed, as --require-model asks: {reason}"
    if status == "differs":
        finding = dataclasses.replace(finding, status="failed", exit_code=FAILED, reason=reason)
    return finding, check


def _check_model(finding: Finding) -> dict[str, str]:
    if not finding.is_good:
        return _NO_MODEL
    if lacking := _lacking(finding.target):
        return {"status": "not recomputed", "reason": lacking}
    from umbel.replay import check_model  # noqa: PLC0415 (the server's world, which a ledger does not need)

    return dataclasses.asdict(check_model(finding.target, finding.found))


def _lacking(target: Target) -> str:
    """Why a model cannot be recomputed from these files; an empty string where it can."""
    if target.root is None:
        return "a release folder alone does not have the config.toml and schema.safetensors that it takes."
    if not (target.root / "release/model.safetensors").exists():
        return "there is no release/model.safetensors: the run has not ended, or somebody took it away."
    return "" if (target.root / "schema.safetensors").exists() else "there is no schema.safetensors."


def _attacked(found: dict[str, Any], finding: Finding, attack: Attack) -> dict[str, Any]:
    """The audit with the attack's result, written down; a lower bound above what the ledger claims fails it."""
    if finding.target.releases is None:
        raise UmbelError(f"Expected a run folder with --empirical, got {finding.target.path}. Name the run's folder.")
    if not finding.is_good:
        return found
    from umbel.empirical import attack_run  # noqa: PLC0415 (the server's world, and SciPy's)

    result = attack_run(finding.target.path, canaries=attack.canaries, threat=attack.threat, seed=None)
    found = found | {"empirical": result | _write_down(finding.target, result)}
    if not result["alarm"]:
        return found
    refuted = [bound for bound in result["bounds"] if bound["epsilon"] > result["claimed"]["epsilon"]]
    said = ", ".join(f"{bound['name']} {bound['epsilon']:.3g}" for bound in refuted)
    reason = (
        f"Expected lower bounds up to the claimed epsilon={result['claimed']['epsilon']:.3g}, got {said}: "
        "the mechanism, run again as the ledger says, has less noise than it claims."
    )
    return found | {"status": "failed", "exit_code": FAILED, "reason": reason}


def _write_down(target: Target, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write the attack's result beside the ledger, and a run's reports anew, which would not have it otherwise.

    Returns:
        `written`, paths; `not_written`, why not all of them, or an empty string. The attack counts all the same.
    """
    from umbel.empirical import write_result  # noqa: PLC0415

    written: list[str] = []
    try:
        _check_writable(target)
        written.append(str(write_result(target.path, result)))
        if target.root is None:
            return _wrote(written, "no report: it is written anew in the run's own folder only.")
        if not (target.root / "release/ledger.jsonl").exists():
            return _wrote(written, "no report: the run has not ended.")
        from privacy.report_page import write_pages  # noqa: PLC0415

        written += map(str, write_pages(target.root))
    except (UmbelError, OSError) as error:
        return _wrote(written, str(error))
    except ModuleNotFoundError as error:
        return _wrote(written, f'no report: it takes the package {error.name}. Run pip install "umbel[simulate]".')
    return _wrote(written, "")


def _wrote(written: list[str], not_written: str) -> dict[str, Any]:
    return {"written": written, "not_written": not_written}


def _check_writable(target: Target) -> None:
    """Refuse before anything is written, or a folder would be left half new."""
    release = target.path / "release"
    for folder in (target.path, release if release.is_dir() else target.path):
        if not os.access(folder, os.W_OK):
            raise UmbelError(f"nothing: {folder} cannot be written to. Its reports are as they were.")


def ledger_contents(path: Path, run: str | None = None) -> dict[str, Any]:
    """What a ledger says, for `umbel ledger show`; refuses one that is not valid in itself.

    Args:
        path: A ledger, or a folder with one.
        run: Show the rounds of this run only.

    Raises:
        UmbelError: If there is no such ledger or run.
        LedgerCorrupt: If a line is not valid.
    """
    ledger = PrivacyLedger.open(find_ledger(path))
    if run is not None and run not in ledger.runs:
        raise UmbelError(
            f"Expected one of the runs {', '.join(ledger.runs) or '(none)'}, got {run=}. Name one of them."
        )
    genesis, delta, s = ledger.genesis, float(ledger.genesis["delta"]), int(ledger.genesis["max_nodes_per_user"])
    rounds = sorted((r for name in ledger.runs for r in ledger.rounds_of(name)), key=lambda entry: entry.sequence)
    by_charge = mu_curve(ledger.rounds.noise_multipliers(), s)
    mu = [by_charge[ledger.rounds.charged_by(position) - 1] for position in range(len(rounds))]
    reasons = reasons_against(ledger.events(), genesis["mu_max"])
    return {
        "ledger": str(ledger.path),
        "head": f"{ledger.sequence}:{ledger.head.hex()}",
        "genesis": dict(genesis),
        "registry": None if ledger.registry is None else dict(ledger.registry),
        "public_key": ledger.public_key,
        "torn_bytes": ledger.torn_bytes,
        "epsilon_budget": _finite(float(genesis["epsilon"])),
        "epsilon_spent": None if reasons else _finite(ledger.epsilon_spent(delta)),
        "delta": delta,
        "not_private": bool(reasons),
        "reasons_against": list(reasons),
        "runs": {name: dict(body) for name, body in ledger.runs.items()},
        "rounds": [
            {**_round_facts(entry), "mu_after": None if reasons else _finite(after)}
            for entry, after in zip(rounds, mu, strict=True)
            if run in (None, entry.run)
        ],
    }


def _round_facts(entry: Round) -> dict[str, Any]:
    return {
        "sequence": entry.sequence,
        "run": entry.run,
        "round": entry.server_round,
        "outcome": _outcome(entry),
        "release_digest": entry.release_digest,
        "invited_users": entry.invited_users,
        "event": dict(entry.event),
    }


def _outcome(entry: Round) -> str:
    if entry.is_open:
        return "open"
    return "released" if entry.abort_code is None else f"aborted: {entry.abort_code}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
