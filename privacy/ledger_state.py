"""What a ledger's lines say together: what was reserved, what became of it, what is spent. Reads, never writes.

The rules are in one place, used for every line that is read and for every line before it is written: one GENESIS,
START before RESERVE, no round reserved twice, no more rounds, no other noise and no other sampling than START's
schedule says (where it says), one COMMIT or ABORT at most for a RESERVE, never beyond the budget.

A sampled run is charged in its START line, as a whole: with what the runs without sampling may cost besides it, and
with the epsilon of both together. It is the only one of its ledger and comes before every charge, so that neither
its schedule nor that share could have been chosen by what a release has shown.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import BudgetExhausted, UmbelError, VerificationError
from common.records import canonical_json
from privacy.gaussian import delta_of_epsilon
from privacy.lines import (
    FORMAT,
    MAX_LINE,
    ZERO_HEAD,
    Line,
    chain,
    check_recovery,
    check_signature,
    extend,
    parse_line,
)
from privacy.participation import (
    UNITS,
    checked_noise_multiplier,
    cost_units,
    is_noiseless,
    is_unlimited,
    limit_units,
)
from privacy.rounds import Event, Round, Rounds
from privacy.sampling import NO_SAMPLING, SampledRun, check_charge, poisson, sampled_run

__all__ = ["Event", "LedgerState", "Reading", "Round", "read_file", "read_lines"]
_CHUNK = 4096
_MU_SLACK = 1 + 1e-9  # for the float arithmetic of this check alone; mu_max itself was rounded down


@dataclass(slots=True)
class _Stretch:
    """Lines that follow each other one by one.

    Attributes:
        first: Number of the first.
        head: The head before it.
        digests: 32 bytes a line.
    """

    first: int
    head: bytes
    digests: bytearray = field(default_factory=bytearray)


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
        rounds: Every RESERVE line and what became of it, packed, in order.
        spent_units: Sum of the costs of all RESERVE lines, an integer; inf after one without noise. Those of a
            sampled run count as if everybody had contributed.
        capped_units: The same without those of a sampled run.
        limit_units: What `capped_units` may reach, an integer; inf if the ledger promises nothing.
        mu_limit: The same as mu, a decimal string or "inf".
        sampled: The sampled run, or None.
        sampled_start: Its START line.
        counts: Lines by type.
        key_lines: KEY lines, raw.
        restored: The last RESTORE line, or None.
        last: The last line, or None.
    """

    head: bytes = ZERO_HEAD
    sequence: int = -1
    public_keys: list[str] = field(default_factory=list)
    genesis: Mapping[str, Any] = field(default_factory=dict)
    registry: Mapping[str, Any] | None = None
    runs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=Rounds)
    spent_units: float = 0
    capped_units: float = 0
    limit_units: float = 0
    mu_limit: str = "0"
    sampled: SampledRun | None = None
    sampled_start: Line | None = None
    counts: Counter[str] = field(default_factory=Counter)
    key_lines: list[bytes] = field(default_factory=list)
    restored: Line | None = None
    last: Line | None = None
    _stretches: list[_Stretch] = field(default_factory=lambda: [_Stretch(0, ZERO_HEAD)])

    def check(self, line: Line) -> None:
        """Say whether `line` may come next.

        Raises:
            BudgetExhausted: If it reserves more than is left.
            ValueError: If it may not for another reason.
        """
        expected = self.sequence + 1 + (line.body["lost"] if line.kind == "RESTORE" else 0)
        if line.sequence != expected:
            raise ValueError(f"Expected sequence={expected}, got sequence={line.sequence}.")
        if line.previous != self.head.hex():
            raise ValueError("Expected the head of the lines before as previous; one of them was changed.")
        if (line.kind == "GENESIS") != (self.sequence < 0):
            raise ValueError(f"Expected GENESIS as the first line and only there, got type={line.kind}.")
        if line.kind == "RESTORE":
            self._check_restore(line)
        self._check_body(line.kind, line.body)

    def advance(self, line: Line) -> None:
        """Take in a line that has passed `check`."""
        digest = sha256(line.raw).digest()
        self._advance_body(line.kind, line.body, line.sequence)
        if self.sampled is not None and self.sampled_start is None:
            self.sampled_start = line
        if line.kind == "KEY":
            self.key_lines.append(line.raw)
        if line.kind == "RESTORE":
            self.restored = line
            self._stretches.append(_Stretch(line.sequence, self.head))
        self.head = extend(self.head, digest)
        self.sequence = line.sequence
        self.last = line
        self.counts[line.kind] += 1
        self._stretches[-1].digests += digest

    def would_exceed(self, event: Event) -> bool:
        """Whether `event` costs more than is left; one of a sampled run was paid for by its START line."""
        if event["sampling"] != NO_SAMPLING:
            return False
        return self.capped_units + _cost(event["noise_multiplier"]) > self.limit_units

    def mu_spent(self) -> float:
        """mu of the user who contributed to every release from every node it may be on, rounded up.

        With a sampled run it is what holds whatever the coins have shown, and much more than what is promised.
        """
        units = self.genesis["max_nodes_per_user"] ** 2 * self.spent_units
        return math.nextafter(math.sqrt(units / UNITS), math.inf) if units else 0.0

    def rounds_of(self, run: str) -> tuple[Round, ...]:
        """The rounds that one run has reserved, in order."""
        return tuple(self.rounds.of_run(run))

    def open_reservations(self) -> tuple[Round, ...]:
        """Rounds with neither COMMIT nor ABORT."""
        return tuple(self.rounds.open())

    def digests(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """`t x 32`, the digests of lines `start` to `stop` - 1, between which no line was lost."""
        stretch = self._stretch(start)
        packed = stretch.digests[32 * (start - stretch.first) : 32 * (stop - stretch.first)]
        return np.frombuffer(bytes(packed), np.uint8).reshape(-1, 32)

    def head_at(self, sequence: int) -> bytes:
        """h_t of line `sequence`, without a copy of all digests before it; of a lost one, that of the last kept."""
        stretch = self._stretch(sequence)
        head = stretch.head
        for start in range(stretch.first, sequence + 1, _CHUNK):
            head = chain(head, self.digests(start, min(start + _CHUNK, sequence + 1)))
        return head

    def line_number(self, sequence: int) -> int:
        """Where line `sequence` is in the file, from 1; of a lost one, where the last before it is."""
        own = self._stretch(sequence)
        before = sum(len(stretch.digests) // 32 for stretch in self._stretches if stretch.first < own.first)
        return before + min(sequence - own.first + 1, len(own.digests) // 32)

    def _check_body(self, kind: str, body: Mapping[str, Any]) -> None:
        match kind:
            case "GENESIS":
                _check_budget(body)
            case "START":
                self._check_start(body)
            case "RESERVE":
                self._check_reserve(body)
            case "COMMIT" | "ABORT":
                if not self.rounds.is_open(body["reserve"]):
                    raise ValueError(f"Expected a RESERVE that is still open, got reserve={body['reserve']}.")
            case "KEY" if body["public_key"] in self.public_keys:
                raise ValueError("Expected a key that this ledger has not had yet.")

    def _check_restore(self, line: Line) -> None:
        recovery_key, multiplier = str(self.genesis["recovery_key"]), line.body["noise_multiplier"]
        if not recovery_key:
            raise ValueError("Expected no RESTORE line in a ledger without a recovery key, got one.")
        try:
            check_recovery(line, str(self.genesis["ledger_id"]), recovery_key)
        except VerificationError as error:
            raise ValueError(str(error)) from error
        worst, charged = self.worst_noise(), checked_noise_multiplier(multiplier)
        if worst is not None and charged > worst:
            raise ValueError(f"Expected lost lines charged with noise_multiplier <= {worst}, got {multiplier}.")
        if self.sampled is not None and self.capped_units + line.body["lost"] * _cost(multiplier) > self.limit_units:
            raise ValueError(
                "Expected room beside the sampled run for what is lost, got none: its epsilon is fixed. "
                "Nothing more can be released on this ledger."
            )

    def worst_noise(self) -> Fraction | None:
        """The least noise of any run or release so far; None where there was none."""
        planned = [str(body["schedule"].get("noise_multiplier", "0")) for body in self.runs.values()]
        known = {z for z in (*planned, *self.rounds.noise_multipliers()) if not is_noiseless(z)}
        return min(map(checked_noise_multiplier, known), default=None)

    def _stretch(self, sequence: int) -> "_Stretch":
        return next(stretch for stretch in reversed(self._stretches) if stretch.first <= max(sequence, 0))

    def _check_start(self, body: Mapping[str, Any]) -> None:
        if body["run"] in self.runs:
            raise ValueError(f"Expected a new run, got run={body['run']!r}. Resume it.")
        rounds, multiplier = body["schedule"].get("rounds", 0), body["schedule"].get("noise_multiplier", "")
        if type(rounds) is not int or not isinstance(multiplier, str):
            raise ValueError(f"Expected rounds as integer and noise_multiplier as text, got {rounds=}, {multiplier=}.")
        sampled = sampled_run(body["run"], body["schedule"])
        if sampled is None:
            return
        if self.sampled is not None or self.spent_units:  # which also has what RESTORE lines charge
            raise ValueError(
                "Expected a sampled run only as the first that is charged, got a ledger with charges: no filter is "
                "known for sampling that is chosen after a release. Give it a ledger of its own."
            )
        check_charge(sampled, epsilon=self.genesis["epsilon"], limit=self.limit_units)

    def _check_reserve(self, body: Mapping[str, Any]) -> None:
        if body["run"] not in self.runs:
            raise ValueError(f"Expected a run that was started, got run={body['run']!r}.")
        if self.rounds.has(body["run"], body["round"]):
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
        schedule, charged = self.runs[body["run"]]["schedule"], self.rounds.count(body["run"])
        if charged >= schedule.get("rounds", math.inf):
            raise ValueError(
                f"Expected at most rounds={schedule['rounds']} as run={body['run']!r} was started, got another."
            )
        planned, multiplier = schedule.get("noise_multiplier"), body["event"]["noise_multiplier"]
        if planned not in (None, multiplier):
            raise ValueError(
                f"Expected noise_multiplier={planned} as run={body['run']!r} was started, got {multiplier}."
            )
        is_sampled = self.sampled is not None and self.sampled.run == body["run"]
        sampling = poisson(self.sampled.sampling_probability if self.sampled and is_sampled else None)
        if body["event"]["sampling"] != sampling:
            raise ValueError(
                f"Expected {sampling=} as run={body['run']!r} was started, got {body['event']['sampling']!r}."
            )
        if is_sampled and self.restored is not None:
            raise ValueError("Expected no more rounds of a sampled run after a RESTORE line: some may be lost.")
        if is_sampled and not 1 <= body["round"] <= schedule["rounds"]:
            raise ValueError(f"Expected a round of the {schedule['rounds']} of the schedule, got {body['round']}.")

    def _advance_body(self, kind: str, body: Mapping[str, Any], sequence: int) -> None:
        match kind:
            case "GENESIS":
                self.genesis = body
                self.public_keys.append(body["public_key"])
                self._limit(body["mu_max"])
            case "REGISTRY":
                self.registry = body
            case "START":
                self.runs[body["run"]] = body
                sampled = sampled_run(body["run"], body["schedule"])
                if sampled is not None:
                    self.sampled = sampled
                    self._limit(sampled.capped_mu_max)
            case "RESERVE":
                self.rounds.reserve(sequence, body)
                cost = _cost(body["event"]["noise_multiplier"])
                self.spent_units += cost
                self.capped_units += cost if body["event"]["sampling"] == NO_SAMPLING else 0
            case "COMMIT":
                self.rounds.commit(body["reserve"], body["release_digest"])
            case "ABORT":
                self.rounds.abort(body["reserve"], body["code"])
            case "KEY":
                self.public_keys.append(body["public_key"])
            case "RESTORE":
                self.rounds.lose(body["lost"], body["noise_multiplier"])
                self.spent_units += body["lost"] * _cost(body["noise_multiplier"])
                self.capped_units += body["lost"] * _cost(body["noise_multiplier"])

    def _limit(self, mu_max: str) -> None:
        self.mu_limit = mu_max
        self.limit_units = math.inf if is_unlimited(mu_max) else limit_units(mu_max)


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

    Raises:
        UmbelError: If the ledger is of a newer format.
    """
    state, length, last = LedgerState(), 0, None
    for number, raw in enumerate(raw_lines, 1):
        if not raw.endswith(b"\n") and len(raw) <= MAX_LINE:
            return _with_last_signature(Reading(state=state, length=length, torn_bytes=len(raw)), last)
        try:
            line = parse_line(raw.removesuffix(b"\n"))
            state.check(line)
            if all_signatures or line.kind == "KEY":
                check_signature(line, _signer(state, line))
        except (ValueError, BudgetExhausted, VerificationError) as error:
            if number == 1:
                _refuse_newer(raw[:-1])
            return Reading(state=state, length=length, line=number, reason=str(error))
        state.advance(line)
        length += len(raw)
        last = line
    return _with_last_signature(Reading(state=state, length=length), last)


def _refuse_newer(raw: bytes) -> None:
    """Say so where the first line, which is none of this format, is the GENESIS of a later one.

    Its own key must have signed it: a number that somebody changed is no newer format.
    """
    try:
        unsigned = json.loads(raw)
        found, owner = unsigned["body"]["format"], bytes.fromhex(unsigned["body"]["public_key"])
        signature = bytes.fromhex(unsigned.pop("signature"))
        Ed25519PublicKey.from_public_bytes(owner).verify(signature, canonical_json(unsigned))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature):
        return
    if type(found) is int and found > FORMAT:
        raise UmbelError(
            f"Expected a ledger of format {FORMAT}, got format={found}, of a newer version. Use a newer umbel."
        )


def _with_last_signature(reading: Reading, last: Line | None) -> Reading:
    if last is None:
        return dataclasses.replace(reading, line=1, reason="Expected a GENESIS line, got none. Create a ledger.")
    try:
        if last.kind != "KEY":
            check_signature(last, reading.state.public_keys[-1])
    except VerificationError as error:
        return dataclasses.replace(reading, line=reading.state.line_number(last.sequence), reason=str(error))
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
            return read_lines(_bounded(raw_lines), all_signatures=all_signatures)
    except OSError as error:
        raise UmbelError(f"Expected a readable ledger, got {file} ({error.strerror}).") from error


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long no more than shows that it is."""
    return iter(lambda: file.readline(MAX_LINE + 1), b"")


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
