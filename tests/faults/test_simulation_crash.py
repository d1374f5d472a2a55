"""A simulation that is killed at any moment: what was charged stays charged, what was released was charged once.

Run as a program this file is that simulation: `python test_simulation_crash.py POINT HIT ARGUMENT...` is
`umbel ARGUMENT...`, which kills itself when it passes the named point for the HIT-th time.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.store import DeviceStore
from common.files import unpack
from privacy.ledger import PrivacyLedger
from tests.faults.aftermath import Aftermath

ROOT = Path(__file__).parents[2]
LOSING = ("reserved", "computed", "charged", "staged")
"""Points after the charge and before there is a release: the round is spent for nothing."""
KEEPING = ("renamed", "committed", "checkpointed", "reported", "modelled", "folding", "evaluated")
"""Points at which nothing is lost."""


def test_a_run_killed_at_each_step_of_a_round_goes_on(tmp_path):
    """Killed once at every point of a round and of the end: all rounds are charged, those that crashed for nothing."""
    lives = Lives(tmp_path / "run", {"training.rounds": 14, "privacy.epsilon": 2.0})
    for point in LOSING + KEEPING:
        lives.live(point, hit=2 if point in ("reserved", "staged") else 1)
    assert lives.kills == len(LOSING + KEEPING)
    lives.live()
    assert lives.finished
    assert len(lives.released) == 14 - len(LOSING)


def test_a_run_that_lost_no_round_ends_as_if_it_had_not_crashed(tmp_path):
    """Without noise, killed wherever a release is on disk already: the same releases and model, bit for bit."""
    options = {"training.rounds": 6, "privacy.epsilon": "none", "privacy.seed": 3}
    straight, killed = Lives(tmp_path / "straight", options), Lives(tmp_path / "killed", options)
    straight.live()
    for point in KEEPING:
        killed.live(point, hit=1)
    killed.live()
    assert (straight.kills, killed.kills) == (0, len(KEEPING))
    assert straight.finished
    assert killed.finished
    assert killed.released == straight.released
    (arrays, _), (expected, _) = (unpack(lives.folder.model) for lives in (killed, straight))
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_a_run_that_crashed_in_its_only_round_ends_without_a_release(tmp_path):
    """The round is charged and gone: resuming asks for no other, and says so in its report."""
    lives = Lives(tmp_path / "run", {"training.rounds": 1})
    lives.live("reserved", hit=1)
    lives.live()
    assert lives.finished
    assert not lives.released


def test_a_run_killed_a_few_times_goes_on(tmp_path):
    """Killed at five random moments of its rounds; every property holds at each of them."""
    rng = random.Random(11)  # noqa: S311 (moments of a kill, not privacy)
    lives = Lives(tmp_path / "run", {"training.rounds": 40})
    for _ in range(5):
        lives.live(**lives.moment(rng))
    lives.live()
    assert lives.finished
    assert lives.kills >= 2  # two cannot reach the end of a run this long


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_many_times_goes_on(tmp_path, seed):
    """Killed 112 times in all, from its first line to its report, by SIGKILL to the whole process."""
    rng = random.Random(seed)  # noqa: S311 (moments of a kill, not privacy)
    kills = number = 0
    while kills < 28:
        noise = {} if number % 2 == 0 else {"privacy.epsilon": "none"}
        lives = Lives(tmp_path / str(number), {"training.rounds": 50, **noise})
        number += 1
        while kills + lives.kills < 28 and not lives.finished:
            lives.live(**(lives.moment(rng) if rng.random() < 0.9 else {"delay": rng.uniform(0.3, 2)}))
        while not lives.finished:
            lives.live()
        kills += lives.kills


class Lives(Aftermath):
    """The lives of one run in processes of their own."""

    kills = 0
    finished = False

    def moment(self, rng: random.Random) -> dict[str, float]:
        """When to kill: some lines of the ledger from now, and a little later."""
        return {"lines": self.lines() + rng.randint(1, 9), "delay": rng.uniform(0, 0.05)}

    def live(self, point: str = "", hit: int = 0, lines: int = 0, delay: float | None = None) -> None:
        """Start the run or go on with it, have it killed if asked to, and check what it left."""
        program = [__file__, point, str(hit)] if point else ["-m", "umbel"]
        command = [sys.executable, *program, *self.arguments()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT
        ) as process:
            if delay is not None:
                while self.lines() < lines and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(delay)
                process.kill()
            assert process.stderr is not None
            said = process.stderr.read().decode()
        assert process.returncode in (0, -signal.SIGKILL), said
        self.kills += process.returncode != 0
        self.finished = process.returncode == 0
        self.check(finished=self.finished)


class Suicide:
    """Kills its process when a named point is passed for the n-th time."""

    def __init__(self, point: str, hit: int) -> None:
        """Wait for `point`, `hit` times."""
        self.point, self.left = point, hit

    def at(self, point: str) -> None:
        """Die here, if this is the moment."""
        self.left -= point == self.point
        if point == self.point and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: object, name: str, *, before: str = "", after: str = "") -> None:
        """Put points before and after a function."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            self.at(before)
            result = function(*arguments, **options)
            self.at(after)
            return result

        setattr(owner, name, watched)

    def around_renaming_of_releases(self) -> None:
        """Put points before and after the step that makes a staged release one."""
        replace = os.replace

        def watched(source, target):
            release = Path(target).parent.name == "rounds"
            self.at("staged" if release else "")
            replace(source, target)
            self.at("renamed" if release else "")

        os.replace = watched


def main(point: str, hit: int, arguments: list[str]) -> int:
    """`umbel ARGUMENTS`, until the point is reached."""
    import server.training
    import umbel.simulate
    from umbel.cli import run

    suicide = Suicide(point, hit)
    suicide.around(PrivacyLedger, "reserve", after="reserved")
    suicide.around(DeviceStore, "charge", before="computed", after="charged")
    suicide.around_renaming_of_releases()
    suicide.around(PrivacyLedger, "commit", after="committed")
    suicide.around(server.training, "save_checkpoint", after="checkpointed")
    suicide.around(server.training, "append_line", after="reported")
    suicide.around(server.training, "save_model", after="modelled")
    suicide.around(DeviceStore, "save_states", after="folding")
    suicide.around(umbel.simulate, "write_reports", before="evaluated")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
