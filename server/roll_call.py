"""Which connected node is which of the registry: asked, answered with the node's own signature, remembered.

Flower's own registration is open to whoever reaches its Control API, so being online says nothing: only a node that
answers a fresh challenge with the key the registry has of it is ever invited. One that says it hosts another number of
users than the registry is left out before anything is charged: later, the bound on its sum would let one user decide
whether all of them count.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from common.errors import Refused, UmbelError
from common.sealing import UNSIGNED, check_introduction
from server.registry import RegisteredNode, Registry
from server.replies import Answer, identity_in

_PAUSE_SECONDS = 0.2
_REFRESH_SECONDS = 5.0
_MOST_PATIENCE = 64


class Nodes(Protocol):
    """What a round needs of the federation: Flower, behind one function."""

    def node_ids(self) -> list[int]:
        """Nodes that are connected."""

    def ask(
        self, node_ids: Iterable[int], action: str, payload: bytes, signature: bytes, timeout: float
    ) -> Iterator[Answer]:
        """Send one signed message to each node, and yield what comes back within `timeout` seconds."""


class RollCall:
    """The nodes of a registry, as far as they have been there."""

    def __init__(self, registry: Registry, nodes: Nodes, *, max_users: int) -> None:
        """Nobody has answered yet.

        Args:
            registry: Who may be invited.
            nodes: The federation.
            max_users: A node with more is not invited.
        """
        self._registered = {node.name: node for node in registry.nodes}
        self._nodes = nodes
        self._max_users = max_users
        self._present: dict[int, RegisteredNode] = {}
        self._refused: dict[int, str] = {}
        self._strangers: dict[int, tuple[int, int]] = {}  # how often in vain, and when to ask again
        self._calls = 0

    @property
    def known(self) -> Mapping[int, RegisteredNode]:
        """Nodes that have said who they are, by Flower's number."""
        return self._present

    def wait(self, seconds: float, *, enough: Callable[[int, int], bool] = int.__eq__) -> list[int]:
        """Ask until enough nodes are there or time is up.

        Args:
            seconds: At most.
            enough: Of the numbers of nodes that are connected and known, and of all that are registered.

        Returns:
            Those that are connected and known.

        Raises:
            UmbelError: If that is nobody.
        """
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            self._ask(max(left, _PAUSE_SECONDS))
            there = self.connected()
            if enough(len(there), len(self._registered)) or (there and left <= 0):
                return there
            if left <= 0:
                codes = ", ".join(sorted(set(self._refused.values())))
                said = f" that answers: {codes}" if codes else ""
                raise UmbelError(
                    f"Expected nodes of the registry to be connected, got none{said}. Start them and resume."
                )
            time.sleep(_PAUSE_SECONDS)

    def refresh(self) -> list[int]:
        """Those that are connected and known, after strangers were asked who they are; of these few are asked twice."""
        self._calls += 1
        self._ask(_REFRESH_SECONDS, patient=True)
        return self.connected()

    def connected(self) -> list[int]:
        """Nodes that are connected and known, in the order of their numbers."""
        return sorted(self._present.keys() & set(self._nodes.node_ids()))

    def _ask(self, seconds: float, *, patient: bool = False) -> None:
        """Ask all connected nodes that have not said who they are; with patience, the silent ones ever less often."""
        unknown = [node_id for node_id in self._nodes.node_ids() if node_id not in self._present]
        if patient:
            unknown = [node_id for node_id in unknown if self._strangers.get(node_id, (0, 0))[1] <= self._calls]
        if not unknown:
            return
        challenge = os.urandom(32)
        for node_id in unknown:
            times = self._strangers.get(node_id, (0, 0))[0] + 1
            self._strangers[node_id] = times, self._calls + min(2**times, _MOST_PATIENCE)
        for answer in self._nodes.ask(unknown, "query.identity", challenge, UNSIGNED, seconds):
            try:
                self._present[answer.node_id] = self._recognised(answer, challenge)
            except Refused as refused:
                self._refused[answer.node_id] = refused.code
            else:
                self._strangers.pop(answer.node_id, None)
                self._refused.pop(answer.node_id, None)

    def _recognised(self, answer: Answer, challenge: bytes) -> RegisteredNode:
        name, users = identity_in(answer)
        node = self._registered.get(name)
        if node is None:
            raise Refused("node_unknown", "Expected a node of the registry, got another.")
        check_introduction(answer.payload or b"", challenge=challenge, public_key=node.public_key)
        before = next((node_id for node_id, known in self._present.items() if known.name == name), None)
        if before is not None and not node.public_key:
            raise Refused("node_unknown", "Expected each name once, got one again.")
        if users != node.users or users > self._max_users:
            raise Refused("policy_users", f"Expected {node.users} users as registered, got {users}.")
        if before is not None:  # the holder of the key has a new number
            del self._present[before]
        return node
