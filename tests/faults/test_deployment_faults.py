"""A deployed federation of real processes in which something breaks: it goes on, and nothing is charged twice.

After each fault the run is resumed from its folder to its end, the ledger verifies, every release was charged once
and every device answers its users. The model is the one that a simulation with the same dropouts gets, bit for bit.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.store_file import set_aside_files
from common import wire
from common.errors import StorageError, UmbelError
from tests.faults.deployed import (
    Deployed,
    Pool,
    answered,
    by_round,
    metrics,
    model,
    never,
    pool_of,
    releases,
    simulated,
)
from tests.faults.loopback import eventually
from umbel import submit

pytestmark = pytest.mark.faults

NAMES = ("edge-1", "edge-2", "edge-3")
PRIVATE = {"privacy__epsilon": 1.0}
PATIENCE = {"training__round_timeout": 8.0, "training__startup_timeout": 8.0}
LOSING = (
    "reserved",
    "asked train.contribute",
    "answered train.contribute",
    "noised",
    "staged",
)
"""Points of the ServerApp after the charge and before there is a release: the round is spent for nothing."""
KEEPING = (
    "waiting",
    "started",
    "committed",
    "renamed",
    "checkpointed",
    "reported",
    "modelled",
    "asked train.fold_in",
    "answered train.fold_in",
    "ending",
)
"""Points at which nothing is lost."""


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three resident nodes and all of the server, as processes; their users have models from a first run."""
    made = Deployed(tmp_path_factory.mktemp("resident"), nodes=len(NAMES))
    try:
        made.start()
        made.check(made.run("first", training__rounds=2, **PRIVATE))
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Ten nodes in threads, without noise."""
    with pool_of(tmp_path_factory.mktemp("pool"), nodes=10) as made:
        yield made


def test_a_server_app_killed_at_each_step_of_a_round_goes_on(resident: Deployed) -> None:
    """Killed once at every point of the ledger's protocol: each round is charged once, also those that are lost."""
    settings = resident.lay_out("killed", training__rounds=len(LOSING) + 4, **PRIVATE)
    for point in (*KEEPING[:2], *LOSING, *KEEPING[2:]):
        resident.plan("superexec", at=point, nth=2 if point == "checkpointed" else 1, do="kill")
        with pytest.raises(submit.RunDiedError):
            resident.go_on(settings)
        resident.check(settings, finished=False)
    resident.plan("superexec")
    done = subprocess.run(
        [sys.executable, "-m", "umbel", "train", str(resident.folder.root), "--resume", "killed", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resident.check(settings, lost=len(LOSING))
    owner = resident.verified().public_keys[0]
    audit = [sys.executable, "-m", "umbel", "audit", str(settings.folder.root), "--public-key", owner]
    assert subprocess.run(audit, capture_output=True, timeout=120, check=False).returncode == 0


def test_a_model_is_the_same_whenever_the_server_app_was_killed(pool: Pool, tmp_path: Path) -> None:
    """Three rounds of which a kill loses one, and kills that lose none: the model of a simulation of two rounds."""
    settings = pool.federation.lay_out("killed", training__rounds=3)
    for point in ("renamed", "reserved", "modelled"):
        pool.federation.plan("superexec", at=point, do="kill")
        with pytest.raises(submit.RunDiedError):
            pool.federation.go_on(settings)
    pool.federation.plan("superexec")
    pool.federation.go_on(settings)
    pool.federation.check(settings, lost=1)
    same = simulated(pool, tmp_path / "run", absent=lambda *_: False, training__rounds=2)
    assert model(settings.folder) == model(same.folder)


@pytest.mark.parametrize("point", ["found train.contribute", "computed", "charged", "sent train.contribute"])
def test_a_node_that_is_killed_misses_one_round_at_most(resident: Deployed, point: str) -> None:
    """Before, during and after its work; it is started again as it would be by the system, and is in the next round."""
    resident.kill("edge-2")
    resident.plan("edge-2", at=point, do="kill")
    resident.start()
    settings = resident.lay_out(f"node-{point.split(maxsplit=1)[0]}", training__rounds=3, **PRIVATE, **PATIENCE)
    submit.submit(resident, settings)
    eventually(lambda: not resident.alive("edge-2"), 60)
    resident.plan("edge-2")
    resident.start()
    resident.go_on(settings)
    assert answered(settings) == [3 if point.startswith("sent") else 2, 3, 3]
    resident.check(settings)


@pytest.mark.parametrize("program", ["proxy", "superlink", "superexec"])
def test_a_run_outlives_a_part_of_the_server(resident: Deployed, program: str) -> None:
    """Killed in the middle of a run and started again, it costs what was under way at most."""
    settings = resident.lay_out(f"without-{program}", training__rounds=5, **PRIVATE, **PATIENCE)
    submit.submit(resident, settings)
    eventually(lambda: len(metrics(settings)) >= 2, 60)
    resident.kill(program)
    assert resident.start() == [program]
    resident.go_on(settings)
    resident.check(settings, lost=sum(entry.release_digest is None for entry in rounds(resident, settings)))
    assert len(releases(settings)) >= 4
    if program == "proxy":
        assert answered(settings) == [3] * 5
    assert answered(settings)[-1] == 3


def rounds(federation: Deployed, settings: submit.RunSettings) -> list:
    return [entry for entry in federation.verified().rounds if entry.run == settings.run]


def twice(_, __, reply):
    return (reply, reply)


def garbage(link, _, __):
    return (wire.answer(os.urandom(1000), link.request),)


def late(_, __, reply):
    time.sleep(9.5)
    return (reply,)


def test_a_node_that_answers_late_twice_never_or_garbage_is_in_the_sums_it_belongs_to(
    pool: Pool, tmp_path: Path
) -> None:
    """Twice counts once; late, never and garbage count nothing; the others are in every round."""
    pool.mischief = {"edge-3": by_round({1: twice, 2: garbage, 3: never, 4: late})}
    settings = pool.federation.run("answers", training__rounds=5, training__round_timeout=8.0)
    pool.mischief = {}
    pool.federation.check(settings)
    assert answered(settings) == [10, 9, 9, 9, 10]
    assert [entry["refusals"] for entry in metrics(settings)] == [{}, {"sealing": 1}, {}, {}, {}]
    absent = simulated(pool, tmp_path / "run", absent=lambda i, r: i == 2 and r in (2, 3, 4), training__rounds=5)
    assert [total.tolist() for total in releases(settings)] == [total.tolist() for total in absent.releases.values()]
    assert model(settings.folder) == model(absent.folder)


@pytest.mark.parametrize("share", [0, 30, 60, 90])
def test_a_model_without_most_of_the_nodes_is_what_their_absence_explains(
    pool: Pool, tmp_path: Path, share: int
) -> None:
    """They are gone in the middle of the first round; the rest trains the model that it trains in a simulation."""
    names = pool.federation.deployment.nodes.names
    gone = names[: share * len(names) // 100]

    def leaves(link, _, __):
        pool.leave(link.name)
        return ()

    pool.mischief = dict.fromkeys(gone, leaves)
    settings = pool.federation.run(f"without-{share}", training__rounds=2, training__round_timeout=8.0)
    pool.mischief = {}
    pool.start(gone)
    assert answered(settings) == [10 - len(gone)] * 2
    pool.federation.check(settings)
    same = simulated(pool, tmp_path / "run", absent=lambda i, _: names[i] in gone, training__rounds=2)
    assert model(settings.folder) == model(same.folder)


@pytest.mark.parametrize(("point", "room", "lost"), [("started", 4096, 0), ("reserved", 4096, 0), ("noised", 100, 1)])
def test_a_server_whose_disk_is_full_says_so_and_goes_on_with_room(
    resident: Deployed, point: str, room: int, lost: int
) -> None:
    """No room for RESERVE, for COMMIT, or for the release: at most the round is lost that was charged before."""
    settings = resident.lay_out(f"full-{point}", training__rounds=2, **PRIVATE)
    resident.plan("superexec", at=point, do="fill", room=room)
    with pytest.raises(UmbelError) as raised:
        resident.go_on(settings)
    if room > 1000:  # or not even the outcome finds room
        assert isinstance(raised.value, StorageError)
    assert len(rounds(resident, settings)) == (point != "started")
    resident.check(settings, finished=False)
    resident.plan("superexec")
    resident.go_on(settings)
    resident.check(settings, lost=lost)


def test_a_device_whose_disk_is_full_contributes_nothing_and_keeps_its_models(resident: Deployed) -> None:
    """It refuses with `storage`, the others train; with room it is in the next run."""
    resident.kill("edge-2")
    resident.plan("edge-2", at="computed", do="fill", room=1000)
    resident.start()
    settings = resident.run("device-full", training__rounds=2, **PRIVATE)
    assert [(entry["answered"], entry["refusals"]) for entry in metrics(settings)] == [(2, {"storage": 1})] * 2
    resident.check(settings)
    resident.kill("edge-2")
    resident.plan("edge-2")
    resident.start()
    settings = resident.run("device-has-room", training__rounds=2, **PRIVATE)
    assert answered(settings) == [3, 3]
    resident.check(settings)


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_node_whose_clock_is_off_is_absent_and_is_told_why(resident: Deployed, seconds: int) -> None:
    """SuperLink does not admit it; its log and `umbel doctor` name the clock; the others train."""
    resident.kill("edge-2")
    resident.plan("edge-2", clock=seconds)
    with contextlib.suppress(UmbelError):  # it has ended
        resident.start()
    eventually(lambda: not resident.alive("edge-2"))
    where = "ahead of" if seconds > 0 else "behind"
    said = resident.log("edge-2").splitlines()[-1]
    assert re.search(rf"clock is (3599|360\d) s {where} the server's", said), said
    command = [sys.executable, "-m", "umbel", "doctor", str(resident.folder.node("edge-2").root), "--format", "json"]
    environment = os.environ | resident.environment("edge-2")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    failed = [check for check in json.loads(done.stdout)["checks"] if check["status"] == "fail"]
    assert done.returncode == 2
    assert any("clock" in check["name"] for check in failed), failed
    settings = resident.run(
        f"clock{seconds}",
        training__rounds=2,
        **PRIVATE | {"training__round_timeout": 4.0, "training__startup_timeout": 4.0},
    )
    assert answered(settings) == [2, 2]
    resident.check(settings)
    resident.plan("edge-2")
    resident.start()


def test_a_model_of_another_rank_takes_the_place_of_the_one_before(resident: Deployed) -> None:
    """Devices follow an upgrade of the model, and its undoing, without any step of their owners."""
    for name, rank in (("rank-2", 2), ("rank-1", 1)):
        settings = resident.run(name, training__rounds=2, model__rank=rank, **PRIVATE)
        assert answered(settings) == [3, 3]
        resident.check(settings)


def test_a_device_with_a_damaged_store_goes_on(resident: Deployed) -> None:
    """The file is set aside, filters that cannot be read are full, and its users get models again."""
    resident.kill("edge-3")
    store = resident.folder.node("edge-3").store / "node.sqlite"
    with store.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(store.stat().st_size - 4096))
    store.with_name("node.sqlite-wal").write_bytes(b"")
    resident.damaged.add("edge-3")
    resident.start()
    settings = resident.run("damaged", training__rounds=2, **PRIVATE)
    assert answered(settings) == [3, 3]
    assert len(set_aside_files(store)) == 1
    assert "damaged" in resident.log("edge-3")
    resident.check(settings)
