"""The charged rounds of a ledger, packed: about a hundred bytes each, so that a million lines fit in memory.

Most of an event repeats from round to round, all but its clipping norm; what repeats is kept once.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from common.records import canonical_json

Event = Mapping[str, Any]
_DIGEST = 32
_NORM = 31  # the longest decimal string: 12 digits, a point, 18 digits
_OPEN, _RELEASED = 0, 1  # larger outcomes are aborts


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


@dataclass(slots=True)
class _RunRounds:
    """Which rounds one run has reserved; those that follow each other cost nothing.

    Attributes:
        number: Of the run, in the order in which runs were first charged.
        positions: Among all rounds of the ledger.
        first: The first round reserved.
        end: One after the last of those that followed it one by one.
        others: Rounds out of this order.
    """

    number: int
    first: int
    end: int
    positions: "array[int]" = field(default_factory=lambda: array("I"))
    others: set[int] = field(default_factory=set)

    def __contains__(self, server_round: object) -> bool:
        """Whether a round was reserved."""
        return (isinstance(server_round, int) and self.first <= server_round < self.end) or server_round in self.others


class Rounds(Sequence[Round]):
    """Every RESERVE line of a ledger and what became of it, in order; a `Round` is made when it is asked for."""

    def __init__(self) -> None:
        self._sequences = array("q")
        self._numbers = array("q")
        self._invited = array("q")
        self._run_numbers = array("I")
        self._kinds = array("I")
        self._outcomes = array("I")
        self._norms = bytearray()
        self._digests = bytearray()
        self._runs: dict[str, _RunRounds] = {}
        self._run_names: list[str] = []
        self._codes: list[str] = []
        self._templates: list[Event] = []
        self._template_numbers: dict[bytes, int] = {}
        self._lost: list[tuple[int, int, str]] = []  # after how many rounds, how many, z

    def __len__(self) -> int:
        """How many rounds were charged."""
        return len(self._sequences)

    @overload
    def __getitem__(self, index: int) -> Round: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Round, ...]: ...
    def __getitem__(self, index: int | slice) -> Round | tuple[Round, ...]:
        """The round, or rounds, at a position."""
        if isinstance(index, slice):
            return tuple(self._round(i) for i in range(*index.indices(len(self))))
        return self._round(range(len(self))[index])

    def reserve(self, sequence: int, body: Mapping[str, Any]) -> None:
        """Take in a RESERVE line."""
        run, number, event = body["run"], body["round"], body["event"]
        known = self._runs.get(run)
        if known is None:
            known = self._runs[run] = _RunRounds(len(self._run_names), number, number)
            self._run_names.append(run)
        if number == known.end:
            known.end += 1
        else:
            known.others.add(number)
        known.positions.append(len(self))
        self._run_numbers.append(known.number)
        self._sequences.append(sequence)
        self._numbers.append(number)
        self._invited.append(body["invited_users"])
        self._kinds.append(self._template(event))
        self._norms += event["clipping_norm"].encode("ascii").ljust(_NORM)
        self._digests += bytes(_DIGEST)
        self._outcomes.append(_OPEN)

    def commit(self, sequence: int, release_digest: str) -> None:
        """Take in the COMMIT line of the RESERVE line `sequence`."""
        position = self._position(sequence)
        self._digests[_DIGEST * position : _DIGEST * (position + 1)] = bytes.fromhex(release_digest)
        self._outcomes[position] = _RELEASED

    def abort(self, sequence: int, code: str) -> None:
        """Take in the ABORT line of the RESERVE line `sequence`."""
        if code not in self._codes:
            self._codes.append(code)
        self._outcomes[self._position(sequence)] = _RELEASED + 1 + self._codes.index(code)

    def lose(self, count: int, noise_multiplier: str) -> None:
        """Take in a RESTORE line: nobody knows these rounds, and each is charged."""
        self._lost.append((len(self), count, noise_multiplier))

    @property
    def num_lost(self) -> int:
        """How many lines RESTORE lines stand for, each charged as a round."""
        return sum(count for _, count, _ in self._lost)

    def charged_by(self, position: int) -> int:
        """How many releases had been charged with the round at `position`, lost ones before it included."""
        return position + 1 + sum(count for after, count, _ in self._lost if after <= position)

    def has(self, run: str, server_round: int) -> bool:
        """Whether a run has reserved this round of its own."""
        return run in self._runs and server_round in self._runs[run]

    def count(self, run: str) -> int:
        """How many rounds a run has reserved."""
        return len(self._runs[run].positions) if run in self._runs else 0

    def is_open(self, sequence: int) -> bool:
        """Whether line `sequence` is a RESERVE line with neither COMMIT nor ABORT."""
        position = self._position(sequence)
        return self._is_at(position, sequence) and self._outcomes[position] == _OPEN

    def at_sequence(self, sequence: int) -> Round | None:
        """The round that line `sequence` reserved, if it did."""
        position = self._position(sequence)
        return self._round(position) if self._is_at(position, sequence) else None

    def of_run(self, run: str) -> Iterator[Round]:
        """The rounds of one run, in order."""
        return map(self._round, self._runs[run].positions if run in self._runs else ())

    def open(self) -> Iterator[Round]:
        """Rounds with neither COMMIT nor ABORT."""
        return (self._round(i) for i, outcome in enumerate(self._outcomes) if outcome == _OPEN)

    def released(self) -> Iterator[Round]:
        """Rounds with a COMMIT, in the order in which they were reserved."""
        return (self._round(i) for i, outcome in enumerate(self._outcomes) if outcome == _RELEASED)

    def noise_multipliers(self, run: str | None = None) -> list[str]:
        """z of every round and of what RESTORE lines charge, in order, or of one run's rounds, as it is spelled."""
        spelled = [str(template["noise_multiplier"]) for template in self._templates]
        if run is None:
            found, begin = [], 0
            for after, count, noise_multiplier in (*self._lost, (len(self), 0, "")):
                found += [spelled[kind] for kind in self._kinds[begin:after]] + [noise_multiplier] * count
                begin = after
            return found
        return [spelled[self._kinds[i]] for i in (self._runs[run].positions if run in self._runs else ())]

    def events(self) -> Iterator[Event]:
        """The mechanism event of every round; one object as long as it repeats."""
        last, event = (-1, b""), self._templates[0] if self._templates else {}
        for position, kind in enumerate(self._kinds):
            key = (kind, self._norm(position))
            if key != last:
                last, event = key, self._event(position)
            yield event

    def _round(self, position: int) -> Round:
        outcome = self._outcomes[position]
        digest = self._digests[_DIGEST * position : _DIGEST * (position + 1)]
        return Round(
            run=self._run_names[self._run_numbers[position]],
            server_round=self._numbers[position],
            sequence=self._sequences[position],
            event=self._event(position),
            invited_users=self._invited[position],
            release_digest=digest.hex() if outcome == _RELEASED else None,
            abort_code=self._codes[outcome - _RELEASED - 1] if outcome > _RELEASED else None,
        )

    def _event(self, position: int) -> Event:
        return {"clipping_norm": self._norm(position).decode("ascii"), **self._templates[self._kinds[position]]}

    def _norm(self, position: int) -> bytes:
        return bytes(self._norms[_NORM * position : _NORM * (position + 1)]).rstrip()

    def _template(self, event: Event) -> int:
        """Number of what this event has in common with others."""
        template = {name: value for name, value in event.items() if name != "clipping_norm"}
        if self._kinds and self._templates[self._kinds[-1]] == template:
            return self._kinds[-1]
        number = self._template_numbers.setdefault(canonical_json(template), len(self._templates))
        if number == len(self._templates):
            self._templates.append(template)
        return number

    def _position(self, sequence: int) -> int:
        return bisect_left(self._sequences, sequence)

    def _is_at(self, position: int, sequence: int) -> bool:
        return position < len(self) and self._sequences[position] == sequence
