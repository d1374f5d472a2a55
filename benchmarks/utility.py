"""How much utility every algorithm keeps at every epsilon: umbel against its rivals, on one mechanism and accountant.

    python -m benchmarks.utility --out FOLDER [--shared ../shared/data] [--jobs 2]
    python -m benchmarks.utility --out FOLDER --quick           # less than five minutes
    python -m benchmarks.utility --out FOLDER --dry-run         # what would be run, and about how long it takes

Data: `benchmarks.utility_data`; files that are not there are skipped with a line. Methods: `benchmarks.rivals`. Epsilon
from .25 to 8 and none, at delta 1e-6 on ratings and 1e-5 on synthetic data; sweeps of one factor of the synthetic data
at .5, 2 and none. Seeds 0, 1, 2: of the split, or of the generator. The noise is the system's, so a second run differs.

What is tuned: each rival gets at most six trained settings, and for each at most six of what a user does alone; in
sweeps half of the trained ones. They are compared on a validation part of the training examples of seed 0, under the
budget of the cell with noise of its own, and the best is used for all seeds. This spends privacy that is not accounted
for, in the rivals' favour; `umbel` is not tuned at all, and `umbel_tuned` is umbel with the rivals' effort.

FOLDER/cells.jsonl has one line a cell and is appended to as cells are finished: the command goes on where it was. The
page is FOLDER/results.html, and FOLDER/results.jsonl has the cells with their differences from umbel on the same
examples, from the users' own losses in FOLDER/losses. All of it is evaluation, computed from the raw data.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.cells import Cell, Group, identity_of_cell, paired, read
from benchmarks.rivals import RIVALS
from benchmarks.rivals.rival import MOST_SETTINGS
from benchmarks.utility_data import BASE, ITEMS, RATINGS, SYNTHETIC, DataSet, ratings, sweeps, synthetic
from common.files import make_folder, write_durably

EPSILONS: tuple[float | None, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, None)
SWEEP_EPSILONS: tuple[float | None, ...] = (0.5, 2.0, None)
QUICK_EPSILONS: tuple[float | None, ...] = (1.0, None)
SEEDS = (0, 1, 2)
SWEEPS = "sweeps"
ALL = (*RATINGS, ITEMS, SYNTHETIC, SWEEPS)
_QUICK = {"n": 500, "m": 20, "d": 20, "r": 2}
_QUICK_SETTINGS = 2
_SECONDS = {
    "umbel": 2.0,
    "umbel_tuned": 1.6,
    "fedavg": 0.3,
    "fedavg_tuned": 1.2,
    "centaur": 1.0,
    "amht_lrs": 5.0,
    "fedrep": 0.6,
    "ridge_around_global": 1.0,
    "alone": 0.6,
    "full_covariance": 5.0,
}
"""Measured on the base population, one setting trained and judged; only for `--dry-run`."""
_RELATIVE_COST = {"ml-1m-part": 2.5, "ml-100k": 0.7, ITEMS: 2.0}
"""Of data in files, relative to the base population."""


def groups_of(arguments: argparse.Namespace, console: Console) -> list[Group]:
    """What is asked for."""
    found = []
    for data in _data(arguments, console):
        base = data.is_base or bool(arguments.synthetic)
        epsilons = arguments.epsilon or (QUICK_EPSILONS if arguments.quick else EPSILONS if base else SWEEP_EPSILONS)
        most = arguments.settings or (_QUICK_SETTINGS if arguments.quick else MOST_SETTINGS // (1 if base else 2))
        seeds = tuple(arguments.seeds or (SEEDS[:1] if arguments.quick else SEEDS))
        for method in arguments.methods or RIVALS:
            rival = RIVALS[method]
            # nothing noised: one cell stands at every epsilon
            for epsilon in epsilons if rival.is_released else (None,):
                found.append(Group(data=data, method=method, epsilon=epsilon, seeds=seeds, most_settings=most))
    return found


def _data(arguments: argparse.Namespace, console: Console) -> Iterator[DataSet]:
    wanted = arguments.only or (("ml-100k", SYNTHETIC) if arguments.quick else ALL)
    if arguments.synthetic:
        yield synthetic(**dict(arguments.synthetic))
        return
    for name in wanted:
        if name == SYNTHETIC:
            yield synthetic(**_QUICK) if arguments.quick else synthetic()
        elif name == SWEEPS:
            yield from sweeps()
        elif missing := (data := ratings(name, arguments.shared)).files_missing():
            console.print(f"{name} is left out: no {', '.join(missing)} in {arguments.shared}.")
        else:
            yield data


def run(groups: Sequence[Group], folder: Path, jobs: int, console: Console) -> list[str]:
    """Compute what is missing. Returns what failed."""
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("cells", total=sum(len(group.seeds) for group in groups))
        for group, problem in _finished(groups, folder, jobs):
            epsilon = "none" if group.epsilon is None else f"{group.epsilon:g}"
            progress.update(bar, advance=len(group.seeds), description=f"{group.data.name} {group.method} {epsilon}")
            if problem:
                failures.append(f"{group.data.key} {group.method} epsilon {epsilon}: {problem}")
    return failures


def _finished(groups: Sequence[Group], folder: Path, jobs: int) -> Iterator[tuple[Group, str | None]]:
    """Groups as they are done, each with what went wrong."""
    if jobs == 1:
        for group in groups:
            yield group, _run(group, folder)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_run, group, folder): group for group in groups}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(group: Group, folder: Path) -> str | None:
    try:
        group.run(folder, read(folder))
    except Exception as error:  # one method's failure is said at the end, and does not stop the others
        return f"{type(error).__name__}: {error}"
    return None


def estimate(groups: Sequence[Group], done: Sequence[Cell]) -> float:
    """About how many seconds of one core are left."""
    known = {identity_of_cell(cell) for cell in done}
    total = 0.0
    for group in groups:
        data = group.data
        missing = [seed for seed in group.seeds if group.identity(seed) not in known]
        relative = _RELATIVE_COST.get(data.name, 1.0)
        if data.settings:
            sizes = {**BASE, **data.settings}
            relative = sizes["n"] / 2000 * max(sizes["d"] / 40, (sizes["d"] / 40) ** 2) * (0.5 + 0.5 * sizes["m"] / 30)
        tuning = min(group.most_settings, len(group.rival.settings(40))) * 0.8
        effort = len(missing) + (tuning if len(missing) == len(group.seeds) else 0)
        total += _SECONDS[group.method] * relative * effort if missing else 0.0
    return total


def table(cells: Sequence[Cell]) -> Iterator[Table]:
    """Mean error over seeds, a table for each data set."""
    for key in dict.fromkeys((cell["data"], str(cell["settings"])) for cell in cells):
        mine = [cell for cell in cells if (cell["data"], str(cell["settings"])) == key]
        epsilons = [e for e in EPSILONS if any(cell["epsilon"] == e for cell in mine)]
        epsilons += [e for e in dict.fromkeys(cell["epsilon"] for cell in mine) if e not in EPSILONS]
        settings = ", ".join(f"{name} {value:g}" for name, value in mine[0]["settings"].items())
        title = f"{key[0]} {settings}: {mine[0]['metric']}, mean over seeds"
        shown = Table(title=title, title_justify="left")
        shown.add_column("epsilon")
        for epsilon in epsilons:
            shown.add_column("none" if epsilon is None else f"{epsilon:g}", justify="right")
        for method in (name for name in RIVALS if any(cell["method"] == name for cell in mine)):
            found = [[c["overall"] for c in mine if (c["method"], c["epsilon"]) == (method, e)] for e in epsilons]
            shown.add_row(method, *("" if not errors else _mean(errors) for errors in found))
        yield shown


def _mean(errors: Sequence[float | None]) -> str:
    finite = [error for error in errors if error is not None]
    return f"{statistics.fmean(finite):.4f}" if len(finite) == len(errors) else "not finite"


def _epsilon(text: str) -> float | None:
    if text == "none":
        return None
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"Expected a number above 0 or none, got {text}.")
    return value


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in BASE:
        raise argparse.ArgumentTypeError(f"Expected NAME=VALUE with a name among {', '.join(BASE)}, got {text}.")
    return name, float(value) if name == "noise" else int(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where cells and page go")
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared/data"), help="folder with ml-100k and ml-1m-part"
    )
    parser.add_argument("--quick", action="store_true", help="two data sets, two epsilons, one seed, small grids")
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="DATA", help=f"of {', '.join(ALL)}")
    parser.add_argument("--methods", nargs="+", choices=RIVALS, metavar="METHOD", help=f"of {', '.join(RIVALS)}")
    parser.add_argument("--epsilon", nargs="+", type=_epsilon, help="numbers, or none")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--settings", type=int, help="at most so many settings in a grid")
    parser.add_argument("--synthetic", nargs="+", type=_setting, metavar="NAME=VALUE", help="only this synthetic data")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--dry-run", action="store_true", help="count cells and estimate the time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print tables, write the page; 1 if a cell failed."""
    arguments, console = _parser().parse_args(argv), Console()
    make_folder(arguments.out)
    groups, done = groups_of(arguments, console), read(arguments.out)
    count = sum(len(group.seeds) for group in groups)
    minutes = estimate(groups, done) / arguments.jobs / 60
    console.print(
        f"{count} cells in {len(groups)} groups; about {minutes:.0f} minutes with {arguments.jobs} processes."
    )
    if arguments.dry_run:
        return 0
    failures = run(groups, arguments.out, arguments.jobs, console)
    cells = paired(read(arguments.out), arguments.out)
    results = "".join(json.dumps(cell, sort_keys=True, allow_nan=False) + "\n" for cell in cells)
    write_durably(arguments.out / "results.jsonl", results.encode())
    for shown in table(cells):
        console.print(shown)
    from benchmarks.utility_page import write_page  # noqa: PLC0415 (plots only where they are drawn)

    write_page(cells, arguments.out / "results.html")
    console.print(f"Cells in {arguments.out / 'cells.jsonl'}, the page in {arguments.out / 'results.html'}.")
    for failure in failures:
        console.print(f"Failed: {failure}", style="red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
