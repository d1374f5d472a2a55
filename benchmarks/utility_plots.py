"""The plots of the utility page: a line for each method, named where it ends.

Colours are told apart by people with any kind of colour vision, and every method has a marker of its own, so that no
colour is needed. As in `privacy.plots`, each is a variable of the page's style sheet.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.utility_results import CEILING, METHODS, OURS
from privacy.plots import ACCENT, INK, MUTED, RULE, SETTINGS, blank_figure, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "umbel": ("#0b6862", "#63c3b8", "D"),
    "umbel_tuned": ("#3f9a5f", "#8fd694", "d"),
    "fedavg": ("#7c858b", "#8f999f", "o"),
    "fedavg_tuned": ("#c25400", "#f5945a", "s"),
    "centaur": ("#0072b2", "#64b5f6", "v"),
    "amht_lrs": ("#b3508a", "#eb9fca", "P"),
    "fedrep": ("#b07a00", "#ecb84e", "<"),
    "ridge_around_global": ("#1d2226", "#e6e7e4", "X"),
    "alone": ("#7a7000", "#cfc553", "*"),
    "full_covariance": ("#5b646b", "#a0a9ae", ""),
}
"""Colour on light, colour on dark, marker. A triangle that points up means "off the scale" and is nobody's."""
_OTHER_MARKERS = "hp>8H"
_WIDTH, _HEIGHT, _PANEL_WIDTH, _PANEL_HEIGHT = 5.4, 3.5, 4.6, 2.7
_SIZE = 9  # of type
_LABEL_GAP = 0.072  # between names, in parts of the height
_FAR = 2.5  # what is farther from the best than so many times the median is off the scale
_NEVER_CUT = 1.6  # unless showing it costs less than so much of the height
_RATIOS = (
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    1.0,
    1.02,
    1.05,
    1.1,
    1.2,
    1.4,
    1.7,
    2.0,
    3.0,
    5.0,
    10.0,
    30.0,
)
_FINE_RATIOS = (0.97, 0.98, 0.985, 0.99, 0.995, 1.0, 1.005, 1.01, 1.015, 1.02, 1.03)
_MOST_TICKS = 7


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method's points.

    Attributes:
        method: Its key.
        values: At each place from left to right; None where there is none.
        half_widths: Of their intervals; None where there is none.
    """

    method: str
    values: Sequence[float | None]
    half_widths: Sequence[float | None] = ()


def css_colours(index: int) -> dict[str, str]:
    """Colours on light (0) or dark (1) by the name of their variable."""
    return {f"m-{number}": style[index] for number, style in enumerate(STYLES.values())}


def epsilon_lines(
    lines: Sequence[Line],
    *,
    epsilons: Sequence[float | None],
    metric: str,
    cut: bool,
    name: str,
    description: str,
) -> str:
    """Error against epsilon, which grows by factors; without noise stands apart at the right end.

    Args:
        lines: Of values at `epsilons`.
        epsilons: Rising; None, which is last, is without noise.
        metric: What the values are.
        cut: Whether values far above the others may be off the scale.
        name: Of the drawing, its own on the page.
        description: For whoever does not see it.
    """
    places = [math.log2(epsilon) for epsilon in epsilons if epsilon is not None]
    step = (places[-1] - places[0]) / (len(places) - 1) if len(places) > 1 else 1.0
    if None in epsilons:
        places.append(places[-1] + 1.15 * step if places else 0.0)
    with _drawing():
        figure, axes = blank_figure(_WIDTH, _HEIGHT)
        _draw(axes, lines, places, cut=cut)
        axes.set_xticks(places, ["none" if epsilon is None else f"{epsilon:g}" for epsilon in epsilons])
        if None in epsilons and len(places) > 1:
            axes.axvline(places[-1] - 0.575 * step, color=RULE, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        axes.set_xlabel("epsilon")
        axes.set_ylabel(metric)
        return _coloured(inline_svg(figure, name, description))


def ratio_lines(
    lines: Sequence[Line],
    *,
    places: Sequence[Any],
    labels: Sequence[str],
    title: str,
    axis: str,
    cut: bool,
    name: str,
    description: str,
) -> str:
    """Error over umbel's, against something of the data.

    Args:
        lines: Of ratios, positive.
        places: What the horizontal axis is; numbers that grow by a large factor are drawn by factors, and what is
            not a number is drawn at equal distances.
        labels: Of the places.
        title: Of the drawing.
        axis: Name of the horizontal axis.
        cut: Whether values far above the others may be off the scale.
        name: Of the drawing, its own on the page.
        description: For whoever does not see it.
    """
    logs = [
        Line(method=line.method, values=[None if v is None or not v > 0 else math.log(v) for v in line.values])
        for line in lines
    ]
    with _drawing():
        figure, axes = blank_figure(_PANEL_WIDTH, _PANEL_HEIGHT)
        positions = _positions(places)
        _draw(axes, logs, positions, cut=cut)
        axes.set_title(title, size=_SIZE + 1, pad=6)
        axes.set_xticks(positions, labels)
        low, high = axes.get_ylim()
        ticks = _ratio_ticks(low, high)
        axes.set_yticks([math.log(ratio) for ratio in ticks], [f"{ratio:g}" for ratio in ticks])
        axes.set_xlabel(axis)
        axes.set_ylabel("error over umbel's")
        return _coloured(inline_svg(figure, name, description))


def _drawing() -> Any:
    import matplotlib as mpl  # noqa: PLC0415 (half a second, needed only where a page is written)

    return mpl.rc_context({**SETTINGS, "font.size": _SIZE})


def _draw(axes: "Axes", lines: Sequence[Line], places: Sequence[float], *, cut: bool) -> None:
    bottom, top = _limits(lines, cut=cut)
    span = (places[-1] - places[0]) or 1.0
    axes.set_xlim(places[0] - 0.08 * span, places[-1] + 0.08 * span)
    axes.set_ylim(bottom, top)
    axes.yaxis.grid(True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=3)
    shift = 0.011 * span
    for number, line in enumerate(lines):
        moved = shift * (number - (len(lines) - 1) / 2)  # intervals at one place stay apart
        _draw_line(axes, line, [place + (0 if line.method == CEILING else moved) for place in places], top)
    _name_lines(axes, lines, places)


def _draw_line(axes: "Axes", line: Line, places: Sequence[float], top: float) -> None:
    points = [(x, y) for x, y in zip(places, line.values, strict=True) if y is not None and math.isfinite(y)]
    if not points:
        return
    is_ours = line.method == OURS
    style: dict[str, Any] = {"color": _placeholder(line.method), "zorder": 6 if is_ours else 4}
    dashes = (0, (5, 3)) if line.method == CEILING else "-"
    axes.plot(*zip(*points, strict=True), linewidth=2.2 if is_ours else 1.2, linestyle=dashes, **style)
    inside = [(x, y) for x, y in points if y <= top]
    if inside and _marker(line.method):
        marker_size = 6.5 if is_ours else 6
        axes.plot(*zip(*inside, strict=True), _marker(line.method), markersize=marker_size, markeredgewidth=0, **style)
    for x in (x for x, y in points if y > top):
        axes.plot(x, top, "^", markersize=6, markeredgewidth=0, clip_on=False, **style)
    for x, y, half in zip(places, line.values, line.half_widths, strict=False):
        if y is not None and half is not None and y <= top:
            axes.errorbar(x, y, yerr=half, fmt="none", ecolor=style["color"], elinewidth=0.9, capsize=2)


def _name_lines(axes: "Axes", lines: Sequence[Line], places: Sequence[float]) -> None:
    """Names to the right, each joined to the last point of its line."""
    bottom, top = axes.get_ylim()
    ends = {}
    for line in lines:
        last = [(x, y) for x, y in zip(places, line.values, strict=True) if y is not None and math.isfinite(y)]
        if last:
            ends[line.method] = (last[-1][0], min(1.0, (last[-1][1] - bottom) / (top - bottom)))
    left, right = axes.get_xlim()
    gap = _LABEL_GAP * _HEIGHT / (axes.figure.get_size_inches()[1])
    heights = _apart({method: height for method, (_, height) in ends.items()}, gap)
    for method, (x, height) in ends.items():
        color, start = _placeholder(method), (x - left) / (right - left)
        axes.plot(
            (start, 1.0, 1.04),
            (height, height, heights[method]),
            color=color,
            linewidth=0.6,
            alpha=0.6,
            transform=axes.transAxes,
            clip_on=False,
            zorder=2,
        )
        if _marker(method):
            axes.plot(
                1.07,
                heights[method],
                _marker(method),
                color=color,
                markersize=5,
                markeredgewidth=0,
                transform=axes.transAxes,
                clip_on=False,
            )
        axes.annotate(
            METHODS.get(method, method),
            (1.1, heights[method]),
            xycoords="axes fraction",
            va="center",
            size=_SIZE - 0.5,
            color=ACCENT if method == OURS else MUTED if method == CEILING else INK,
            weight="bold" if method == OURS else "normal",
        )


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights, moved as little as is needed for `gap` between neighbours; the lowest may fall below 0."""
    names = sorted(heights, key=lambda name: heights[name])
    blocks: list[list[str]] = []

    def bottom(block: list[str]) -> float:
        middle = statistics.fmean(heights[name] - gap * place for place, name in enumerate(block))
        return min(middle, 1.0 - gap * (len(block) - 1))

    for name in names:
        blocks.append([name])
        while len(blocks) > 1 and bottom(blocks[-2]) + gap * len(blocks[-2]) > bottom(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return {name: bottom(block) + gap * place for block in blocks for place, name in enumerate(block)}


def _limits(lines: Sequence[Line], *, cut: bool) -> tuple[float, float]:
    """Of the vertical axis: umbel is always within it, and so are most others."""
    values = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    ours = [v for line in lines if line.method == OURS for v in line.values if v is not None and math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    near = max([low + _FAR * (statistics.median(values) - low), *ours])
    if cut and high - low > _NEVER_CUT * (near - low) > 0:
        high = near
    bars = [
        (value, half)
        for line in lines
        for value, half in zip(line.values, line.half_widths, strict=False)
        if value is not None and half is not None and low <= value <= high
    ]
    room = (high - low) / 2  # a wide interval may leave the drawing before it flattens all lines
    low, high = (
        max(low - room, min([low, *(value - half for value, half in bars)])),
        min(high + room, max([high, *(value + half for value, half in bars)])),
    )
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _positions(places: Sequence[Any]) -> list[float]:
    if not all(isinstance(place, int | float) and not isinstance(place, bool) for place in places):
        return [float(number) for number in range(len(places))]
    numbers = [float(place) for place in places]
    is_wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 4
    return [math.log2(number) for number in numbers] if is_wide else numbers


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios within logarithmic limits, few enough to read."""
    found: list[float] = []
    for ratios in (_RATIOS, _FINE_RATIOS):
        found = [ratio for ratio in ratios if low <= math.log(ratio) <= high]
        if len(found) >= 3:
            break
    while len(found) > _MOST_TICKS:
        middle = found.index(1.0) if 1.0 in found else 0
        found = [ratio for place, ratio in enumerate(found) if (place - middle) % 2 == 0]
    return found


def _number(method: str) -> int:
    """Of its colour; methods that the page does not know share those of the others."""
    names = list(STYLES)
    return names.index(method) if method in names else sum(method.encode()) % len(names)


def _marker(method: str) -> str:
    return STYLES[method][2] if method in STYLES else _OTHER_MARKERS[sum(method.encode()) % len(_OTHER_MARKERS)]


def _placeholder(method: str) -> str:
    return f"#0203{_number(method):02x}"


def _coloured(svg: str) -> str:
    for number in range(len(STYLES)):
        svg = svg.replace(f"#0203{number:02x}", f"var(--m-{number})")
    return svg
