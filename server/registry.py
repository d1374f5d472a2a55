"""Who may be invited: the nodes of a population and how many users each hosts. Public, beside the ledger."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from common.errors import UmbelError
from common.files import write_durably
from common.records import canonical_json

_is_key = re.compile(r"(?:[0-9a-f]{64})?").fullmatch


@dataclass(frozen=True, kw_only=True)
class RegisteredNode:
    """A node that may be invited.

    Attributes:
        name: As the node calls itself.
        users: How many users it hosts.
        public_key: With which it signs, Ed25519, hex; "" for a node of a simulation.
    """

    name: str
    users: int
    public_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """All nodes of a population."""

    nodes: tuple[RegisteredNode, ...]

    def __post_init__(self) -> None:
        """Check what counting users rests on.

        Raises:
            ValueError: If a name is there twice or a node hosts nobody.
        """
        keys = [node.public_key for node in self.nodes if node.public_key]
        if any(len(set(each)) < len(each) for each in ([node.name for node in self.nodes], keys)):
            raise ValueError("Expected each node and each key once, got one twice.")
        if any(node.users < 1 or _is_key(node.public_key) is None for node in self.nodes):
            raise ValueError("Expected nodes with users and keys of 64 hex digits, got another.")

    @property
    def population_size(self) -> int:
        """Users in all."""
        return sum(node.users for node in self.nodes)

    @property
    def users_per_node(self) -> int:
        """The most users that one node hosts."""
        return max((node.users for node in self.nodes), default=0)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical encoding, hex."""
        return sha256(self._encoded()).hexdigest()

    def users_of(self) -> dict[str, int]:
        """Users by node name."""
        return {node.name: node.users for node in self.nodes}

    def save(self, path: Path) -> None:
        """Write it durably."""
        write_durably(path, self._encoded() + b"\n")

    def _encoded(self) -> bytes:
        return canonical_json({"nodes": [asdict(node) for node in self.nodes]})


def registry_of(users_by_name: Iterable[tuple[str, int]]) -> Registry:
    """A registry from names and user counts, in the order of the names."""
    return Registry(nodes=tuple(RegisteredNode(name=n, users=u) for n, u in sorted(users_by_name)))


def registry_with(nodes: Iterable[RegisteredNode]) -> Registry:
    """A registry in the order of the names."""
    return Registry(nodes=tuple(sorted(nodes, key=lambda node: node.name)))


def load_registry(path: Path) -> Registry:
    """Read a registry.

    Raises:
        UmbelError: If the file is missing or is not a registry.
    """
    try:
        entries = json.loads(path.read_text("utf-8"))["nodes"]
        return registry_with(
            RegisteredNode(name=str(e["name"]), users=int(e["users"]), public_key=str(e["public_key"])) for e in entries
        )
    except OSError as error:
        raise UmbelError(f"Expected a registry at {path}, got {error.strerror}. Run `umbel provision`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UmbelError(
            f"Expected a registry at {path}, got something else. Restore it from the ledger's copy."
        ) from error
