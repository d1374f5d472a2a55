"""A deployed federation that tests disturb: real processes on loopback, or a pool of nodes in threads of this process.

Both have a real SuperLink with TLS and node authentication, a proxy, and ServerApps in processes of their own.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Message

import client.service
from client.app import app, close_services
from client.loop import Loop, Pace
from client.node import FlowerLink, Received
from client.settings import load_settings
from client.sources import node_data
from client.status_file import StatusFile, read_status
from client.store import DeviceStore
from common import wire
from common.config import Config, load_config
from common.files import unpack
from common.model import IntArray
from common.records import Broadcast
from privacy.audit.verify import Anchor, Verification, verify
from privacy.participation import cost_units, is_noiseless
from server.settings import RunSettings
from tests.faults.loopback import eventually
from tests.federation import Run, prepare, run_real
from umbel import deploy, processes, submit
from umbel.deploy import Federation, Program
from umbel.inprocess import Fault
from umbel.predict import predict
from umbel.processes import Process
from umbel.provision import Request, provision

INSIDE = Path(__file__).parent / "inside"
D = 4
SMALL = {
    "model.rank": 1,
    "model.sparsity": 1,
    "training.startup_timeout": 20.0,
    "training.round_timeout": 30.0,
}
POLL, SELDOM = "0.2", 1.0
"""Seconds between questions for work, of resident nodes and of a pool: ten that ask often would take a core."""


def data(path: Path, users: int) -> dict[str, Any]:
    """Write a table of users with parameters of their own; how it is declared."""
    rng = np.random.default_rng(1)
    theta = rng.normal(size=(users, 1)) * rng.normal(size=D) + rng.normal(size=D)
    x = rng.uniform(-1, 1, size=(users, 8, D))
    y = np.clip(np.einsum("ud,umd->um", theta, x) + 0.1 * rng.normal(size=x.shape[:2]), -8, 8)
    rows = [
        f"u{u:02d},{','.join(map(repr, x[u, m].tolist()))},{float(y[u, m])!r}" for u in range(users) for m in range(8)
    ]
    path.write_text("\n".join([f"user,{','.join(f'x{i}' for i in range(D))},y", *rows]) + "\n")
    return {
        "data.source": str(path),
        "data.features": [{"name": f"x{i}", "low": -1.0, "high": 1.0} for i in range(D)],
        "data.target": "y",
        "data.target_range": [-8.0, 8.0],
    }


class Silent:
    """Watches, and remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Remember it."""
        self.warnings.append(message)

    def round(self, numbers: Mapping[str, Any]) -> None:
        """Nothing."""


class Deployed(Federation):
    """A federation whose programs a test ends, starts and looks into one by one.

    Args:
        root: Where its folder, its data, and what is planned for its processes, will be.
        nodes: How many.
        users: Of all nodes.
        without_nodes: Start the server's programs only.
        options: Of provisioning.
        settings: Of its runs, beside those of `SMALL`.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int,
        users: int = 30,
        without_nodes: bool = False,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = SMALL | data(root / "data.csv", users) | dict(settings or {})
        ports = {"superlink": 0, "fleet": 0, "metrics": 0}
        given: dict[str, Any] = {"epsilon": 40.0} | dict(options or {})
        provision(root / "fed", Request(nodes=nodes, config=self.config(), ports=ports, **given))
        super().__init__(root / "fed")
        self.without_nodes = without_nodes
        self.plans = root / "plans"
        self.plans.mkdir()
        self.anchor: Anchor | None = None
        self.released: dict[Path, str] = {}
        self.damaged: set[str] = set()
        self.hurry()

    def hurry(self) -> None:
        """Let nodes ask for work more often."""
        for path in self.folder.root.glob("nodes/*/node.toml"):
            path.write_text(path.read_text().replace("poll_seconds = 1.0", f"poll_seconds = {POLL}"))

    def config(self, **changes: Any) -> Config:
        """Of a run; keys have `__` for the dot."""
        return load_config(None, self.settings | {key.replace("__", "."): value for key, value in changes.items()})

    def programs(self, *, stock: bool) -> list[Program]:
        """The server's only, where a test is the nodes."""
        found = super().programs(stock=stock)
        return found[: -len(self.deployment.nodes.names)] if self.without_nodes else found

    def extended(self) -> None:
        """Take up what provisioning has added."""
        del self.__dict__["deployment"]
        self.hurry()

    def plan(self, program: str, **plan: Any) -> None:
        """What is to happen in a program that starts from now on; nothing, if nothing is said."""
        path = self.plans / f"{program}.json"
        path.write_text(json.dumps(plan)) if plan else path.unlink(missing_ok=True)

    def environment(self, program: str) -> dict[str, str]:
        """What a process needs for its plan."""
        path = os.pathsep.join(filter(None, [str(INSIDE), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "PLANS": str(self.plans), "PROGRAM": program, "UMBEL_LOG": "json"}

    def _start(self, program: Program) -> Process:
        with (
            mock.patch.dict(os.environ, self.environment(program.name)),
            mock.patch.object(deploy, "_NOT_INHERITED", ()),
        ):
            return super()._start(program)

    def _wait_for_nodes(self, known: Mapping[str, Process]) -> None:
        if not self.without_nodes:
            super()._wait_for_nodes(known)

    def start(self) -> list[str]:
        """Start what does not run."""
        return self.up(Silent())

    def stop(self) -> None:
        """End everything."""
        self.down(Silent())

    def alive(self, name: str) -> bool:
        """Whether a program runs."""
        return processes.is_running(self.processes[name])

    def kill(self, name: str) -> None:
        """End a program at once, as a power cut would."""
        os.kill(self.processes[name].pid, signal.SIGKILL)
        eventually(lambda: not self.alive(name))

    def lay_out(self, name: str, **changes: Any) -> RunSettings:
        """A new run."""
        return submit.lay_out(self, self.config(**changes), name, Silent())

    def go_on(self, settings: RunSettings) -> dict[str, Any]:
        """Submit a run, or go on with it, and follow it to its end; as `umbel train` does."""
        with mock.patch.object(submit, "write_reports"):  # that costs seconds, and is tested elsewhere
            return submit.train(self, settings, Silent())

    def run(self, name: str, **changes: Any) -> RunSettings:
        """A run from its configuration to its end."""
        settings = self.lay_out(name, **changes)
        self.go_on(settings)
        return settings

    def log(self, name: str) -> str:
        """What a program, or `run-NAME`, has logged."""
        return (self.logs / f"{name}.log").read_text()

    def verified(self) -> Verification:
        """The ledger, which verifies and has gone on from where it was."""
        first_key = load_settings(self.folder.node("edge-1").settings).public_key
        found = verify(self.folder.place.ledger, public_key=first_key, anchor=self.anchor, all_signatures=True)
        assert found.status == "verified", found.reason
        self.anchor = Anchor(sequence=found.sequence, head=found.head)
        return found

    def check(self, settings: RunSettings, *, finished: bool = True, lost: int = 0, states: bool = True) -> None:
        """Everything that must hold after any life of a run.

        Args:
            settings: The run.
            finished: Whether it came to its end.
            lost: Rounds that were charged and came to nothing.
            states: Whether every device has models of its users by now.
        """
        ledger = self.verified()
        rounds = [entry for entry in ledger.rounds if entry.run == settings.run]
        planned = settings.config.training.rounds
        assert [entry.server_round for entry in rounds] == list(range(1, len(rounds) + 1))
        assert len(rounds) == planned if finished else len(rounds) <= planned
        digests = {path: sha256(path.read_bytes()).hexdigest() for path in settings.folder.rounds.glob("0*")}
        committed = {entry.sequence: entry.release_digest for entry in rounds if entry.release_digest is not None}
        found = {int(path.stem): digest for path, digest in digests.items()}
        assert found.keys() <= {entry.sequence for entry in rounds}
        assert all(self.released.setdefault(path, digest) == digest for path, digest in digests.items())
        if finished:
            assert found == committed
            assert len(committed) == planned - lost
        for name in self.deployment.nodes.names:
            self.check_device(name, ledger, states=states)

    def check_device(self, name: str, ledger: Verification, *, states: bool) -> None:
        """A device has charged its users once for every release it worked for, and answers them without a server."""
        settings = load_settings(self.folder.node(name).settings)
        users = node_data(settings.data, settings.family, settings.partition, settings.partitions)[0].users
        if not Path(settings.store).exists():
            return
        with DeviceStore.open(settings.store, users) as store:
            assert store.acknowledged(ledger.genesis["ledger_id"])[0] <= ledger.sequence
            rounds = [
                r for r in ledger.rounds if store.charged(ledger.genesis["ledger_id"], r.sequence, users) is not None
            ]
            noise = [str(entry.event["noise_multiplier"]) for entry in rounds]
            if not any(is_noiseless(z) for z in noise):
                spent, charged = store.spent(users), sum(map(cost_units, noise))
                knows_more = name in self.damaged or "RESTORE" in ledger.counts  # charges for lines that are lost
                assert ((spent >= charged) if knows_more else (spent == charged)).all()
        if states:
            answer = predict(self.folder.node(name).settings, users[0], self.inputs())
            assert answer["source"] == "posterior"
            assert np.isfinite(answer["scores"]).all()

    def inputs(self) -> Path:
        """A row to predict for."""
        path = self.folder.root.parent / "inputs.csv"
        path.write_text(",".join(f"x{i}" for i in range(D)) + "\n" + ",".join(["0.5"] * D) + "\n")
        return path


def metrics(settings: RunSettings) -> list[dict[str, Any]]:
    """The public numbers of every round."""
    path = settings.folder.metrics
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def answered(settings: RunSettings) -> list[int]:
    """How many nodes are in each round."""
    return [entry["answered"] for entry in metrics(settings)]


def releases(settings: RunSettings) -> list[IntArray]:
    """Released sums in their order."""
    return [unpack(path)[0]["noised_sum"] for path in sorted(settings.folder.rounds.glob("0*"))]


def model(folder: Any) -> dict[str, bytes]:
    """The final model of a run, bit by bit."""
    return {name: array.tobytes() for name, array in unpack(folder.model)[0].items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What a node was about to send.

    Attributes:
        contribution: Before it was sealed.
        broadcast: What it answers.
        sealed: After.
        options: What else it was sealed with.
    """

    contribution: bytes
    broadcast: bytes
    sealed: bytes
    options: Mapping[str, Any]


Mischief = Callable[["PoolLink", Received, Message], Iterable[Message]]
"""A node, what it was asked and its honest reply, to the replies that it sends."""


def honest(_: "PoolLink", __: Received, reply: Message) -> Sequence[Message]:
    """What an honest node sends."""
    return (reply,)


def never(_: "PoolLink", __: Received, ___: Message) -> Sequence[Message]:
    """A node that computes, charges and says nothing."""
    return ()


def by_round(table: Mapping[int, "Mischief"]) -> "Mischief":
    """Another mischief in each round, and none in others."""

    def mischief(link: "PoolLink", work: Received, reply: Message) -> Iterable[Message]:
        return table.get(Broadcast.decode(link.broadcast).server_round, honest)(link, work, reply)

    return mischief


class PoolLink(FlowerLink):
    """A node of a pool: with registered keys and the real ClientApp, and what a test makes of its replies."""

    pool: "Pool"
    name: str
    request: Message
    has_left = False

    @property
    def broadcast(self) -> bytes:
        """The signed bytes that are answered."""
        return wire.read_request(self.request)[0]

    @property
    def last_said(self) -> "Said":
        """What the node was about to send."""
        return self.pool.said[self.name][-1]

    def disconnect(self) -> None:
        """Say good-bye, unless the node is gone without a word: then SuperLink takes it to be there for a minute."""
        if not self.has_left:
            super().disconnect()
        elif self._client is not None:
            self._client.close()

    def compute(self, request: Message) -> Message:
        """The honest reply."""
        self.request = request
        return super().compute(request)

    def push(self, work: Received, reply: Message) -> None:
        """Send what a test wants."""
        mischief = self.pool.mischief.get(self.name, honest) if work.action == "train.contribute" else honest
        for message in mischief(self, work, reply):
            super().push(work, message)
            self.pool.sent(self.name, work)


class Pool:
    """Nodes in threads of this process, with the keys, settings and stores that were provisioned."""

    def __init__(self, federation: Deployed) -> None:
        self.federation = federation
        self.mischief: dict[str, Mischief] = {}
        self.said: dict[str, list[Said]] = {}
        self.sent: Callable[[str, Received], None] = lambda name, work: None
        self.bundles: dict[str, tuple[str, ...]] = {}
        self._loops: dict[str, tuple[Loop[Received], threading.Thread, PoolLink]] = {}
        self._known: dict[str, int] = {}

    def start(self, names: Iterable[str]) -> None:
        """Let nodes be there."""
        for name in names:
            if name in self._loops:
                self._loops[name][1].join(60)
            path = self.federation.folder.node(name).settings
            settings = load_settings(path)
            settings = settings.model_copy(update={"bundle_hashes": self.bundles.get(name, ())})
            config = {
                "node-config": str(path),
                "partition-id": settings.partition,
                "num-partitions": settings.partitions,
            }
            link = PoolLink(settings, app, node_config=config, heartbeat=30.0, known_node=self._known.get(name))
            link.pool, link.name = self, name
            loop = Loop(link, Pace(poll=SELDOM), StatusFile(None), dict)
            thread = threading.Thread(target=loop.run, name=name, daemon=True)
            self._loops[name] = (loop, thread, link)
            thread.start()
        wanted = set(self._loops)
        eventually(lambda: wanted <= set(self.federation.nodes_online()))

    def link(self, name: str) -> "PoolLink":
        """A node's connection."""
        return self._loops[name][2]

    def leave(self, name: str) -> None:
        """Let a node be gone in the middle of what it does; `start` brings it back."""
        loop, _, link = self._loops[name]
        link.has_left = True
        self._known[name] = int(link._node.node_id)
        loop.stop()

    def stop(self) -> None:
        """Let all go."""
        for loop, _, _ in self._loops.values():
            loop.stop()
        for _, thread, _ in self._loops.values():
            thread.join(60)
            assert not thread.is_alive()
        self._loops.clear()

    def enclose(self, contribution: bytes, **options: Any) -> bytes:
        """Remember what nodes say before it is sealed."""
        sealed = _enclose(contribution, **options)
        said = Said(contribution=contribution, broadcast=options["broadcast"], sealed=sealed, options=options)
        self.said.setdefault(options["name"], []).append(said)
        return sealed


_enclose = client.service.enclose


@contextmanager
def pool_of(root: Path, *, nodes: int, **more: Any):
    """A noiseless federation whose nodes are a pool: what it releases can be compared bit by bit."""
    settings = {"data.synthetic.users": 2 * nodes, "privacy.epsilon": "none", "privacy.seed": 0}
    federation = Deployed(root, nodes=nodes, without_nodes=True, settings=settings, options={"epsilon": None, **more})
    pool = Pool(federation)
    try:
        federation.start()
        with mock.patch.object(client.service, "enclose", pool.enclose):
            pool.start(federation.deployment.nodes.names)
            yield pool
    finally:
        pool.stop()
        close_services()
        federation.stop()


def simulated(pool: Pool, folder: Path, *, absent: Callable[[int, int], bool], **changes: Any) -> Run:
    """The same run in this process, without the contributions of nodes (0, 1, ...) that are absent from a round."""
    names = pool.federation.deployment.nodes.names

    def faults(node_id: int, message: Message) -> Fault | None:
        if message.metadata.message_type != "train.contribute":
            return None
        server_round = Broadcast.decode(wire.read_request(message)[0]).server_round
        return Fault.UNREACHABLE if absent(node_id - 2, server_round) else None

    config = pool.federation.config(**changes, run__out=str(folder), training__nodes=len(names))
    return run_real(prepare(config), faults=faults)


def status(federation: Deployed, name: str) -> dict[str, Any]:
    """What a resident node last said of itself."""
    return read_status(load_settings(federation.folder.node(name).settings).store) or {}
