"""A whole federation as real processes on loopback: it trains, goes on after kills, and lets nobody in."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.config import load_config
from privacy.ledger import PrivacyLedger
from server.certificates import (
    certificate_pem,
    make_authority,
    make_server_certificate,
    new_auth_key,
    new_key,
    to_openssh,
    to_pem,
)
from tests.faults.loopback import eventually
from umbel import processes
from umbel.deploy import Federation
from umbel.provision import Request, provision

pytestmark = pytest.mark.faults

SMALL = {"data.synthetic.users": 30, "data.synthetic.dimension": 5, "data.synthetic.examples": 8}
RUN = ("--rank", "1", "--sparsity", "1", "--epsilon", "1")
NOT_FOUND = (404, b"")


class Running:
    """A federation of three nodes and the command line for it."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root / "fed"
        ports = {"superlink": 0, "fleet": 0, "metrics": 0}
        provision(self.root, Request(nodes=3, config=load_config(None, SMALL), epsilon=8.0, ports=ports))
        for path in self.root.glob("nodes/*/node.toml"):
            path.write_text(path.read_text().replace("poll_seconds = 1.0", "poll_seconds = 0.2"))
        self.federation = Federation(self.root)

    def umbel(self, command: str, *options: str, code: int = 0, seconds: float = 80) -> dict[str, Any]:
        """A command; what it says as JSON, or, where it is to fail, its last line on stderr."""
        done = subprocess.run(
            self.line(command, *options, "--format", "json"),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else {"said": done.stderr.splitlines()[-1]}

    def line(self, command: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "umbel", command, str(self.root), *options]

    def kill(self, name: str) -> None:
        """End one of the processes at once."""
        process = self.federation.processes[name]
        os.kill(process.pid, signal.SIGKILL)
        eventually(lambda: not processes.is_running(process))

    def rounds(self, run: str) -> int:
        metrics = self.root / "runs" / run / "release" / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def charged(self, run: str) -> int:
        """Rounds of a run in the ledger."""
        name = load_config(self.root / "runs" / run / "config.toml").run.name
        with PrivacyLedger.open(self.federation.folder.place.ledger) as ledger:
            return len(ledger.rounds_of(str(name)))

    def audited(self, run: str) -> dict[str, Any]:
        """A run's audit with the owner's key."""
        settings = (self.root / "nodes" / "edge-1" / "node.toml").read_text()
        key = re.search(r'^public_key = "(\w+)"', settings, re.MULTILINE)
        assert key is not None
        folder = str(self.root / "runs" / run)
        command = [sys.executable, "-m", "umbel", "audit", folder, "--public-key", key[1], "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("federation"))
    try:
        made.umbel("up")
        yield made
    finally:
        subprocess.run(made.line("down"), timeout=60, check=True)


def test_a_run_ends_with_a_model_and_a_report(running: Running) -> None:
    """One command from the configuration to the report; all nodes answered, and the audit verifies it."""
    done = running.umbel("train", "--rounds", "3", "--name", "first", *RUN)
    folder = Path(done["run"])
    assert Path(done["report"]).is_file()
    assert Path(done["model"]).is_file()
    lines = [json.loads(line) for line in (folder / "release" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["answered"], line["invited"]) for line in lines] == [(1, 3, 3), (2, 3, 3), (3, 3, 3)]
    assert not (folder / "nodes").exists()
    assert sorted(path.name for path in (folder / "evaluation").iterdir()) == ["timings.jsonl"]
    assert running.audited("first")["releases"]["committed"] == 3
    status = running.umbel("status")
    assert status["last_run"] == {"name": "first", "rounds": 3, "state": "finished"}
    assert status["nodes"] == {"offline": [], "online": ["edge-1", "edge-2", "edge-3"]}
    assert 6.9 < status["ledger"]["epsilon_left"] < 7.1


def test_a_killed_server_app_goes_on(running: Running) -> None:
    """`train` says at once that it is gone and how to go on; the rounds that are left are done, none twice."""
    with subprocess.Popen(
        running.line("train", "--rounds", "6", "--name", "killed", *RUN), stderr=subprocess.PIPE, text=True
    ) as following:
        eventually(lambda: running.rounds("killed") >= 2, 60)
        holder = processes.lock_holder(running.federation.folder.place.ledger)
        assert holder is not None
        os.kill(holder, signal.SIGKILL)
        assert following.stderr is not None
        said = following.stderr.read().splitlines()[-1]
    assert following.returncode == 130
    assert f"umbel train {running.root} --resume killed" in said
    before = running.charged("killed")
    assert running.umbel("train", "--resume", "killed")["name"] == "killed"
    assert 2 <= before < running.charged("killed") == 6
    assert running.audited("killed")["exit_code"] == 0
    files = {path.stem for path in (running.root / "runs" / "killed" / "release" / "rounds").glob("*.safetensors")}
    assert 5 <= len(files) <= 6


def test_a_run_goes_on_without_who_follows_it(running: Running) -> None:
    """Ctrl-C ends following only; --resume joins the run that is at work and does not start it again."""
    with subprocess.Popen(
        running.line("train", "--rounds", "5", "--name", "left", *RUN), stderr=subprocess.PIPE, text=True
    ) as following:
        eventually(lambda: running.rounds("left") >= 1, 60)
        following.send_signal(signal.SIGINT)
        assert following.stderr is not None
        said = following.stderr.read()
    assert following.returncode == 130, said
    assert "the run goes on" in said
    submitted = json.loads((running.root / "runs" / "left" / "submission.json").read_text())["flower_run_id"]
    assert running.umbel("train", "--resume", "left")["flower_run_id"] == submitted
    assert running.charged("left") == 5


def test_up_starts_what_was_ended(running: Running) -> None:
    """Only that: the others keep their processes; a run still works."""
    before = running.federation.processes
    for name in ("proxy", "edge-2"):
        running.kill(name)
    state = running.umbel("status")["processes"]
    assert sorted(name for name, process in state.items() if not process["running"]) == ["edge-2", "proxy"]
    assert running.umbel("up")["started"] == ["proxy", "edge-2"]
    after = running.federation.processes
    assert {name for name in before if before[name] != after[name]} == {"proxy", "edge-2"}
    assert running.umbel("up")["started"] == []
    running.umbel("train", "--rounds", "1", "--name", "after", *RUN)


def test_a_server_that_refuses_says_why(running: Running) -> None:
    """The exit code of `train` is the run's own; Flower's commands end with 0."""
    said = running.umbel("train", "--rounds", "1", "--epsilon", "50", "--name", "dear", code=3)["said"]
    assert "got one with room for 0" in said
    assert not (running.root / "runs" / "dear").exists()
    assert "'first', which there is" in running.umbel("train", "--name", "first", code=2)["said"]


CONTROL = ("list-runs", "list-nodes", "start-run", "stop-run", "register-node", "unregister-node", "stream-logs")
RUNTIME = ("acquire-task", "pull-task-input", "push-messages", "pull-messages", "get-nodes", "push-logs")
CLOSED = [
    *(f"/v1/control/{name}" for name in CONTROL),
    *(f"/v1/runtime/{name}" for name in RUNTIME),
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2Fcontrol/list-runs",
    "/v1/fleet//../control/list-runs",
    "//v1/control/list-runs",
    "/v1/control/list-runs;/v1/fleet/pull-messages",
    "/v1/fleet/pull-messages;/../../control/list-runs",
    "/V1/CONTROL/LIST-RUNS",
]


def asked(running: Running, port: int, target: str, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of a request whose target goes out as it is written."""
    context = ssl.create_default_context(cafile=str(running.root / "ca" / "ca.crt"))
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
    plain = socket.create_connection(("127.0.0.1", port), 20)
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        tls.sendall(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := tls.recv(65536):
            answer += piece
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), body


def test_without_credentials_there_is_no_way_in(running: Running) -> None:
    """Behind the proxy nothing but the Fleet API is found, which SuperLink itself would have answered to."""
    ports = running.federation.deployment.ports
    for target in (*CLOSED, f"https://localhost:{ports.superlink}/v1/control/list-runs"):
        for method in ("POST", "GET"):
            assert asked(running, ports.fleet, target, method) == NOT_FOUND, target
    assert asked(running, ports.superlink, "/v1/control/list-runs")[0] == 200
    assert asked(running, ports.superlink, "/docs", "GET")[0] == 200
    # the task of a ServerApp cannot be had without the executor's secret even on SuperLink's own port
    assert asked(running, ports.superlink, "/v1/runtime/acquire-task")[0] in (401, 403)


def test_the_fleet_api_itself_wants_a_registered_key(running: Running) -> None:
    """Without a signature, nothing is told of nodes, runs and bundles, and no node is added."""
    before = running.umbel("status")["nodes"]
    for name in ("register-node", "activate-node", "pull-messages", "get-run", "get-fab", "pull-object", "push-object"):
        assert asked(running, running.federation.deployment.ports.fleet, f"/v1/fleet/{name}")[0] in (401, 403), name
    with running.federation.control() as control:
        assert len(control.nodes()) == 3
    assert running.umbel("status")["nodes"] == before


def node_with(running: Running, folder: Path, **changes: str) -> list[str]:
    """The command of a node like edge-1, with settings of its own."""
    text = (running.root / "nodes" / "edge-1" / "node.toml").read_text()
    for key in ("signing_key", "root_certificates", "auth_key"):
        text = text.replace(f'{key} = "', f'{key} = "{running.root}/nodes/edge-1/')
    text = text.replace('store = "store/node.sqlite"', f'store = "{folder}/node.sqlite"')
    for key, value in changes.items():
        text = re.sub(rf'^{key} = ".*"$', f'{key} = "{value}"', text, flags=re.MULTILINE)
    (folder / "node.toml").write_text(text)
    return [sys.executable, "-m", "umbel", "node", str(folder / "node.toml")]


def test_a_key_that_nobody_registered_is_refused(running: Running, tmp_path: Path) -> None:
    """The node is not admitted, and SuperLink knows of no fourth."""
    (tmp_path / "auth.key").write_bytes(to_openssh(new_auth_key()))
    (tmp_path / "auth.key").chmod(0o600)
    command = node_with(running, tmp_path, auth_key=f"{tmp_path}/auth.key")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as node:
        status = tmp_path / "status.json"
        eventually(lambda: status.exists() and "waiting to be admitted" in status.read_text())
        node.terminate()
        _, said = node.communicate(timeout=30)
    assert "connected" not in said
    with running.federation.control() as control:
        assert len(control.nodes()) == 3


def test_nobody_in_the_middle_is_spoken_to(running: Running, tmp_path: Path) -> None:
    """A server whose certificate another authority signed sees a handshake that breaks off, and not one request."""
    now, authority_key, key = datetime.now(UTC), new_key(), new_key()
    authority = make_authority(authority_key, name="other", now=now)
    certificate = make_server_certificate(
        key.public_key(), hosts=["localhost"], authority=authority, authority_key=authority_key, now=now
    )
    (tmp_path / "tls.crt").write_bytes(certificate_pem(certificate))
    (tmp_path / "tls.key").write_bytes(to_pem(key))
    with middle(tmp_path) as (port, came):
        command = node_with(running, tmp_path, superlink=f"localhost:{port}")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as node:
            eventually(lambda: len(came) >= 1)
            node.terminate()
            node.communicate(timeout=30)
        # the same server is spoken to by who trusts that authority
        (tmp_path / "ca.crt").write_bytes(certificate_pem(authority))
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"https://localhost:{port}/v1/fleet/pull-messages", verify=context, trust_env=False)
    assert came.pop().startswith(b"POST /v1/fleet/pull-messages")
    assert set(came) == {b""}


@contextlib.contextmanager
def middle(folder: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A TLS server that keeps what it is sent; b"" for who did not trust it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    came: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as tls:
                    came.append(tls.recv(65536))
            except OSError:
                came.append(b"")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield listening.getsockname()[1], came
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_flowers_own_nodes_work_too(tmp_path: Path) -> None:
    """Stock SuperNodes start a process for each message; then `down` leaves nobody behind."""
    stock = Running(tmp_path)
    try:
        stock.umbel("up", "--stock")
        groups = [processes.group_of(process) for process in stock.federation.processes.values()]
        stock.umbel("train", "--rounds", "1", "--name", "stock", *RUN)
        assert stock.rounds("stock") == 1
    finally:
        ended = stock.umbel("down")["ended"]
    assert set(ended) == {"superlink", "superexec", "proxy", "metrics", "edge-1", "edge-2", "edge-3"}
    assert not any(processes.is_running(member) for group in groups for member in group)
    assert stock.umbel("down")["ended"] == []
