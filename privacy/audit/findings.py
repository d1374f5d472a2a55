"""The audit of a run folder or a ledger: verify, recompute, and say what is promised. No Flower, data or stores."""

import re
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from common.errors import UmbelError, VerificationError
from privacy.audit.losses import amplified_epsilon, checked_deltas, losses_at, void
from privacy.audit.releases import Releases, run_of, verify_release
from privacy.audit.verify import Anchor, Verification, verify
from privacy.keys import load_key, public_key_hex
from privacy.lines import check_signature, parse_line
from privacy.participation import cost_units, is_noiseless, is_unlimited, limit_units
from privacy.promise import promise_of_ledger, reasons_against
from privacy.rounding import counted
from privacy.sampling import NO_SAMPLING

VERIFIED, OVER_BUDGET, FAILED, OWNER_NOT_VERIFIED = 0, 3, 4, 5
"""Exit codes of `umbel audit`."""
_ACCOUNTANTS_SLACK = 1 + 1e-6  # between machines; what is charged was rounded up
_LONGEST_ANCHOR = 18 + 1 + 64
_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is audited.

    Attributes:
        path: As it was named.
        ledger: The file of lines.
        releases: What must be beside it; None for a ledger alone.
        root: The run folder, of which the release folder is a part; None where only that, or a ledger, was named.
    """

    path: Path
    ledger: Path
    releases: Releases | None = None
    root: Path | None = None

    @property
    def run(self) -> str | None:
        """Whose folder it is; None for a ledger, or where nothing says so."""
        return None if self.releases is None else self.releases.run


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on one target.

    Attributes:
        target: What was audited.
        found: What its ledger says.
        status: The verdict in words.
        exit_code: The verdict as `umbel audit` ends.
        line: Number of the line that failed, from 1, or None.
        reason: Why, or an empty string.
    """

    target: Target
    found: Verification
    status: str
    exit_code: int
    line: int | None
    reason: str

    @property
    def is_good(self) -> bool:
        """Whether what the ledger says can be believed, as far as its key can."""
        return self.exit_code in (VERIFIED, OWNER_NOT_VERIFIED)


def find_target(path: Path) -> Target:
    """A ledger file, or the ledger and the releases of a run folder or of its `release` folder.

    Raises:
        UmbelError: If there is no ledger, or the released model cannot be read.
    """
    if not path.is_dir():
        return Target(path=path, ledger=path)
    ledger, release = find_ledger(path), _release_folder(path)
    run = run_of(release) or _run_name(path / "config.toml")  # a run that is not finished has no model yet
    root = None if release == path else path
    return Target(path=path, ledger=ledger, releases=Releases(folder=release / "rounds", run=run), root=root)


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
    path: str | Path,
    *,
    public_key: str | Collection[str] | None = None,
    anchor: str | None = None,
    deltas: Iterable[float] = (),
    all_signatures: bool = False,
) -> dict[str, Any]:
    """Verify a ledger and the releases beside it, and recompute what was spent, from what may be published alone.

    Args:
        path: A run folder, its `release` folder, or a ledger.
        public_key: The owner's, hex or a file; or several, of which it must be one.
        anchor: A head that somebody remembers, "sequence:head".
        deltas: To recompute epsilon for; by default the ledger's.
        all_signatures: Check each line's signature, not only the last.

    Returns:
        What `umbel audit --format json` prints, but for what needs more than the release: `model` and `empirical`.

    Raises:
        UmbelError: If the ledger cannot be read, or a number is out of range.
    """
    wanted = checked_deltas(deltas)
    finding = inspect(
        find_target(Path(path)), public_keys=keys_of(public_key), anchor=anchor, all_signatures=all_signatures
    )
    return document(finding, wanted)


def keys_of(public_key: str | Collection[str] | None) -> tuple[str, ...]:
    """Public keys as hex, from one or several in hex or in files.

    Raises:
        UmbelError: If one is neither.
    """
    given = (public_key,) if isinstance(public_key, str) else tuple(public_key or ())
    return tuple(map(read_public_key, given))


def inspect(
    target: Target,
    *,
    public_keys: Collection[str] = (),
    anchor: str | None = None,
    all_signatures: bool = False,
) -> Finding:
    """Verify one target.

    Args:
        target: What to audit.
        public_keys: Hex; one must be the ledger's.
        anchor: A head that somebody remembers, "sequence:head".
        all_signatures: Check each line's signature, not only the last.

    Raises:
        UmbelError: If the ledger cannot be read.
    """
    _refuse_empty(target.ledger)
    known: dict[str, Any] = {
        "public_key": tuple(public_keys),
        "anchor": None if anchor is None else _anchor(anchor),
        "all_signatures": all_signatures,
    }
    releases = target.releases
    found = verify(target.ledger, **known) if releases is None else verify_release(target.ledger, releases, **known)
    exit_code = {"verified": VERIFIED, "failed": FAILED}.get(found.status, OWNER_NOT_VERIFIED)
    status: str = found.status
    if found.status == "failed" and _is_authentic_overrun(target.ledger, found, public_keys):
        status, exit_code = "over budget", OVER_BUDGET
    reason = found.reason
    if found.status != "failed" and (unlike := _unlike_start(target, found)):
        status, exit_code, reason = "failed", FAILED, unlike
    if exit_code in (VERIFIED, OWNER_NOT_VERIFIED) and (understated := _understated(found) or _lost_too_much(found)):
        status, exit_code, reason = "over budget", OVER_BUDGET, understated
    return Finding(target=target, found=found, status=status, exit_code=exit_code, line=found.line, reason=reason)


def document(finding: Finding, deltas: tuple[float, ...] = ()) -> dict[str, Any]:
    """One target's audit as documented for `--format json`; its `exit_code` is the verdict.

    Args:
        finding: The verdict.
        deltas: To recompute epsilon for; none for the ledger's.

    Raises:
        UmbelError: If accountants contradict each other.
    """
    found, target, releases = finding.found, finding.target, finding.target.releases
    privacy = _privacy(found, deltas) if found.genesis else None
    commits, opened = _outcomes(found)
    # whether it is right and whether it promises something are two things
    stamped = finding.is_good and privacy is not None and privacy["not_private"]
    return {
        "status": f"{finding.status}, NOT PRIVATE" if stamped else finding.status,
        "exit_code": finding.exit_code,
        "ledger": str(target.ledger),
        "run": target.run,
        "line": finding.line,
        "reason": finding.reason,
        "lines": found.num_lines,
        "torn_bytes": found.torn_bytes,
        "head": f"{found.sequence}:{found.head}",
        "public_key": found.public_keys[-1] if found.public_keys else None,
        "ledger_id": found.genesis.get("ledger_id"),
        "population": found.genesis.get("population"),
        "population_size": (found.registry or {}).get("population_size"),
        "runs": sorted(found.runs),
        "releases": {
            "reserved": len(found.rounds),
            "committed": commits,
            "open": opened,
            "compared": 0 if releases is None else releases.count_present(found),
        },
        "privacy": privacy,
    }


def _refuse_empty(ledger: Path) -> None:
    try:
        empty = ledger.stat().st_size == 0
    except OSError:
        return  # whoever opens it says why
    if empty:
        raise UmbelError(f"Expected a ledger, got {ledger}, which is empty. Get it again from its owner.")


def _outcomes(found: Verification) -> tuple[int, int]:
    commits = found.counts.get("COMMIT", 0)
    return commits, found.counts.get("RESERVE", 0) - commits - found.counts.get("ABORT", 0)


def _anchor(text: str) -> Anchor:
    if len(text) > _LONGEST_ANCHOR:
        raise UmbelError(
            f"Expected an anchor such as 41:9f3c…, got {len(text)} letters. Copy it from umbel ledger head."
        )
    try:
        return Anchor.parse(text)
    except UmbelError as error:
        raise UmbelError(f"{error} Copy what `umbel ledger head` printed.") from error


def _privacy(found: Verification, deltas: tuple[float, ...]) -> dict[str, Any]:
    """`privacy` of the audit: the budget, and epsilon recomputed from the events alone; void without a promise."""
    genesis = found.genesis
    s, budget_delta = int(genesis["max_nodes_per_user"]), float(genesis["delta"])
    wanted = checked_deltas(deltas, default=budget_delta)
    losses = losses_at(wanted, mu=found.mu_spent, noise_multipliers=found.noise_multipliers, s=s, sampled=found.sampled)
    reasons = reasons_against(found.rounds.events(), genesis["mu_max"])
    if reasons:
        losses = void(losses)
    return {
        "epsilon_budget": None if is_unlimited(genesis["epsilon"]) else float(genesis["epsilon"]),
        "delta_budget": budget_delta,
        **losses,
        "unit": genesis["unit"],
        "neighboring_relation": genesis["neighboring_relation"],
        "max_nodes_per_user": s,
        "not_private": bool(reasons),
        "reasons_against": list(reasons),
        "promise": promise_of_ledger(
            losses["epsilon"],
            wanted[0],
            population=genesis["population"],
            rounds=len(found.rounds),
            lost=found.rounds.num_lost,
            runs=len(found.runs),
            max_nodes_per_user=s,
            is_sampled=found.sampled is not None,
            reasons_against=reasons,
        ),
    }


def _run_name(config: Path) -> str | None:
    """The run of a folder, from the configuration it was started with."""
    try:
        name = tomllib.loads(config.read_text("utf-8")).get("run", {}).get("name")
    except (OSError, ValueError):
        return None
    return str(name) if name else None


def _unlike_start(target: Target, found: Verification) -> str:
    """Which file of a run folder is gone or changed though the run's START line has its digest; or nothing.

    A folder without them could not be told from one whose model was swapped.
    """
    if target.root is None or not found.runs:
        return ""
    if target.run is None:
        missing = not (target.root / "config.toml").exists()
        return _lacking(target.root / "config.toml", "a run of the ledger") if missing else ""
    started = found.runs.get(target.run)
    if started is None:
        return ""  # no run of this ledger: its releases, or its model, say so
    schedule = started["schedule"]
    digests = {"config.toml": started["configuration_digest"], "schema.safetensors": schedule.get("schema")}
    if isinstance(schedule.get("start"), dict):
        digests["start.safetensors"] = schedule["start"].get("digest")
    for name, digest in digests.items():
        path, of_run = target.root / name, f"run={target.run!r}"
        try:
            same = digest is None or sha256(path.read_bytes()).hexdigest() == digest
        except FileNotFoundError:
            return _lacking(path, of_run)
        except OSError as error:
            raise UmbelError(f"Expected to read {path}, got {error.strerror}. Make it readable.") from error
        if not same:
            return f"Expected {path} as {of_run} was started (SHA-256 {str(digest)[:16]}…), got another."
    return ""


def _lacking(path: Path, of_run: str) -> str:
    return (
        f"Expected {path}, whose digest is in the START line of {of_run}, got none: it is missing. Put it back, or "
        "audit the release folder alone, of which the model cannot be recomputed."
    )


def _understated(found: Verification) -> str:
    """What is wrong with the cost that a sampled run was charged with, asked of the accountants again; or nothing."""
    sampled, genesis = found.sampled, found.genesis
    if sampled is None or is_unlimited(genesis["mu_max"]):
        return ""
    cost = amplified_epsilon(sampled, float(genesis["delta"]), int(genesis["max_nodes_per_user"]))
    if cost <= float(sampled.amplified_epsilon) * _ACCOUNTANTS_SLACK:
        return ""
    return (
        f"Expected run={sampled.run!r} to cost amplified_epsilon={sampled.amplified_epsilon} as it was charged, "
        f"got {cost:.6g}."
    )


def _lost_too_much(found: Verification) -> str:
    """That what RESTORE lines charge is more than was left; nothing else of a valid ledger can be beyond its budget."""
    if is_unlimited(found.mu_limit) or found.capped_units <= limit_units(found.mu_limit):
        return ""
    lost = counted(found.rounds.num_lost, "lost line")
    return f"Expected spending within mu_max={found.mu_limit}, got more with {lost}, each charged as a round."


def _is_authentic_overrun(ledger: Path, found: Verification, public_keys: Collection[str]) -> bool:
    """Whether the first line that is not valid is a release beyond the budget, signed by the ledger's own key.

    Its signature covers everything before it; nothing after it was read.
    """
    mu_max = found.mu_limit if found.genesis else "inf"
    foreign = bool(public_keys) and not set(public_keys).intersection(found.public_keys)
    if found.line is None or is_unlimited(mu_max) or foreign:
        return False
    try:
        with ledger.open("rb") as lines:
            line = parse_line(next(islice(lines, found.line - 1, None)).rstrip(b"\n"))
        if line.kind != "RESERVE" or (line.sequence, line.previous) != (found.sequence + 1, found.head):
            return False
        check_signature(line, found.public_keys[-1])
    except VerificationError:
        return False
    event = line.body["event"]
    z = str(event["noise_multiplier"])
    over = is_noiseless(z) or found.capped_units + cost_units(z) > limit_units(mu_max)
    return over and event["sampling"] == NO_SAMPLING
