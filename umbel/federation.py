"""A federation's folder: where its files lie, and `deployment.toml`, which says what it consists of."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config import DataConfig, Family, to_toml
from common.errors import UmbelError
from common.files import write_durably
from server.settings import LedgerPlace

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,30}", re.ASCII)
"""What a node or a federation may be called: safe in a path, in a certificate and for Flower."""

Port = Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True, kw_only=True)
class NodeFolder:
    """What one device gets.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """What the node is told, for `client.settings`."""
        return self.root / "node.toml"

    @property
    def auth_key(self) -> Path:
        """Key for Flower's transport, in OpenSSH's format."""
        return self.root / "auth.key"

    @property
    def auth_public(self) -> Path:
        """Its public half, with which the node is registered at the SuperLink."""
        return self.root / "auth.key.pub"

    @property
    def signing_key(self) -> Path:
        """Ed25519 key that signs contributions; the registry has its public half."""
        return self.root / "signing.key"

    @property
    def authority(self) -> Path:
        """Whose certificates the node trusts."""
        return self.root / "ca.crt"

    @property
    def superexec_secret(self) -> Path:
        """What a stock SuperNode's executor has to show."""
        return self.root / "superexec.secret"

    @property
    def store(self) -> Path:
        """Folder of the filters and personal models."""
        return self.root / "store"


@dataclass(frozen=True, kw_only=True)
class FederationFolder:
    """The places of a federation's files.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def deployment(self) -> Path:
        """What the federation consists of; whoever has it is a federation's folder."""
        return self.root / "deployment.toml"

    @property
    def authority(self) -> Path:
        """The certificate that everybody trusts."""
        return self.root / "ca" / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Its key, needed only to make certificates."""
        return self.root / "ca" / "ca.key"

    @property
    def server(self) -> Path:
        """What only the server has."""
        return self.root / "server"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.server / "tls.crt"

    @property
    def certificate_key(self) -> Path:
        """Its key."""
        return self.server / "tls.key"

    @property
    def superexec_secret(self) -> Path:
        """What the ServerApp's executor has to show."""
        return self.server / "superexec.secret"

    @property
    def place(self) -> LedgerPlace:
        """The population's ledger and its key."""
        return LedgerPlace(ledger=self.server / "ledger.jsonl")

    @property
    def registry(self) -> Path:
        """Who may be invited."""
        return self.server / "registry.json"

    @property
    def recovery_key(self) -> Path:
        """The key that the operator keeps elsewhere."""
        return self.root / "recovery" / "recovery.key"

    @property
    def compose_environment(self) -> Path:
        """Variables for docker-compose.yml."""
        return self.root / "compose.env"

    @property
    def runs(self) -> Path:
        """Run folders."""
        return self.root / "runs"

    @property
    def var(self) -> Path:
        """State of the processes that `umbel up` starts."""
        return self.root / "var"

    def node(self, name: str) -> NodeFolder:
        """What one device gets."""
        return NodeFolder(root=self.root / "nodes" / name)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hosts(_Table):
    """Where the server is reached.

    Attributes:
        names: Names and addresses, all of them in its certificate; devices call the first one.
    """

    names: tuple[str, ...] = Field(min_length=1)


class Ports(_Table):
    """Where the server listens.

    Attributes:
        superlink: Flower's own port, for the operator only.
        fleet: The proxy's, which devices reach.
        metrics: Of Prometheus' exporter, on loopback.
    """

    superlink: Port = 8443
    fleet: Port = 9443
    metrics: Port = 9464


class Budget(_Table):
    """What GENESIS of the population's ledger says, or will say once it is written.

    Attributes:
        population: Whose privacy is counted, in words.
        epsilon: For all runs together; inf for a ledger that promises nothing.
        delta: Likewise.
        max_nodes_per_user: On how many nodes one person may be a user.
    """

    population: Annotated[str, Field(min_length=1)]
    epsilon: float
    delta: float
    max_nodes_per_user: Annotated[int, Field(ge=1)] = 1


class Nodes(_Table):
    """The devices, and what a new one is told.

    Attributes:
        names: In the order they were added; each ends in a number of its own.
        partitions: Into how many parts `data` is divided, of which node number i has the i-th; 0 where each device
            has data of its own.
        users_per_node: How many users a device with data of its own has.
        family: Loss family of the targets.
        mu_max: Limit of each user, where it is not the ledger's.
        allow_statistics: Whether it answers AMHT-LRS too.
        allow_not_private: Whether it answers releases that are not private.
    """

    names: tuple[Annotated[str, Field(pattern=f"^{NAME.pattern}-[1-9][0-9]*$")], ...] = ()
    partitions: Annotated[int, Field(ge=0)] = 0
    users_per_node: Annotated[int, Field(ge=1)] | None = None
    family: Family = "squared"
    mu_max: str | None = None
    allow_statistics: bool = False
    allow_not_private: bool = False

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each node, by name."""
        return {name: int(name.rpartition("-")[2]) for name in self.names}


class Deployment(_Table):
    """What `deployment.toml` says.

    Attributes:
        format: Of this file.
        name: Of the federation.
        hosts: Where the server is reached.
        ports: Where it listens.
        budget: The population's.
        nodes: The devices.
        data: Of the nodes: one source that is divided, for a trial; or what is declared about each device's own; or
            None where the devices' owners declare it.
    """

    format: int = FORMAT
    name: str
    hosts: Hosts
    ports: Ports = Ports()
    budget: Budget
    nodes: Nodes = Nodes()
    data: DataConfig | None = None

    def save(self, path: Path) -> None:
        """Write it durably."""
        head = "# Written by `umbel provision`; change it with its options. No secret is in here.\n"
        write_durably(path, (head + to_toml(self.model_dump(exclude_none=True))).encode())


def load_deployment(folder: FederationFolder) -> Deployment:
    """Read what a federation consists of.

    Raises:
        UmbelError: If the folder is not one that `umbel provision` made, or of a newer version.
    """
    path = folder.deployment
    try:
        found: Mapping[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UmbelError(
            f"Expected the folder of a federation, got {folder.root} ({path.name}: {error.strerror}). "
            "Make one with `umbel provision`."
        ) from error
    except ValueError as error:
        raise UmbelError(f"{path}: Expected TOML in UTF-8, got this problem: {error}. Restore it.") from error
    if found.get("format") != FORMAT:
        raise UmbelError(f"{path}: Expected format={FORMAT}, got format={found.get('format')!r}. Use a newer umbel.")
    try:
        return Deployment.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UmbelError(
            f"{path}: Expected a deployment, got a problem at {key}: {problem['msg']}. Mend it."
        ) from error
