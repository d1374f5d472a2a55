"""Attacks on a deployed federation: each is refused under a public code, named in the log, and the round goes on.

What needs no federation that trains (no credentials, an unregistered key, a man in the middle) is in `test_federation`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.loop import Rejected, RunOver
from client.node import FlowerLink
from client.settings import load_settings
from client.store import DeviceStore
from common import wire
from common.errors import UmbelError, VerificationError
from common.records import Contribution
from common.sealing import enclose
from server.registry import load_registry
from tests.faults.deployed import (
    Deployed,
    Pool,
    PoolLink,
    Received,
    Said,
    answered,
    by_round,
    metrics,
    model,
    pool_of,
    releases,
    simulated,
    status,
)
from tests.faults.loopback import eventually
from umbel import submit
from umbel.flower_engine import build_bundle

pytestmark = pytest.mark.faults

PRIVATE = {"privacy__epsilon": 1.0}
LIAR, OTHER = "edge-3", "edge-4"
NODES = 5


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three resident nodes and all of the server, as processes, with data for a fourth."""
    made = Deployed(tmp_path_factory.mktemp("resident"), nodes=3, options={"partitions": 4})
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Nodes in threads, without noise."""
    with pool_of(tmp_path_factory.mktemp("pool"), nodes=NODES) as made:
        yield made


def resealed(link: PoolLink, contribution: bytes, **options: Any) -> bytes:
    """A contribution sealed and signed as the node's own for what it was asked."""
    return enclose(contribution, **{**link.last_said.options, **options})


def changed(said: Said, **fields: Any) -> bytes:
    """A node's contribution with other fields."""
    own = Contribution.decode(said.contribution)
    names = ("ledger_id", "sequence", "acknowledged", "total")
    return Contribution(**{name: getattr(own, name) for name in names} | fields).encode()


def with_total(make: Callable[[Any], Any]) -> Callable[[PoolLink], bytes]:
    """Another array in place of the sum, sealed and signed."""

    def lie(link: PoolLink) -> bytes:
        said = link.last_said
        return resealed(link, changed(said, total=make(Contribution.decode(said.contribution).total)))

    return lie


def of_other(link: PoolLink) -> Said:
    """What another node says to the same broadcast."""
    said = link.pool.said
    eventually(lambda: OTHER in said and said[OTHER][-1].broadcast == link.broadcast)
    return said[OTHER][-1]


def before(link: PoolLink) -> Said:
    """What the node has said in the round before."""
    return link.pool.said[LIAR][-2]


LIES: Mapping[str, tuple[str, Callable[[PoolLink], bytes]]] = {
    "NaN": ("malformed", with_total(lambda own: np.full(own.size, np.nan))),
    "16 MB": ("malformed", with_total(lambda _: np.ones(2**21, np.int64))),
    "more than all its users' clips": ("malformed", with_total(lambda own: np.full(own.size, 2**40))),
    "nothing": ("malformed", with_total(lambda own: own[:0])),
    "its reply of the round before": ("sealing", lambda link: before(link).sealed),
    "its sum of the round before": ("replayed", lambda link: resealed(link, before(link).contribution)),
    "a sum for the next round": (
        "replayed",
        lambda link: resealed(link, changed(link.last_said, sequence=10**6)),
    ),
    "a sum for another ledger": (
        "replayed",
        lambda link: resealed(link, changed(link.last_said, ledger_id="0" * 32)),
    ),
    "another node's reply": ("sealing", lambda link: of_other(link).sealed),
    "another node's sum and signature": (
        "node_signature",
        lambda link: resealed(link, of_other(link).contribution, sign=of_other(link).options["sign"]),
    ),
    "a sum without a signature": (
        "node_signature",
        lambda link: resealed(link, link.last_said.contribution, sign=None),
    ),
    "a sum that is not sealed": ("sealing", lambda link: resealed(link, link.last_said.contribution, sealing_key=b"")),
}
TELLTALE = "u04 answered 3.25"


def told(lie: Callable[[PoolLink], bytes]):
    """A node that sends these bytes in place of its reply."""

    def mischief(link: PoolLink, _: Received, __: Message) -> Iterable[Message]:
        return (wire.answer(lie(link), link.request),)

    return mischief


def tells(link: PoolLink, _: Received, __: Message) -> Iterable[Message]:
    """A refusal whose code is text with data."""
    return (Message(RecordDict({"refusal": ConfigRecord({"code": TELLTALE})}), reply_to=link.request),)


def poses(link: PoolLink, work: Received, reply: Message) -> Iterable[Message]:
    """First an answer to what another node was asked, with that node's own bytes; then the honest one."""
    said = of_other(link)
    with suppress(Rejected, RunOver):
        FlowerLink.push(link, work, wire.answer(said.sealed, link.pool.link(OTHER).request))
    return (reply,)


def test_a_lie_of_a_registered_node_is_refused_by_its_code_and_the_others_train(pool: Pool, tmp_path: Path) -> None:
    """One lie a round: the releases are those of a simulation without that node, and no text of it is kept."""
    first = 2
    table = {first + i: told(lie) for i, (_, lie) in enumerate(LIES.values())}
    table[first + len(LIES)], table[first + len(LIES) + 1] = tells, poses
    lying = set(table) - {first + len(LIES) + 1}
    pool.mischief = {LIAR: by_round(table)}
    settings = pool.federation.run("lies", training__rounds=len(table) + 2)
    pool.mischief = {}
    pool.federation.check(settings)
    codes = [{}, *({code: 1} for code, _ in LIES.values()), {"error": 1}, {}, {}]
    assert [entry["refusals"] for entry in metrics(settings)] == codes
    index = pool.federation.deployment.nodes.names.index(LIAR)
    same = simulated(
        pool, tmp_path / "run", absent=lambda i, r: i == index and r in lying, training__rounds=len(table) + 2
    )
    assert [total.tolist() for total in releases(settings)] == [total.tolist() for total in same.releases.values()]
    assert model(settings.folder) == model(same.folder)
    log = pool.federation.log("run-lies")
    assert all(f'"{code}":1' in log for code, _ in LIES.values())
    kept = [path for path in settings.folder.root.rglob("*") if path.is_file()]
    assert not any(TELLTALE.encode() in path.read_bytes() for path in (*kept, *pool.federation.logs.iterdir()))


def test_a_tampered_bundle_is_not_run_by_who_has_a_list(pool: Pool, tmp_path: Path) -> None:
    """Nodes that allow one bundle answer its runs; one byte of code more and they refuse before anything is charged."""
    federation = pool.federation
    names = federation.deployment.nodes.names
    reviewed = submit.bundle_of(tmp_path)
    with (tmp_path / "umbel" / "client" / "guard.py").open("ab") as file:
        file.write(b"\n")
    tampered = build_bundle(tmp_path / "tampered", tmp_path / "umbel")
    pool.stop()
    pool.bundles = dict.fromkeys(names, (sha256(reviewed.read_bytes()).hexdigest(),))
    pool.start(names)
    try:
        settings = federation.lay_out("tampered", training__rounds=1, training__startup_timeout=8.0)
        with (
            mock.patch.object(submit, "bundle_of", return_value=tampered),
            pytest.raises(UmbelError, match="policy_bundle"),
        ):
            federation.go_on(settings)
        assert settings.run not in {entry.run for entry in federation.verified().rounds}
        with mock.patch.object(submit, "bundle_of", return_value=reviewed):
            federation.go_on(settings)
        (only,) = metrics(settings)
        assert 0 < only["answered"] == only["invited"]
        federation.check(settings, states=False)
    finally:
        pool.stop()
        pool.bundles = {}
        pool.start(names)


@pytest.mark.parametrize("place", [40, 400])
def test_a_changed_broadcast_is_refused_by_who_receives_it(pool: Pool, place: int) -> None:
    """One byte of it is another one on its way to one node, which answers `signature`; the others train."""
    pool.federation.plan("superexec", forge=place)
    try:
        settings = pool.federation.run(f"forged-{place}", training__rounds=2)
    finally:
        pool.federation.plan("superexec")
    assert [entry["refusals"] for entry in metrics(settings)] == [{"signature": 1}] * 2
    assert answered(settings) == [NODES - 1] * 2
    pool.federation.check(settings)


def test_the_database_of_a_killed_superlink_holds_no_contribution(pool: Pool) -> None:
    """Killed as soon as the last reply has come: its file and log hold the sealed bytes and not the integers."""
    federation = pool.federation
    settings = federation.lay_out("seized", training__rounds=2, training__round_timeout=15.0)
    sent: dict[str, Said] = {}

    def seize(name: str, work: Received) -> None:
        if work.action == "train.contribute" and len(sent) < NODES:
            sent[name] = pool.said[name][-1]
            if len(sent) == NODES:
                federation.kill("superlink")

    pool.sent = seize
    submit.submit(federation, settings)
    eventually(lambda: len(sent) == NODES and not federation.alive("superlink"), 60)
    pool.sent = lambda *_: None
    files = [path.read_bytes() for path in federation.folder.var.glob("superlink.db*")]
    assert any(any(found_in(files, said.sealed)) for said in sent.values())
    for said in sent.values():
        total = Contribution.decode(said.contribution).total
        numbers = [number for number in total if abs(int(number)) > 2**24]
        assert len(numbers) > 3
        assert not any(number.tobytes() in data for number in numbers for data in files)
    federation.start()
    federation.go_on(settings)
    federation.check(settings, lost=sum(entry["answered"] == 0 for entry in metrics(settings)))


def found_in(files: list[bytes], wanted: bytes, length: int = 32) -> Iterator[bool]:
    """Whether pieces of these bytes are anywhere in files."""
    for start in range(0, len(wanted) - length + 1, length):
        yield any(wanted[start : start + length] in data for data in files)


def test_nodes_follow_a_rotated_ledger_key(resident: Deployed) -> None:
    """`umbel provision --rotate ledger`: a KEY line hands over, nodes follow it by themselves and remember it."""
    assert answered(resident.run("old-key", training__rounds=1, **PRIVATE)) == [3]
    umbel("provision", str(resident.folder.root), "--rotate", "ledger")
    for name in ("new-key", "new-key-again"):
        settings = resident.run(name, training__rounds=2, **PRIVATE)
        assert [(entry["answered"], entry["refusals"]) for entry in metrics(settings)] == [(3, {})] * 2
        resident.check(settings)
    ledger = resident.verified()
    assert len(ledger.public_keys) == 2
    with DeviceStore.open(load_settings(resident.folder.node("edge-1").settings).store, ()) as store:
        assert store.trusted_key(ledger.genesis["ledger_id"]) == bytes.fromhex(ledger.public_keys[1])


def test_a_node_enrolled_during_a_run_is_in_the_next_one(resident: Deployed) -> None:
    """The run that is at work goes on with its registry; the next one writes a REGISTRY line and invites the node."""
    settings = resident.lay_out("at-work", training__rounds=4, **PRIVATE)
    submit.submit(resident, settings)
    eventually(lambda: metrics(settings), 60)
    umbel("provision", str(resident.folder.root), "--nodes", "4")
    resident.extended()
    assert resident.start() == ["edge-4"]
    resident.go_on(settings)
    assert [entry["invited"] for entry in metrics(settings)] == [3] * 4
    resident.check(settings, states=False)
    after = resident.run("with-the-new-one", training__rounds=2, **PRIVATE)
    assert [(entry["invited"], entry["answered"]) for entry in metrics(after)] == [(4, 4)] * 2
    resident.check(after)
    registry = resident.verified().registry
    assert registry is not None
    assert registry["population_size"] == load_registry(resident.folder.registry).population_size


def test_two_federations_on_one_machine_do_not_disturb_each_other(resident: Deployed, pool: Pool) -> None:
    """Both train at the same time; one is ended and started again, and the other's processes stay as they are."""
    here, there = resident.lay_out("here", training__rounds=3, **PRIVATE), pool.federation.lay_out("there")
    submit.submit(resident, here)
    submit.submit(pool.federation, there)
    pool.federation.go_on(there)
    resident.go_on(here)
    for federation, settings in ((resident, here), (pool.federation, there)):
        assert answered(settings) == [len(federation.deployment.nodes.names)] * settings.config.training.rounds
        federation.check(settings)
    before = resident.processes
    pool.federation.stop()
    assert all(resident.alive(name) for name in before)
    pool.federation.start()
    assert resident.start() == []
    assert resident.processes == before
    pool.start(())
    assert answered(pool.federation.run("there-again", training__rounds=1)) == [NODES]


def test_a_rolled_back_ledger_is_refused_until_its_owner_restores_it(resident: Deployed) -> None:
    """Devices refuse an older copy; a RESTORE line of the recovery key, which charges the loss, brings them back."""
    place = resident.folder.place.ledger
    copy = place.with_name("older-copy")
    resident.run("kept", training__rounds=1, **PRIVATE)
    shutil.copyfile(place, copy)
    resident.run("lost", training__rounds=2, **PRIVATE)
    names = resident.deployment.nodes.names
    newest = max(status(resident, name)["acknowledged"] for name in names)
    assert newest == resident.verified().sequence  # what the operator reads from devices is the end of what was lost
    shutil.copyfile(copy, place)
    resident.anchor = None
    settings = resident.lay_out("rolled-back", training__rounds=3, **PRIVATE)
    with pytest.raises(VerificationError, match="older copy"):
        resident.go_on(settings)  # run folders and nodes beside it remember more: nothing is charged
    assert resident.verified().sequence < newest
    with (
        mock.patch.object(submit, "check_not_rolled_back"),  # as on a machine where nothing remembers
        pytest.raises(VerificationError, match=r"ledger_(rollback|fork)"),
    ):
        resident.go_on(settings)
    assert not releases(settings)
    options = ("--up-to", str(newest), "--recovery-key", str(resident.folder.recovery_key))
    document = umbel("ledger", "restore", str(place), "--yes", *options)
    assert document["lost"] > 0
    assert document["epsilon_spent"] > document["epsilon_before"]
    resident.go_on(settings)
    assert answered(settings)[-2:] == [len(names)] * 2
    resident.check(settings, lost=1)


def umbel(*arguments: str) -> dict[str, Any]:
    """A command, as the operator gives it."""
    command = [sys.executable, "-m", "umbel", *arguments, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def announces(link: PoolLink, work: Received, reply: Message) -> Iterable[Message]:
    """A node that says that a reply is coming, and never sends a piece of it."""
    with mock.patch.object(link._connected, "PushObject", side_effect=RunOver):
        try:
            FlowerLink.push(link, work, reply)
        except RunOver:
            return ()
    raise AssertionError("expected pieces to send, got none")


def test_a_reply_that_is_announced_and_never_sent_stops_no_round(pool: Pool, tmp_path: Path) -> None:
    """It costs the node its place and the round some seconds; the others' answers count."""
    pool.mischief = {"edge-2": announces}
    settings = pool.federation.run("announced", training__rounds=2, training__round_timeout=60.0)
    pool.mischief = {}
    pool.federation.check(settings)
    nodes = len(pool.federation.deployment.nodes.names)
    assert answered(settings) == [nodes - 1] * 2
    assert [entry["refusals"] for entry in metrics(settings)] == [{"unavailable": 1}] * 2
    seconds = [json.loads(line)["seconds"] for line in settings.folder.timings.read_text().splitlines()]
    assert max(seconds) < 50
