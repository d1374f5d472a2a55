"""What `umbel status` shows of a federation, and `umbel train` of a run that has ended."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UmbelError
from privacy.ledger import PrivacyLedger
from privacy.rounding import counted, rounded_down, rounded_up
from server.certificates import expiry, parse_certificate
from server.settings import RunFolder
from umbel.console import show_not_private
from umbel.deploy import Federation
from umbel.plan import room
from umbel.processes import is_running
from umbel.submit import outcome_of, submission_of

_ANY_NOISE = "1"


def status_of(root: Path) -> dict[str, Any]:
    """Processes, nodes, last run, budget and certificates, as documented for `--format json`."""
    federation = Federation(root)
    return {
        "folder": str(federation.folder.root),
        "processes": _processes(federation),
        "nodes": _nodes(federation),
        "last_run": _last_run(federation),
        "ledger": _ledger(federation),
        "certificates": _certificates(federation),
    }


def show_status(document: Mapping[str, Any]) -> None:
    """The same for people."""
    console = Console()
    table = Table.grid(padding=(0, 2))
    running = [name for name, process in document["processes"].items() if process["running"]]
    ended = [name for name, process in document["processes"].items() if not process["running"]]
    table.add_row("running", ", ".join(running) or "nothing; start it with `umbel up`")
    if ended:
        table.add_row("ended", Text(", ".join(ended), style="bold red"))
    nodes, run, ledger = document["nodes"], document["last_run"], document["ledger"]
    offline = f"; not: {', '.join(nodes['offline'])}" if nodes["offline"] else ""
    table.add_row("nodes", "unknown" if nodes["online"] is None else f"{len(nodes['online'])} online{offline}")
    if run is not None:
        table.add_row("last run", f"{run['name']}, {counted(run['rounds'], 'round')}, {run['state']}")
    if ledger["not_private"]:
        table.add_row("budget", "NOT PRIVATE")
    else:
        left, of_all = rounded_down(ledger["epsilon_left"]), rounded_up(ledger["epsilon"])
        table.add_row("budget", f"epsilon {left} left of {of_all} at delta {rounded_up(ledger['delta'])}")
    for name, certificate in document["certificates"].items():
        table.add_row(f"{name} certificate", f"until {certificate['until'][:10]}, {certificate['days_left']} days")
    console.print(table)


def show_run(document: Mapping[str, Any]) -> None:
    """A run's end: what was spent, what is promised, where it all is."""
    console, privacy = Console(), document["privacy"]
    if privacy["not_private"]:
        show_not_private(console)
    else:
        spent = (
            f"epsilon {rounded_up(privacy['epsilon'])} at delta {rounded_up(privacy['delta'])} spent by the ledger, "
            f"{counted(privacy['rounds'], 'round')} of this run at noise multiplier {privacy['noise_multiplier']:g}"
        )
        console.print(Text(spent), soft_wrap=True)
        console.print(Text(privacy["promise"]), soft_wrap=True)
    for name in ("report", "model", "run"):
        console.print(Text(f"{name}: {document[name]}"), soft_wrap=True)


def _processes(federation: Federation) -> dict[str, Any]:
    known = federation.processes
    return {name: {"pid": process.pid, "running": is_running(process)} for name, process in known.items()}


def _nodes(federation: Federation) -> dict[str, Any]:
    names = federation.deployment.nodes.names
    try:
        online = federation.nodes_online()
    except UmbelError:
        return {"online": None, "offline": []}
    return {"online": list(online), "offline": [name for name in names if name not in online]}


def _last_run(federation: Federation) -> dict[str, Any] | None:
    configs = sorted(federation.folder.runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
    if not configs:
        return None
    folder = RunFolder(root=configs[-1].parent)
    submission = submission_of(folder)
    outcome = None if submission is None else outcome_of(folder, submission)
    if outcome is not None:
        state = "finished" if outcome["error"] is None else f"ended with {outcome['error']}"
    elif submission is None:
        state = "not submitted"
    else:
        state = "interrupted" if federation.server_app_runs() is False else "at work"
    rounds = len(folder.metrics.read_bytes().splitlines()) if folder.metrics.exists() else 0
    return {"name": folder.root.name, "state": state, "rounds": rounds}


def _ledger(federation: Federation) -> dict[str, Any]:
    with PrivacyLedger.open(federation.folder.place.ledger) as ledger:
        return room(ledger, _ANY_NOISE, 1)


def _certificates(federation: Federation) -> dict[str, Any]:
    now = datetime.now(UTC)
    paths = {"authority": federation.folder.authority, "server": federation.folder.certificate}
    ends = {name: expiry(parse_certificate(path.read_bytes())) for name, path in paths.items()}
    return {name: {"until": end.isoformat(), "days_left": (end - now).days} for name, end in ends.items()}
