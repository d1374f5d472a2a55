"""Processes are found again and ended, and nobody else's are."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UmbelError
from umbel import processes
from umbel.processes import Process

SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]
STUBBORN = [
    sys.executable,
    "-u",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(300)",
]
PARENT = [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({SLEEPER!r}); time.sleep(300)"]


@pytest.fixture
def started(tmp_path: Path) -> object:
    """Starts processes and ends them all."""
    made: list[Process] = []

    def start(command: list[str]) -> Process:
        made.append(processes.start(command, env=os.environ, cwd=tmp_path, log=tmp_path / "log"))
        return made[-1]

    yield start
    for process in made:
        for member in processes.group_of(process):
            os.kill(member.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_process_is_found_again(started: Callable[[list[str]], Process], tmp_path: Path) -> None:
    """By number and start, also after the file was read again; once it has ended, no more."""
    processes.save(tmp_path / "pids.json", {"one": started(SLEEPER)})
    found = processes.load(tmp_path / "pids.json")["one"]
    assert processes.is_running(found)
    assert (tmp_path / "pids.json").stat().st_mode & 0o777 == 0o600
    assert processes.stop([found], seconds=20) == []
    assert not processes.is_running(found)


def test_a_number_that_is_used_again_is_another_process(started: Callable[[list[str]], Process]) -> None:
    """One with the same number and another start is never ended, nor what it has started."""
    other = started(PARENT)
    wait_for(lambda: len(processes.group_of(other)) == 2)
    remembered = Process(pid=other.pid, started="of an earlier time")
    assert not processes.is_running(remembered)
    assert processes.group_of(remembered) == []
    processes.stop([remembered], seconds=0.2)
    assert len(processes.group_of(other)) == 2


def test_who_does_not_listen_is_ended(started: Callable[[list[str]], Process], tmp_path: Path) -> None:
    """After the time to end by itself."""
    stubborn = started(STUBBORN)
    wait_for(lambda: "ready" in (tmp_path / "log").read_text())
    assert processes.stop([stubborn], seconds=0.3) == [stubborn]
    wait_for(lambda: not processes.is_running(stubborn))


def test_children_end_with_their_parent(started: Callable[[list[str]], Process]) -> None:
    """Also those that outlive it, when it was killed before."""
    first, second = started(PARENT), started(PARENT)
    wait_for(lambda: len(processes.group_of(first)) == len(processes.group_of(second)) == 2)
    os.kill(second.pid, signal.SIGKILL)
    wait_for(lambda: not processes.is_running(second))
    orphans = processes.group_of(second)
    assert len(orphans) == 1
    processes.stop([first, second], seconds=0.5)
    wait_for(lambda: processes.group_of(first) == processes.group_of(second) == [])


@pytest.mark.parametrize("when", ["another boot", "later"])
def test_orphans_of_another_with_the_same_number_are_left_alone(
    started: Callable[[list[str]], Process], tmp_path: Path, when: str
) -> None:
    """What is left of a group whose leader had our number in an earlier boot, or began before ours, is not ours."""
    other = started(PARENT)
    wait_for(lambda: len(processes.group_of(other)) == 2)
    os.kill(other.pid, signal.SIGKILL)
    wait_for(lambda: not processes.is_running(other))
    boot, _, ticks = other.started.partition("-")
    began = f"00000000-{ticks}" if when == "another boot" else f"{boot}-{10**15}"
    remembered = Process(pid=other.pid, started=began)
    assert len(processes.group_of(other)) == 1
    assert processes.stop([remembered], seconds=0) == []
    assert len(processes.group_of(other)) == 1


def test_who_holds_a_lock_is_seen(tmp_path: Path) -> None:
    """While it is held, and without taking it."""
    path = tmp_path / "ledger"
    path.touch()
    assert processes.lock_holder(path) is None
    program = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert processes.lock_holder(path) == holder.pid
    assert processes.lock_holder(path) is None
    assert processes.lock_holder(tmp_path / "none") is None


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """Rather than taken for an empty one, whose processes would be started again."""
    (tmp_path / "pids.json").write_text('{"one": 5}')
    with pytest.raises(UmbelError, match=r"pids\.json"):
        processes.load(tmp_path / "pids.json")
    assert processes.load(tmp_path / "none.json") == {}


def test_without_proc_the_same_is_seen(
    started: Callable[[list[str]], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ps` tells numbers and groups where there is no /proc."""
    parent = started(PARENT)
    wait_for(lambda: len(processes.group_of(parent)) == 2)
    groups = {pid: seen.group for pid, seen in processes._from_proc().items()}
    others = {pid: seen.group for pid, seen in processes._from_ps().items()}
    both = groups.keys() & others.keys()
    assert {member.pid for member in processes.group_of(parent)} <= both
    assert {pid: groups[pid] for pid in both} == {pid: others[pid] for pid in both}
