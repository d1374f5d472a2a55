"""The write-ahead ledger of a population: what was spent, signed and on disk before anything is released.

One file of lines (`privacy.lines`) for all runs on one population. A release is: RESERVE, on disk; noise; the
noised release staged, renamed, on disk; COMMIT, on disk; publish. What counts as spent is every RESERVE, for
ever: a crash, an ABORT or a round that nobody answered gives nothing back, and no noise is drawn twice for
one RESERVE.

Guarantees, to one user of at most `max_nodes_per_user` nodes, under the zero-out relation: the releases this
ledger has reserved compose to at most `mu_spent`, as if that user had contributed to each, and `mu_spent`
stays within the budget of the GENESIS line; with a sampled run it is the amplified epsilon of its START line that does
(`privacy.sampling`). That holds for releases whose event names a cryptographic source
of noise; one with seeded noise is charged alike and is not private. The file shows changes to all but its own
end; whoever remembers a head shows the rest.
"""

import contextlib
import errno
import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerCorrupt, StorageError, UmbelError, VerificationError
from common.files import sync_directory
from privacy.gaussian import epsilon_of_mu
from privacy.keys import public_key_hex
from privacy.ledger_state import Event, LedgerState, Reading, Round, read_file
from privacy.lines import FORMAT, NEIGHBORING_RELATION, UNIT, Line, parse_line, recovery_statement, signed_line
from privacy.rounds import Rounds
from privacy.sampling import SampledRun

_FIRST_BYTES = b'{"body":{"delta":'


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What a broadcast needs to show that a release is charged.

    Attributes:
        sequence: Sequence number of the RESERVE line.
        raw_line: That line.
        head: The head of the ledger after it.
    """

    sequence: int
    raw_line: bytes
    head: bytes


class PrivacyLedger:
    """A ledger on disk: one writer, which stops for good when the disk fails; or read-only, without a key.

    Get one from `create` or `open`, close it or use it as a context manager.
    """

    def __init__(self, path: Path, descriptor: int | None, key: Ed25519PrivateKey | None, reading: Reading) -> None:
        """Not for callers: see `create` and `open`."""
        self.path = path
        self.torn_bytes = reading.torn_bytes
        self._descriptor = descriptor
        self._key = key
        self._state = reading.state
        self._length = reading.length
        self._failed = False

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        population: str,
        epsilon: float | str,
        delta: float | str,
        mu_max: str,
        max_nodes_per_user: int,
        key: Ed25519PrivateKey,
        recovery_key: str = "",
        ledger_id: str | None = None,
    ) -> Self:
        """Make a new ledger with its GENESIS line.

        Args:
            path: A file that does not exist, or holds no more than a GENESIS line torn by a crash.
            population: Whose privacy is counted here, in words.
            epsilon: The budget; inf for a ledger that promises nothing, which alone takes releases without
                noise.
            delta: The budget's delta.
            mu_max: Limit of one (user, node), rounded down: `participation.mu_max_string`.
            max_nodes_per_user: s, the most nodes that one user's data may be on.
            key: Owner of the ledger.
            recovery_key: Public key, hex, of the only one who may go on beyond lost lines; "" for nobody.
            ledger_id: A name of its own, random if not given.

        Raises:
            UmbelError: If there is a file already, or another process is writing it.
            ValueError: If the budget is not one, or `mu_max` is more than it allows.
            StorageError: If the disk fails.
        """
        body = {
            "ledger_id": ledger_id or uuid4().hex,
            "population": population,
            "unit": UNIT,
            "neighboring_relation": NEIGHBORING_RELATION,
            "max_nodes_per_user": max_nodes_per_user,
            "epsilon": _decimal_string(epsilon),
            "delta": _decimal_string(delta),
            "mu_max": mu_max,
            "public_key": public_key_hex(key),
            "recovery_key": recovery_key,
            "format": FORMAT,
        }
        descriptor = _open_locked(path, os.O_CREAT)
        with _closing_on_failure(descriptor, path):
            start = os.pread(descriptor, 2**16, 0)
            if b"\n" in start or start[: len(_FIRST_BYTES)] != _FIRST_BYTES[: len(start)]:
                raise UmbelError(f"Expected no ledger yet, got {path=!s}. Open it, or name another file.")
            _truncate(descriptor, 0)
            ledger = cls(path, descriptor, key, Reading(state=LedgerState(), length=0))
            ledger._append("GENESIS", body)
            sync_directory(path.parent)
        return ledger

    @classmethod
    def open(cls, path: Path, *, key: Ed25519PrivateKey | None = None) -> Self:
        """Open a ledger after verifying all of it.

        Args:
            path: The file.
            key: The key in force, for writing: takes the lock and cuts off a torn last line. None opens
                read-only: no lock, a torn last line is left alone and its length is in `torn_bytes`.

        Raises:
            UmbelError: If there is no such file, or another process is writing it.
            LedgerCorrupt: If a line other than a torn last one is not valid; names line and reason.
            VerificationError: If `key` is not the ledger's.
            StorageError: If the disk fails.
        """
        descriptor = None if key is None else _open_locked(path)
        with _closing_on_failure(descriptor, path):
            reading = read_file(path if descriptor is None else descriptor)
            if reading.line is not None:
                raise LedgerCorrupt(
                    f"{path}, line {reading.line}: {reading.reason} "
                    "Do not edit or continue it; run `umbel audit` on a copy."
                )
            if key is not None and public_key_hex(key) != reading.state.public_keys[-1]:
                raise VerificationError(
                    f"Expected key {reading.state.public_keys[-1][:16]}… to write {path}, got another."
                )
            if descriptor is not None and reading.torn_bytes:
                _truncate(descriptor, reading.length)
        return cls(path, descriptor, key, reading)

    def close(self) -> None:
        """Give back the lock; nothing is left to be written."""
        if self._descriptor is not None:
            # A process forked meanwhile still has the file open, and would keep the lock.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
        self._descriptor = self._key = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> bytes:
        """h_t of the last line."""
        return self._state.head

    def head_at(self, sequence: int) -> bytes:
        """h_t of line `sequence`."""
        return self._state.head_at(sequence)

    @property
    def sequence(self) -> int:
        """Number of the last line."""
        return self._state.sequence

    @property
    def genesis(self) -> Mapping[str, Any]:
        """Body of the GENESIS line."""
        return self._state.genesis

    @property
    def ledger_id(self) -> str:
        """The ledger's own name."""
        return str(self.genesis["ledger_id"])

    @property
    def public_key(self) -> str:
        """The key in force, hex."""
        return self._state.public_keys[-1]

    @property
    def registry(self) -> Mapping[str, Any] | None:
        """Body of the last REGISTRY line."""
        return self._state.registry

    @property
    def runs(self) -> Mapping[str, Mapping[str, Any]]:
        """Bodies of the START lines, by run."""
        return self._state.runs

    @property
    def spent_units(self) -> float:
        """Cost of all RESERVE lines in units of 2^-50, per (user, node); an integer, or inf without noise."""
        return self._state.spent_units

    @property
    def capped_units(self) -> float:
        """The same without those of a sampled run, which its START line has paid for."""
        return self._state.capped_units

    @property
    def sampled(self) -> SampledRun | None:
        """The sampled run, or None."""
        return self._state.sampled

    @property
    def sampled_start(self) -> Line | None:
        """The START line of the sampled run, which nodes want to see with each of its releases."""
        return self._state.sampled_start

    @property
    def key_lines(self) -> tuple[bytes, ...]:
        """KEY lines, raw, by which nodes follow from key to key."""
        return tuple(self._state.key_lines)

    @property
    def restored(self) -> Line | None:
        """The last RESTORE line, which nodes that have seen a lost line want to see; or None."""
        return self._state.restored

    @property
    def last(self) -> Line | None:
        """The last line."""
        return self._state.last

    @property
    def mu_limit(self) -> str:
        """What runs without sampling may cost one (user, node) together, a decimal string or "inf"."""
        return self._state.mu_limit

    @property
    def limit_units(self) -> float:
        """What `capped_units` may reach; an integer, or inf."""
        return self._state.limit_units

    @property
    def mu_spent(self) -> float:
        """mu of the user who contributed to every release from every node it may be on, coins not counted on."""
        return self._state.mu_spent()

    def epsilon_spent(self, delta: float) -> float:
        """Epsilon of that user at `delta`; inf after a release without noise.

        With a sampled run it is that of its whole schedule and of all that runs without sampling may still spend,
        as charged when it started.

        Raises:
            ValueError: With a sampled run, if `delta` is not the ledger's.
        """
        sampled = self.sampled
        if sampled is None:
            return epsilon_of_mu(self.mu_spent, delta)
        if delta != float(self.genesis["delta"]):
            raise ValueError(f"Expected delta={self.genesis['delta']} with a sampled run, got {delta=}. Audit it.")
        return float(sampled.amplified_epsilon)

    def would_exceed(self, event: Event) -> bool:
        """Whether reserving `event` would raise BudgetExhausted."""
        return self._state.would_exceed(event)

    def digests_since(self, sequence: int) -> npt.NDArray[np.uint8]:
        """`t x 32`, the digests of all lines after line `sequence` (-1: of all lines), up to the head.

        Raises:
            ValueError: If there is no such line, or lines were lost after it.
        """
        least = -1 if self.restored is None else self.restored.sequence - 1
        if not least <= sequence <= self.sequence:
            raise ValueError(f"Expected {least} <= sequence <= {self.sequence}, got {sequence=}.")
        return self._state.digests(sequence + 1, self.sequence + 1)

    @property
    def num_lines(self) -> int:
        """How many lines there are; fewer than `sequence` says where some were lost."""
        return sum(self._state.counts.values())

    @property
    def rounds(self) -> Rounds:
        """Every round in order, and what RESTORE lines charge."""
        return self._state.rounds

    def events(self) -> tuple[Event, ...]:
        """The mechanism events of all RESERVE lines, in order."""
        return tuple(self._state.rounds.events())

    def rounds_of(self, run: str) -> tuple[Round, ...]:
        """The rounds that `run` has reserved, in order, with what became of them."""
        return self._state.rounds_of(run)

    def open_reservations(self) -> tuple[Round, ...]:
        """Rounds with neither COMMIT nor ABORT: charged, and maybe released up to the rename."""
        return self._state.open_reservations()

    def record_registry(self, population_size: int, users_per_node: int, digest: str) -> None:
        """Append REGISTRY: who may be invited from now on.

        Args:
            population_size: Users in all.
            users_per_node: The most users that one node hosts.
            digest: SHA-256 of the registry, hex.
        """
        body = {"population_size": population_size, "users_per_node": users_per_node, "digest": digest}
        self._append("REGISTRY", body)

    def start(self, run: str, schedule: Mapping[str, Any], configuration_digest: str) -> None:
        """Append START, once for a run; a run that is resumed is already in `runs`.

        Args:
            run: Its name.
            schedule: What was planned, plain values without floats.
            configuration_digest: SHA-256 of the resolved configuration, hex.
        """
        body = {"run": run, "schedule": dict(schedule), "configuration_digest": configuration_digest}
        self._append("START", body)

    def reserve(self, run: str, server_round: int, event: Event, invited_users: int) -> Reservation:
        """Charge a release to everybody; it is on disk when this returns, and never given back.

        Args:
            run: A run that was started.
            server_round: A round of it that was not reserved before.
            event: The mechanism, as `privacy.lines` describes.
            invited_users: Users on the nodes that will be invited.

        Raises:
            BudgetExhausted: If it costs more than is left; nothing was written.
            ValueError: If run, round or event are not acceptable; nothing was written.
            StorageError: If it could not be brought to disk; it is not charged, and this ledger has stopped.
        """
        body = {"run": run, "round": server_round, "event": dict(event), "invited_users": invited_users}
        line = self._append("RESERVE", body)
        return Reservation(sequence=line.sequence, raw_line=line.raw, head=self.head)

    def commit(self, sequence: int, release_digest: str) -> None:
        """Append COMMIT: the staged release with this SHA-256 (hex) is on disk and may be published.

        Args:
            sequence: Of the RESERVE line, which must be open.
            release_digest: Of the noised release.
        """
        self._append("COMMIT", {"reserve": sequence, "release_digest": release_digest})

    def abort(self, sequence: int, code: str) -> None:
        """Append ABORT: nothing will be released for this RESERVE line; it stays charged.

        Args:
            sequence: Of the RESERVE line, which must be open.
            code: Why, a public word such as `no_answer`.
        """
        self._append("ABORT", {"reserve": sequence, "code": code})

    def rotate_key(self, key: Ed25519PrivateKey) -> None:
        """Append KEY, signed by the key in force; `key` signs everything after it."""
        self._append("KEY", {"public_key": public_key_hex(key)})
        self._key = key

    def restore(self, *, up_to: int, noise_multiplier: str | None, recovery_key: Ed25519PrivateKey) -> int:
        """Append RESTORE: go on after the newest lines were lost, each charged as a release.

        Args:
            up_to: The last line that anybody can have seen; nodes that have seen more go on refusing.
            noise_multiplier: z that each lost line is charged with, at most that of any known run; None for that.
            recovery_key: The private half of GENESIS' `recovery_key`.

        Returns:
            How many lines are charged.

        Raises:
            UmbelError: If there is nothing lost, or the key is not the ledger's.
            ValueError: If the line is not acceptable.
        """
        lost, worst = up_to - self.sequence, self._state.worst_noise()
        if lost < 1:
            raise UmbelError(
                f"Expected up_to > {self.sequence}, the ledger's last line, got {up_to=}. Nothing is lost up to there."
            )
        if public_key_hex(recovery_key) != self.genesis["recovery_key"]:
            raise UmbelError(
                f"Expected recovery key {str(self.genesis['recovery_key'])[:16] or '(this ledger has none)'}…, "
                "got another. Use the one that was made with the ledger."
            )
        if noise_multiplier is None:
            if worst is None:
                raise UmbelError(
                    "Expected noise_multiplier to charge lost lines with, got none: the ledger knows no run. Name it."
                )
            noise_multiplier = format(_as_decimal(worst), "f")
        statement = recovery_statement(
            ledger_id=self.ledger_id,
            sequence=up_to + 1,
            previous=self.head,
            lost=lost,
            noise_multiplier=noise_multiplier,
        )
        signature = recovery_key.sign(statement).hex()
        body = {"lost": lost, "noise_multiplier": noise_multiplier, "recovery_signature": signature}
        self._append("RESTORE", body, sequence=up_to + 1)
        return lost

    def copy_to(self, path: Path) -> None:
        """Write a copy of all lines so far; `path` holds the old bytes or the new ones, never a part."""
        staging = path.with_name(f".{path.name}.tmp")
        try:
            with self.path.open("rb") as source, staging.open("wb") as target:
                target.write(source.read(self._length))
                target.flush()
                os.fsync(target.fileno())
            os.replace(staging, path)
            sync_directory(path.parent)
        except OSError as error:
            raise StorageError(f"Expected to copy the ledger to {path}, got {error.strerror}.") from error

    def _append(self, kind: str, body: Mapping[str, Any], *, sequence: int | None = None) -> Line:
        if self._failed:
            raise StorageError("Expected a ledger whose disk works, got one that failed. Open it again.")
        if self._key is None or self._descriptor is None:
            raise UmbelError(f"Expected a ledger open for writing, got {self.path}. Open it with its key.")
        raw = signed_line(
            sequence=self.sequence + 1 if sequence is None else sequence,
            kind=kind,
            body=body,
            previous=self.head,
            time=_now(),
            key=self._key,
        )
        try:
            line = parse_line(raw)
        except LedgerCorrupt as error:
            raise ValueError(str(error)) from error
        self._state.check(line)
        self._write(self._descriptor, line)
        return line

    def _write(self, descriptor: int, line: Line) -> None:
        found = os.fstat(descriptor)
        if found.st_size != self._length or found.st_nlink == 0:
            raise LedgerCorrupt(f"Expected {self.path} as this process left it, got it changed. Open it again.")
        # Until the line is on disk and taken in, any way out, Ctrl-C included, ends this writer.
        self._failed = True
        try:
            _write_all(descriptor, line.raw + b"\n")
            os.fsync(descriptor)
        except BaseException as error:
            with contextlib.suppress(OSError):
                _truncate(descriptor, self._length)
            if isinstance(error, OSError):
                raise StorageError(
                    f"Expected to write {line.kind} to {self.path}, got {error.strerror}. "
                    "Nothing was released for it; make room or mend the disk, then resume."
                ) from error
            raise
        self._state.advance(line)
        self._length += len(line.raw) + 1
        self._failed = False


def _decimal_string(value: float | str) -> str:
    """The decimal string of a number, without an exponent; strings are left to the check of the line."""
    if isinstance(value, str):
        return value
    return "inf" if value == math.inf else format(Decimal(repr(value)), "f")


def _as_decimal(value: Fraction) -> Decimal:
    """A fraction that was a decimal string, as that again."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _open_locked(path: Path, flags: int = 0) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT):
            raise StorageError(
                f"Expected to write {path}, got {error.strerror}. Make room or mend the disk."
            ) from error
        raise UmbelError(f"Expected a ledger to write, got {path=!s} ({error.strerror}). Correct the path.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UmbelError(
            f"Expected to be the only writer of {path}, got one that holds its lock. "
            "Wait for the other run, or charge another ledger."
        ) from error
    return descriptor


@contextlib.contextmanager
def _closing_on_failure(descriptor: int | None, path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise StorageError(
                f"Expected a disk that works under {path}, got {error.strerror}. Mend it, then resume."
            ) from error
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _truncate(descriptor: int, length: int) -> None:
    os.ftruncate(descriptor, length)
    os.fsync(descriptor)
