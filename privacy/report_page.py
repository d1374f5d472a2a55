"""The report as files: a page for people, twice, and one object for machines.

The page needs nothing but itself: no request leaves it, whatever the names in the data are. The one in the release
folder holds public facts only; the one in the run folder adds what a simulation computed from raw data.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from common.errors import StorageError
from common.files import write_durably
from privacy.disclosure import EVALUATION_NOTICE
from privacy.plots import ErrorRow, bounds_plot, epsilon_plot, error_plots, progress_plot
from privacy.registry_yaml import registry_document, to_yaml
from privacy.release_files import EmpiricalAudit
from privacy.report import PrivacyReport, RoundFacts, read_evaluation, report_of, shown_rounds
from privacy.rounding import counted, rounded_up

METHODS = {
    "global": "one global model",
    "alone": "each user alone",
    "ridge_around_global": "ridge around global",
    "low_rank": "low rank only",
    "gradient": "the default algorithm",
    "non_private": "without privacy",
}
"""What is compared, in the words of the terminal."""
_OURS = "umbel (this run)"
_NOISE = {"ours": "as reported", "alone": "nothing is shared", "non_private": "none"}
_BASELINE_NOISE = "the same noise"
_METRICS = {"rmse": "root mean squared error (rmse)", "log_loss": "logarithmic loss"}
_ACCOUNTANTS = {
    "epsilon": ("Exact", "the exact Gaussian formula (arXiv:1805.06530): the one that counts"),
    "pld_epsilon": ("PLD", "privacy-loss distributions of dp-accounting, which must agree with it"),
    "prv_epsilon": ("PRV", "privacy random variables of opacus (arXiv:2106.02848): an upper bound, up to 0.02 above"),
    "rdp_epsilon": ("RDP", "Rényi accountant of dp-accounting: looser, and never below"),
    "replace_one_epsilon": (
        "Replace-one",
        "the exact formula for neighbours that swap one user's data for other data instead of for zeros",
    ),
}
_OF_SAMPLED = {
    "epsilon": ("Amplified", "of the whole schedule, as PLD has it, between PRV's lower bound and RDP: what counts"),
    "replace_one_epsilon": ("Replace-one", "by PLD, for neighbours that swap one user's data for other data"),
}
_METHODS_OF_ATTACK = {
    "clopper-pearson": "Counting (Clopper–Pearson)",
    "one-run": "One run (arXiv:2305.08846)",
    "gaussian": "Gaussian trade-off",
}
_STANDARD_ERRORS = 2  # within so many a difference is taken to be chance
_FELT = 1e-3  # a scale that moves by less is a flat line with an axis that nobody can read
_MOST_NAMES = 40
_OWNER_ONLY = 0o600  # an evaluation is for whoever ran the simulation


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table of rounds.

    Attributes:
        title: Its head.
        meaning: What it is, in words.
        cells: A text for each round shown.
        is_number: Whether it is aligned as numbers are.
        is_setting: Whether it is said once where it is the same in all rounds.
    """

    title: str
    meaning: str
    cells: tuple[str, ...]
    is_number: bool = True
    is_setting: bool = True


@dataclass(frozen=True, kw_only=True)
class Difference:
    """This run against another method on the same users and examples.

    Attributes:
        label: What the other is called.
        value: This run's error minus the other's; below 0 this run is better.
        standard_error: Of that difference, over users.
    """

    label: str
    value: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """What the difference says."""
        if abs(self.value) <= _STANDARD_ERRORS * self.standard_error:
            return "could be chance"
        return "this run is better" if self.value < 0 else "this run is worse"


def write_reports(run_root: Path) -> Path:
    """Write the reports of a finished run: a page, `report.json` and `registry.yaml` in `release`, and the full page.

    Args:
        run_root: The run folder.

    Returns:
        The full page, `report.html`, which has the evaluation where there is one.

    Raises:
        UmbelError: If the run has no release yet, or a file of it cannot be read.
        StorageError: If the disk fails.
    """
    report = report_of(run_root)
    page, *_ = write_pages(run_root, report)
    write_durably(run_root / "release" / "registry.yaml", to_yaml(registry_document(report)).encode())
    return page


def write_pages(run_root: Path, report: PrivacyReport | None = None) -> tuple[Path, ...]:
    """`write_reports` but for `registry.yaml`, in which the operator may have filled in blanks.

    Args:
        run_root: The run folder.
        report: Of this run, if it is made already.

    Returns:
        The full page, and the page and the JSON of the release.
    """
    made, evaluation = report or report_of(run_root), read_evaluation(run_root)
    public, full, release = render(made), run_root / "report.html", run_root / "release"
    html, machine = release / "report.html", release / "report.json"
    write_report(made, html=html, machine=machine, page=public)
    write_durably(full, (render(made, evaluation) if evaluation else public).encode(), mode=_OWNER_ONLY)
    return full, html, machine


def write_report(report: PrivacyReport, *, html: Path, machine: Path, page: str | None = None) -> None:
    """Write a report of public facts as a page and as JSON.

    Args:
        report: What it says.
        html: Where the page goes.
        machine: Where the JSON goes.
        page: The page, if it is rendered already.
    """
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    for path, content in ((machine, text + "\n"), (html, page or render(report))):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"Expected a folder for {path}, got {error.strerror}.") from error
        write_durably(path, content.encode())


def render(report: PrivacyReport, evaluation: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        report: Public facts.
        evaluation: What a simulation computed from raw data; with it the page must not be published.
    """
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 (the extra `simulate`)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(up=rounded_up, counted=counted)
    source = files("privacy").joinpath("templates/report.html.jinja").read_text("utf-8")
    numbers = set(shown_rounds(report.num_rounds))
    shown = [facts for facts in report.rounds if facts.number in numbers]
    columns = tuple(_columns(report, shown))
    return environment.from_string(source).render(
        report=report,
        spent=report.spent,
        checked=report.verification,
        budget=f"{report.budget_epsilon:g}" if math.isfinite(report.budget_epsilon) else "none",
        epsilon_svg=_epsilon_svg(report),
        accountants=_ACCOUNTANTS | (_OF_SAMPLED if report.is_sampled else {}),
        progress=_progress_svgs(report, shown),
        caps=sorted({facts.cap for facts in report.rounds if facts.cap is not None}),
        attack=None if report.empirical is None else _attack_view(report.empirical),
        constant=[column for column in columns if _is_constant(column)],
        varying=[column for column in columns if not _is_constant(column)],
        rows_shown=len(shown),
        names=() if report.model is None else report.model.feature_names[:_MOST_NAMES],
        evaluation=_evaluation_view(evaluation) if evaluation else None,
        notice=EVALUATION_NOTICE,
    )


def _epsilon_svg(report: PrivacyReport) -> Any:
    points = [(point.number, point.epsilon) for point in report.curve if math.isfinite(point.epsilon)]
    if not points:
        return None
    starts: dict[int, str] = {}
    for facts in report.rounds if len(report.rounds) == report.num_rounds else ():
        if facts.run not in starts.values():
            starts[facts.number] = facts.run
    description = (
        f"Epsilon spent rises to {rounded_up(points[-1][1])} after {counted(points[-1][0], 'charged round')}; "
        f"the budget is {report.budget_epsilon:g}."
    )
    return _markup(epsilon_plot(points, budget=report.budget_epsilon, run_starts=starts, description=description))


def _progress_svgs(report: PrivacyReport, shown: Sequence[RoundFacts]) -> list[Any]:
    """The released residual scale over rounds and against epsilon; nothing where it is not, or hardly, learned."""
    scales = [(facts, facts.residual_scale) for facts in shown if facts.residual_scale is not None]
    largest, least = (choose((scale for _, scale in scales), default=0.0) for choose in (max, min))
    if largest - least <= _FELT * largest:
        return []
    epsilon = {point.number: point.epsilon for point in report.curve}
    by_round = [(float(facts.server_round), scale) for facts, scale in scales]
    by_epsilon = [(epsilon[facts.number], scale) for facts, scale in scales if math.isfinite(epsilon[facts.number])]
    return _two_plots(by_round, by_epsilon, upwards="residual scale", name="progress")


def _two_plots(
    by_round: Sequence[tuple[float, float]],
    by_epsilon: Sequence[tuple[float, float]],
    *,
    upwards: str,
    name: str,
    reference: tuple[str, float] | None = None,
) -> list[Any]:
    """A number after rounds, and against the epsilon spent by then."""
    return [
        _markup(
            progress_plot(
                points,
                across=across,
                upwards=upwards,
                name=f"{name}{number}",
                description=f"{upwards} against {across}: from {points[0][1]:.4g} to {points[-1][1]:.4g}.",
                reference=reference,
            )
        )
        for number, (across, points) in enumerate((("rounds of the run", by_round), ("epsilon spent", by_epsilon)))
        if len(points) > 1
    ]


def _attack_view(found: EmpiricalAudit) -> dict[str, Any]:
    """What the page shows of an attack: bounds by their names in words, and a plot of them."""
    bounds = [(_METHODS_OF_ATTACK.get(bound.name, bound.name), bound) for bound in found.bounds]
    listed = ", ".join(f"{name} {bound.epsilon:.4g}" for name, bound in bounds)
    description = f"Lower bounds on epsilon: {listed}; claimed is {rounded_up(found.claimed_epsilon)}."
    heights = [(name.split(" (")[0], bound.epsilon) for name, bound in bounds]
    return {
        "bounds": bounds,
        "svg": _markup(bounds_plot(heights, claimed=found.claimed_epsilon, description=description)),
    }


def _columns(report: PrivacyReport, shown: Sequence[RoundFacts]) -> Iterator[Column]:
    epsilon = {point.number: rounded_up(point.epsilon) for point in report.curve}

    def column(title: str, meaning: str, cell: Any, **kind: bool) -> Column:
        return Column(title=title, meaning=meaning, cells=tuple(map(cell, shown)), **kind)

    if len(report.runs) > 1:
        yield column("run", "the run that charged it", lambda r: r.run, is_number=False, is_setting=False)
    yield column("round", "its number in the run", lambda r: f"{r.server_round:,}", is_setting=False)
    yield column("ε after", "spent by the whole ledger after it", lambda r: epsilon[r.number], is_setting=False)
    yield column("z", "noise multiplier: standard deviation of the noise, in clipping norms", _z)
    yield column("C", "clipping norm: the most one user can add", _clipping_norm)
    yield column("shares", "parts of C for each group of numbers", _shares, is_number=False)
    yield column("D", "numbers released", lambda r: f"{r.coordinates:,}")
    yield column("K", "grid scale: integers per clipping norm", lambda r: f"{r.grid_scale:,}")
    yield column("denominator", "what the noised sum is divided by, public", lambda r: f"{r.denominator:,}")
    yield column("cap", "rounds like this that one user's filter admits in all", _cap)
    yield column("sampling", "of users; none means that everybody takes part", lambda r: r.sampling, is_number=False)
    yield column("noise", "what its randomness comes from", lambda r: r.noise, is_number=False)
    yield column("users invited", "users on the invited nodes", lambda r: f"{r.invited_users:,}")
    if any(facts.attendance for facts in shown):
        yield column("nodes answered", "of those invited", _attendance, is_setting=False)
    if any(facts.initialization for facts in shown):
        yield column("initialization", "makes the first model", lambda r: "yes" if r.initialization else "no")
    yield column("outcome", "what became of the charge", lambda r: r.outcome, is_number=False, is_setting=False)


def _z(facts: RoundFacts) -> str:
    return "0 (no noise)" if float(facts.noise_multiplier) == 0 else facts.noise_multiplier


def _clipping_norm(facts: RoundFacts) -> str:
    return f"{float(facts.clipping_norm):#.6g}"


def _shares(facts: RoundFacts) -> str:
    return ", ".join(f"{name} {share}" for name, share in facts.shares.items())


def _cap(facts: RoundFacts) -> str:
    if facts.sampling != "none":
        return "as coins fall"
    return "no limit" if facts.cap is None else f"{facts.cap:,}"


def _attendance(facts: RoundFacts) -> str:
    if facts.attendance is None:
        return "not recorded"
    refused = "".join(f", {code} {count:,}" for code, count in sorted(facts.attendance.refusals.items()))
    return f"{facts.attendance.answered:,} of {facts.attendance.invited:,}{refused}"


def _is_constant(column: Column) -> bool:
    return column.is_setting and len(column.cells) > 1 and len(set(column.cells)) == 1


def _evaluation_view(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the evaluation part shows: plots, the same numbers as a table, and which differences are certain."""
    sections = {"ours": evaluation["error"], **evaluation["baselines"]}
    rows = {
        name: ErrorRow(label=_label(name), errors=_errors(sections[name]), is_ours=name == "ours")
        for name in sorted(sections, key=_place)
    }
    groups = {"overall": "all users"} | {name: name.replace("-", "–") for name in sections["ours"]["by_examples"]}
    groups = {
        name: title for name, title in groups.items() if any(row.errors.get(name) is not None for row in rows.values())
    }
    metric = _METRICS.get(evaluation["metric"], evaluation["metric"])
    standard_error = _finite(sections["ours"].get("standard_error"))
    return {
        "metric": metric,
        "groups": groups,
        "rows": [(row, _NOISE.get(name, _BASELINE_NOISE if name in METHODS else "")) for name, row in rows.items()],
        "standard_error": standard_error,
        "differences": _differences(evaluation.get("paired", {})),
        "penalties": {_label(name): value for name, value in evaluation.get("penalties", {}).items()},
        "svgs": _error_svgs(list(rows.values()), groups, standard_error, metric),
        **_curve_view(evaluation.get("curve", []), rows.get("non_private"), evaluation["metric"]),
    }


def _curve_view(curve: Sequence[Mapping[str, Any]], without_privacy: ErrorRow | None, metric: str) -> dict[str, Any]:
    """Held-out error over rounds and against epsilon, where it was computed."""
    points = [
        (float(point["round"]), _finite(point["epsilon"]), error)
        for point in curve
        if (error := _finite(point["error"])) is not None
    ]
    reference = None if without_privacy is None else without_privacy.errors.get("overall")
    return {
        "curve": points,
        "curve_svgs": _two_plots(
            [(number, error) for number, _, error in points],
            [(epsilon, error) for _, epsilon, error in points if epsilon is not None],
            upwards=f"held-out {metric.replace('_', ' ')}",
            name="exact",
            reference=None if reference is None else ("without privacy", reference),
        ),
    }


def _label(name: str) -> str:
    return _OURS if name == "ours" else METHODS.get(name, name)


def _place(name: str) -> int:
    order = ("ours", *METHODS)
    return order.index(name) if name in order else len(order)


def _differences(paired: Mapping[str, Any]) -> list[Difference]:
    """This run against each baseline, where both have an error."""
    found = []
    for name in sorted(paired, key=_place):
        value, spread = _finite(paired[name]["difference"]), _finite(paired[name]["standard_error"])
        if value is not None and spread is not None:
            found.append(Difference(label=_label(name), value=value, standard_error=spread))
    return found


def _error_svgs(
    rows: Sequence[ErrorRow], groups: Mapping[str, str], standard_error: float | None, metric: str
) -> list[Any]:
    titles = {name: title if name == "overall" else f"{title} training examples" for name, title in groups.items()}
    descriptions = {name: f"{metric}, {title}: {_listed(rows, name)}." for name, title in titles.items()}
    titles = {name: title.replace("training ", "") for name, title in titles.items()}
    return [
        _markup(svg)
        for svg in error_plots(rows, groups=titles, standard_error=standard_error, descriptions=descriptions)
    ]


def _listed(rows: Sequence[ErrorRow], group: str) -> str:
    errors = ((row.label, row.errors.get(group)) for row in rows)
    return ", ".join(f"{label} {error:.4g}" for label, error in errors if error is not None)


def _errors(section: Mapping[str, Any]) -> dict[str, float | None]:
    errors = {"overall": section["overall"], **section["by_examples"]}
    return {name: _finite(error) for name, error in errors.items()}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _markup(svg: str) -> Any:
    from markupsafe import Markup  # noqa: PLC0415 (comes with jinja2)

    return Markup(svg)  # noqa: S704 (our own drawing; what it quotes was escaped there)
