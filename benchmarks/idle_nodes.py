"""How many idle nodes one SuperLink holds: its CPU time for the poll and the heartbeat of a resident node.

    python -m benchmarks.idle_nodes [--seconds 20] [--clients 2] [--memory]

Starts a real SuperLink on loopback (TLS, node authentication, process isolation, SQLite unless --memory), registers a
node for each client and polls as `umbel node` does between messages, over kept connections, as fast as it answers.
What counts is SuperLink's own CPU time a request, since clients share the cores with it. Prints a table of nodes a
core at several poll intervals, and one JSON line.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from server import certificates
from server.health import is_serving

BIN = Path(sys.executable).parent
HEARTBEAT_SECONDS = 30.0
INTERVALS = (1.0, 3.0, 10.0, 30.0, 60.0, 300.0)
BUSY = 0.7
"""Share of a core that idle nodes may take; the rest is for rounds."""
_STARTUP_SECONDS = 60.0
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def superlink(folder: Path, *, memory: bool) -> Iterator[tuple[int, str]]:
    """A SuperLink until the block ends: its process and its address."""
    authority_key, key = certificates.new_key(), certificates.new_key()
    now = datetime.now(UTC)
    authority = certificates.make_authority(authority_key, name="benchmark", now=now)
    certificate = certificates.make_server_certificate(
        key.public_key(), hosts=["localhost", "127.0.0.1"], authority=authority, authority_key=authority_key, now=now
    )
    (folder / "ca.crt").write_bytes(certificates.certificate_pem(authority))
    (folder / "tls.crt").write_bytes(certificates.certificate_pem(certificate))
    (folder / "tls.key").write_bytes(certificates.to_pem(key))
    (folder / "superexec.secret").write_text(secrets.token_hex(32))
    port, health = free_port(), free_port()
    words = [
        *(str(BIN / "flower-superlink"), "--host=127.0.0.1", f"--port={port}"),
        *(() if memory else (f"--database={folder / 'superlink.db'}",)),
        *(f"--ssl-ca-certfile={folder / 'ca.crt'}", f"--ssl-certfile={folder / 'tls.crt'}"),
        *(f"--ssl-keyfile={folder / 'tls.key'}", "--enable-supernode-auth", "--isolation=process"),
        *(f"--superexec-auth-secret-file={folder / 'superexec.secret'}", "--disable-runtime-dependency-installation"),
        f"--health-server-address=127.0.0.1:{health}",
    ]
    environment = {**os.environ, **_QUIET, "FLWR_HOME": str(folder / "flwr")}
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + _STARTUP_SECONDS
        while not is_serving(f"127.0.0.1:{health}"):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit((folder / "superlink.log").read_text("utf-8", "replace"))
            time.sleep(0.2)
        yield process.pid, f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def register(folder: Path, address: str, number: int) -> Path:
    """A key of its own for a client, known to SuperLink; returns its file."""
    key, path = certificates.new_auth_key(), folder / f"node-{number}.key"
    path.write_bytes(certificates.to_openssh(key))
    public = path.with_suffix(".pub")
    public.write_bytes(certificates.to_openssh_public(key.public_key(), path.stem))
    home = folder / "operator"
    home.mkdir(exist_ok=True)
    settings = f'[superlink.here]\naddress = "{address}"\nroot-certificates = "{folder / "ca.crt"}"\n'
    (home / "config.toml").write_text(settings)
    subprocess.run(
        [str(BIN / "flwr"), "supernode", "register", str(public), "here", "--name", path.stem],
        env={**os.environ, **_QUIET, "FLWR_HOME": str(home)},
        check=True,
        capture_output=True,
    )
    return path


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every client does: one request, again and again, at an address whose CA is in a file."""

    address: str
    ca: str
    request: str
    seconds: float


def repeat(work: Work, key_file: str, results: Any) -> None:
    """One client's work, as a node that is connected; puts how many requests were answered."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL  # noqa: PLC0415 (in the client's process only)
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest  # noqa: PLC0415
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # noqa: PLC0415
    from flwr.proto.node_pb2 import Node  # noqa: PLC0415
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor  # noqa: PLC0415
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # noqa: PLC0415
    from flwr.supernode.fleet_http_client import FleetHttpClient  # noqa: PLC0415
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # noqa: PLC0415

    key = load_ssh_private_key(Path(key_file).read_bytes(), None)
    public, interval = key.public_key(), HEARTBEAT_DEFAULT_INTERVAL
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, public)]
    with FleetHttpClient.from_server_address(work.address, False, work.ca, interceptors=interceptors) as client:
        activation = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=interval)
        node = Node(node_id=client.ActivateNode(activation).node_id)
        count, until = 0, time.monotonic() + work.seconds
        while time.monotonic() < until:
            if work.request == "poll":
                client.PullMessages(PullMessagesRequest(node=node))
            else:
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=interval))
            count += 1
        client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    results.put(count)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pid: int, work: Work, keys: list[Path]) -> dict[str, Any]:
    """Requests a second, and SuperLink's CPU time a request."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    clients = [context.Process(target=repeat, args=(work, str(key), results), daemon=True) for key in keys]
    before = cpu_seconds(pid)
    for client in clients:
        client.start()
    counts = [results.get(timeout=work.seconds + _STARTUP_SECONDS) for _ in clients]
    used = cpu_seconds(pid) - before
    for client in clients:
        client.join()
    return {"requests_per_second": sum(counts) / work.seconds, "cpu_ms": 1e3 * used / sum(counts)}


def nodes_a_core(poll_ms: float, heartbeat_ms: float, interval: float) -> float:
    """Idle nodes whose polls and heartbeats take `BUSY` of a core."""
    cost = poll_ms / interval + heartbeat_ms / HEARTBEAT_SECONDS  # CPU milliseconds a second and node
    return 1e3 * BUSY / cost


def main() -> None:
    """Start, poll, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="SuperLink's state in memory instead of SQLite")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        superlink(Path(temporary), memory=arguments.memory) as (pid, address),
    ):
        folder = Path(temporary)
        keys = [register(folder, address, number) for number in range(arguments.clients)]
        ca, seconds = str(folder / "ca.crt"), arguments.seconds
        found = {
            request: measure(pid, Work(address=address, ca=ca, request=request, seconds=seconds), keys)
            for request in ("poll", "heartbeat")
        }
    for what, result in found.items():
        print(f"{what:<10} {result['requests_per_second']:>6.0f} requests/s {result['cpu_ms']:>6.2f} CPU-ms a request")
    table = {
        interval: nodes_a_core(found["poll"]["cpu_ms"], found["heartbeat"]["cpu_ms"], interval)
        for interval in INTERVALS
    }
    for interval, nodes in table.items():
        print(f"poll every {interval:>5.0f} s: {nodes:>8,.0f} idle nodes at {BUSY:.0%} of a core")
    storage = "memory" if arguments.memory else "sqlite"
    print(json.dumps({"benchmark": "idle_nodes", "storage": storage, "measured": found, "nodes_a_core": table}))


if __name__ == "__main__":
    main()
