"""A SuperLink with TLS and node authentication on loopback, an app that asks nodes who they are, and resident nodes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.config import load_config
from umbel.provision import Request, provision

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",  # SuperLink starts programs by their names
}
PROJECT = """
[project]
name = "asking"
version = "0.0.1"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "tests"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["asking/*.py", "LICENSE"]
[tool.flwr.app.components]
serverapp = "asking.server:app"
clientapp = "asking.client:app"
[tool.flwr.app.config]
folder = ""
nodes = 2
"""
SERVER = '''
import json, time
from pathlib import Path
from flwr.serverapp import ServerApp
from common import wire
from common.records import decode

app = ServerApp()

@app.main()
def main(grid, context):
    """Ask all nodes again and again who they are, until told to stop."""
    folder = Path(context.run_config["folder"])
    asked = 0
    while not (folder / "stop").exists():
        ids = list(grid.get_node_ids())
        if len(ids) < context.run_config["nodes"]:
            time.sleep(0.1)
            continue
        asked += 1
        challenge = bytes([asked % 256]) * 32
        begun, answers = time.time(), []
        waiting = grid.push_messages(
            [wire.request(challenge, bytes(64), node_id=i, action="query.identity", ttl=20) for i in ids]
        )
        waiting = list(waiting)
        while waiting and time.time() - begun < 20:
            for reply in grid.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                found = wire.read_answer(reply)
                answers.append(found.code if isinstance(found, wire.Refusal) else len(found))
            time.sleep(0.05)
        with (folder / "answers.jsonl").open("a") as file:
            file.write(json.dumps({"asked": asked, "seconds": time.time() - begun, "answers": answers}) + "\\n")
'''
CLIENT = """
from flwr.clientapp import ClientApp

raise RuntimeError("no resident node imports this")
app = ClientApp()
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def eventually(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `true` returns as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds} s")


class Loopback:
    """A federation of two nodes whose processes a test starts and ends one by one."""

    def __init__(self, root: Path) -> None:
        """Provision it."""
        self.root, self.fed, self.port = root, root / "fed", free_port()
        config = load_config(
            None, {"data.synthetic.users": 8, "data.synthetic.dimension": 4, "data.synthetic.examples": 5}
        )
        fleet = free_port()
        provision(self.fed, Request(nodes=2, config=config, ports={"superlink": self.port, "fleet": fleet}))
        for name in ("edge-1", "edge-2"):  # there is no proxy here
            path = self.settings(name)
            path.write_text(path.read_text().replace(f"localhost:{fleet}", f"localhost:{self.port}"))
        self.home = root / "home"
        self.home.mkdir()
        address = f'address = "localhost:{self.port}"\nroot-certificates = "{self.fed}/ca/ca.crt"\n'
        (self.home / "config.toml").write_text(f"[superlink.here]\n{address}")
        self.app = root / "app"
        (self.app / "asking").mkdir(parents=True)
        (self.app / "pyproject.toml").write_text(PROJECT)
        (self.app / "LICENSE").write_text("none\n")
        (self.app / "asking" / "__init__.py").write_text("")
        (self.app / "asking" / "server.py").write_text(SERVER)
        (self.app / "asking" / "client.py").write_text(CLIENT)
        self.processes: list[subprocess.Popen[bytes]] = []

    def settings(self, name: str) -> Path:
        """The settings of a node."""
        return self.fed / "nodes" / name / "node.toml"

    def status(self, name: str) -> dict[str, Any]:
        """What a node last said."""
        path = self.settings(name).parent / "store" / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A process with a log, in a neutral folder."""
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self.home), "UMBEL_LOG": "json"}
        neutral = self.root / "neutral"
        neutral.mkdir(exist_ok=True)
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=neutral, env=environment, start_new_session=True
            )
        self.processes.append(process)
        return process

    def superlink(self) -> subprocess.Popen[bytes]:
        """The SuperLink, which listens when this returns."""
        server, ca = self.fed / "server", self.fed / "ca" / "ca.crt"
        process = self.start(
            "superlink",
            *(str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", str(self.root / "superlink.db"), "--enable-supernode-auth"),
            *("--ssl-certfile", str(server / "tls.crt"), "--ssl-keyfile", str(server / "tls.key")),
            *("--ssl-ca-certfile", str(ca)),
        )
        eventually(self._listens)
        return process

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def flwr(self, *arguments: str) -> str:
        """Flower's own command line, as the operator."""
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self.home)}
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=self.root, env=environment, timeout=60
        )
        return done.stdout + done.stderr

    def register(self, name: str) -> None:
        """Let the SuperLink know a node's key."""
        key = self.settings(name).parent / "auth.key.pub"
        said = self.flwr("supernode", "register", str(key), "here", "--name", name)
        assert "register" in said.lower(), said

    def node(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """A resident node."""
        return self.start(name, str(BIN / "umbel"), "node", str(self.settings(name)), "--poll", "0.1", *options)

    def run(self) -> None:
        """Submit the app."""
        said = self.flwr("run", str(self.app), "here", "--run-config", f'folder="{self.root}" nodes=2')
        assert re.search(r"uccess|tarted", said), said

    def answers(self) -> list[dict[str, Any]]:
        """What the app has got so far, one entry for each time it asked."""
        path = self.root / "answers.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, name: str) -> list[dict[str, Any]]:
        """A node's log."""
        lines = (self.root / f"{name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, answers: Sequence[object]) -> dict[str, Any]:
        """The next round, of those not begun yet, with these answers."""
        before = len(self.answers())
        return dict(
            eventually(
                lambda: next(
                    (
                        a
                        for a in self.answers()[before + 1 :]
                        if sorted(map(str, a["answers"])) == sorted(map(str, answers))
                    ),
                    None,
                ),
                60,
            )
        )

    def end(self) -> None:
        """End everything this has started."""
        (self.root / "stop").touch()
        for process in self.processes:
            if process.poll() is None:
                with_group(process.pid, signal.SIGKILL)
            process.wait()


def with_group(pid: int, number: int) -> None:
    """A signal to a process and its children."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def loopback(root: Path) -> Iterator[Loopback]:
    """A provisioned federation without processes."""
    made = Loopback(root)
    try:
        yield made
    finally:
        made.end()
