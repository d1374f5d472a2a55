"""A disk that is full at any write: one line with a remedy, exit code 7, nothing released uncharged, and it goes on."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

import client.sources
from tests.faults.aftermath import Aftermath
from umbel import cli

ROOT = Path(__file__).parents[2]
ROUNDS = 8


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands set environment variables; a test gives them back."""
    with mock.patch.dict(os.environ):
        yield


class FullDisk:
    """A disk that has no room from the n-th time on that a file of this name is brought to it."""

    def __init__(self, name: str, nth: int) -> None:
        """Wait for `name`, a part of a path, `nth` times."""
        self.name, self.left = name, nth

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Have the disk for a while."""
        fsync = os.fsync

        def full(descriptor: int) -> None:
            self.left -= self.name in os.readlink(f"/proc/self/fd/{descriptor}")
            if self.left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with mock.patch.object(os, "fsync", full):
            yield
        assert self.left <= 0, f"{self.name} was not written so often"


def fails(run: Aftermath, capsys: pytest.CaptureFixture[str], name: str, nth: int = 1) -> None:
    """One command on a full disk ends in one line."""
    capsys.readouterr()
    with FullDisk(name, nth).inserted():
        code = cli.run(run.arguments())
    out, err = capsys.readouterr()
    assert (code, out) == (7, ""), err
    assert err.count("umbel: error") == 1
    assert "No space left on device" in err
    assert "resume" in err or "disk" in err
    run.check(finished=False)


LAYING_OUT = (
    "ledger.jsonl",
    ".registry.json",
    ".schema.safetensors",
    "nodes/.node.toml",
    ".config.toml",
)
TRAINING = (
    ("ledger.jsonl", 3),  # after REGISTRY and START: RESERVE
    ("ledger.jsonl", 2),  # COMMIT, after a release that goes out when the run is resumed
    ("release/rounds/", 2),
    ("checkpoints/", 1),
    ("metrics.jsonl", 2),
    ("release/.model.safetensors", 1),
    ("release/.ledger.jsonl", 1),
    ("evaluation/.results.json", 1),
    ("release/.report.json", 1),
    ("release/.report.html", 1),
    ("release/.registry.yaml", 1),
    ("run/.report.html", 1),
)


def test_a_disk_that_is_full_at_any_write_of_a_run_stops_it_until_there_is_room(tmp_path, capsys):
    """From the first line of the ledger to the last page of the report; then it ends as any other run."""
    run = Aftermath(tmp_path / "run", {"training.rounds": ROUNDS})
    for name in LAYING_OUT:
        fails(run, capsys, name)
        assert not run.folder.config.exists()
        assert run.lines() <= 1  # GENESIS
    for name, nth in TRAINING:
        fails(run, capsys, name, nth)
    assert cli.run(run.arguments()) == 0
    run.check(finished=True)
    # the RESERVE that failed is not charged; only the staging that failed has cost a round
    assert len(run.released) == ROUNDS - 1


def test_a_ledger_without_room_for_a_whole_line_keeps_the_lines_before(tmp_path, capsys):
    """Half of a RESERVE line is cut off again, the round is not charged, and nobody was asked."""
    run = Aftermath(tmp_path / "run", {"training.rounds": 2})
    write, full = os.write, []

    def torn(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if b'"RESERVE"' in data:
            full.append(True)
            return write(descriptor, data[:100])
        return write(descriptor, data)

    with mock.patch.object(os, "write", torn):
        assert cli.run(run.arguments()) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert run.lines() == 3
    assert run.ledger.read_bytes().endswith(b"\n")
    assert cli.run(run.arguments()) == 0
    run.check(finished=True)
    assert len(run.released) == 2


LIMITED = """
import resource, sys
from umbel.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [20_000, 120_000])
def test_nodes_without_room_stop_the_run_before_it_spends_its_budget(tmp_path, limit):
    """Whether a node cannot make its store or cannot write one more charge: what it cannot store it does not answer.

    The limit is on the size of a file, and the log of a node's store is the first that reaches it. A round that no
    node could store is charged and the last: a run would spend its whole budget on such rounds.
    """
    run = Aftermath(tmp_path / "run", {"training.rounds": 30})
    command = [sys.executable, "-c", LIMITED, str(limit), *run.arguments()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr
    assert ended.stderr.count("umbel: error") == 1
    assert "disk" in ended.stderr
    charged = run.ledger.read_bytes().count(b'"RESERVE"')
    lost = run.ledger.read_bytes().count(b'"ABORT"')
    assert (charged > 0) == (limit > 100_000)
    assert lost == (charged > 0)
    assert charged < 30
    run.check(finished=False, all_answer=False)
    assert cli.run(run.arguments()) == 0
    run.check(finished=True, all_answer=False)
    assert run.lines() > 30


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys, monkeypatch, error):
    """A place that cannot be written to is one line with another place as the remedy, and nothing is charged."""

    def refuses(path: object, *_: object) -> None:
        raise OSError(error, os.strerror(error), str(path))

    client.sources.forget()
    monkeypatch.setattr(os, "mkdir", refuses)
    run = Aftermath(tmp_path / "run", {"training.rounds": 2})
    assert cli.run(run.arguments()) == 7
    err = capsys.readouterr().err
    assert err.count("umbel: error") == 1
    assert str(tmp_path / "run") in err
    assert "Choose a place" in err
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_became_read_only_is_not_charged(tmp_path, capsys, monkeypatch):
    """A resumed run that cannot write its ledger stops before it asks anybody."""
    run = Aftermath(tmp_path / "run", {"training.rounds": 3})
    fails(run, capsys, "metrics.jsonl")
    before = run.ledger.read_bytes()
    opened = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert cli.run(run.arguments()) != 0
    err = capsys.readouterr().err
    assert err.count("umbel: error") == 1
    assert "Read-only file system" in err
    monkeypatch.undo()
    assert run.ledger.read_bytes() == before
    assert cli.run(run.arguments()) == 0
    run.check(finished=True)
