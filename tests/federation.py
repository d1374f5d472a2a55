"""The real ServerApp in this process, with the real ClientApp or with nodes that answer what a test wants.

Runs are laid out as `umbel simulate` does. `node_data` is replaced, so that a test can give any population to the
real nodes, which read theirs from a source otherwise.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.service
from client.app import app as real_client_app
from client.app import close_services
from common import wire
from common.config import Config, load_config
from common.data import DataSchema, Population, partition
from common.files import unpack, write_durably
from common.model import IntArray
from common.records import PROTOCOL_VERSION, Broadcast, Contribution, encode
from common.sealing import SealingKey, disclose, enclose, introduce
from privacy.layout import Layout
from privacy.ledger import PrivacyLedger
from server.app import app as server_app
from server.checkpoint import load_checkpoint, save_schema
from server.layout import contribution_layout
from server.rounds import ServerState
from server.settings import RunFolder
from umbel.inprocess import Faults, InProcessGrid, partitions, run_server_app
from umbel.simulate import lay_out

KEYS: dict[bytes, SealingKey] = {}
"""What no server keeps: the private halves of the keys that replies were sealed to, by the public ones."""

Answers = Callable[[int, Broadcast], Sequence[IntArray]]
"""Node and broadcast to the sums that the node answers with: one if it is honest."""


class Silent:
    """A progress that shows nothing."""

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a run has left behind.

    Attributes:
        folder: Its files.
        config: As resolved.
        layout: Of its releases.
        broadcasts: What nodes were sent for each release, by sequence number.
    """

    folder: RunFolder
    config: Config
    layout: Layout
    broadcasts: dict[int, Broadcast]

    @property
    def releases(self) -> dict[int, IntArray]:
        """The released sums by the sequence number of the line that paid for them."""
        return {int(path.stem): unpack(path)[0]["noised_sum"] for path in sorted(self.folder.rounds.iterdir())}

    @property
    def state(self) -> ServerState:
        """The server's last state."""
        found = load_checkpoint(self.folder.checkpoints)
        assert found is not None
        return found.state

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The public numbers of every round."""
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]

    def ledger(self) -> PrivacyLedger:
        """The ledger as it is on disk, for reading."""
        return PrivacyLedger.open(Path(str(self.config.run.ledger)))


def configuration(root: Path, **overrides: Any) -> Config:
    """A small noiseless run; keys have `__` for the dot."""
    defaults = {
        "run.out": str(root),
        "data.synthetic.users": 12,
        "data.synthetic.examples": 6,
        "data.synthetic.dimension": 4,
        "data.synthetic.rank": 1,
        "data.synthetic.sparsity": 1,
        "model.rank": 1,
        "model.sparsity": 1,
        "training.rounds": 2,
        "training.nodes": 2,
        "training.round_timeout": 60.0,
        "privacy.epsilon": "none",
        "privacy.seed": 0,
    }
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    if given.get("training.engine") != "flower":  # in this process all nodes are there at once, or never
        defaults["training.startup_timeout"] = 1.0
    return load_config(None, defaults | given)


def prepare(config: Config, noise_multiplier: str | None = None) -> Config:
    """Lay the run out; with another noise multiplier than planned if given, in a ledger that promises nothing."""
    resolved = lay_out(config, Silent())
    if noise_multiplier is None:
        return resolved
    folder = RunFolder(root=Path(str(resolved.run.out)))
    changed = load_config(folder.config, {"run.noise_multiplier": noise_multiplier})
    write_durably(folder.config, changed.to_toml().encode())
    return changed


def run_real(
    config: Config,
    *,
    data: tuple[Population, DataSchema] | None = None,
    faults: Faults | None = None,
) -> Run:
    """The real apps, on the configured source or on `data` cut into the configured nodes."""
    broadcasts: dict[int, Broadcast] = {}

    def recorded(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.contribute":
            _record(broadcasts, wire.read_request(message)[0])
        return real_client_app(message=message, context=context)

    def node_data(_: Any, __: Any, index: int, num_nodes: int) -> tuple[Population, DataSchema]:
        assert data is not None
        return partition(data[0], num_nodes, index), data[1]

    close_services()
    try:
        if data is None:
            return _run(config, recorded, broadcasts, faults)
        save_schema(RunFolder(root=Path(str(config.run.out))).schema, data[1])
        with mock.patch.object(client.service, "node_data", node_data):
            return _run(config, recorded, broadcasts, faults)
    finally:
        close_services()


def run_answers(config: Config, answers: Answers, *, users_per_node: int) -> Run:
    """The real ServerApp with nodes that answer every release with what `answers` says."""
    broadcasts: dict[int, Broadcast] = {}
    app = ClientApp()

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        name = f"node-{context.node_config['partition-id']}"
        return wire.answer(introduced(name, users_per_node), message)

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        broadcast = Broadcast.decode(wire.read_request(message)[0])
        sequence = _record(broadcasts, broadcast.encode())
        index = int(context.node_config["partition-id"])
        (total,) = answers(index, broadcast)
        reply = Contribution(ledger_id=broadcast.ledger_id, sequence=sequence, acknowledged=sequence, total=total)
        return wire.answer(enclosed(reply.encode(), broadcast, f"node-{index}"), message)

    @app.train("fold_in")
    def fold_in(message: Message, _: Context) -> Message:
        return wire.answer(encode({"acknowledged": 0}, {}), message)

    return _run(config, app, broadcasts, None)


def introduced(name: str, users: int) -> bytes:
    """What a node without a key says when it is asked who it is."""
    header = {"protocol": PROTOCOL_VERSION, "name": name, "users": users}
    return introduce(encode(header, {}), challenge=b"", sign=None)


def enclosed(contribution: bytes, broadcast: Broadcast, name: str) -> bytes:
    """The reply of a node without a key."""
    return enclose(contribution, broadcast=broadcast.encode(), name=name, sealing_key=broadcast.sealing_key, sign=None)


def opened(reply: bytes, payload: bytes, name: str) -> bytes:
    """The contribution in a reply to a broadcast, as the ServerApp reads it."""
    key = KEYS[Broadcast.decode(payload).sealing_key]
    return disclose(reply, broadcast=payload, name=name, key=key, public_key="")


def run_app(config: Config, app: Any, faults: Faults | None = None) -> Run:
    """The real ServerApp with any ClientApp."""
    return _run(config, app, {}, faults)


def layout_of(config: Config, *, private: bool) -> Layout:
    """The layout of a synthetic run."""
    return contribution_layout(config.data.synthetic.dimension, config.model.rank, private=private)


def _run(config: Config, app: Any, broadcasts: dict[int, Broadcast], faults: Faults | None) -> Run:
    folder = RunFolder(root=Path(str(config.run.out)))
    nodes = partitions(config.training.nodes, {"node-config": str(folder.nodes / "node.toml")})
    run_config: dict[str, bool | float | int | str] = {"run-folder": str(folder.root)}
    with (
        InProcessGrid(app, nodes, run_config=run_config, faults=faults) as grid,
        mock.patch.object(SealingKey, "fresh", _remembered),
    ):
        run_server_app(server_app, grid)
    private = config.run.noise_multiplier != "0"
    return Run(folder=folder, config=config, layout=layout_of(config, private=private), broadcasts=broadcasts)


def _remembered() -> SealingKey:
    key = SealingKey(X25519PrivateKey.generate())
    KEYS[key.public] = key
    return key


def _record(broadcasts: dict[int, Broadcast], payload: bytes) -> int:
    broadcast = Broadcast.decode(payload)
    sequence = int(json.loads(broadcast.lines[-1])["sequence"])
    broadcasts[sequence] = broadcast
    return sequence


def zeros(layout: Layout) -> IntArray:
    """The sum of nobody."""
    return np.zeros(layout.size, np.int64)
