"""A writer that is killed at any moment: what was reserved stays charged, what was released was reserved.

Run as a program this file is that writer: `python test_ledger_crash.py FOLDER POINT HIT` goes through rounds until
its budget is exhausted, or until it kills itself when it passes the named point for the HIT-th time.
"""

import os
import random
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from common.errors import BudgetExhausted
from privacy.audit.verify import Anchor, verify
from privacy.keys import create_key, load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string, noise_multiplier_for

ROOT = Path(__file__).parents[2]
ROUNDS = 150
EXHAUSTED = 3
POINTS = (
    "torn write",
    "written",
    "synced",
    "reserved",
    "staged",
    "staging synced",
    "renamed",
    "folder synced",
    "committed",
)


def test_a_writer_killed_at_each_step_leaves_a_ledger_that_verifies(tmp_path):
    """Killed once at every step of a release, and twice from outside, the ledger recovers each time."""
    rng = random.Random(7)  # noqa: S311 (moments of a kill, not privacy)
    lives = Lives(tmp_path)
    for point in POINTS:
        lives.live(point, rng.randint(1, 4))
    for _ in range(2):
        lives.live(delay=rng.uniform(0, 0.03))
    assert lives.kills == len(POINTS) + 2


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_many_times_leaves_a_ledger_that_verifies(tmp_path, seed):
    """Killed 160 times in all, at random moments and at every step, no life contradicts an earlier one."""
    rng = random.Random(seed)  # noqa: S311 (moments of a kill, not privacy)
    kills = number = 0
    while kills < 40:
        lives = Lives(tmp_path / str(number))
        number += 1
        while kills + lives.kills < 40 and not lives.exhausted:
            if rng.random() < 0.5:
                lives.live(rng.choice(POINTS), rng.randint(1, 12))
            else:
                lives.live(delay=rng.uniform(0, 0.06))
        kills += lives.kills


class Lives:
    """The lives of one writer, and everything that any of them has said."""

    def __init__(self, folder: Path) -> None:
        """Make a ledger for `ROUNDS` rounds in `folder`."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        key = create_key(folder / "key.pem")
        self.owner = public_key_hex(key)
        mu_max = mu_max_string(1.0, 1e-6)
        with PrivacyLedger.create(
            folder / "ledger.jsonl",
            population="p",
            epsilon=1.0,
            delta=1e-6,
            mu_max=mu_max,
            max_nodes_per_user=1,
            key=key,
        ) as ledger:
            ledger.start("run", {"noise_multiplier": noise_multiplier_for(ROUNDS, mu_max)}, "0" * 64)
        self.kills = 0
        self.exhausted = False
        self.reserved: dict[int, str] = {}
        self.published: dict[int, str] = {}
        self.released: dict[int, str] = {}
        self.anchor = self.check()

    def live(self, point: str = "", hit: int = 0, delay: float | None = None) -> None:
        """Start the writer, have it killed, and hold what it left against what it and others before have said."""
        command = [sys.executable, __file__, self.folder, point, str(hit)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if delay is not None:
                time.sleep(delay)
                process.kill()
            said = process.stdout.read()
        self.kills += process.returncode == -signal.SIGKILL
        self.exhausted = process.returncode == EXHAUSTED
        assert process.returncode in (-signal.SIGKILL, EXHAUSTED)
        self.listen(said)
        self.anchor = self.check()

    def listen(self, said: str) -> None:
        """Take down what a life has said, up to the word in which it died: nothing is said twice."""
        for sentence in said.split("\n")[:-1]:
            verb, sequence, what = sentence.split()
            heard = {"reserved": self.reserved, "published": self.published}[verb]
            assert int(sequence) not in heard
            heard[int(sequence)] = what

    def check(self) -> Anchor:
        """Everything that must hold after any life; returns the head that the next one must continue."""
        verification = verify(
            self.folder / "ledger.jsonl",
            public_key=self.owner,
            anchor=getattr(self, "anchor", None),
            all_signatures=True,
            release_found=lambda entry: self.digest_of(entry.sequence) == entry.release_digest,
        )
        assert verification.status == "verified", verification.reason
        rounds = {entry.sequence: entry for entry in verification.rounds}
        released = {int(path.stem) for path in self.folder.glob("*.release")}
        assert released <= rounds.keys()
        for sequence in released:
            assert self.released.setdefault(sequence, self.digest_of(sequence)) == self.digest_of(sequence)
        assert {sequence: str(rounds[sequence].server_round) for sequence in self.reserved} == self.reserved
        for sequence, digest in self.published.items():
            assert rounds[sequence].release_digest == digest
        assert len(rounds) <= ROUNDS
        return Anchor(sequence=verification.sequence, head=verification.head)

    def digest_of(self, sequence: int) -> str:
        """SHA-256 of a release."""
        return sha256((self.folder / f"{sequence}.release").read_bytes()).hexdigest()


def event(noise_multiplier: str) -> dict[str, object]:
    """A mechanism with this noise."""
    return {
        "mechanism": "gaussian",
        "noise_multiplier": noise_multiplier,
        "clipping_norm": "1",
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 10, "share": "1"}],
        "denominator": 3,
        "noise": "aes-256-ctr",
        "sampling": "none",
        "initialization": False,
    }


class Suicide:
    """Kills its process when a named point is passed for the n-th time."""

    def __init__(self, point: str, hit: int) -> None:
        """Wait for `point`, `hit` times."""
        self.point, self.left = point, hit

    def passes(self, point: str) -> bool:
        """Count one passing; whether this is the moment."""
        self.left -= point == self.point
        return point == self.point and self.left == 0

    def at(self, point: str) -> None:
        """Die here, if this is the moment."""
        if self.passes(point):
            os.kill(os.getpid(), signal.SIGKILL)


def say(verb: str, sequence: int, what: object) -> None:
    """Tell the parent in one write, as a broadcast would tell the world."""
    os.write(1, f"{verb} {sequence} {what}\n".encode())


def instrument(suicide: Suicide) -> None:
    """Put points into the ledger's own writes."""
    write, fsync = os.write, os.fsync

    def torn_write(descriptor: int, data: bytes) -> int:
        if descriptor != 1 and suicide.passes("torn write"):
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    def watched_fsync(descriptor: int) -> None:
        suicide.at("written")
        fsync(descriptor)
        suicide.at("synced")

    os.write, os.fsync = torn_write, watched_fsync


def release(ledger: PrivacyLedger, folder: Path, server_round: int, z: str, suicide: Suicide) -> None:
    """One round as the specification has it, with a point after each step."""
    sequence = ledger.reserve("run", server_round, event(z), 3).sequence
    say("reserved", sequence, server_round)
    suicide.at("reserved")
    noised = os.urandom(1000)
    staging = folder / f"{sequence}.staging"
    with staging.open("wb") as file:
        file.write(noised)
        file.flush()
        suicide.at("staged")
        os.fsync(file.fileno())
    suicide.at("staging synced")
    staging.rename(folder / f"{sequence}.release")
    suicide.at("renamed")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    suicide.at("folder synced")
    finish(ledger, folder, sequence)
    suicide.at("committed")


def finish(ledger: PrivacyLedger, folder: Path, sequence: int) -> None:
    """Commit the bytes that are there, then publish them."""
    digest = sha256((folder / f"{sequence}.release").read_bytes()).hexdigest()
    ledger.commit(sequence, digest)
    say("published", sequence, digest)


def main(folder: Path, point: str, hit: int) -> int:
    """Open, finish what an earlier life had renamed, and go through the rounds that are left."""
    suicide = Suicide(point, hit)
    with PrivacyLedger.open(folder / "ledger.jsonl", key=load_key(folder / "key.pem")) as ledger:
        instrument(suicide)
        os.write(1, b"ready\n")
        for entry in ledger.open_reservations():
            if (folder / f"{entry.sequence}.release").exists():
                finish(ledger, folder, entry.sequence)
        z = ledger.runs["run"]["schedule"]["noise_multiplier"]
        server_round = max((entry.server_round for entry in ledger.rounds_of("run")), default=0)
        try:
            while True:
                server_round += 1
                release(ledger, folder, server_round, z, suicide)
        except BudgetExhausted:
            assert len(ledger.rounds_of("run")) == ROUNDS
            return EXHAUSTED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
