"""What a resident node costs a device: memory at rest, CPU time a message, and what it adds to a no-op Flower client.

    python -m benchmarks.node_footprint [--rounds 20] [--nodes 3] [--users-per-node 20]

Lays out a run on synthetic data, starts a real SuperLink on loopback (without TLS; that costs a handshake) and
resident nodes, submits the run, and looks at the nodes' processes before and after. Imports are timed in processes of
their own, the best of five. Prints a table and one JSON line.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.settings import NodeSettings, load_settings
from common.config import load_config, to_toml
from umbel.flower_engine import build_bundle, install_bundle
from umbel.simulate import lay_out

BIN = Path(sys.executable).parent
_TICKS = os.sysconf("SC_CLK_TCK")
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}
_IMPORTS = {
    "no-op Flower client": "from flwr.clientapp import ClientApp; ClientApp()",
    "resident node": "import client.node",
}
_PROBE = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{code}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(wall, cpu, int(rss.split()[1]) / 1024)
"""


class Silent:
    """A progress that shows nothing."""

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""


def imports(code: str, times: int = 5) -> dict[str, float]:
    """Seconds and MiB of a process that runs `code`; the least of several."""
    probe = _PROBE.format(code=code)
    environment = {**os.environ, **_QUIET}
    found = []
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment
        )
        found.append([float(number) for number in done.stdout.split()])
    wall, cpu, rss = (min(column) for column in zip(*found, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "rss_mib": rss}


def memory(pid: int) -> dict[str, float]:
    """Resident and proportional memory of a process, MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss:", "Pss:"))}
    return {"rss_mib": kib["Rss"] / 1024, "pss_mib": kib["Pss"] / 1024}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(name: str, folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a log, until the block ends."""
    home, neutral = folder / f"home-{name}", folder / "neutral"
    for place in (home, neutral):
        place.mkdir(exist_ok=True)
    environment = {**os.environ, **_QUIET, "FLWR_HOME": str(home), "UMBEL_LOG": "json"}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=neutral, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(what: str, true: Any, seconds: float = 120.0) -> None:
    """Until `true()`; an error that names `what` otherwise."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"Expected {what} within {seconds:.0f} s.")
        time.sleep(0.05)


def node_files(folder: Path, nodes: int, port: int) -> list[Path]:
    """Settings of resident nodes for a run that is laid out."""
    common = load_settings(folder / "run" / "nodes" / "node.toml")
    paths = []
    for index in range(nodes):
        place = folder / f"node-{index}"
        place.mkdir()
        own = {"partition": index, "partitions": nodes, "superlink": f"127.0.0.1:{port}", "poll_seconds": 0.5}
        settings = NodeSettings.model_validate(
            {**common.model_dump(exclude_none=True, by_alias=True), **own, "store": str(place / "node.sqlite")}
        )
        paths.append(place / "node.toml")
        paths[-1].write_text(to_toml(settings.model_dump(exclude_none=True, by_alias=True)))
    return paths


def messages_of(log: Path) -> list[dict[str, Any]]:
    """What a node has answered."""
    entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [entry for entry in entries if entry["message"] in ("answered", "refused")]


def at_work(folder: Path, rounds: int, nodes: int, users_per_node: int) -> dict[str, Any]:
    """A run with resident nodes: their memory before it, and the CPU time it takes them."""
    run, port = folder / "run", free_port()
    overrides = {
        "run.out": str(run),
        "training.rounds": rounds,
        "training.nodes": nodes,
        "privacy.epsilon": 8.0,
        "data.synthetic.users": nodes * users_per_node,
    }
    lay_out(load_config(None, overrides), Silent())
    bundle = install_bundle(build_bundle(folder / "fab"), folder / "apps")
    settings = node_files(folder, nodes, port)
    superlink = (str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port))
    operator = folder / "home-operator"
    operator.mkdir()
    (operator / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    with started("superlink", folder, *superlink):
        with socket.socket() as probe:
            wait_until("a SuperLink", lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
        commands = [started(path.parent.name, folder, str(BIN / "umbel"), "node", str(path)) for path in settings]
        with commands[0] as first:
            others = [command.__enter__() for command in commands[1:]]
            try:
                status = settings[0].parent / "status.json"
                wait_until("a node that is connected", status.exists)
                time.sleep(3)
                idle, before = memory(first.pid), cpu_seconds(first.pid)
                submit = [str(BIN / "flwr"), "run", str(bundle), "here", "--run-config", f'run-folder="{run}"']
                begun = time.monotonic()
                subprocess.run(
                    submit, check=True, capture_output=True, env={**os.environ, **_QUIET, "FLWR_HOME": str(operator)}
                )
                log = folder / "node-0.log"
                # who it is, every round, and the last model
                wait_until("the end of the run", lambda: len(messages_of(log)) >= rounds + 2, 60 + 20 * rounds)
                seconds = time.monotonic() - begun
                answered = messages_of(log)
                cpu = cpu_seconds(first.pid) - before
                after = memory(first.pid)
            finally:
                for command in commands[1 : 1 + len(others)]:
                    command.__exit__(None, None, None)
    return {
        "idle": idle,
        "after": after,
        "messages": len(answered),
        "cpu_seconds_a_message": cpu / len(answered),
        "seconds_a_message": sorted(entry["seconds"] for entry in answered)[len(answered) // 2],
        "run_seconds": seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--users-per-node", type=int, default=20)
    arguments = parser.parse_args()
    found = {name: imports(code) for name, code in _IMPORTS.items()}
    bare, ours = found["no-op Flower client"], found["resident node"]
    with tempfile.TemporaryDirectory(prefix="umbel-footprint-") as folder:
        node = at_work(Path(folder), arguments.rounds, arguments.nodes, arguments.users_per_node)
    rows = [
        ("import, no-op Flower client", f"{bare['seconds']:.2f} s, {bare['rss_mib']:.0f} MiB"),
        ("import, resident node", f"{ours['seconds']:.2f} s, {ours['rss_mib']:.0f} MiB"),
        ("added", f"{ours['seconds'] - bare['seconds']:.2f} s, {ours['rss_mib'] - bare['rss_mib']:.0f} MiB"),
        ("idle resident node", f"{node['idle']['rss_mib']:.0f} MiB RSS, {node['idle']['pss_mib']:.0f} MiB PSS"),
        ("after the run", f"{node['after']['rss_mib']:.0f} MiB RSS"),
        ("a message", f"{node['cpu_seconds_a_message']:.3f} CPU-s, {node['seconds_a_message']:.2f} s (median)"),
    ]
    for name, value in rows:
        print(f"{name:30} {value}")
    print(json.dumps({"imports": found, "node": node}))


if __name__ == "__main__":
    main()
