"""Processes that outlive the command that started them: found again, and ended, without ever touching another's.

A process is known by its number and the moment it started; numbers are used again, such pairs are not. All are leaders
of a group of their own, so that what they start can be found when they are gone.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UmbelError
from common.files import write_durably

_LOOK_SECONDS = 0.05
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process, as it is found again.

    Attributes:
        pid: Its number.
        started: When it started, as the system tells it.
    """

    pid: int
    started: str


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A process that runs now."""

    group: int
    started: str


def start(command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> Process:
    """Start a process that stays when this one ends; its output is added to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(  # noqa: S603 - our own programs
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    # a child that has ended already is a zombie, which is not running
    seen = _running().get(child.pid)
    child.returncode = 0  # it is not waited for
    return Process(pid=child.pid, started=seen.started if seen else "")


def is_running(process: Process) -> bool:
    """Whether this very process runs."""
    seen = _running().get(process.pid)
    return seen is not None and seen.started == process.started


def group_of(process: Process) -> list[Process]:
    """The process and what it has started, those of them that run; without it only if its number is not used again."""
    running = _running()
    leader = running.get(process.pid)
    if leader is not None and leader.started != process.started:
        return []
    members = {pid: seen for pid, seen in running.items() if seen.group == process.pid}
    if leader is None:  # its number may have been another's meanwhile, who has left a group of that number
        members = {pid: seen for pid, seen in members.items() if _may_be_child(seen.started, process.started)}
    return [Process(pid=pid, started=seen.started) for pid, seen in members.items()]


def _may_be_child(started: str, parent: str) -> bool:
    """Whether a process that started then can be of a parent that did: not before it, and not after another boot."""
    (boot, _, ticks), (parent_boot, _, parent_ticks) = started.partition("-"), parent.partition("-")
    if not ticks.isdecimal():
        return True  # a date, as `ps` spells it
    return boot == parent_boot and parent_ticks.isdecimal() and int(ticks) >= int(parent_ticks)


def stop(processes: Iterable[Process], *, seconds: float) -> list[Process]:
    """Ask processes to end; after `seconds` end what is left of their groups.

    Returns:
        Those that had to be ended.
    """
    asked = list(processes)
    members = {member for process in asked for member in group_of(process)}
    for process in asked:
        _send(process, signal.SIGTERM)
    until = time.monotonic() + seconds
    while (left := [member for member in members if is_running(member)]) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    left += [member for process in asked for member in group_of(process) if member not in members]
    for member in left:
        _send(member, signal.SIGKILL)
    return left


def lock_holder(path: Path) -> int | None:
    """Number of the process that has locked a file for writing, without touching the lock; None where nobody is seen.

    Processes of another container are never seen.
    """
    try:
        lines, inode = (_PROC / "locks").read_text().splitlines(), path.stat().st_ino
    except OSError:
        return None
    for line in lines:
        words = line.split()
        # 7: FLOCK  ADVISORY  WRITE 4321 08:01:131090 0 EOF
        if words[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and words[5].rpartition(":")[2] == str(inode):
            return int(words[4]) if int(words[4]) > 0 else None
    return None


def save(path: Path, processes: Mapping[str, Process]) -> None:
    """Remember processes by name."""
    document = {name: {"pid": process.pid, "started": process.started} for name, process in processes.items()}
    write_durably(path, json.dumps(document, indent=1).encode() + b"\n", mode=0o600)


def load(path: Path) -> dict[str, Process]:
    """Inverse of `save`; nobody where there is no file.

    Raises:
        UmbelError: If it is not ours.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        return {str(k): Process(pid=int(v["pid"]), started=str(v["started"])) for k, v in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UmbelError(
            f"Expected {path} as umbel wrote it, got something else. End the federation's processes yourself, "
            "then remove the file."
        ) from error


def _send(process: Process, number: signal.Signals) -> None:
    """Send a signal to this very process, if it still runs."""
    try:
        if not hasattr(os, "pidfd_open"):
            if is_running(process):
                os.kill(process.pid, number)
            return
        # what the descriptor stands for stays the same, also if the number is used again meanwhile
        descriptor = os.pidfd_open(process.pid)
        try:
            if is_running(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        return


def _running() -> dict[int, _Seen]:
    return _from_proc() if (_PROC / "self" / "stat").exists() else _from_ps()


def _from_proc() -> dict[int, _Seen]:
    boot = (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()[:8]
    found = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # its name, in brackets, can hold anything
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        state, group, ticks = fields[0], int(fields[2]), fields[19]
        if state not in "ZX":
            found[int(entry.name)] = _Seen(group=group, started=f"{boot}-{ticks}")
    return found


def _from_ps() -> dict[int, _Seen]:
    columns = "pid=,pgid=,state=,lstart="
    listed = subprocess.run(["ps", "-A", "-o", columns], capture_output=True, text=True, check=True)  # noqa: S603, S607
    rows = (line.split(maxsplit=3) for line in listed.stdout.splitlines())
    return {int(pid): _Seen(group=int(group), started=when) for pid, group, state, when in rows if state[0] not in "ZX"}
