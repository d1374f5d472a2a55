"""The results of the utility suite as one page that needs nothing but itself.

    python -m benchmarks.utility_page cells.jsonl utility.html

The cells are those of `python -m benchmarks.utility`, one JSON object a line.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from benchmarks.utility_plots import Line, css_colours, epsilon_lines, ratio_lines
from benchmarks.utility_results import (
    CEILING,
    METHODS,
    OURS,
    TUNED,
    Cell,
    Epsilon,
    Problem,
    Sweep,
    markdown_table,
    mean_by_examples,
    problems_of,
    rising,
    shown_epsilon,
    shown_error,
    shown_value,
    summary,
    sweeps_of,
    titles_of,
)
from common.files import write_durably

__all__ = ["markdown_table", "render", "summary", "write_page"]

_FACTORS = {
    "n": "users n",
    "m": "training examples of each m",
    "d": "features d",
    "r": "rank r of the data",
    "k": "nonzeros k of each b",
    "noise": "noise of an example",
}
_METRICS = {"rmse": "RMSE", "mse": "mean squared error", "log_loss": "logarithmic loss"}


def write_page(cells: list[dict[str, Any]], path: Path, *, text: str | None = None) -> None:
    """Write the page.

    Args:
        cells: Of the utility suite.
        path: Where the page goes; its folder is made.
        text: What its author has to say, in paragraphs with an empty line between them; plain text.

    Raises:
        StorageError: If the disk fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, render(cells, text=text).encode())


def render(cells: Sequence[Cell], *, text: str | None = None) -> str:
    """The page as HTML."""
    problems = problems_of(cells)
    titles = {id(problem): title for problem, title in zip(problems, titles_of(problems), strict=True)}
    sweeps = sweeps_of(problems)
    appearances = [problem for sweep in sweeps for problem in sweep.problems]
    views = [_problem_view(p, titles[id(p)], number) for number, p in enumerate(problems)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(epsilon=shown_epsilon, value=shown_value)
    source = files("benchmarks").joinpath("templates/utility.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        style=house_style(),
        light=css_colours(0),
        dark=css_colours(1),
        facts=_facts(cells, problems),
        paragraphs=[part.strip() for part in (text or "").split("\n\n") if part.strip()],
        matrices=_matrices(cells, problems, titles),
        # what is in one sweep alone has its tables there; where several cross is a data set like others
        problems=[view for p, view in zip(problems, views, strict=True) if appearances.count(p) != 1],
        sweeps=[
            _sweep_view(sweep, [views[problems.index(problem)] for problem in sweep.problems], number)
            for number, sweep in enumerate(sweeps)
        ],
        choices=[(titles[id(problem)], list(_choices(problem))) for problem in problems],
        methods=METHODS,
    )


def house_style() -> Markup:
    """The style sheet of the privacy report."""
    report = files("privacy").joinpath("templates/report.html.jinja").read_text("utf-8")
    return Markup(report.partition("<style>")[2].partition("</style>")[0])  # noqa: S704 (a file of ours)


def _facts(cells: Sequence[Cell], problems: Sequence[Problem]) -> dict[str, Any]:
    """What the first paragraphs say about all cells."""
    tried = {
        method: sorted({len(cell["grid"]) for cell in cells if cell["method"] == method and cell.get("grid")})
        for method in METHODS
    }
    return {
        "methods": [
            METHODS.get(method, method)
            for method in dict.fromkeys(cell["method"] for cell in cells)
            if method not in (OURS, TUNED, CEILING)
        ],
        "data": list(dict.fromkeys(problem.data for problem in problems)),
        "epsilons": [shown_epsilon(epsilon) for epsilon in rising(cell["epsilon"] for cell in cells)],
        "deltas": [
            _power(f"{delta:g}") for delta in sorted({cell["delta"] for cell in cells if cell["delta"] is not None})
        ],
        "seeds": sorted({cell["seed"] for cell in cells}),
        "is_tuned": any(cell["method"] == OURS and len(cell.get("grid") or ()) > 1 for cell in cells),
        "has_tuned": any(cell["method"] == TUNED for cell in cells),
        "has_ceiling": any(cell["method"] == CEILING for cell in cells),
        "tried": {METHODS[method]: _range(counts) for method, counts in tried.items() if counts},
        "cells": len(cells),
        "seconds": sum(cell.get("seconds") or 0.0 for cell in cells),
    }


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _problem_view(problem: Problem, title: str, number: int) -> dict[str, Any]:
    """A problem's plots and tables."""
    nearest = _nearest_to_one(problem.epsilons)
    groups = _groups(problem)
    metric = _METRICS.get(problem.metric, problem.metric)
    return {
        "title": title,
        "metric": metric,
        "more_is_better": problem.sign < 0,
        "settings": problem.settings,
        "facts": _personal_numbers(problem),
        "epsilons": problem.epsilons,
        "svg": Markup(_epsilon_svg(problem, title, metric, number)),  # noqa: S704 (our own drawing, names escaped there)
        "rows": [(METHODS.get(m, m), m, [_cell(problem, m, e) for e in problem.epsilons]) for m in problem.methods],
        "nearest": nearest,
        "groups": groups,
        "by_examples": list(_group_rows(problem, nearest, groups)),
        "groups_svg": Markup(_groups_svg(problem, title, nearest, groups, number)) if len(groups) > 1 else None,  # noqa: S704
    }


def _epsilon_svg(problem: Problem, title: str, metric: str, number: int) -> str:
    lines = []
    for method in problem.methods:
        entries = [problem.standings[epsilon].get(method) for epsilon in problem.epsilons]
        lines.append(
            Line(
                method=method,
                values=[entry.mean if entry else None for entry in entries],
                half_widths=[entry.half_width if entry else None for entry in entries],
            )
        )
    last = problem.epsilons[0]
    listed = "; ".join(
        f"{METHODS.get(method, method)} {shown_error(entry.mean, problem)}"
        for method, entry in problem.standings[last].items()
    )
    return epsilon_lines(
        lines,
        epsilons=problem.epsilons,
        metric=metric,
        cut=problem.sign > 0,
        name=f"epsilon{number}",
        description=f"{metric} on {title} against epsilon. At epsilon {shown_epsilon(last)}: {listed}.",
    )


def _cell(problem: Problem, method: str, epsilon: Epsilon) -> dict[str, Any] | None:
    """What the table of a problem says about a method at one epsilon."""
    entry = problem.standings[epsilon].get(method)
    if entry is None:
        return None
    most = max(other.seeds for other in problem.standings[epsilon].values())
    return {
        "error": shown_error(entry.mean, problem),
        "is_best": entry.is_best,
        "is_close": entry.is_close,
        "half_width": _small(entry.half_width),
        "paired_error": _small(entry.paired_error),
        "seeds": f"{entry.seeds} of {most} seeds" if entry.seeds < most else "",
    }


def _small(value: float | None) -> str | None:
    """A standard error or half an interval: four decimals where they say something."""
    if value is None or not math.isfinite(value):
        return None
    return f"{value:.4f}".removeprefix("0") if value >= 0.0001 or value == 0 else _power(f"{value:.1e}")


def _power(number: str) -> str:
    """`1e-06` as people write it."""
    return number.replace("e-0", "e-")


def _signed(value: float) -> str:
    size = "∞" if math.isinf(value) else _small(abs(value))
    return f"{'−' if value < 0 else '+'}{size}"


def _personal_numbers(problem: Problem) -> dict[str, str]:
    """Numbers that a method keeps for each user, by its name."""
    found: dict[str, set[float]] = {}
    for cell in problem.cells:
        if cell.get("personal_numbers") is not None:
            found.setdefault(cell["method"], set()).add(cell["personal_numbers"])
    return {
        METHODS.get(method, method): " to ".join(shown_value(n) for n in dict.fromkeys((min(ns), max(ns))))
        for method in problem.methods
        if (ns := found.get(method))
    }


def _nearest_to_one(epsilons: Sequence[Epsilon]) -> Epsilon:
    finite = [epsilon for epsilon in epsilons if epsilon is not None]
    return min(finite, key=lambda epsilon: abs(math.log(epsilon)), default=None)


def _groups(problem: Problem) -> list[str]:
    """Ranges of the number of training examples in which anybody has an error, from few to many."""
    found = dict.fromkeys(
        group for cell in problem.cells for group, error in cell["by_examples"].items() if error is not None
    )
    return sorted(found, key=lambda group: int("".join(c for c in group.partition("-")[0] if c.isdigit()) or 0))


def _group_rows(problem: Problem, epsilon: Epsilon, groups: Sequence[str]) -> Iterator[tuple[str, str, list[Any]]]:
    """A method's name, its key, and for each range its error and whether it is the best."""
    means = {method: mean_by_examples(problem, method, epsilon) for method in problem.methods}
    best = {
        group: min(
            (problem.sign * found[group] for m, found in means.items() if group in found and m != CEILING), default=0
        )
        for group in groups
    }
    for method, found in means.items():
        if found:
            cells = [
                (shown_error(found[group], problem), method != CEILING and problem.sign * found[group] == best[group])
                if group in found
                else None
                for group in groups
            ]
            yield METHODS.get(method, method), method, cells


def _groups_svg(problem: Problem, title: str, epsilon: Epsilon, groups: Sequence[str], number: int) -> str:
    means = {method: mean_by_examples(problem, method, epsilon) for method in problem.methods}
    ours = means.get(OURS, {})
    lines = [
        Line(method=m, values=[found[g] / ours[g] if g in found and ours.get(g) else None for g in groups])
        for m, found in means.items()
    ]
    return ratio_lines(
        lines,
        places=groups,
        labels=[group.replace("-", "–") for group in groups],
        title="",
        axis="training examples of a user",
        cut=problem.sign > 0,
        name=f"groups{number}",
        description=f"Error over umbel's on {title}, by number of training examples; the numbers are in the table.",
    )


def _sweep_view(sweep: Sweep, views: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    epsilons = rising(epsilon for problem in sweep.problems for epsilon in problem.epsilons)
    factor = _FACTORS.get(sweep.factor, sweep.factor.replace("_", " "))
    return {
        "factor": factor,
        "fixed": sweep.fixed,
        "data": list(dict.fromkeys(problem.data for problem in sweep.problems)),
        "svgs": [
            Markup(_sweep_svg(sweep, factor, epsilon, f"sweep{number}-{place}"))  # noqa: S704 (as above)
            for place, epsilon in enumerate(epsilons)
        ],
        "problems": [
            {**view, "title": f"{factor}: {shown_value(value)}", "name": view["title"]}
            for view, value in zip(views, sweep.values, strict=True)
        ],
    }


def _sweep_svg(sweep: Sweep, factor: str, epsilon: Epsilon, name: str) -> str:
    methods = dict.fromkeys(method for problem in sweep.problems for method in problem.methods)
    lines = [
        Line(method=method, values=[_ratio(problem, method, epsilon) for problem in sweep.problems])
        for method in sorted(methods, key=lambda method: (*METHODS, method).index(method))
    ]
    return ratio_lines(
        lines,
        places=sweep.values,
        labels=[shown_value(value) for value in sweep.values],
        title="without noise" if epsilon is None else f"epsilon {shown_epsilon(epsilon)}",
        axis=factor,
        cut=all(problem.sign > 0 for problem in sweep.problems),
        name=name,
        description=f"Error over umbel's against {factor} at epsilon {shown_epsilon(epsilon)}; tables are below.",
    )


def _ratio(problem: Problem, method: str, epsilon: Epsilon) -> float | None:
    """A method's error over umbel's, both means over the seeds that they share."""
    theirs, ours = problem.runs(method, epsilon), problem.runs(OURS, epsilon)
    seeds = [seed for seed in theirs if seed in ours]
    pairs = [(theirs[seed]["overall"], ours[seed]["overall"]) for seed in seeds]
    if not pairs or any(error is None for pair in pairs for error in pair) or not sum(own for _, own in pairs):
        return None
    return statistics.fmean(error for error, _ in pairs) / statistics.fmean(own for _, own in pairs)


def _matrices(cells: Sequence[Cell], problems: Sequence[Problem], titles: Mapping[int, str]) -> list[dict[str, Any]]:
    """Verdicts by problem and epsilon for umbel, and for umbel tuned where it was run."""
    present = {cell["method"] for cell in cells}
    return [_matrix(problems, titles, ours) for ours in (OURS, TUNED) if ours in present]


def _matrix(problems: Sequence[Problem], titles: Mapping[int, str], ours: str) -> dict[str, Any]:
    heads = rising(epsilon for problem in problems for epsilon in problem.epsilons)
    records = {id(problem): {r["epsilon"]: r for r in summary(problem.cells, ours=ours)} for problem in problems}
    everything = [record for found in records.values() for record in found.values()]
    counts = [sum(record["verdict"] == verdict for record in everything) for verdict in ("win", "tie", "loss")]
    return {
        "name": METHODS[ours],
        "epsilons": heads,
        "rows": [
            (titles[id(problem)], [_matrix_cell(records[id(problem)].get(epsilon)) for epsilon in heads])
            for problem in problems
        ],
        "counts": f"wins {counts[0]}, ties {counts[1]} and loses {counts[2]}",
        "total": sum(counts),
    }


def _matrix_cell(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None or record["verdict"] is None:
        return None
    return {
        "verdict": record["verdict"],
        "margin": _signed(record["margin"]),
        "standard_error": _small(record["standard_error"]),
        "seed_error": _small(record["seed_error"]),
        "rival": METHODS.get(record["rival"], record["rival"]),
    }


def _choices(problem: Problem) -> Iterator[dict[str, str]]:
    """What every method chose at every epsilon, and from what."""
    for method in problem.methods:
        for epsilon in problem.epsilons:
            cells = [c for c in problem.cells if (c["method"], c["epsilon"]) == (method, epsilon)]
            if cells:
                chosen = dict.fromkeys(shown_value(cell.get("hyperparameters") or {}) for cell in cells)
                yield {
                    "method": METHODS.get(method, method),
                    "epsilon": shown_epsilon(epsilon),
                    "chosen": " / ".join(chosen),
                    "grid": "; ".join(_tried(cells)),
                    "rounds": " / ".join(dict.fromkeys(str(cell.get("rounds", "–")) for cell in cells)),
                    "noise": " / ".join(dict.fromkeys(str(cell.get("noise_multiplier", "–")) for cell in cells)),
                }


def _tried(cells: Iterable[Cell]) -> Iterator[str]:
    """Every setting of the grids with its validation error, the mean over the seeds that tried it."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        for entry in cell.get("grid") or []:
            *setting, error = entry
            found.setdefault(", ".join(map(shown_value, setting)), []).append(error)
    for setting, errors in found.items():
        numbers = [error for error in errors if isinstance(error, int | float) and math.isfinite(error)]
        yield f"{setting}: {statistics.fmean(numbers):.4g}" if len(numbers) == len(errors) else f"{setting}: failed"


def main() -> None:
    """Write the page of a file of cells, and print its verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--text", type=Path, default=None, help="a file with what its author has to say, plain text")
    arguments = parser.parse_args()
    cells = [json.loads(line) for line in arguments.cells.read_text("utf-8").splitlines() if line.strip()]
    text = arguments.text.read_text("utf-8") if arguments.text else None
    write_page(cells, arguments.page, text=text)
    problems = problems_of(cells)
    titles = [title for p, title in zip(problems, titles_of(problems), strict=True) for _ in p.epsilons]
    for title, record in zip(titles, summary(cells), strict=True):
        margin = "" if record["margin"] is None else _signed(record["margin"])
        rival = record["rival"] or "–"
        print(f"{title:<40} {shown_epsilon(record['epsilon']):>6} {record['verdict'] or '–':>5} {margin} {rival}")


if __name__ == "__main__":
    main()
