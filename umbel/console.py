"""What the command line shows to people: progress on stderr, tables on stdout. Machines get JSON and none of this."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from privacy.gaussian import epsilon_of_mu
from privacy.promise import NOTHING_PROMISED, promise
from privacy.rounding import counted, rounded_down, rounded_up

_ROUNDS_LOG = "umbel.rounds"
_MOST_LINES = 20
_BAR_WIDTH = 40
_BASELINES = {
    "global": "one global model",
    "alone": "each user alone",
    "ridge_around_global": "ridge around global",
    "low_rank": "low rank only",
    "gradient": "the default algorithm",
    "non_private": "without privacy",
}
_REFERENCE = "non_private"
_NOISE_WIDTH = len("aes-256-ctr")  # never cut, however narrow the terminal
_VOID = "epsilon void, NOT PRIVATE"
_MOST_MULTIPLIERS = 3
_OWNER_UNKNOWN = "Give the owner's --public-key, from where the owner published it, to know whose ledger this is."


class Watcher(Protocol):
    """Who watches a simulation."""

    def step(self, name: str) -> None:
        """A new step has begun."""

    def warn(self, message: str) -> None:
        """Something the user should know."""

    def round(self, numbers: Mapping[str, Any]) -> None:
        """A round has ended; its public numbers."""


def say(message: str) -> None:
    """One line on stderr."""
    print("umbel:", " ".join(message.split()), file=sys.stderr, flush=True)  # noqa: T201 (the command line's voice)


class Lines:
    """Progress as lines, for a log; quiet, only warnings."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def step(self, name: str) -> None:
        """A line for a step."""
        if not self._quiet:
            say(name)

    def warn(self, message: str) -> None:
        """A line for a warning, quiet or not."""
        say(f"warning: {message}")

    def round(self, numbers: Mapping[str, Any]) -> None:
        """A line for a round, or for one of many."""
        every = -(-int(numbers["rounds"]) // _MOST_LINES)
        last = numbers["round"] == numbers["rounds"]
        if not self._quiet and (last or numbers["round"] % every == 0):
            say(f"round {numbers['round']}/{numbers['rounds']}, {round_details(numbers)}")


class Bar:
    """Progress as a bar on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def step(self, name: str) -> None:
        """Another bar, of unknown length until rounds are reported."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=None, details="")

    def warn(self, message: str) -> None:
        """A line above the bar."""
        self._progress.console.print(Text(f"umbel: warning: {message}", style="yellow"), soft_wrap=True)

    def round(self, numbers: Mapping[str, Any]) -> None:
        """The bar moves on."""
        if self._task is not None:
            self._progress.update(
                self._task,
                description=f"round {numbers['round']}/{numbers['rounds']}",
                total=numbers["rounds"],
                completed=numbers["round"],
                details=round_details(numbers),
            )


def round_details(numbers: Mapping[str, Any]) -> str:
    """Answered of invited, epsilon spent and left."""
    answered = f"answered {numbers['answered']}/{numbers['invited']}"
    spent, budget = numbers["epsilon_spent"], numbers["epsilon_budget"]
    if spent is None or budget is None:
        return f"{answered}, NOT PRIVATE"
    return f"{answered}, epsilon {rounded_up(spent)} spent, {rounded_down(budget - spent)} left"


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watcher]:
    """Show a simulation's progress on stderr: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        lines = Lines(quiet=quiet)
        with _listening(lines.round):
            yield lines
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[details]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = Bar(progress)
        with _listening(bar.round):
            yield bar


@contextmanager
def _listening(on_round: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Pass the server's log of rounds on."""
    log, handler = logging.getLogger(_ROUNDS_LOG), _RoundHandler(on_round)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _RoundHandler(logging.Handler):
    def __init__(self, on_round: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._on_round = on_round

    def emit(self, record: logging.LogRecord) -> None:
        """Hand over the numbers of a round; other records have none."""
        numbers = getattr(record, "round", None)
        if isinstance(numbers, Mapping):
            self._on_round(numbers)


def show_results(results: Mapping[str, Any]) -> None:
    """A simulation's end: errors against the baselines, what was spent, what is promised, where it all is."""
    console, privacy = Console(), results["privacy"]
    console.print(_error_table(results))
    if privacy["not_private"]:
        show_not_private(console)
    else:
        _say(
            console,
            f"epsilon {rounded_up(privacy['epsilon'])} at delta {rounded_up(privacy['delta'])} spent by the ledger, "
            f"{rounded_up(privacy['replace_one_epsilon'])} under replace-one; "
            f"{privacy['rounds']} rounds at noise multiplier {privacy['noise_multiplier']:g}",
        )
        _say(console, privacy["promise"])
    speed = results["users_per_second"]
    _say(
        console,
        f"{results['users']} users"
        + (f", {speed:,.0f} users a second" if speed else "")
        + f", {results['peak_memory_bytes'] / 2**20:,.0f} MiB at most",
    )
    if Path(results["report"]).exists():
        _say(console, f"report: {results['report']}")
    _say(console, f"run: {results['run']}")


def show_not_private(console: Console) -> None:
    """A stamp that nobody overlooks."""
    console.print(Panel(Text(NOTHING_PROMISED, style="bold red"), border_style="bold red", expand=False))


def show_plan(plan: Mapping[str, Any]) -> None:
    """Noise, cost, and the budget's curve as bars."""
    console = Console()
    if plan["not_private"]:
        show_not_private(console)
    table = Table.grid(padding=(0, 2))
    for name, value in _plan_rows(plan):
        table.add_row(name, value)
    console.print(table)
    if plan["epsilon"] is not None:
        console.print(_curve_table(plan, "█" if console.encoding.startswith("utf") else "#"))
    if not plan["not_private"]:
        releases, s = (
            f"Everything that such a run releases ({counted(plan['rounds'], 'round')})",
            plan["max_nodes_per_user"],
        )
        _say(console, promise(releases, plan["epsilon"], plan["delta"], max_nodes_per_user=s))
    for note in plan["notes"]:
        _say(console, f"note: {note}")


def show_audit(audit: Mapping[str, Any]) -> None:
    """The verdict and what was recomputed."""
    console = Console()
    privacy = audit["privacy"]
    _show_verdict(console, audit, audit["ledger"], where=f", line {audit['line']}" if audit["line"] else "")
    if audit["reason"]:
        _say(console, audit["reason"])
    if void := privacy is not None and privacy["not_private"]:
        show_not_private(console)
    table = Table.grid(padding=(0, 2))
    for name, value in _audit_rows(audit):
        table.add_row(name, Text(str(value), overflow="fold"))
    console.print(table)
    if privacy is not None and not void:
        _show_losses(console, privacy)
    if audit["empirical"] is not None:
        _show_attack(console, audit["empirical"])
    if privacy is not None and (void or audit["exit_code"] in (0, 5)):
        _say(console, privacy["promise"])
    if audit["exit_code"] == 5:
        _say(console, _OWNER_UNKNOWN)


def show_audit_together(audit: Mapping[str, Any]) -> None:
    """Several targets: the verdict, what each run has cost, and what all have cost together."""
    console, privacy = Console(), audit["privacy"]
    _show_verdict(console, audit, f"{len(audit['targets'])} targets of “{audit['population']}”")
    for target in audit["targets"]:
        where = f", line {target['line']}" if target["line"] else ""
        model = f", model {target['model']['status']}" if target["model"] else ""
        _say(console, " ".join(f"{target['path']}: {target['status']}{where}{model} {target['reason']}".split()))
    if privacy is not None and privacy["not_private"]:
        show_not_private(console)
    table = Table("run", "ledger", "rounds", "z", "mu", "share of mu²", Column("folder", overflow="fold"), box=None)
    for run in audit["runs"]:
        table.add_row(*_run_cells(run))
    console.print(table)
    if privacy is not None:
        if not privacy["not_private"]:
            _say(console, f"together mu {rounded_up(privacy['mu'])}, {counted(len(audit['ledgers']), 'ledger')}")
            _show_losses(console, privacy)
        _say(console, privacy["promise"])
    _say(console, audit["note"])
    if audit["exit_code"] == 5:
        _say(console, _OWNER_UNKNOWN)


def _run_cells(run: Mapping[str, Any]) -> list[str]:
    multipliers = run["noise_multipliers"]
    z = ", ".join(multipliers if len(multipliers) <= _MOST_MULTIPLIERS else [*multipliers[:_MOST_MULTIPLIERS], "…"])
    share = run["mu_share"]
    return [
        run["run"],
        run["ledger_id"][:8],
        str(run["rounds"]),
        z,
        "void" if run["mu"] is None else rounded_up(run["mu"]),
        "–" if share is None else f"{100 * share:.1f} %",
        run["path"] or "–",
    ]


def _show_verdict(console: Console, audit: Mapping[str, Any], what: str, *, where: str = "") -> None:
    privacy = audit["privacy"]
    void = privacy is not None and privacy["not_private"]
    style = "bold red" if void else {0: "bold green", 5: "bold yellow"}.get(audit["exit_code"], "bold red")
    console.print(Text(f"{audit['status']}: {what}{where}", style=style), soft_wrap=True)


def _show_losses(console: Console, privacy: Mapping[str, Any]) -> None:
    """Epsilon at each delta, by each accountant."""
    table = Table("epsilon at delta", "counted", "PLD", "PRV", "RDP", "replace-one", box=None)
    for row in privacy["at_deltas"]:
        names = ("epsilon", "pld_epsilon", "prv_epsilon", "rdp_epsilon", "replace_one_epsilon")
        table.add_row(
            rounded_up(row["delta"]), *("–" if row[name] is None else rounded_up(row[name]) for name in names)
        )
    console.print(table)
    if privacy["pld_epsilon"] is None:
        _say(console, 'PLD and RDP not computed: pip install "umbel[simulate]"')
    elif privacy["prv_epsilon"] is None:
        _say(console, 'PRV not computed: it takes "umbel[audit]", and at most 100,000 rounds.')


def _show_attack(console: Console, found: Mapping[str, Any]) -> None:
    """The lower bounds of an empirical audit, each with what it assumes."""
    claimed, tpr, auroc = found["claimed"], found["tpr_at_fpr"], found["auroc"]
    _say(
        console,
        f"attack with {found['canaries']} canaries on {found['threat']}: {'ALARM' if found['alarm'] else 'no alarm'}; "
        f"claimed epsilon {rounded_up(claimed['epsilon'])} at delta {rounded_up(claimed['delta'])}",
    )
    table = Table("lower bound", "epsilon", "confidence", "assumes", box=None)
    for bound in found["bounds"]:
        table.add_row(bound["name"], rounded_down(bound["epsilon"]), f"{bound['confidence']:.2%}", bound["assumes"])
    console.print(table)
    _say(
        console,
        f"TPR {tpr['tpr']:.3f} ({tpr['low']:.3f} to {tpr['high']:.3f}) at FPR {tpr['fpr']:g}; "
        f"AUROC {auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})",
    )
    if found["written"]:
        _say(console, f"written: {', '.join(found['written'])}")
    if found["not_written"]:
        _say(console, f"not written: {found['not_written']}")


def show_restored(document: Mapping[str, Any]) -> None:
    """What a restored ledger has charged, and what is left."""
    spent, budget = (rounded_up(document[f"epsilon_{name}"]) for name in ("spent", "budget"))
    left = " Nothing more can be released." if document["exhausted"] else ""
    _say(
        Console(),
        f"{document['lost']} lost lines are charged with noise_multiplier {document['noise_multiplier']}: epsilon "
        f"{rounded_up(document['epsilon_before'])} became {spent} of {budget}.{left} The head is now "
        f"{document['head']}; write it down, and put the recovery key away again.",
    )


def show_ledger(contents: Mapping[str, Any]) -> None:
    """A ledger's budget and its rounds, the first and the last of many."""
    console, genesis = Console(), contents["genesis"]
    spent, budget = contents["epsilon_spent"], contents["epsilon_budget"]
    registry = contents["registry"] or {}
    delta = rounded_up(contents["delta"])
    if contents["not_private"]:
        show_not_private(console)
        _say(console, f"{'; '.join(contents['reasons_against'])}.")
    rows = {
        "ledger": contents["ledger"],
        "population": f"{genesis['population']}, {registry.get('population_size', 'no')} users registered",
        "budget": f"epsilon {rounded_up(budget)} at delta {delta}, {genesis['neighboring_relation']}",
        "spent": _VOID if contents["not_private"] else f"epsilon {rounded_up(spent)}",
        "head": contents["head"],
        "public key": contents["public_key"],
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(name, Text(value, overflow="fold"))
    console.print(grid)
    rounds = contents["rounds"]
    if not rounds:
        _say(console, "No round was charged yet.")
        return
    shown = rounds if len(rounds) <= _MOST_LINES else [*rounds[: _MOST_LINES // 2], None, *rounds[-_MOST_LINES // 2 :]]
    table = Table(
        "line",
        "run",
        "round",
        "z",
        Column("noise", min_width=_NOISE_WIDTH),
        "C",
        "users",
        "outcome",
        "epsilon after",
        box=None,
    )
    for entry in shown:
        table.add_row(*(_round_cells(entry, contents["delta"]) if entry else ["…"] * len(table.columns)))
    console.print(table)


def _round_cells(entry: Mapping[str, Any], delta: float) -> list[str]:
    event, mu = entry["event"], entry["mu_after"]
    return [
        str(entry["sequence"]),
        entry["run"],
        str(entry["round"]),
        event["noise_multiplier"],
        event["noise"].partition(" ")[0],
        f"{float(event['clipping_norm']):.4g}",
        str(entry["invited_users"]),
        entry["outcome"],
        "void" if mu is None else rounded_up(epsilon_of_mu(mu, delta)),
    ]


def _error_table(results: Mapping[str, Any]) -> Table:
    """Rows are models, columns groups of users that have held-out examples; the best of each column is bold."""
    ours, baselines, private = results["error"], results["baselines"], not results["privacy"]["not_private"]
    groups = [name for name, error in ours["by_examples"].items() if error is not None]
    caption = "Columns: users by their training examples. * best"
    table = Table(
        f"held-out {results['metric']}",
        "all users",
        *groups,
        box=box.SIMPLE_HEAD,
        caption=f"{caption} that keeps the promise." if private else f"{caption}.",
        caption_justify="left",
    )
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {"umbel (this run)": ours} | {_BASELINES.get(k, k): v for k, v in baselines.items()}
    reference = _BASELINES[_REFERENCE] if private else None
    best = [
        min(
            (v for name, row in rows.items() if name != reference and (v := _cell(row, group)) is not None),
            default=None,
        )
        for group in (None, *groups)
    ]
    for name, row in rows.items():
        cells = [_error_cell(_cell(row, group), least) for group, least in zip((None, *groups), best, strict=True)]
        if row is ours and ours.get("standard_error") is not None:
            cells[0].append(f" ±{ours['standard_error']:.3f}", style="not bold")
        table.add_row(Text(name, style="cyan" if row is ours else "dim" if name == reference else ""), *cells)
    return table


def _cell(row: Mapping[str, Any], group: str | None) -> float | None:
    value: float | None = row["overall"] if group is None else row["by_examples"].get(group)
    return value


def _error_cell(value: float | None, best: float | None) -> Text:
    if value is None:
        return Text("–")
    return Text(f"{value:.4f}*", style="bold") if value == best else Text(f"{value:.4f} ")


def _plan_rows(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "rounds", str(plan["rounds"])
    yield "noise multiplier", plan["noise_multiplier"]
    yield "epsilon", f"{rounded_up(plan['epsilon'])} at delta {rounded_up(plan['delta'])}"
    yield "replace-one", f"epsilon {rounded_up(plan['replace_one_epsilon'])}"
    if plan["max_nodes_per_user"] > 1:
        yield "nodes per user", f"up to {plan['max_nodes_per_user']}"
    ledger = plan["ledger"]
    if ledger is None:
        return
    yield "ledger", f"{ledger['path']} of {ledger['population']}"
    if ledger["not_private"]:
        yield "spent there", _VOID
        left = "no limit" if ledger["epsilon"] is None else _VOID
    else:
        yield "spent there", f"epsilon {rounded_up(ledger['epsilon_spent'])} at delta {rounded_up(ledger['delta'])}"
        left = f"epsilon {rounded_down(ledger['epsilon_left'])}"
    yield "left there", left if ledger["affordable_rounds"] is None else f"{left}, {ledger['affordable_rounds']} rounds"
    yield "this run", "fits" if ledger["fits"] else "DOES NOT FIT"


def _curve_table(plan: Mapping[str, Any], block: str) -> Table:
    table = Table("after round", "epsilon", "", box=None)
    table.columns[0].justify = "right"
    curve, budget = plan["curve"], plan["epsilon_budget"] or plan["epsilon"]
    step = -(-len(curve) // _MOST_LINES)
    for point in [*curve[step - 1 : -1 : step], curve[-1]]:
        share = min(1.0, point["epsilon"] / budget)
        table.add_row(str(point["round"]), rounded_up(point["epsilon"]), block * max(1, round(share * _BAR_WIDTH)))
    return table


def _audit_rows(audit: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    releases, privacy = audit["releases"], audit["privacy"]
    yield "lines", f"{audit['lines']} valid" + (f", {audit['torn_bytes']} torn bytes" if audit["torn_bytes"] else "")
    compared = f"{releases['compared']} compared with files"
    yield "releases", f"{releases['reserved']} charged, {releases['committed']} committed, {compared}"
    if privacy is None:
        return
    yield "population", f"{audit['population']}, {audit['population_size'] or 'no'} users registered"
    yield "budget", f"epsilon {rounded_up(privacy['epsilon_budget'])} at delta {rounded_up(privacy['delta_budget'])}"
    if privacy["not_private"]:
        yield "spent", _VOID
    else:
        spent, delta = rounded_up(privacy["epsilon"]), rounded_up(privacy["delta"])
        yield "spent", f"epsilon {spent} at delta {delta}, mu {rounded_up(privacy['mu'])}"
    if audit["model"] is not None:
        model = audit["model"]
        yield (
            "model",
            "recomputed from the committed sums"
            if model["status"] == "recomputed"
            else (f"{model['status']}: {model['reason']}"),
        )
    yield "head", audit["head"]
    yield "public key", audit["public_key"]


def _say(console: Console, text: str) -> None:
    """A line that is not broken where it could be copied."""
    console.print(Text(text), soft_wrap=True)
