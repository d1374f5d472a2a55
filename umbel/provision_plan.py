"""What `umbel provision` was asked for, and what a federation is to consist of then. Nothing here writes."""

import math
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from client.sources import node_data
from common.config import Config, DataConfig
from common.errors import UmbelError
from privacy.participation import mu_max_string
from server import certificates
from server.registry import load_registry
from umbel.checks import call, is_free
from umbel.federation import NAME, Budget, Deployment, FederationFolder, Hosts, Nodes, Ports, load_deployment
from umbel.plan import resolve_delta
from umbel.rotation import LEDGER, SERVER

DEFAULT_EPSILON = 8.0
ALWAYS_HOSTS = ("localhost", "127.0.0.1", "superlink", "fleet-proxy")
"""What this machine and the containers of docker-compose.yml call the server."""
_FIRST_LINE_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the operator asked for; None for what was left open.

    Attributes:
        nodes: How many nodes there are to be in all.
        hosts: Names and addresses of the server.
        config: Of the runs: its data are divided among the nodes.
        users_per_node: How many users each new device has, on data of its own.
        partitions: Into how many parts the data are divided.
        epsilon: Of the population's budget, for all runs.
        delta: Likewise.
        max_nodes_per_user: On how many nodes one person may be a user.
        population: Whose privacy the ledger counts, in words.
        name_prefix: New nodes are called so, with a number.
        ports: By name; 0 chooses a free one.
        rotate: "server", "ledger" or nodes whose keys are to be renewed.
    """

    nodes: int | None = None
    hosts: tuple[str, ...] = ()
    config: Config | None = None
    users_per_node: int | None = None
    partitions: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    max_nodes_per_user: int | None = None
    population: str | None = None
    name_prefix: str = "edge"
    ports: Mapping[str, int | None]
    rotate: tuple[str, ...] = ()


def planned(folder: FederationFolder, request: Request) -> Deployment:
    """What the federation is to consist of, from what there is and what is asked for; nothing is written.

    Raises:
        UmbelError: If it cannot be had.
    """
    unknown = [host for host in request.hosts if not certificates.is_host(host)]
    if unknown:
        raise UmbelError(f"Expected names or addresses of hosts, got --host {unknown[0]!r}. Leave out port and path.")
    if NAME.fullmatch(request.name_prefix) is None:
        raise UmbelError(
            f"Expected letters, digits and single hyphens, got --name-prefix {request.name_prefix!r}. Try edge."
        )
    exists = folder.deployment.exists()
    deployment = _extended(folder, load_deployment(folder), request) if exists else _first(folder, request)
    for what in request.rotate:
        if what not in (SERVER, LEDGER, *deployment.nodes.names):
            raise UmbelError(
                f"Expected server, ledger or a node ({', '.join(deployment.nodes.names)}), got --rotate {what}."
            )
    for name in deployment.nodes.names:
        users_on(folder, deployment, name)
    return deployment


def _first(folder: FederationFolder, request: Request) -> Deployment:
    """A federation where there was none."""
    root = folder.root
    if root.is_dir() and any(entry for entry in root.iterdir() if entry.name != f".{folder.deployment.name}.tmp"):
        raise UmbelError(
            f"Expected a new folder, an empty one, or one that `umbel provision` made, got {root} with other files. "
            "Name another."
        )
    if request.nodes is None or request.nodes < 1:
        raise UmbelError("Expected the number of nodes of a new federation, got none. Add --nodes 3.")
    if request.rotate:
        raise UmbelError(f"Expected a federation for --rotate, got none at {root}. Leave --rotate out.")
    config = request.config or Config()
    has_own_data = request.users_per_node is not None
    if has_own_data and request.partitions is not None:
        raise UmbelError("Expected one of --partitions and --users-per-node, got both. Leave one of them out.")
    data = config.data if has_own_data else _with_absolute_paths(config.data)
    privacy = config.privacy
    nodes = Nodes(
        partitions=0 if has_own_data else max(request.nodes, request.partitions or 0),
        users_per_node=request.users_per_node,
        family=config.model.family,
        mu_max=_limit_of_sampled_run(config, request),
        allow_statistics=config.training.algorithm == "amht-lrs",
        allow_not_private=privacy.epsilon == "none" or privacy.seed is not None,
    )
    hosts = tuple(dict.fromkeys((*request.hosts, *ALWAYS_HOSTS)))
    name = root.name if NAME.fullmatch(root.name) else "federation"
    source = None if has_own_data and request.config is None else data
    named = _with_nodes(nodes, request.nodes, request.name_prefix)
    counted = sum(_users_of(named, data, number) for number in named.numbers.values())
    return Deployment(
        name=name,
        hosts=Hosts(names=hosts),
        ports=_ports(Ports(), request.ports),
        budget=_budget(request, population=Path(source.source).name if source else name, users=counted),
        nodes=named,
        data=source,
    )


def _extended(folder: FederationFolder, deployment: Deployment, request: Request) -> Deployment:
    """A federation with what was added."""
    _check_budget(deployment.budget, request)
    nodes = deployment.nodes
    if request.partitions not in (None, nodes.partitions):
        raise UmbelError(
            f"Expected {nodes.partitions} partitions as the data were divided, got --partitions {request.partitions}: "
            "users would move between nodes. Leave it out, or provision another folder."
        )
    if request.config is not None and not _same_data(deployment, request.config.data):
        raise UmbelError(
            "Expected the data that this federation was provisioned with, got a --config with others. Leave it out; "
            "a new node's data can be changed in its node.toml."
        )
    count = len(nodes.names) if request.nodes is None else request.nodes
    if count < len(nodes.names):
        raise UmbelError(
            f"Expected --nodes of at least {len(nodes.names)}, the nodes there are, got {count}: provisioning only "
            "adds. To retire a node, take its name out of deployment.toml and its entry out of server/registry.json."
        )
    nodes = nodes.model_copy(update={"users_per_node": request.users_per_node or nodes.users_per_node})
    hosts = tuple(dict.fromkeys((*deployment.hosts.names, *request.hosts)))
    kept = {name: port for name, port in deployment.ports.model_dump().items() if not _is_taken(folder, port)}
    asked = {name: port or kept.get(name, port) for name, port in request.ports.items()}
    return deployment.model_copy(
        update={
            "nodes": _with_nodes(nodes, count, request.name_prefix),
            "hosts": Hosts(names=hosts),
            "ports": _ports(deployment.ports, asked),
        }
    )


def _with_nodes(nodes: Nodes, count: int, prefix: str) -> Nodes:
    """The nodes with as many more as it takes; numbers are never given twice among those there are."""
    taken = max(nodes.numbers.values(), default=0)
    new = range(taken + 1, taken + 1 + count - len(nodes.names))
    if new and nodes.users_per_node is None and new[-1] > nodes.partitions:
        raise UmbelError(
            f"Expected data for node {new[-1]}, got data that are divided into {nodes.partitions} parts, which the "
            "nodes have already. Add --users-per-node for a device with data of its own; provision with --partitions "
            "to leave room for nodes."
        )
    return nodes.model_copy(update={"names": (*nodes.names, *(f"{prefix}-{i}" for i in new))})


def users_on(folder: FederationFolder, deployment: Deployment, name: str) -> int:
    """How many users a node hosts."""
    if folder.registry.exists() and name in (known := load_registry(folder.registry).users_of()):
        return known[name]
    return _users_of(deployment.nodes, deployment.data or DataConfig(), deployment.nodes.numbers[name])


def _users_of(nodes: Nodes, data: DataConfig, number: int) -> int:
    if number > nodes.partitions:
        return nodes.users_per_node or 1
    try:
        part, _ = node_data(data, nodes.family, number - 1, nodes.partitions)
    except ValueError as error:
        raise UmbelError(f"Expected users for each of {nodes.partitions} nodes: {error}") from error
    return part.num_users


def _limit_of_sampled_run(config: Config, request: Request) -> str | None:
    """What the filters of a sampled run's nodes must have room for, which is more than the ledger's limit."""
    if config.privacy.sampling_probability is None:
        return None
    from umbel.simulate import device_limit, noise_and_limit  # noqa: PLC0415 (a world of its own, seldom asked for)

    delta, _ = resolve_delta(request.delta or config.privacy.delta, None)
    noise_multiplier, mu_max = noise_and_limit(config, delta)
    run = config.run.model_copy(update={"noise_multiplier": noise_multiplier})
    return device_limit(config.model_copy(update={"run": run}), mu_max)


def _budget(request: Request, *, population: str, users: int) -> Budget:
    """What the population may lose in all of its runs."""
    privacy = (request.config or Config()).privacy
    delta, _ = resolve_delta(request.delta or privacy.delta, users)
    planned = DEFAULT_EPSILON if privacy.epsilon == "none" else max(DEFAULT_EPSILON, float(privacy.epsilon))
    epsilon = request.epsilon or (math.inf if privacy.epsilon == "none" else privacy.ledger_epsilon or planned)
    s = request.max_nodes_per_user or privacy.max_nodes_per_user
    try:
        if math.isfinite(epsilon):
            mu_max_string(epsilon, delta, s)
    except ValueError as error:
        raise UmbelError(f"--epsilon, --delta: {error}") from error
    return Budget(population=request.population or population, epsilon=epsilon, delta=delta, max_nodes_per_user=s)


def _check_budget(budget: Budget, request: Request) -> None:
    """Refuse to change what GENESIS says for ever, or is about to."""
    for name in Budget.model_fields:
        asked, said = getattr(request, name), getattr(budget, name)
        if asked not in (None, said):
            raise UmbelError(
                f"Expected {name}={said} as this federation was begun, got --{name.replace('_', '-')} {asked}. Leave "
                "it out; another budget is another population's, in another folder."
            )


def is_begun(ledger: Path) -> bool:
    """Whether there is a whole first line; a torn one is written anew."""
    if not ledger.exists():
        return False
    with ledger.open("rb") as file:
        return b"\n" in file.read(_FIRST_LINE_BYTES)


def _ports(present: Ports, asked: Mapping[str, int | None]) -> Ports:
    """The ports with those that were asked for; 0 is replaced by one that is free now."""
    with ExitStack() as stack:
        chosen = {name: port or _free_port(stack) for name, port in asked.items() if port is not None}
    try:
        ports = Ports(**{**present.model_dump(), **chosen})
    except ValueError as error:
        raise UmbelError(f"Expected ports from 1 to 65535, or 0 for free ones, got {chosen}.") from error
    if len({ports.superlink, ports.fleet, ports.metrics}) < 3:
        raise UmbelError(f"Expected three different ports, got {ports.model_dump()}. Change one of them.")
    return ports


def _is_taken(folder: FederationFolder, port: int) -> bool:
    """Whether another program than this federation's own listens there."""
    if is_free(port):
        return False
    answer = call(f"127.0.0.1:{port}", folder.authority) if folder.authority.exists() else None
    return answer is None or bool(answer.problem)


def _free_port(stack: ExitStack) -> int:
    """A free port on loopback, kept until all are chosen so that none is chosen twice."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    return int(listener.getsockname()[1])


def _with_absolute_paths(data: DataConfig) -> DataConfig:
    """Data that several nodes of one machine share."""
    names = ("source", "item_features", "catalogue")
    given = {name: value for name in names if (value := getattr(data, name)) not in (None, "synthetic")}
    return data.model_copy(update={name: str(Path(value).resolve()) for name, value in given.items()})


def _same_data(deployment: Deployment, data: DataConfig) -> bool:
    return deployment.data in (data, _with_absolute_paths(data))
