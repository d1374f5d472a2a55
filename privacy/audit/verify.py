"""Verification of a ledger file by somebody who has nothing else: no key, no data, no run.

What it can show: nobody without the key changed, dropped, swapped, added or forged a line; every release was
reserved, within the budget, before it was committed. What it cannot show by itself: that the key is the
owner's (give `public_key`), that nothing was cut off at the end of a line (give `anchor`: a head that a
report, a node or a witness remembers), and that the noise was drawn as an event says.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from common.errors import UmbelError
from privacy.ledger_state import LedgerState, Reading, read_file
from privacy.lines import CRYPTOGRAPHIC_NOISE
from privacy.rounds import Event, Round, Rounds
from privacy.sampling import SampledRun

Status = Literal["verified", "consistent, owner not verified", "failed"]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A head that somebody remembers.

    Attributes:
        sequence: Number of the line it was the head after.
        head: Hex.
    """

    sequence: int
    head: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "sequence:head", the way reports print it."""
        sequence, _, head = text.partition(":")
        if not (sequence.isdecimal() and len(head) == 64 and set(head) <= set("0123456789abcdef")):
            raise UmbelError(f"Expected an anchor such as 41:9f3c… of 64 hex digits, got anchor={text!r}.")
        return cls(sequence=int(sequence), head=head)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The verdict, and what the ledger says; after a failure, what the lines before it say.

    Attributes:
        status: "verified" only against the owner's public key.
        line: Number of the line that failed, from 1, or None.
        reason: Why, or an empty string.
        sequence: Number of the last valid line, from 0; -1 if there is none.
        head: The head after it, hex.
        public_keys: Every key of the ledger in order, hex; the last is in force.
        genesis: Body of the GENESIS line.
        registry: Body of the last REGISTRY line, or None.
        counts: Lines by type.
        runs: Bodies of the START lines, by run.
        rounds: Every RESERVE and what became of it, in order; each is made when it is asked for.
        spent_units: What all of them cost, in units of 2^-50 per (user, node), coins not counted on.
        mu_spent: The same as mu of the worst-case user.
        capped_units: `spent_units` without a sampled run.
        mu_limit: What that may reach as mu, a decimal string or "inf".
        sampled: The sampled run, or None.
        torn_bytes: Bytes after the last complete line, which count for nothing.
    """

    status: Status
    line: int | None
    reason: str
    sequence: int
    head: str
    public_keys: tuple[str, ...]
    genesis: Mapping[str, Any]
    registry: Mapping[str, Any] | None
    counts: Mapping[str, int]
    runs: Mapping[str, Mapping[str, Any]]
    rounds: Rounds
    spent_units: float
    mu_spent: float
    capped_units: float
    mu_limit: str
    sampled: SampledRun | None
    torn_bytes: int

    @property
    def num_lines(self) -> int:
        """How many lines are valid; fewer than `sequence` says where some were lost."""
        return sum(self.counts.values())

    @property
    def events(self) -> tuple[Event, ...]:
        """The mechanism events of all RESERVE lines, in order."""
        return tuple(self.rounds.events())

    @property
    def noise_multipliers(self) -> list[str]:
        """z of all RESERVE lines and of what RESTORE lines charge, in order, as the ledger spells them."""
        return self.rounds.noise_multipliers()

    @property
    def commits(self) -> tuple[Round, ...]:
        """Rounds with a committed release, in the order in which they were reserved."""
        return tuple(self.rounds.released())

    @property
    def open_reservations(self) -> tuple[Round, ...]:
        """Rounds with neither COMMIT nor ABORT: charged all the same."""
        return tuple(self.rounds.open())

    @property
    def is_private(self) -> bool:
        """Whether every event names a cryptographic source of noise."""
        return all(event["noise"] in CRYPTOGRAPHIC_NOISE for event in self.rounds.events())


def verify(
    path: Path,
    *,
    public_key: str | Collection[str] | None = None,
    anchor: Anchor | None = None,
    all_signatures: bool = False,
    release_found: Callable[[Round], bool] | None = None,
) -> Verification:
    """Verify a ledger file, or a copy of one.

    Checked: canonical form, sequence, chain, the last signature and those of KEY lines, one GENESIS, START
    before RESERVE, no round reserved twice, no more rounds, no other noise multiplier and no other sampling than
    START's schedule says, at most one COMMIT or ABORT for a RESERVE, mu_max within (epsilon, delta), and that at no
    line the budget was exceeded.

    Args:
        path: The file; it is not changed, and may be in use.
        public_key: The owner's key, hex: one that the ledger has or had; or several, of which it must be one.
        anchor: A head that the ledger must have had.
        all_signatures: Check every signature, about 0.1 ms each; the last one authenticates all.
        release_found: Whether the committed release of a round is where it should be, called for every
            COMMIT; True for those that are not to be looked for.

    Raises:
        UmbelError: If there is no such file or it cannot be read.
    """
    keys = (public_key,) if isinstance(public_key, str) else tuple(public_key or ())
    reading = read_file(path, all_signatures=all_signatures)
    line, reason = reading.line, reading.reason
    if line is None:
        line, reason = _outside_failure(reading.state, keys, anchor, release_found)
    if reason:
        return _verification(reading, "failed", line, reason)
    return _verification(reading, "verified" if keys else "consistent, owner not verified", None, "")


def recompute_epsilon(verification: Verification, delta: float) -> dict[str, float]:
    """Epsilon at `delta` of all RESERVE lines, coins not counted on, by each accountant, from their events alone."""
    from privacy.accounting import gdp_epsilon, pld_epsilon  # noqa: PLC0415 (needs the extra `simulate`)

    multipliers = verification.noise_multipliers
    s = verification.genesis["max_nodes_per_user"]
    return {"gdp": gdp_epsilon(multipliers, delta, s), "pld": pld_epsilon(multipliers, delta, s)}


def _outside_failure(
    state: LedgerState,
    keys: tuple[str, ...],
    anchor: Anchor | None,
    release_found: Callable[[Round], bool] | None,
) -> tuple[int | None, str]:
    """Compare a ledger that is valid in itself with what is known from elsewhere."""
    if keys and not set(keys).intersection(state.public_keys):
        wanted = " or ".join(f"{key[:16]}…" for key in keys)
        return None, f"Expected a ledger of key {wanted}, got key {state.public_keys[-1][:16]}…."
    if anchor is not None and anchor.sequence > state.sequence:
        return (
            None,
            f"Expected lines up to {anchor.sequence}, got them up to {state.sequence}: the end is missing, or this "
            "head is another ledger's.",
        )
    if anchor is not None and state.head_at(anchor.sequence).hex() != anchor.head:
        return (
            state.line_number(anchor.sequence),
            f"Expected head {anchor.head[:16]}… here, got another: the past was rewritten, or this head "
            "is another ledger's.",
        )
    for entry in state.rounds.released() if release_found is not None else ():
        if release_found is not None and not release_found(entry):
            return state.line_number(entry.sequence), (
                f"Expected the release of run={entry.run!r}, round {entry.server_round} "
                f"with the committed SHA-256 {str(entry.release_digest)[:16]}…, got none or another."
            )
    return None, ""


def _verification(reading: Reading, status: Status, line: int | None, reason: str) -> Verification:
    state = reading.state
    return Verification(
        status=status,
        line=line,
        reason=reason,
        sequence=state.sequence,
        head=state.head.hex(),
        public_keys=tuple(state.public_keys),
        genesis=state.genesis,
        registry=state.registry,
        counts=dict(state.counts),
        runs=dict(state.runs),
        rounds=state.rounds,
        spent_units=state.spent_units,
        mu_spent=state.mu_spent() if state.genesis else 0.0,
        capped_units=state.capped_units,
        mu_limit=state.mu_limit,
        sampled=state.sampled,
        torn_bytes=reading.torn_bytes,
    )
