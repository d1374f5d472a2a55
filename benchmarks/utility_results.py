"""What the cells of the utility suite say: means, intervals, and where umbel wins, ties or loses.

A cell is one method on one data set at one epsilon with one seed. Cells with the same data, metric and settings make
a problem; methods are compared within a problem, at one epsilon, on the seeds that all of them have.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

OURS = "umbel"
TUNED = "umbel_tuned"
CEILING = "full_covariance"
METHODS = {
    "umbel": "umbel",
    "umbel_tuned": "tuned umbel",
    "fedavg": "one global model",
    "fedavg_tuned": "global, tuned locally",
    "centaur": "CENTAUR",
    "amht_lrs": "AMHT-LRS",
    "fedrep": "low rank only",
    "ridge_around_global": "ridge around global",
    "alone": "each user alone",
    "full_covariance": "full covariance",
}
"""What is compared, in the words of the page, from top to bottom."""
_OWN = (OURS, TUNED)  # no rivals of each other
_SHARES_NOTHING = ("alone", CEILING)  # not noised: a cell without epsilon stands at every epsilon
_NOT_A_SETTING = ("seed", "split_seed")
_HIGHER_IS_BETTER = ("recall", "ndcg", "hit", "precision", "auc", "accuracy")
_CONFIDENCE = 0.95

Cell = Mapping[str, Any]
Epsilon = float | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method on a problem at one epsilon.

    Attributes:
        method: Its key.
        mean: Of its errors over seeds; infinite where one of them is not finite.
        half_width: Of the 95 % interval of that mean over seeds; None with one seed.
        paired_error: Standard error over users of its difference from umbel, averaged over seeds, by their root.
        seeds: How many.
        gap: How much worse than the best, never below 0; None where nothing can be compared.
        is_close: Whether the gap is within its standard error: the best itself, and all that tie with it.
    """

    method: str
    mean: float
    half_width: float | None
    paired_error: float | None
    seeds: int
    gap: float | None = None
    is_close: bool = False

    @property
    def is_best(self) -> bool:
        """Whether nothing is better."""
        return self.gap == 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One data set with one choice of settings.

    Attributes:
        data: Its name.
        family: Of the data: "ratings", "items" or "synthetic".
        metric: Of the error.
        settings: Of the data, without seeds.
        cells: All of it.
    """

    data: str
    family: str
    metric: str
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @property
    def sign(self) -> int:
        """-1 where more is better."""
        return -1 if self.metric.startswith(_HIGHER_IS_BETTER) else 1

    @cached_property
    def epsilons(self) -> tuple[Epsilon, ...]:
        """From much privacy to none, which is last."""
        return rising(cell["epsilon"] for cell in self.cells)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """All that have a cell, in the order of the page."""
        found = dict.fromkeys(cell["method"] for cell in self.cells)
        return tuple(sorted(found, key=lambda method: (*METHODS, method).index(method)))

    def runs(self, method: str, epsilon: Epsilon) -> dict[Any, Cell]:
        """Cells by seed."""
        wanted = {cell["seed"]: cell for cell in self.cells if (cell["method"], cell["epsilon"]) == (method, epsilon)}
        return self.runs(method, None) if not wanted and epsilon is not None and method in _SHARES_NOTHING else wanted

    @cached_property
    def standings(self) -> dict[Epsilon, dict[str, Entry]]:
        """Every method at every epsilon, where it has cells."""
        return {epsilon: _standing(self, epsilon) for epsilon in self.epsilons}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """Synthetic problems that differ in one setting.

    Attributes:
        factor: That setting.
        fixed: The other settings.
        problems: By rising value of the factor.
    """

    factor: str
    fixed: Mapping[str, Any]
    problems: tuple[Problem, ...]

    @property
    def values(self) -> tuple[Any, ...]:
        """Of the factor."""
        return tuple(problem.settings[self.factor] for problem in self.problems)


def problems_of(cells: Iterable[Cell]) -> list[Problem]:
    """The problems, in the order in which they first appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_canonical([cell["data"], cell["metric"], _settings(cell)]), []).append(cell)
    return [
        Problem(
            data=group[0]["data"],
            family=group[0]["family"],
            metric=group[0]["metric"],
            settings=_settings(group[0]),
            cells=tuple(group),
        )
        for group in groups.values()
    ]


def sweeps_of(problems: Iterable[Problem]) -> list[Sweep]:
    """Every way in which synthetic problems differ in one setting alone."""
    synthetic = [problem for problem in problems if problem.family == "synthetic"]
    sweeps = []
    for factor in dict.fromkeys(name for problem in synthetic for name in problem.settings):
        groups: dict[str, list[Problem]] = {}
        for problem in synthetic:
            if factor in problem.settings:
                rest = {name: value for name, value in problem.settings.items() if name != factor}
                groups.setdefault(_canonical([problem.metric, rest]), []).append(problem)
        for rest, members in groups.items():
            if len({_canonical(problem.settings[factor]) for problem in members}) > 1:
                ordered = sorted(members, key=lambda problem: _rank(problem.settings[factor]))
                sweeps.append(Sweep(factor=factor, fixed=json.loads(rest)[1], problems=tuple(ordered)))
    return sweeps


def titles_of(problems: Sequence[Problem]) -> list[str]:
    """What each problem is called: its data, and the settings that are not the usual ones of that data."""
    titles = []
    for problem in problems:
        twins = [other.settings for other in problems if other.data == problem.data]
        unusual = []
        for name, value in problem.settings.items():
            values = [_canonical(twin[name]) for twin in twins if name in twin]
            if _canonical(value) != max(values, key=values.count):
                unusual.append(f"{name.replace('_', ' ')} {shown_value(value)}")
        titles.append(", ".join([problem.data, *unusual]))
    return titles


def summary(cells: Iterable[Cell], *, ours: str = OURS) -> list[dict[str, Any]]:
    """Where umbel wins, ties and loses: one record for each problem and epsilon.

    Args:
        cells: Of any data.
        ours: Whose verdicts: umbel, or a variant of it. The others of these are no rivals, nor is the ceiling.

    Returns:
        Records of `data`, `settings`, `metric`, `epsilon`, and:
        `verdict`: "win" where ours is best and no rival within one standard error of it, "tie" where it is best or
        within one standard error of the best but not alone there, "loss" otherwise; None where ours or every rival
        is missing, or they have no seed in common.
        `winner`: The best method. `within`: All others within one standard error of it.
        `rival`: The best one that is not ours. `margin`: By how much ours is worse than it, so below 0 is better.
        `standard_error`: Of the margin, over users. `seed_error`: The same over seeds, None with one seed.
        `seeds`: Compared.
    """
    return [_verdict(problem, epsilon, ours) for problem in problems_of(cells) for epsilon in problem.epsilons]


def markdown_table(cells: Iterable[Cell], data: str) -> str:
    """Method by epsilon in Markdown: the best in bold, `≈` where it is within one standard error of the best.

    Args:
        cells: Of any data.
        data: Whose table it is; one table for each of its settings, with a line of text before it if they are many.

    Raises:
        ValueError: If there is no such data.
    """
    chosen = [problem for problem in problems_of(cells) if problem.data == data]
    if not chosen:
        raise ValueError(f"Expected the name of a data set with cells, got data={data!r}.")
    tables = []
    for problem, title in zip(chosen, titles_of(chosen), strict=True):
        table = _markdown(problem)
        tables.append(table if len(chosen) == 1 else f"{title}:\n\n{table}")
    return "\n\n".join(tables) + "\n"


def rising(epsilons: Iterable[Epsilon]) -> tuple[Epsilon, ...]:
    """Each once, from much privacy to none, which is last."""
    return tuple(sorted(set(epsilons), key=lambda epsilon: math.inf if epsilon is None else epsilon))


def shown_error(value: float, problem: Problem) -> str:
    """With so many decimals that the smallest error of the problem has four digits."""
    if not math.isfinite(value):
        return "not finite"
    means = (entry.mean for standing in problem.standings.values() for entry in standing.values())
    smallest = min((abs(mean) for mean in means if mean and math.isfinite(mean)), default=1.0)
    decimals = min(12, max(4, 3 - math.floor(math.log10(smallest))))
    return f"{value:.{decimals}f}" if abs(value) < 1000 else f"{value:.3g}"


def shown_epsilon(epsilon: Epsilon) -> str:
    """As the tables say it."""
    return "none" if epsilon is None else f"{epsilon:g}"


def shown_value(value: Any) -> str:
    """A setting or a hyper-parameter, short."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown_value(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "–".join(map(shown_value, value)) if len(value) == 2 else ", ".join(map(shown_value, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean_by_examples(problem: Problem, method: str, epsilon: Epsilon) -> dict[str, float]:
    """Errors by number of training examples, mean over the seeds that have users there."""
    found: dict[str, list[float]] = {}
    for cell in problem.runs(method, epsilon).values():
        for group, error in cell["by_examples"].items():
            if error is not None:
                found.setdefault(group, []).append(error)
    return {group: statistics.fmean(errors) for group, errors in found.items()}


def _standing(problem: Problem, epsilon: Epsilon) -> dict[str, Entry]:
    entries = {}
    for method in problem.methods:
        runs = problem.runs(method, epsilon)
        if runs:
            errors = [_error(cell) for cell in runs.values()]
            entries[method] = Entry(
                method=method,
                mean=statistics.fmean(errors),
                half_width=_half_width(errors),
                paired_error=None if method == OURS else _paired_error(runs.values()),
                seeds=len(runs),
            )
    compared = _compare(problem, epsilon, [method for method in entries if method != CEILING])
    for method, gap in compared.gaps.items():
        entries[method] = replace(entries[method], gap=gap, is_close=method in compared.close)
    return entries


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Methods on the seeds that all of them have; empty where there is none, or no method is finite.

    Attributes:
        seeds: Compared.
        gaps: How much worse than the best, by method.
        errors: Standard error over users of the difference from umbel, by method.
    """

    seeds: tuple[Any, ...] = ()
    gaps: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The first without a gap."""
        return min(self.gaps, key=lambda method: self.gaps[method], default=None)

    @property
    def close(self) -> list[str]:
        """Those within one standard error of the best, with it."""
        best = self.best
        return [m for m, gap in self.gaps.items() if best is not None and gap <= self.error_between(m, best)]

    def error_between(self, one: str, other: str) -> float:
        """Standard error of the difference of two.

        Each is paired with umbel alone, so between two others it is the root of the sum of squares, which is too
        large where both differ from umbel for the same users.
        """
        return 0.0 if one == other else math.hypot(self.errors[one], self.errors[other])


def _compare(problem: Problem, epsilon: Epsilon, methods: Sequence[str]) -> _Comparison:
    runs = {method: found for method in methods if (found := problem.runs(method, epsilon))}
    seeds = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if not seeds:
        return _Comparison()
    means = {m: problem.sign * statistics.fmean(_error(cells[seed]) for seed in seeds) for m, cells in runs.items()}
    least = min(means.values())
    if not math.isfinite(least):
        return _Comparison(seeds=tuple(seeds))
    return _Comparison(
        seeds=tuple(seeds),
        gaps={method: mean - least for method, mean in means.items()},
        errors={
            m: 0.0 if m == OURS else _paired_error(cells[seed] for seed in seeds) or 0.0 for m, cells in runs.items()
        },
    )


def _verdict(problem: Problem, epsilon: Epsilon, ours: str) -> dict[str, Any]:
    compared = _compare(problem, epsilon, [m for m in problem.methods if m == ours or m not in (*_OWN, CEILING)])
    best, close = compared.best, compared.close
    record = {
        **{"data": problem.data, "settings": dict(problem.settings), "metric": problem.metric, "epsilon": epsilon},
        **dict.fromkeys(("verdict", "rival", "margin", "standard_error", "seed_error")),
        **{"winner": best, "within": [m for m in close if m != best], "seeds": list(compared.seeds)},
    }
    rivals = {method: gap for method, gap in compared.gaps.items() if method != ours}
    if ours not in compared.gaps or not rivals:
        return record
    rival = min(rivals, key=lambda method: rivals[method])
    one, other = problem.runs(ours, epsilon), problem.runs(rival, epsilon)
    differences = [problem.sign * (_error(one[seed]) - _error(other[seed])) for seed in compared.seeds]
    return record | {
        "verdict": ("win" if close == [ours] else "tie") if ours in close else "loss",
        "rival": rival,
        "margin": statistics.fmean(differences),
        "standard_error": compared.error_between(ours, rival),
        "seed_error": statistics.stdev(differences) / math.sqrt(len(differences)) if _can_spread(differences) else None,
    }


def _error(cell: Cell) -> float:
    """The overall error; infinitely bad where it is missing or not a number, so that no failure is averaged away."""
    value = cell["overall"]
    worst = -math.inf if cell["metric"].startswith(_HIGHER_IS_BETTER) else math.inf
    return float(value) if value is not None and math.isfinite(value) else worst


def _paired_error(cells: Iterable[Cell]) -> float | None:
    """Standard error over users of the difference from umbel, of the mean over seeds.

    A cell that could not be paired gives the standard error of its own error, which is larger.
    """
    errors = []
    for cell in cells:
        paired = (cell.get("paired") or {}).get("standard_error")
        errors.append(cell.get("standard_error") if paired is None else paired)
    if not errors or any(error is None or not math.isfinite(error) for error in errors):
        return None
    return statistics.fmean(errors) / math.sqrt(len(errors))


def _half_width(errors: Sequence[float]) -> float | None:
    """Of the interval of the mean by Student's t."""
    from scipy.stats import t  # noqa: PLC0415 (a second, needed only where there are several seeds)

    if not _can_spread(errors):
        return None
    quantile = float(t.ppf((1 + _CONFIDENCE) / 2, len(errors) - 1))
    return quantile * statistics.stdev(errors) / math.sqrt(len(errors))


def _can_spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))


def _markdown(problem: Problem) -> str:
    head = ["method", *(f"epsilon {shown_epsilon(e)}" if e is not None else "none" for e in problem.epsilons)]
    lines = [head, ["--"] * len(head)]
    for method in problem.methods:
        entries = [problem.standings[epsilon].get(method) for epsilon in problem.epsilons]
        lines.append([METHODS.get(method, method), *(_markdown_cell(entry, problem) for entry in entries)])
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _markdown_cell(entry: Entry | None, problem: Problem) -> str:
    if entry is None:
        return "–"
    error = shown_error(entry.mean, problem)
    return f"**{error}**" if entry.is_best else f"{error} ≈" if entry.is_close else error


def _settings(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in cell["settings"].items() if name not in _NOT_A_SETTING}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _rank(value: Any) -> tuple[int, float, str]:
    """Numbers by size, pairs by their first number, the rest by name."""
    first = value[0] if isinstance(value, list) and value else value
    is_number = isinstance(first, int | float)
    return (0, float(first), "") if is_number else (1, 0.0, _canonical(value))
