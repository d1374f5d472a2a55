"""The audit of a run folder or a ledger: verify, recompute, and say what is promised. No Flower, data or stores."""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from common.errors import UmbelError, VerificationError
from privacy.accounting import SMALLEST_DELTA, gdp_epsilon, mu_curve, spent, total_mu
from privacy.audit.releases import Releases, run_of, verify_release
from privacy.audit.verify import Anchor, Verification, verify
from privacy.gaussian import replace_one
from privacy.keys import load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.ledger_state import Round
from privacy.lines import check_signature, parse_line
from privacy.participation import cost_units, is_noiseless, is_unlimited, limit_units
from privacy.promise import promise_of_ledger, reasons_against

VERIFIED, OVER_BUDGET, FAILED, OWNER_NOT_VERIFIED = 0, 3, 4, 5
"""Exit codes of `umbel audit`."""
_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is audited.

    Attributes:
        ledger: The file of lines.
        releases: What must be beside it; None for a ledger alone.
    """

    ledger: Path
    releases: Releases | None = None


def find_target(path: Path) -> Target:
    """A ledger file, or the ledger and the releases of a run folder or of its `release` folder.

    Raises:
        UmbelError: If there is no ledger, or the released model cannot be read.
    """
    if not path.is_dir():
        return Target(ledger=path)
    ledger, release = find_ledger(path), _release_folder(path)
    run = run_of(release) or _run_name(path / "config.toml")  # a run that is not finished has no model yet
    return Target(ledger=ledger, releases=Releases(folder=release / "rounds", run=run))


def find_ledger(path: Path) -> Path:
    """The ledger of a run folder or of its `release` folder, or the file itself.

    Raises:
        UmbelError: If there is none.
    """
    if not path.is_dir():
        return path
    for ledger in (_release_folder(path) / "ledger.jsonl", path / "ledger.jsonl"):
        if ledger.exists():
            return ledger
    raise UmbelError(f"Expected a ledger.jsonl in {path}, got none. Name the population's ledger itself.")


def _release_folder(path: Path) -> Path:
    return path / "release" if (path / "release").is_dir() else path


def read_public_key(text: str) -> str:
    """A public key as hex, from hex or from a file with hex, a public key or a private key in PEM.

    Raises:
        UmbelError: If it is neither.
    """
    if _HEX_KEY.fullmatch(text):
        return text.lower()
    path = Path(text)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UmbelError(
            f"Expected 64 hex digits or a key file, got public_key={text!r} ({error.strerror}). "
            "Give the key that the owner published."
        ) from error
    if _HEX_KEY.fullmatch(content.decode("ascii", "replace").strip()):
        return content.decode("ascii").strip().lower()
    if b"PRIVATE KEY" in content:
        return public_key_hex(load_key(path))
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UmbelError(f"Expected an Ed25519 public key in hex or PEM, got {path}. Ask the owner for it.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UmbelError(f"Expected an Ed25519 public key, got another kind in {path}. Ask the owner for it.")
    return public_key_hex(key)


def audit(
    target: Target,
    *,
    public_key: str | None = None,
    anchor: str | None = None,
    delta: float | None = None,
    all_signatures: bool = False,
) -> dict[str, Any]:
    """Verify a ledger and the releases beside it, and recompute what was spent.

    Args:
        target: What to audit.
        public_key: The owner's, hex.
        anchor: A head that somebody remembers, "sequence:head".
        delta: To recompute epsilon for; by default the ledger's.
        all_signatures: Check each line's signature, not only the last.

    Returns:
        The audit, as documented for `--format json`; its `exit_code` is the verdict.

    Raises:
        UmbelError: If the ledger cannot be read, or a number is out of range.
    """
    known: dict[str, Any] = {
        "public_key": public_key,
        "anchor": None if anchor is None else _anchor(anchor),
        "all_signatures": all_signatures,
    }
    releases = target.releases
    found = verify(target.ledger, **known) if releases is None else verify_release(target.ledger, releases, **known)
    over = found.status == "failed" and _is_authentic_overrun(target.ledger, found, public_key)
    exit_code = {"verified": VERIFIED, "failed": FAILED}.get(found.status, OWNER_NOT_VERIFIED)
    privacy = _privacy(found, delta) if found.genesis else None
    return {
        "status": "over budget" if over else _status(found, privacy),
        "exit_code": OVER_BUDGET if over else exit_code,
        "ledger": str(target.ledger),
        "line": found.line,
        "reason": found.reason,
        "lines": found.sequence + 1,
        "torn_bytes": found.torn_bytes,
        "head": f"{found.sequence}:{found.head}",
        "public_key": found.public_keys[-1] if found.public_keys else None,
        "population": found.genesis.get("population"),
        "population_size": (found.registry or {}).get("population_size"),
        "runs": sorted(found.runs),
        "releases": {
            "reserved": len(found.rounds),
            "committed": len(found.commits),
            "open": len(found.open_reservations),
            "compared": 0 if releases is None else sum(releases.path(entry).exists() for entry in found.commits),
        },
        "privacy": privacy,
    }


def _anchor(text: str) -> Anchor:
    try:
        return Anchor.parse(text)
    except UmbelError as error:
        raise UmbelError(f"{error} Copy what `umbel ledger head` printed.") from error


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
    mu = mu_curve([entry.event["noise_multiplier"] for entry in rounds], s)
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


def _status(found: Verification, privacy: Mapping[str, Any] | None) -> str:
    """The verdict on the ledger; whether it is right and whether it promises something are two things."""
    if found.status == "failed" or privacy is None or not privacy["not_private"]:
        return found.status
    return f"{found.status}, NOT PRIVATE"


def _privacy(found: Verification, delta: float | None) -> dict[str, Any]:
    """`privacy` of the audit: the budget, and epsilon recomputed from the events alone; void without a promise."""
    genesis = found.genesis
    s, budget_delta = int(genesis["max_nodes_per_user"]), float(genesis["delta"])
    delta = budget_delta if delta is None else delta
    if not SMALLEST_DELTA <= delta < 1:
        raise UmbelError(f"Expected {SMALLEST_DELTA} <= delta < 1, got {delta=}. Correct --delta, or leave it out.")
    try:
        losses = _losses([event["noise_multiplier"] for event in found.events], delta, s)
    except ValueError as error:
        raise UmbelError(str(error)) from error
    reasons = reasons_against(found.events, genesis["mu_max"])
    if reasons:
        losses = dict.fromkeys(losses)
    return {
        "epsilon_budget": _finite(float(genesis["epsilon"])),
        "delta_budget": budget_delta,
        "delta": delta,
        **losses,
        "unit": genesis["unit"],
        "neighboring_relation": genesis["neighboring_relation"],
        "max_nodes_per_user": s,
        "not_private": bool(reasons),
        "reasons_against": list(reasons),
        "promise": promise_of_ledger(
            losses["epsilon"],
            delta,
            population=genesis["population"],
            rounds=len(found.rounds),
            runs=len(found.runs),
            max_nodes_per_user=s,
            reasons_against=reasons,
        ),
    }


def _losses(noise_multipliers: list[str], delta: float, s: int) -> dict[str, float | None]:
    """The worst-case user's loss by each accountant; None is infinite, or not computed without dp-accounting."""
    if find_spec("dp_accounting") is not None:
        loss = spent(noise_multipliers, delta, s)
        return {
            "epsilon": _finite(loss.epsilon),
            "mu": _finite(loss.mu),
            "replace_one_epsilon": _finite(loss.replace_one_epsilon),
            "pld_epsilon": _finite(loss.pld_epsilon),
            "rdp_epsilon": _finite(loss.rdp_epsilon),
        }
    mu = total_mu(noise_multipliers, s)
    return {
        "epsilon": _finite(gdp_epsilon(noise_multipliers, delta, s)),
        "mu": _finite(mu),
        "replace_one_epsilon": _finite(replace_one(mu, delta)),
        "pld_epsilon": None,
        "rdp_epsilon": None,
    }


def _run_name(config: Path) -> str | None:
    """The run of a folder, from the configuration it was started with."""
    try:
        name = tomllib.loads(config.read_text("utf-8")).get("run", {}).get("name")
    except (OSError, ValueError):
        return None
    return str(name) if name else None


def _is_authentic_overrun(ledger: Path, found: Verification, public_key: str | None) -> bool:
    """Whether the first line that is not valid is a release beyond the budget, signed by the ledger's own key.

    Its signature covers everything before it; nothing after it was read.
    """
    mu_max = found.genesis.get("mu_max", "inf")
    if found.line is None or is_unlimited(mu_max) or (public_key and public_key not in found.public_keys):
        return False
    try:
        with ledger.open("rb") as lines:
            line = parse_line(next(islice(lines, found.line - 1, None)).rstrip(b"\n"))
        if line.kind != "RESERVE" or (line.sequence, line.previous) != (found.sequence + 1, found.head):
            return False
        check_signature(line, found.public_keys[-1])
    except VerificationError:
        return False
    z = str(line.body["event"]["noise_multiplier"])
    return is_noiseless(z) or found.spent_units + cost_units(z) > limit_units(mu_max)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
