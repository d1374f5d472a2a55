"""What a deployed federation costs on one machine: time of a round, memory and CPU of a node, resident and stock.

    python benchmarks/deployment.py --rounds 10

prints a Markdown table. All processes, TLS and the proxy are those of `umbel up`; the deadline-free work is the same
run in one process, without messages.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common.config import Config, load_config
from umbel import processes, submit
from umbel.deploy import Federation
from umbel.processes import Process
from umbel.provision import Request, provision
from umbel.simulate import simulate

_SETTINGS = {"privacy.epsilon": 1.0, "model.rank": 4, "model.sparsity": 3}
_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 2**20


class Silent:
    """A watcher that shows nothing."""

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""

    def round(self, numbers: Mapping[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to run.

    Attributes:
        seconds: Median of a round, without the first.
        rss: MiB of a node's processes between messages, or NaN.
        cpu: CPU seconds of a node for each message it has answered, or NaN.
    """

    seconds: float
    rss: float
    cpu: float


def configuration(rounds: int, nodes: int) -> Config:
    """The run that is measured everywhere."""
    return load_config(None, _SETTINGS | {"training.rounds": rounds, "training.nodes": nodes})


def in_one_process(rounds: int, nodes: int) -> Measured:
    """The work alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(rounds, nodes)
        run = config.run.model_copy(update={"out": f"{folder}/run"})
        simulate(config.model_copy(update={"run": run}), progress=Silent(), with_baselines=False)
        return Measured(seconds=round_seconds(Path(folder) / "run"), rss=float("nan"), cpu=float("nan"))


def deployed(rounds: int, nodes: int, poll: float, *, stock: bool) -> Measured:
    """The same run by a federation."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "fed"
        ports = {"superlink": 0, "fleet": 0, "metrics": 0}
        provision(root, Request(nodes=nodes, config=configuration(rounds, nodes), ports=ports))
        for path in root.glob("nodes/*/node.toml"):
            path.write_text(path.read_text("utf-8").replace("poll_seconds = 1.0", f"poll_seconds = {poll}"), "utf-8")
        federation = Federation(root)
        try:
            federation.up(Silent(), stock=stock)
            node = federation.processes[federation.deployment.nodes.names[0]]
            config = configuration(rounds, nodes)
            settings = submit.lay_out(federation, config, "measured", Silent())
            before = cpu_seconds(node)
            begun = time.monotonic()
            with mock.patch.object(submit, "write_reports"):
                submit.train(federation, settings, Silent())
            spent, lasted = cpu_seconds(node) - before, time.monotonic() - begun
            before = cpu_seconds(node)
            time.sleep(10)
            idle = (cpu_seconds(node) - before) / 10
            messages = rounds + 2  # who it is, and the last round's fold_in
            return Measured(
                seconds=round_seconds(settings.folder.root),
                rss=rss_mib(node),
                cpu=max(spent - idle * lasted, 0.0) / messages,
            )
        finally:
            federation.down(Silent())


def round_seconds(root: Path) -> float:
    """Median over the rounds of a run; the first may load code."""
    lines = (root / "evaluation" / "timings.jsonl").read_text("utf-8").splitlines()
    return statistics.median([json.loads(line)["seconds"] for line in lines][1:])


def cpu_seconds(node: Process) -> float:
    """Of a node and of what it has started and waited for."""
    fields = Path(f"/proc/{node.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS


def rss_mib(node: Process) -> float:
    """Of a node and of what it has started, now."""
    total = 0
    for member in processes.group_of(node):
        words = Path(f"/proc/{member.pid}/statm").read_text("utf-8").split()
        total += int(words[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / _MIB


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Round time, memory and CPU of a federation on one machine.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between a resident node's questions")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{given.nodes} nodes, TLS, {given.rounds} rounds, poll {given.poll:g} s; median of a round")
    print("| | s a round | beyond the work | node RSS, MiB | CPU-s a message |\n|---|---|---|---|---|")
    alone = in_one_process(given.rounds, given.nodes)
    show("in one process, no messages", alone, alone)
    for name, stock in (("resident nodes", False), ("stock SuperNodes", True)):
        show(name, deployed(given.rounds, given.nodes, given.poll, stock=stock), alone)


def show(name: str, found: Measured, alone: Measured) -> None:
    """A row of the table."""
    beyond = found.seconds - alone.seconds
    print(f"| {name} | {found.seconds:.2f} | {beyond:.2f} | {found.rss:.0f} | {found.cpu:.3f} |", flush=True)


if __name__ == "__main__":
    main()
