"""What a ledger's lines say together: what was reserved, what became of it, what is spent. Reads, never writes.

The rules are in one place, used for every line that is read and for every line before it is written: one GENESIS,
START before RESERVE, no round reserved twice, no more rounds and no other noise than START's schedule says (where it
says), one COMMIT or ABORT at most for a RESERVE, never beyond the budget.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import BudgetExhausted, UmbelError, VerificationError
from privacy.gaussian import delta_of_epsilon
from privacy.lines import ZERO_HEAD, Line, check_signature, extend, parse_line
from privacy.participation import UNITS, cost_units, is_noiseless, is_unlimited, limit_units

Event = Mapping[str, Any]
_MU_SLACK = 1 + 1e-9  # for the float arithmetic of this check alone; mu_max itself was rounded down


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A RESERVE line and what became of it.

    Attributes:
        run: The run that reserved.
        server_round: Its round.
        sequence: Sequence number of the RESERVE line.
        event: The mechanism whose cost is charged.
        invited_users: Users on the nodes that were invited.
        release_digest: SHA-256 of the committed release, hex, or None.
        abort_code: Why nothing came of it, or None.
    """

    run: str
    server_round: int
    sequence: int
    event: Event
    invited_users: int
    release_digest: str | None = None
    abort_code: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it was neither committed nor aborted."""
        return self.release_digest is None and self.abort_code is None


@dataclass(kw_only=True)
class LedgerState:
    """What follows from a ledger's lines: the one place that knows its rules, kept up line by line.

    Attributes:
        head: h_t, 32 bytes.
        sequence: t, the last line's number; -1 before GENESIS.
        public_keys: Every key that has signed or may sign, hex; the last one is in force.
        genesis: Body of the GENESIS line.
        registry: Body of the last REGISTRY line, or None.
        runs: Bodies of START lines, by run.
        reserves: Bodies of RESERVE lines, by their sequence number.
        releases: SHA-256 of what was committed, hex, by the sequence number of the RESERVE line.
        aborts: Codes of ABORT lines, by the sequence number of the RESERVE line.
        spent_units: Sum of the costs of all RESERVE lines, an integer; inf after one without noise.
        limit_units: What it may reach, an integer; inf if the ledger promises nothing.
        counts: Lines by type.
    """

    head: bytes = ZERO_HEAD
    sequence: int = -1
    public_keys: list[str] = field(default_factory=list)
    genesis: Mapping[str, Any] = field(default_factory=dict)
    registry: Mapping[str, Any] | None = None
    runs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    reserves: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    releases: dict[int, str] = field(default_factory=dict)
    aborts: dict[int, str] = field(default_factory=dict)
    spent_units: float = 0
    limit_units: float = 0
    counts: Counter[str] = field(default_factory=Counter)
    _digests: bytearray = field(default_factory=bytearray)
    _reserved: dict[str, dict[int, int]] = field(default_factory=dict)
    _last_event: Mapping[str, Any] = field(default_factory=dict)

    def check(self, line: Line) -> None:
        """Say whether `line` may come next.

        Raises:
            BudgetExhausted: If it reserves more than is left.
            ValueError: If it may not for another reason.
        """
        if line.sequence != self.sequence + 1:
            raise ValueError(f"Expected sequence={self.sequence + 1}, got sequence={line.sequence}.")
        if line.previous != self.head.hex():
            raise ValueError("Expected the head of the lines before as previous; one of them was changed.")
        if (line.kind == "GENESIS") != (self.sequence < 0):
            raise ValueError(f"Expected GENESIS as the first line and only there, got type={line.kind}.")
        self._check_body(line.kind, line.body)

    def advance(self, line: Line) -> None:
        """Take in a line that has passed `check`."""
        digest = sha256(line.raw).digest()
        self._advance_body(line.kind, line.body, line.sequence)
        self.head = extend(self.head, digest)
        self.sequence = line.sequence
        self.counts[line.kind] += 1
        self._digests += digest

    def would_exceed(self, event: Event) -> bool:
        """Whether `event` costs more than is left."""
        return self.spent_units + _cost(event["noise_multiplier"]) > self.limit_units

    def mu_spent(self) -> float:
        """mu of the user who contributed to every release from every node it may be on, rounded up."""
        units = self.genesis["max_nodes_per_user"] ** 2 * self.spent_units
        return math.nextafter(math.sqrt(units / UNITS), math.inf) if units else 0.0

    def round_at(self, sequence: int) -> Round:
        """The round that line `sequence` reserved, with what became of it."""
        body = self.reserves[sequence]
        return Round(
            run=body["run"],
            server_round=body["round"],
            sequence=sequence,
            event=body["event"],
            invited_users=body["invited_users"],
            release_digest=self.releases.get(sequence),
            abort_code=self.aborts.get(sequence),
        )

    def rounds(self) -> tuple[Round, ...]:
        """Every round, in the order in which they were reserved."""
        return tuple(self.round_at(sequence) for sequence in self.reserves)

    def rounds_of(self, run: str) -> tuple[Round, ...]:
        """The rounds that one run has reserved, in order."""
        return tuple(self.round_at(sequence) for sequence in self._reserved.get(run, {}).values())

    def open_reservations(self) -> tuple[Round, ...]:
        """Rounds with neither COMMIT nor ABORT."""
        return tuple(self.round_at(sequence) for sequence in self.reserves if self._is_open(sequence))

    def digests(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """`t x 32`, the digests of lines `start` to `stop` - 1."""
        return np.frombuffer(bytes(self._digests[32 * start : 32 * stop]), np.uint8).reshape(-1, 32)

    def _check_body(self, kind: str, body: Mapping[str, Any]) -> None:
        match kind:
            case "GENESIS":
                _check_budget(body)
            case "START":
                self._check_start(body)
            case "RESERVE":
                self._check_reserve(body)
            case "COMMIT" | "ABORT":
                if not self._is_open(body["reserve"]):
                    raise ValueError(f"Expected a RESERVE that is still open, got reserve={body['reserve']}.")
            case "KEY" if body["public_key"] in self.public_keys:
                raise ValueError("Expected a key that this ledger has not had yet.")
            case "RESTORE":
                raise ValueError("Expected no RESTORE line: this version cannot verify a recovery key.")

    def _check_start(self, body: Mapping[str, Any]) -> None:
        if body["run"] in self.runs:
            raise ValueError(f"Expected a new run, got run={body['run']!r}. Resume it.")
        rounds, multiplier = body["schedule"].get("rounds", 0), body["schedule"].get("noise_multiplier", "")
        if type(rounds) is not int or not isinstance(multiplier, str):
            raise ValueError(f"Expected rounds as integer and noise_multiplier as text, got {rounds=}, {multiplier=}.")

    def _check_reserve(self, body: Mapping[str, Any]) -> None:
        if body["run"] not in self.runs:
            raise ValueError(f"Expected a run that was started, got run={body['run']!r}.")
        if body["round"] in self._reserved.get(body["run"], {}):
            raise ValueError(f"Expected a round not reserved before, got round={body['round']}. Use the next.")
        if self.would_exceed(body["event"]):
            raise BudgetExhausted(
                f"Expected a release within epsilon={self.genesis['epsilon']} and "
                f"delta={self.genesis['delta']}, got noise_multiplier={body['event']['noise_multiplier']} "
                f"after mu={self.mu_spent():.6g}. Stop here, or release with more noise."
            )
        self._check_schedule(body)

    def _check_schedule(self, body: Mapping[str, Any]) -> None:
        """A run does what its START line says, where that says something."""
        schedule, charged = self.runs[body["run"]]["schedule"], len(self._reserved.get(body["run"], {}))
        if charged >= schedule.get("rounds", math.inf):
            raise ValueError(
                f"Expected at most rounds={schedule['rounds']} as run={body['run']!r} was started, got another."
            )
        planned, multiplier = schedule.get("noise_multiplier"), body["event"]["noise_multiplier"]
        if planned not in (None, multiplier):
            raise ValueError(
                f"Expected noise_multiplier={planned} as run={body['run']!r} was started, got {multiplier}."
            )

    def _advance_body(self, kind: str, body: Mapping[str, Any], sequence: int) -> None:
        match kind:
            case "GENESIS":
                self.genesis = body
                self.public_keys.append(body["public_key"])
                self.limit_units = math.inf if is_unlimited(body["mu_max"]) else limit_units(body["mu_max"])
            case "REGISTRY":
                self.registry = body
            case "START":
                self.runs[body["run"]] = body
            case "RESERVE":
                self._advance_reserve(body, sequence)
            case "COMMIT":
                self.releases[body["reserve"]] = body["release_digest"]
            case "ABORT":
                self.aborts[body["reserve"]] = body["code"]
            case "KEY":
                self.public_keys.append(body["public_key"])

    def _advance_reserve(self, body: Mapping[str, Any], sequence: int) -> None:
        # Most rounds repeat the event before: one object for all of them keeps 1e5 rounds small in memory.
        if body["event"] != self._last_event:
            self._last_event = body["event"]
        self.reserves[sequence] = {**body, "event": self._last_event}
        self._reserved.setdefault(body["run"], {})[body["round"]] = sequence
        self.spent_units += _cost(self._last_event["noise_multiplier"])

    def _is_open(self, sequence: int) -> bool:
        return sequence in self.reserves and sequence not in self.releases and sequence not in self.aborts


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a ledger; that it is invalid is a value here.

    Attributes:
        state: What follows from the lines that were valid.
        length: Bytes of these lines.
        torn_bytes: Bytes of a last line without newline, which was never acknowledged to anybody.
        line: Number of the first invalid line, from 1; None if there is none.
        reason: What is wrong with it.
    """

    state: LedgerState
    length: int
    torn_bytes: int = 0
    line: int | None = None
    reason: str = ""


def read_lines(raw_lines: Iterable[bytes], *, all_signatures: bool = False) -> Reading:
    """Read lines with their newlines, check each against those before, and the signature of the last.

    Args:
        raw_lines: As iterating over a file opened for reading bytes gives them.
        all_signatures: Check every signature, though the last one and those of KEY lines authenticate all.
    """
    state, length, last = LedgerState(), 0, None
    for number, raw in enumerate(raw_lines, 1):
        if not raw.endswith(b"\n"):
            return _with_last_signature(Reading(state=state, length=length, torn_bytes=len(raw)), last)
        try:
            line = parse_line(raw[:-1])
            state.check(line)
            if all_signatures or line.kind == "KEY":
                check_signature(line, _signer(state, line))
        except (ValueError, BudgetExhausted, VerificationError) as error:
            return Reading(state=state, length=length, line=number, reason=str(error))
        state.advance(line)
        length += len(raw)
        last = line
    return _with_last_signature(Reading(state=state, length=length), last)


def _with_last_signature(reading: Reading, last: Line | None) -> Reading:
    if last is None:
        return dataclasses.replace(reading, line=1, reason="Expected a GENESIS line, got none. Create a ledger.")
    try:
        if last.kind != "KEY":
            check_signature(last, reading.state.public_keys[-1])
    except VerificationError as error:
        return dataclasses.replace(reading, line=last.sequence + 1, reason=str(error))
    return reading


def _signer(state: LedgerState, line: Line) -> str:
    return str(state.public_keys[-1] if state.public_keys else line.body["public_key"])


def read_file(file: Path | int, *, all_signatures: bool = False) -> Reading:
    """`read_lines` of a path, or of a descriptor that stays open.

    Raises:
        UmbelError: If there is no such file or it cannot be read.
    """
    try:
        with open(file, "rb", closefd=not isinstance(file, int)) as raw_lines:
            return read_lines(raw_lines, all_signatures=all_signatures)
    except OSError as error:
        raise UmbelError(f"Expected a readable ledger, got {file} ({error.strerror}).") from error


@lru_cache(maxsize=1024)
def _cost(noise_multiplier: str) -> float:
    return math.inf if is_noiseless(noise_multiplier) else cost_units(noise_multiplier)


def _check_budget(genesis: Mapping[str, Any]) -> None:
    epsilon, delta, mu_max = float(genesis["epsilon"]), float(genesis["delta"]), genesis["mu_max"]
    if not (epsilon > 0 and 0 < delta < 1 and math.isinf(epsilon) == is_unlimited(mu_max)):
        raise ValueError(f"Expected 0 < epsilon and 0 < delta < 1, got {epsilon=}, {delta=}, {mu_max=}.")
    if is_unlimited(mu_max):
        return
    mu = genesis["max_nodes_per_user"] * float(mu_max)
    if limit_units(mu_max) == 0 or delta_of_epsilon(epsilon, mu) > delta * _MU_SLACK:
        raise ValueError(f"Expected 0 < mu_max within the budget, got {mu_max=} for {epsilon=} at {delta=}.")
