"""The results of the replay as one page that needs nothing but itself: curves over time, tables, what was chosen."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from benchmarks.utility_page import house_style
from benchmarks.utility_plots import STYLES, css_colours
from common.files import write_durably
from privacy.plots import INK, MUTED, RULE, SETTINGS, blank_figure, inline_svg

NAMES = {"log_loss": "logarithmic loss", "auc": "area under the ROC curve", "rmse": "RMSE"}
_LOOKS = {
    "never": (4, ":"),
    "last": (2, ":"),
    "warm": (3, "--"),
    "incremental-0.5": (5, "-"),
    "incremental-0.8": (7, "-"),
    "incremental-0.95": (1, "-"),
    "incremental-1": (0, "-"),
    "full": (6, "--"),
}
"""Number of the colour and of the marker, and dashes."""
_WIDTH, _HEIGHT = 6.4, 2.7
_SIZE = 9  # of type
_FAR = 3.0  # what is farther from full retraining than so many times the median is off the scale


def write_page(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page.

    Args:
        documents: Of `benchmarks.replay.run`, one a stream.
        path: Where the page goes; its folder is made.

    Raises:
        StorageError: If the disk fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, render(documents).encode())


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(four=_four)
    source = files("benchmarks").joinpath("templates/replay.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        style=house_style(),
        light=css_colours(0),
        dark=css_colours(1),
        names=NAMES,
        streams=[_view(document, number) for number, document in enumerate(documents)],
    )


def _view(document: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A stream's tables and plots."""
    results, metrics = document["results"], list(document["results"][0]["overall"])
    full = next(each for each in results if each["method"] == "full")
    best = {
        metric: (max if metric == "auc" else min)(each["overall"][metric] for each in results) for metric in metrics
    }
    plots = []
    for metric in metrics:
        values = {each["method"]: each["batches"][metric] for each in results}
        title = NAMES[metric]
        plots.append(_curves(document, values, f"{title} of each batch", f"s{number}-{metric}"))
        apart = {key: _running(values[key], values["full"]) for key in values if key != "full"}
        plots.append(_curves(document, apart, f"{title} less full retraining's, mean so far", f"d{number}-{metric}"))
    spent = {
        each["method"]: list(accumulate(each["seconds_of_batches"])) for each in results if each["method"] != "never"
    }
    plots.append(_curves(document, spent, "seconds of learning so far", f"t{number}", is_logarithmic=True))
    return {
        "name": document["stream"],
        "about": document["about"],
        "kinds": document["kinds"],
        "metrics": metrics,
        "batches": len(document["ends"]) - 1,
        "past": document["ends"][0],
        "events": document["ends"][-1] - document["ends"][0],
        "forgetting": document["forgetting"],
        "passes": document["passes"],
        "reach": document["reach"],
        "rows": [
            {
                **each,
                "is_best": {metric: each["overall"][metric] == best[metric] for metric in metrics},
                "faster": full["seconds"] / each["seconds"] if each["seconds"] > 0 else math.inf,
            }
            for each in results
        ],
        "plots": [Markup(plot) for plot in plots],  # noqa: S704 (our own drawings, descriptions escaped there)
        "grid": document["grid"],
    }


def _running(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Mean of the differences of all batches so far."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    return [total / count for count, total in enumerate(accumulate(differences), 1)]


def _curves(
    document: Mapping[str, Any],
    values: Mapping[str, Sequence[float]],
    upwards: str,
    name: str,
    *,
    is_logarithmic: bool = False,
) -> str:
    """One line a method over the batches."""
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a page is written)

    names = {each["method"]: each["name"] for each in document["results"]}
    ours = next(each["method"] for each in document["results"] if each["is_chosen"])
    with mpl.rc_context({**SETTINGS, "font.size": _SIZE}):
        figure, axes = blank_figure(_WIDTH, _HEIGHT)
        for key, line in values.items():
            number, dashes = _LOOKS[key]
            axes.plot(
                range(1, len(line) + 1),
                line,
                color=f"#0203{number:02x}",
                linestyle=dashes,
                linewidth=2.2 if key == ours else 1.2,
                marker=list(STYLES.values())[number][2],
                markersize=5 if key == ours else 4,
                markeredgewidth=0,
                label=names[key] + (" (chosen)" if key == ours else ""),
                zorder=5 if key == ours else 3,
            )
        if is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(*_limits(values))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(True, color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1) if upwards.endswith("mean so far") else None
        axes.set_title(upwards, size=_SIZE + 1, pad=6, loc="left")
        axes.set_xlabel("batch")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK, fontsize=_SIZE - 0.5)
        last = "; ".join(f"{names[key]} {line[-1]:.4g}" for key, line in values.items())
        svg = inline_svg(figure, name, f"{upwards} on {document['stream']}, over batches. After the last: {last}.")
    for number in range(len(STYLES)):
        svg = svg.replace(f"#0203{number:02x}", f"var(--m-{number})")
    return svg


def _limits(values: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Of the vertical axis: methods that are far from all others leave it."""
    ends = sorted(max(map(abs, line)) for line in values.values())
    kept = [line for line in values.values() if max(map(abs, line)) <= _FAR * ends[len(ends) // 2]]
    shown = [value for line in kept for value in line if math.isfinite(value)]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _four(value: float) -> str:
    """A number with four decimals, or what is left of one."""
    return f"{value:+.4f}".replace("-", "−").removeprefix("+") if math.isfinite(value) else "–"
