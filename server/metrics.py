"""Prometheus metrics of a federation, from its files: run folders and the ledger. Public numbers only.

    python -m server.metrics --runs DIR/runs --ledger DIR/server/ledger.jsonl --listen 127.0.0.1:9464

Reads at each scrape what the server has written: `release/metrics.jsonl`, `outcome.json` and the seconds of rounds of
the newest runs, and the ledger, verified again whenever it has changed. It changes nothing, needs no key, and holds
nothing about a user or a single node: counts of nodes, public refusal codes, epsilon. How long a round took depends
on users' data a little, so the page is the operator's: it listens on loopback, and on another address only with
`--allow-any-host`.
"""

import argparse
import ipaddress
import json
import logging
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common import logs
from common.errors import REFUSALS, UmbelError
from privacy.audit.verify import Verification, verify
from privacy.gaussian import epsilon_of_mu
from privacy.promise import reasons_against
from server.settings import RunFolder

MAX_RUNS = 20
"""Runs on the page: those that were at work last."""
STATES = ("prepared", "running", "finished", "failed")
_MAX_BYTES = 2**26
_LARGEST_PORT = 65535
_logger = logging.getLogger("umbel.metrics")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's folder says.

    Attributes:
        name: Of the folder.
        state: One of `STATES`. A run whose process was killed is "running" still: watch the time since its last round.
        rounds: The lines of its metrics that are whole, in order.
        seconds: How long its last round took, or None.
        changed: Unix time at which its last round ended or, before there is one, it was laid out.
        broken_lines: Lines that are not a round's: one may be torn by a crash.
    """

    name: str
    state: str
    rounds: tuple[Mapping[str, Any], ...]
    seconds: float | None
    changed: float
    broken_lines: int


def read_runs(root: Path, most: int = MAX_RUNS) -> list[RunFacts]:
    """The runs that were at work last, newest first; a folder that is half made or gone meanwhile is left out."""
    try:
        found = [_changed(path) for path in root.iterdir()]
    except OSError:
        return []
    newest = sorted((entry for entry in found if entry is not None), reverse=True)[:most]
    return [_read_run(path, changed) for changed, path in newest]


def _changed(path: Path) -> tuple[float, Path] | None:
    folder = RunFolder(root=path)
    for file in (folder.metrics, folder.config):
        try:
            return file.stat().st_mtime, path
        except OSError:
            continue
    return None


def _read_run(path: Path, changed: float) -> RunFacts:
    folder = RunFolder(root=path)
    lines, broken = _json_lines(folder.metrics)
    rounds = tuple(line for line in lines if _whole(line.get("round")) is not None)
    timings, _ = _json_lines(folder.timings)
    last = timings[-1].get("seconds") if timings else None
    return RunFacts(
        name=path.name,
        state=_state(path / "outcome.json", rounds, changed),
        rounds=rounds,
        seconds=_number(last),
        changed=changed,
        broken_lines=broken + len(lines) - len(rounds),
    )


def _state(outcome: Path, rounds: Sequence[object], changed: float) -> str:
    """An outcome that is older than the last round is that of before the run went on."""
    try:
        if outcome.stat().st_mtime >= changed:
            found = json.loads(outcome.read_bytes())
            return "finished" if found["error"] is None else "failed"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # none yet, or half written
    return "running" if rounds else "prepared"


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines are none."""
    try:
        with path.open("rb") as file:
            lines = file.read(_MAX_BYTES).splitlines()
    except OSError:
        return [], 0
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, len(lines) - len(found)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def refusals_of(rounds: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Refusals by public code; one that is not of the vocabulary counts as "error"."""
    counts: Counter[str] = Counter()
    for line in rounds:
        refusals = line.get("refusals")
        for code, count in refusals.items() if isinstance(refusals, dict) else ():
            counts[code if code in REFUSALS else "error"] += _whole(count) or 0
    return counts


class LedgerView:
    """A ledger as it was last verified; verified again when its file has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._seen: Verification | None = None

    def read(self) -> Verification | None:
        """What the ledger says, or None where there is none that can be read."""
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                self._seen, self._stamp = verify(self._path), stamp
        except (OSError, UmbelError):
            self._seen = self._stamp = None
        return self._seen


class FederationCollector(Collector):
    """All metrics, read from the files at each scrape."""

    def __init__(self, runs: Path, ledger: Path) -> None:
        self._runs = runs
        self._ledger = LedgerView(ledger)
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        with self._lock:
            seen = self._ledger.read()
            yield from ledger_metrics(seen)
            yield from run_metrics(read_runs(self._runs), time.time())


def ledger_metrics(seen: Verification | None) -> Iterator[Metric]:
    """What the ledger says: budget, spending, releases, and whether it verifies."""
    valid = seen is not None and seen.status != "failed"
    yield _gauge("umbel_ledger_valid", "1 where the ledger was read and its chain and signatures verify.", float(valid))
    if seen is None or not seen.genesis:
        return
    spent, budget = epsilon_spent(seen), float(seen.genesis["epsilon"])
    yield _gauge("umbel_ledger_lines", "Lines of the ledger that are valid.", seen.num_lines)
    yield _gauge("umbel_epsilon_budget", "Epsilon of the ledger's budget.", budget)
    yield _gauge("umbel_epsilon_spent", "Epsilon of all charged releases; NaN where nothing is promised.", spent)
    yield _gauge("umbel_epsilon_left", "Budget less epsilon spent; NaN where nothing is promised.", budget - spent)
    yield _gauge("umbel_delta", "Delta that epsilon is for.", float(seen.genesis["delta"]))
    charged = seen.counts.get("RESERVE", 0)
    yield _counter("umbel_releases_charged", "RESERVE lines: paid for, whatever became of them.", charged)
    yield _counter("umbel_releases", "COMMIT lines: noised sums that went out.", seen.counts.get("COMMIT", 0))
    yield _counter("umbel_releases_aborted", "ABORT lines: charged, and nobody answered.", seen.counts.get("ABORT", 0))
    if seen.registry is not None:
        size = float(seen.registry["population_size"])
        yield _gauge("umbel_population_users", "Users in the registry; a public number.", size)


def epsilon_spent(seen: Verification) -> float:
    """Epsilon at the ledger's delta of everything charged; NaN where a round voids the promise."""
    if reasons_against(seen.rounds.events(), str(seen.genesis["mu_max"])):
        return math.nan
    if seen.sampled is not None:
        return float(seen.sampled.amplified_epsilon)
    return epsilon_of_mu(seen.mu_spent, float(seen.genesis["delta"]))


def run_metrics(runs: Sequence[RunFacts], now: float) -> Iterator[Metric]:
    """What the newest runs say, by the name of the run's folder."""
    for name, text, key in (
        ("umbel_round", "The last round that ended.", "round"),
        ("umbel_rounds_planned", "Rounds of the run.", "rounds"),
        ("umbel_nodes_invited", "Nodes invited to the last round.", "invited"),
        ("umbel_nodes_answered", "Nodes whose sum counts in the last round.", "answered"),
    ):
        values = {run.name: _number(run.rounds[-1].get(key)) for run in runs if run.rounds}
        yield _by_run(name, text, values)
    yield _by_run("umbel_round_seconds", "Seconds that the last round took.", {run.name: run.seconds for run in runs})
    ended = {run.name: run.changed for run in runs if run.rounds}
    yield _by_run("umbel_last_round_timestamp_seconds", "Unix time at which the last round ended.", ended)
    ages = {name: max(0.0, now - at) for name, at in ended.items()}
    yield _by_run("umbel_seconds_since_last_round", "Seconds since the last round ended.", ages)
    broken: dict[str, float | None] = {run.name: run.broken_lines for run in runs}
    yield _by_run("umbel_broken_metric_lines", "Lines of metrics.jsonl that are not a round's.", broken)
    refused = CounterMetricFamily("umbel_refusals", "Answers refused, by public code.", labels=("run", "code"))
    for run in runs:
        for code, count in sorted(refusals_of(run.rounds).items()):
            refused.add_metric((run.name, code), count)
    yield refused
    state = GaugeMetricFamily("umbel_run_state", "1 for the state that the run is in.", labels=("run", "state"))
    for run in runs:
        for possible in STATES:
            state.add_metric((run.name, possible), float(run.state == possible))
    yield state


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by_run(name: str, text: str, values: Mapping[str, float | None]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("run",))
    for run, value in values.items():
        if value is not None:
            family.add_metric((run,), value)
    return family


def listening_address(text: str, *, allow_any_host: bool) -> tuple[str, int]:
    """Host and port of `--listen`.

    Raises:
        UmbelError: If it is none, or is not on loopback and need not be.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > _LARGEST_PORT:
        raise UmbelError(f"Expected --listen as HOST:PORT, got {text!r}.")
    if not allow_any_host and not _is_loopback(host):
        raise UmbelError(
            f"Expected --listen on loopback such as 127.0.0.1:{port}, got {host}: whoever reaches the page can read "
            "it. Say --allow-any-host where a firewall or a container's network keeps others out."
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m server.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of run folders")
    parser.add_argument("--ledger", type=Path, required=True, metavar="FILE", help="the population's ledger")
    parser.add_argument("--listen", default="127.0.0.1:9464", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--allow-any-host", action="store_true", help="listen on an address that is not loopback")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    arguments = argument_parser().parse_args(words)
    ended = threading.Event()
    try:
        logs.configure(default="text")
        host, port = listening_address(arguments.listen, allow_any_host=arguments.allow_any_host)
        registry = CollectorRegistry()
        registry.register(FederationCollector(arguments.runs, arguments.ledger))
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (UmbelError, OSError) as error:
        sys.stderr.write(f"server.metrics: error: {error}\n")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    _logger.info("metrics", extra={"address": f"http://{host}:{server.server_port}/metrics"})
    ended.wait()
    server.shutdown()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
