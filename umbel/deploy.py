"""A federation as plain processes on this machine, and its SuperLink's Control API: the same that containers run.

SuperLink, the executor of ServerApps, the proxy, the metrics page and the nodes are processes of their own that outlive
the command. All listen on loopback. SuperLink's own port has no login: who reaches it may start runs, so that only the
proxy's is for devices.
"""

import contextlib
import fcntl
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Protocol, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app.user_config import UserConfig
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.errors import UmbelError
from common.files import make_folder
from umbel import processes
from umbel.checks import is_free
from umbel.federation import Deployment, FederationFolder, load_deployment
from umbel.processes import Process

HOST = "localhost"
_BIN = Path(sys.executable).parent
_START_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_DRAIN_SECONDS = 20.0
_PORT_SECONDS = 2.0  # a process that was killed holds its port until the last of its threads has gone
_LOG_TAIL = 3
_FINISHED = "finished"
# What would call home, count usage or fetch packages; and BLAS threads, which would fight for the cores.
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
# How often an executor asks for work. A node's starts a process for each message; the server's one a run, and each
# question costs SuperLink 5 ms, which at 20 a second is a fifth of a core for nothing (measured).
_ASK_SECONDS = {"superexec": "0.5"}
_ASK_SECONDS_OF_NODES = "0.05"
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Progress(Protocol):
    """Who watches."""

    def step(self, name: str) -> None:
        """A new step has begun."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True, kw_only=True)
class NodeSeen:
    """A node as SuperLink knows it.

    Attributes:
        name: With which it was registered.
        public_key: For Flower's transport, as bytes.
        is_online: Whether it was heard of lately.
        number: SuperLink's own, or None of one that may not connect any more.
    """

    name: str
    public_key: bytes
    is_online: bool
    number: int | None = None


class Control:
    """SuperLink's Control API.

    Args:
        address: `host:port`.
        authority: The CA of its certificate.
    """

    def __init__(self, address: str, authority: Path) -> None:
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def nodes(self) -> list[NodeSeen]:
        """All nodes that are registered."""
        with self._asking():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            NodeSeen(
                name=node.name,
                public_key=node.public_key,
                is_online=node.status == "online",
                number=None if node.status == "unregistered" else node.node_id,
            )
            for node in found
        ]

    def register(self, name: str, public_key: bytes) -> None:
        """Let the node with this key connect."""
        with self._asking():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, number: int) -> None:
        """Let a node connect no more."""
        with self._asking():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=number))

    def start_run(self, bundle: Path, run_config: UserConfig) -> str:
        """Submit a bundle; returns the run's number."""
        content = bundle.read_bytes()
        fab = Fab(sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(run_config))
        with self._asking():
            run_id = self._client.StartRun(request).run_id
        if not run_id:
            raise UmbelError("Expected SuperLink to accept the run, got a refusal. See its log.")
        return str(run_id)

    def run_status(self, run_id: str) -> str:
        """`pending`, `starting`, `running`, `finished`, or `unknown` to a SuperLink that has lost its state."""
        with self._asking():
            runs = self._client.ListRuns(ListRunsRequest(run_id=int(run_id))).run_dict
        found = runs.get(int(run_id))
        return found.status.status if found is not None else "unknown"

    def log_of(self, run_id: str) -> str:
        """What the ServerApp of a run that has ended has logged: it keeps it at SuperLink."""
        with self._asking():
            return "".join(piece.log_output for piece in self._client.StreamLogs(StreamLogsRequest(run_id=int(run_id))))

    def stop_run(self, run_id: str) -> None:
        """End a run, for SuperLink; one that has ended is no trouble."""
        with contextlib.suppress(UmbelError), self._asking():
            self._client.StopRun(StopRunRequest(run_id=int(run_id)))

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise UmbelError(f"Expected SuperLink to do as asked, got status {error.response.status_code}.") from error
        except httpx.HTTPError as error:
            raise UnreachableError(
                f"Expected SuperLink at {self._address}, got {type(error).__name__}. "
                "Start the federation with `umbel up`, or see its log."
            ) from error


class UnreachableError(UmbelError):
    """SuperLink does not answer."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A process of the federation.

    Attributes:
        name: For people, logs and `pids.json`.
        command: What is run.
    """

    name: str
    command: tuple[str, ...]


class Federation:
    """A provisioned folder and the processes that serve it.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = FederationFolder(root=root.resolve())

    @cached_property
    def deployment(self) -> Deployment:
        """What the federation consists of."""
        return load_deployment(self.folder)

    @property
    def superlink(self) -> str:
        """Address of SuperLink for the operator."""
        return f"{HOST}:{self.deployment.ports.superlink}"

    @property
    def logs(self) -> Path:
        """Where the processes' output goes."""
        return self.folder.var / "logs"

    @property
    def processes(self) -> dict[str, Process]:
        """The processes that `up` has started, whether they still run or not."""
        return processes.load(self._pids)

    def control(self) -> Control:
        """SuperLink's Control API."""
        return Control(self.superlink, self.folder.authority)

    def programs(self, *, stock: bool) -> list[Program]:
        """Everything that `up` starts, in this order."""
        ports, folder = self.deployment.ports, self.folder
        secret, authority = str(folder.superexec_secret), str(folder.authority)
        server = [
            Program(
                name="superlink",
                command=(
                    *_flower("flower-superlink"),
                    *("--host", "127.0.0.1", "--port", str(ports.superlink)),
                    *("--database", str(folder.var / "superlink.db")),
                    *("--ssl-ca-certfile", authority, "--ssl-certfile", str(folder.certificate)),
                    *("--ssl-keyfile", str(folder.certificate_key)),
                    *("--enable-supernode-auth", "--isolation", "process"),
                    *("--superexec-auth-secret-file", secret, "--disable-runtime-dependency-installation"),
                ),
            ),
            Program(
                name="superexec",
                command=(
                    *_flower("flower-superexec"),
                    *("--runtime-api-address", self.superlink, "--root-certificates", authority),
                    *("--superexec-auth-secret-file", secret),
                ),
            ),
            Program(
                name="proxy",
                command=(
                    *(sys.executable, "-m", "server.fleet_proxy"),
                    *("--listen", f"127.0.0.1:{ports.fleet}", "--superlink", self.superlink),
                    *("--ca", authority, "--cert", str(folder.certificate), "--key", str(folder.certificate_key)),
                ),
            ),
            Program(
                name="metrics",
                command=(
                    *(sys.executable, "-m", "server.metrics", "--runs", str(folder.runs)),
                    *("--ledger", str(folder.place.ledger), "--listen", f"127.0.0.1:{ports.metrics}"),
                ),
            ),
        ]
        return server + [self._node(name, stock=stock) for name in self.deployment.nodes.names]

    def _node(self, name: str, *, stock: bool) -> Program:
        node = self.folder.node(name)
        if not stock:
            return Program(name=name, command=(sys.executable, "-m", "umbel", "node", str(node.settings)))
        return Program(
            name=name,
            command=(
                *_flower("flower-supernode"),
                *("--superlink", f"{HOST}:{self.deployment.ports.fleet}"),
                *("--root-certificates", str(node.authority)),
                *("--auth-supernode-private-key", str(node.auth_key)),
                *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(_free_port())),
                *("--node-config", f'node-config="{node.settings}"'),
            ),
        )

    def up(self, progress: Progress, *, stock: bool = False) -> list[str]:
        """Start what does not run, and wait until all of it works together.

        Args:
            progress: Who watches.
            stock: Flower's own SuperNodes instead of resident nodes.

        Returns:
            What was started.

        Raises:
            UmbelError: If a port is taken or a process ends; those that run go on, and `up` can be run again.
        """
        for place in (self.folder.var, self.logs, self.folder.var / "neutral"):
            make_folder(place, mode=0o700)
        make_folder(self.folder.runs)
        started = []
        with self._alone():
            known = self.processes
            for program in self.programs(stock=stock):
                if program.name in known and processes.is_running(known[program.name]):
                    continue
                if program.name in known:  # its children may have outlived it
                    processes.stop([known[program.name]], seconds=0)
                self._check_port(program.name)
                progress.step(f"starting {program.name}")
                known[program.name] = self._start(program)
                processes.save(self._pids, known)
                started.append(program.name)
                if program.name == "superlink":
                    self._wait(known, "superlink", self._superlink_answers)
                    progress.step("registering nodes")
                    self._register()
                elif program.name == "proxy":
                    self._wait(known, "proxy", self._proxy_answers)
            self._register()
            progress.step("waiting for nodes")
            self._wait_for_nodes(known)
        if "metrics" in started and not processes.is_running(known["metrics"]):  # training does without it
            progress.warn(f"the metrics page has ended. {self._log_of('metrics')}")
            started.remove("metrics")
        return started

    def down(self, progress: Progress) -> list[str]:
        """End what `up` has started, children of theirs too; returns what was ended.

        The ServerApp and the nodes first: what they have begun they finish or, as after any crash, can go on with. What
        the federation consists of is not asked, so that one can be ended whose `deployment.toml` is damaged.
        """
        if not self._pids.exists():
            load_deployment(self.folder)  # another folder is no federation that is down
            return []
        ended = []
        with self._alone():
            known = self.processes
            nodes = [name for name in known if name not in _SERVER_PARTS]
            for names in (["superexec", *nodes], ["proxy", "metrics"], ["superlink"]):
                alive = [name for name in names if name in known and processes.group_of(known[name])]
                if not alive:
                    continue
                progress.step(f"ending {', '.join(alive)}")
                if processes.stop([known[name] for name in alive], seconds=_DRAIN_SECONDS):
                    progress.warn(f"some of {', '.join(alive)} did not end in {_DRAIN_SECONDS:g} s and were killed.")
                ended += alive
            processes.save(self._pids, {})
        return ended

    def nodes_online(self) -> tuple[str, ...]:
        """Names of the deployment's nodes that SuperLink hears of."""
        with self.control() as control:
            seen = {node.public_key for node in control.nodes() if node.is_online}
        return tuple(name for name in self.deployment.nodes.names if self._public_key(name) in seen)

    def server_app_runs(self) -> bool | None:
        """Whether a ServerApp is at work on this machine; None where its executor is not ours to look at."""
        if processes.lock_holder(self.folder.place.ledger) is not None:
            return True
        executor = self.processes.get("superexec")
        if executor is None:
            return None
        return any(member.pid != executor.pid for member in processes.group_of(executor))

    @property
    def _pids(self) -> Path:
        return self.folder.var / "pids.json"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse to work while another `up` or `down` does."""
        with (self.folder.var / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UmbelError(
                    f"Expected to be the only one at work on {self.folder.root}, got another `up` or `down`. Wait."
                ) from error
            yield

    def _start(self, program: Program) -> Process:
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        home = self.folder.var / "flwr" / program.name
        make_folder(home, mode=0o700)
        asking = _ASK_SECONDS.get(program.name, _ASK_SECONDS_OF_NODES)
        environment = inherited | _ENVIRONMENT | {"FLWR_HOME": str(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": asking}
        # Flower starts its own programs by their names, and httpx would ask a proxy of the environment
        environment["PATH"] = os.pathsep.join([str(_BIN), inherited.get("PATH", "")])
        environment["NO_PROXY"] = environment["no_proxy"] = "localhost,127.0.0.1"
        return processes.start(
            program.command, env=environment, cwd=self.folder.var / "neutral", log=self.logs / f"{program.name}.log"
        )

    def _check_port(self, name: str) -> None:
        ports = self.deployment.ports
        port = {"superlink": ports.superlink, "proxy": ports.fleet, "metrics": ports.metrics}.get(name)
        if port is None:
            return
        option = "fleet" if name == "proxy" else name
        until = time.monotonic() + _PORT_SECONDS
        while not is_free(port):
            if time.monotonic() > until:
                raise UmbelError(
                    f"Expected port {port} to be free for {name}, got it in use. End who uses it, or choose another "
                    f"with `umbel provision {self.folder.root} --{option}-port 0`."
                )
            time.sleep(_LOOK_SECONDS)

    def _wait(self, known: Mapping[str, Process], name: str, answers: Callable[[], bool]) -> None:
        until = time.monotonic() + _START_SECONDS
        while not answers():
            self._check_alive(known, name)
            if time.monotonic() > until:
                raise UmbelError(f"Expected {name} to answer, got none in {_START_SECONDS:g} s. {self._log_of(name)}")
            time.sleep(_LOOK_SECONDS)

    def _check_alive(self, known: Mapping[str, Process], name: str) -> None:
        if not processes.is_running(known[name]):
            raise UmbelError(f"Expected {name} to run, got it ended. {self._log_of(name)}")

    def _log_of(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        last = [line.strip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip()][-_LOG_TAIL:]
        return f"{path} ends: {' | '.join(last)}" if last else f"{path} is empty."

    def _superlink_answers(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self.folder.authority))
            return httpx.get(f"https://{self.superlink}/health", verify=context, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def _proxy_answers(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self.folder.authority))
            address = f"https://{HOST}:{self.deployment.ports.fleet}/"
            return httpx.get(address, verify=context, trust_env=False).status_code == httpx.codes.NOT_FOUND
        except httpx.HTTPError:
            return False

    def _public_key(self, name: str) -> bytes:
        path = self.folder.node(name).auth_public
        key = load_ssh_public_key(path.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UmbelError(
                f"Expected {path} with a key on a NIST curve, got another. Make it with `umbel provision`."
            )
        return public_key_to_bytes(key)

    def _register(self) -> None:
        """Tell SuperLink the keys of nodes that it does not know yet, and to forget those from before a rotation."""
        keys = {name: self._public_key(name) for name in self.deployment.nodes.names}
        with self.control() as control:
            seen = control.nodes()
            for node in seen:
                if node.number is not None and node.name in keys and node.public_key != keys[node.name]:
                    control.unregister(node.number)
            known = {node.public_key for node in seen}
            for name, key in keys.items():
                if key not in known:
                    control.register(name, key)

    def _wait_for_nodes(self, known: Mapping[str, Process]) -> None:
        wanted = self.deployment.nodes.names
        until = time.monotonic() + _START_SECONDS
        while missing := sorted(set(wanted) - set(self.nodes_online())):
            for name in missing:
                self._check_alive(known, name)
            if time.monotonic() > until:
                raise UmbelError(
                    f"Expected {len(wanted)} nodes online, got none of {', '.join(missing)} in {_START_SECONDS:g} s. "
                    f"{self._log_of(missing[0])}"
                )
            time.sleep(_LOOK_SECONDS)


_SERVER_PARTS = ("superlink", "superexec", "proxy", "metrics")


def is_over(status: str) -> bool:
    """Whether a run with this status will do nothing more."""
    return status.startswith(_FINISHED) or status == "unknown"


def _flower(name: str) -> tuple[str, ...]:
    """One of Flower's programs, of this environment."""
    return (str(_BIN / name),)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
