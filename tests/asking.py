"""A server as a node sees it: signed broadcasts of one ledger, each with a line of its own."""

import hashlib
import time
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.service import NodeService
from client.settings import NodeSettings
from client.sources import node_data
from common.config import DataConfig
from common.model import IntArray, SharedModel
from common.records import Broadcast, Contribution
from common.sealing import disclose
from privacy.keys import public_key_hex
from privacy.layout import groups_of_event
from privacy.lines import ZERO_HEAD, extend, signed_line
from privacy.sampling import poisson
from server.layout import contribution_layout

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class Asker:
    """Asks for releases of one model, without noise unless `noise_multiplier` is given."""

    def __init__(
        self,
        model: SharedModel,
        data: DataConfig,
        *,
        noise_multiplier: str = "0",
        sparsity: int = 1,
        sampling_probability: str | None = None,
        seeded: bool = False,
    ) -> None:
        """Start a ledger.

        Args:
            model: The prior of every release.
            data: Of the nodes that will be asked.
            noise_multiplier: Decimal string.
            sparsity: Cap on nonzeros of b.
            sampling_probability: Of a run whose START line the ledger then begins with.
            seeded: Whether the noise is.
        """
        self._model, self._sparsity = model, sparsity
        self._lines: list[bytes] = []
        self._schema = node_data(data, "squared", 0, 1)[1].digest
        self._head = ZERO_HEAD
        private = noise_multiplier != "0"
        self.layout = contribution_layout(model.dimension, model.rank, private=private)
        self._event = {
            "mechanism": "gaussian",
            "noise_multiplier": noise_multiplier,
            "clipping_norm": "3",
            "grid_scale": self.layout.grid_scale,
            "groups": groups_of_event(self.layout),
            "denominator": 10,
            "noise": ("seeded (NOT PRIVATE)" if seeded else "aes-256-ctr") if private else "none",
            "sampling": poisson(sampling_probability),
            "initialization": False,
        }
        self._start: tuple[str, ...] = ()
        if sampling_probability is not None:
            cost = {"capped_mu_max": "0", "amplified_epsilon": "1"}
            schedule = {"rounds": 100, "noise_multiplier": noise_multiplier, "sampling": poisson(sampling_probability)}
            body = {"run": "run", "schedule": schedule | cost, "configuration_digest": "0" * 64}
            self._start = (self._add("START", body).decode(),)

    @property
    def sequence(self) -> int:
        """Number of the last line."""
        return len(self._lines) - 1

    def train(self) -> tuple[bytes, bytes]:
        """A new release: payload and signature."""
        server_round = len(self._lines) + 1
        body = {"run": "run", "round": server_round, "event": self._event, "invited_users": 10}
        line = self._add("RESERVE", body)
        return self._signed(server_round=server_round, purpose="train", lines=(*self._start, line.decode()))

    def fold_in(self) -> tuple[bytes, bytes]:
        """A message that asks for no contribution."""
        if not self._lines:
            self._add("ABORT", {"reserve": 0, "code": "none"})
        return self._signed(server_round=0, purpose="fold_in", lines=(self._lines[-1].decode(),))

    def _add(self, kind: str, body: dict[str, Any]) -> bytes:
        sequence = len(self._lines)
        line = signed_line(
            sequence=sequence, kind=kind, body=body, previous=self._head, time="2026-11-20T09:00:00Z", key=KEY
        )
        self._lines.append(line)
        self._head = extend(self._head, hashlib.sha256(line).digest())
        return line

    def _signed(self, **fields: Any) -> tuple[bytes, bytes]:
        digests = b"".join(hashlib.sha256(line).digest() for line in self._lines)
        payload = Broadcast(
            ledger_id="L",
            run="run",
            digests_from=0,
            digests=np.frombuffer(digests, np.uint8).reshape(-1, 32),
            deadline=int(time.time()) + 3600,
            task={"family": "squared", "sparsity": self._sparsity},
            model=self._model,
            metric=np.eye(self._model.dimension),
            schema=self._schema,
            **fields,
        ).encode()
        return payload, KEY.sign(payload)


def node(data: DataConfig, *, store: str = ":memory:", mu_max: str = "inf", **settings: Any) -> NodeService:
    """A node with all users of a source, which answers releases without noise too."""
    settings |= {"store": store, "mu_max": mu_max, "data": data}
    known = NodeSettings(public_key=public_key_hex(KEY), ledger_id="L", allow_not_private=True, **settings)
    return NodeService(known, 0, 1)


def total_of(service: NodeService, message: tuple[bytes, bytes]) -> IntArray:
    """The sum a node answers with."""
    reply = service.contribute(*message)
    return Contribution.decode(disclose(reply, broadcast=message[0], name="", key=None, public_key="")).total
