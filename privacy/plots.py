"""The plots of a report, as SVG for the inside of a page.

Drawn by matplotlib in the colours of the page: each is written as a CSS variable, so that one drawing is readable
on light, dark and paper. Equal numbers give equal bytes. Nothing in a plot refers to anything outside the page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours no one would choose, each standing for a variable of the page's style sheet.
INK, MUTED, RULE, ACCENT, TINT, WARN = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", TINT: "tint", WARN: "warn"}
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
    "svg.hashsalt": "umbel",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_FONT = "font-family: 'DejaVu Sans', sans-serif"
_MOST_MARKERS = 60
_MOST_RUNS = 4
_LONGEST_NAME = 14
# Inches of 72 units each; narrow, so that type stays readable where a phone shrinks the drawing to its width.
_CURVE_WIDTH, _PANEL_WIDTH = 4.2, 3.6
_HALF_HEIGHT = 2.0
_ROOM = 0.12  # beside the outermost points


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """The errors of one method.

    Attributes:
        label: What it is called.
        errors: By group of users, None where the group is empty.
        is_ours: Whether it is the released model.
    """

    label: str
    errors: Mapping[str, float | None]
    is_ours: bool


def epsilon_plot(
    points: Sequence[tuple[int, float]], *, budget: float, run_starts: Mapping[int, str], description: str
) -> str:
    """Epsilon spent after each charged round, against the budget.

    Args:
        points: Number of the round in its ledger, and epsilon after it; finite.
        budget: Epsilon that may be spent; inf draws no line.
        run_starts: Runs by the number of their first round; marked if there are several, but not many.
        description: For whoever does not see the plot.
    """
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a report is written)

    with mpl.rc_context(SETTINGS):
        figure, axes = blank_figure(_CURVE_WIDTH, 2.2)
        numbers, epsilons = [0, *(n for n, _ in points)], [0.0, *(epsilon for _, epsilon in points)]
        axes.plot(
            numbers,
            epsilons,
            color=ACCENT,
            linewidth=1.6,
            marker="o" if len(points) <= _MOST_MARKERS else None,
            markersize=4,
            clip_on=False,
            zorder=3,
        )
        top = max(epsilons)
        if budget < float("inf"):
            top = max(top, budget)
            axes.axhline(budget, color=WARN, linewidth=1.2, linestyle=(0, (5, 3)))
            axes.annotate("budget", (0, budget), (4, -4), textcoords="offset points", va="top", color=WARN)
        if 1 < len(run_starts) <= _MOST_RUNS:
            for start, run in run_starts.items():
                name = run if len(run) <= _LONGEST_NAME else f"{run[: _LONGEST_NAME - 1]}…"
                axes.axvline(start - 0.5, color=RULE, linewidth=0.8, zorder=1)
                axes.annotate(name, (start - 0.5, 0), (4, 4), textcoords="offset points", color=MUTED, size=8)
        axes.set_xlim(0, max(numbers) or 1)
        axes.set_ylim(0, (top or 1) * 1.06)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(True, color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("charged rounds of the ledger")
        axes.set_ylabel("epsilon spent")
        return inline_svg(figure, "epsilon", description)


def error_plots(
    rows: Sequence[ErrorRow],
    *,
    groups: Mapping[str, str],
    standard_error: float | None,
    descriptions: Mapping[str, str],
) -> tuple[str, ...]:
    """Errors of all methods, a drawing for each group of users, all on one scale.

    Args:
        rows: From top to bottom.
        groups: Titles of the drawings by group; the first one is of all users.
        standard_error: Of ours in the first drawing.
        descriptions: By group, for whoever does not see the drawing.
    """
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a report is written)

    limits = _limits([error for row in rows for group in groups if (error := row.errors.get(group)) is not None])
    with mpl.rc_context(SETTINGS):
        drawings = []
        for number, (group, title) in enumerate(groups.items()):
            figure, panel = blank_figure(_PANEL_WIDTH, 0.65 + 0.24 * len(rows))
            _error_panel(panel, rows, group, title)
            panel.set_xlim(*limits)
            if number == 0 and standard_error is not None:
                _draw_standard_error(panel, rows, group, standard_error)
            drawings.append(inline_svg(figure, f"errors{number}", descriptions[group]))
        return tuple(drawings)


def progress_plot(
    points: Sequence[tuple[float, float]],
    *,
    across: str,
    upwards: str,
    name: str,
    description: str,
    reference: tuple[str, float] | None = None,
) -> str:
    """A number that changes as training goes on.

    Args:
        points: Where on the horizontal axis, and the number.
        across: Label of the horizontal axis.
        upwards: Label of the vertical axis.
        name: Of the drawing on its page.
        description: For whoever does not see the plot.
        reference: Name and height of a line to compare with.
    """
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a report is written)

    heights = [height for _, height in points] + ([reference[1]] if reference else [])
    with mpl.rc_context(SETTINGS):
        figure, axes = blank_figure(_PANEL_WIDTH, _HALF_HEIGHT)
        marker = "o" if len(points) <= _MOST_MARKERS else None
        axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.6, marker=marker, markersize=4, zorder=3)
        if reference:
            axes.axhline(reference[1], color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
            # to the left, where a curve that falls is far above it
            where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(reference[0], (0.02, reference[1]), (0, 4), va="bottom", color=MUTED, **where)
        axes.set_ylim(*_limits(heights))
        axes.xaxis.get_major_locator().set_params(integer=all(float(x).is_integer() for x, _ in points))
        axes.yaxis.grid(True, color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(across)
        axes.set_ylabel(upwards)
        return inline_svg(figure, name, description)


def bounds_plot(bounds: Sequence[tuple[str, float]], *, claimed: float, description: str) -> str:
    """Lower bounds on epsilon beside what is claimed; one that is above it stands out.

    Args:
        bounds: Names and epsilons, from top to bottom.
        claimed: Epsilon.
        description: For whoever does not see the plot.
    """
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a report is written)

    with mpl.rc_context(SETTINGS):
        figure, axes = blank_figure(_CURVE_WIDTH, 0.75 + 0.3 * len(bounds))
        for position, (_, epsilon) in enumerate(bounds):
            color = WARN if epsilon > claimed else ACCENT
            axes.plot([0, epsilon], [position, position], color=color, linewidth=5, solid_capstyle="butt", alpha=0.5)
            axes.plot(epsilon, position, "D", color=color, markersize=6, clip_on=False, zorder=4)
        axes.axvline(claimed, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        largest = max(claimed, *(epsilon for _, epsilon in bounds)) or 1.0
        axes.set_xlim(-0.02 * largest, (1 + _ROOM) * largest)
        axes.set_ylim(len(bounds) - 0.5, -1)
        left = claimed > largest / 2
        axes.annotate(
            "claimed",
            (claimed, -0.95),
            (-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
        )
        axes.set_yticks(range(len(bounds)), [name for name, _ in bounds])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("epsilon")
        return inline_svg(figure, "bounds", description)


def _error_panel(panel: "Axes", rows: Sequence[ErrorRow], group: str, title: str) -> None:
    panel.set_title(title, size=10, pad=6)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.yaxis.grid(True, color=RULE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.locator_params(axis="x", nbins=4)
    panel.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(ACCENT if row.is_ours else INK)
    for position, row in enumerate(rows):
        error = row.errors.get(group)
        if error is None:
            continue
        if row.is_ours:
            panel.axvline(error, color=ACCENT, linewidth=0.8, alpha=0.6, zorder=1)
        marker, color, size = ("D", ACCENT, 6.5) if row.is_ours else ("o", INK, 5)
        panel.plot(error, position, marker, color=color, markersize=size, clip_on=False, zorder=5)


def _draw_standard_error(panel: "Axes", rows: Sequence[ErrorRow], group: str, standard_error: float) -> None:
    for position, row in enumerate(rows):
        error = row.errors.get(group)
        if row.is_ours and error is not None:
            panel.axvspan(error - standard_error, error + standard_error, color=TINT, linewidth=0, zorder=0)
            panel.errorbar(error, position, xerr=standard_error, color=ACCENT, capsize=3, linewidth=1.4, zorder=4)


def _limits(errors: Sequence[float]) -> tuple[float, float]:
    """Of an axis that has room for all markers."""
    low, high = min(errors, default=0.0), max(errors, default=1.0)
    margin = _ROOM * (high - low) or 0.5
    return low - margin, high + margin


def blank_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415 (as above)

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    panel = figure.subplots()
    panel.patch.set_alpha(0)
    return figure, panel


def inline_svg(figure: "Figure", name: str, description: str) -> str:
    """The drawing without what only a file of its own needs, in the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<defs>\s*<style.*?</defs>", "", drawn, count=1, flags=re.DOTALL)  # it would style the page
    head, rest = drawn.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    rest = rest.replace("xlink:href", "href")
    # several drawings share a page: each has identifiers of its own
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", rest)
    for color, variable in _VARIABLES.items():
        rest = rest.replace(color, f"var(--{variable})")
    rest = rest.replace(_FONT, "font-family: var(--sans)")
    label = escape(description, quote=True)
    return f'<svg role="img" aria-label="{label}" {view.group() if view else ""}>{rest}'
