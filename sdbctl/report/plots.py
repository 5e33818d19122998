"""The plots of the HTML page, as inline SVG whose colours are CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sdbctl.report import Curve, Point, Report, Student
from sdbctl.report.view import ROLES, clean, ordered, spread

WIDE, NARROW = 1000, 340
"""Widths in CSS pixels, for a desktop and for a phone."""
FEW = 10
"""Images below which a bin of a reliability diagram is not drawn."""
_DPI = 72  # matplotlib writes SVG in points of 1/72 inch, so a point is a CSS pixel here
# matplotlib wants real colours: each CSS variable gets one that nothing else uses
_PAINT = {name: f"#{0xA1B200 + index:06x}" for index, name in enumerate(("ink", "muted", "line", *ROLES))}
_SERIES = ("reference", "attack", "floor", "authorized", "wrong_key", "disturb")
_MARKS = "osD^v*"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 13,
    "lines.markersize": 5,
    "axes.edgecolor": _PAINT["line"],
    "axes.labelcolor": _PAINT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _PAINT["line"],
    "grid.linewidth": 0.8,
    "text.color": _PAINT["ink"],
    "xtick.color": _PAINT["line"],
    "ytick.color": _PAINT["line"],
    "xtick.labelcolor": _PAINT["muted"],
    "ytick.labelcolor": _PAINT["muted"],
    "legend.frameon": False,
    "legend.fontsize": 12,
}


@dataclass(frozen=True)
class Plot:
    """One plot: a heading and the SVG."""

    title: str
    svg: Markup


def students(report: Report, width: int) -> Plot | None:
    """Bars from each student's control, the best of the floor, to its mean, with standard deviations and seeds as dots.

    Names and numbers stand beside the bars, or above them where the page is narrow. A student that falls far
    below the floor gets a bar that is cut off, so that the others stay readable.
    """
    rows = [student for student in ordered(report.students) if student.mean is not None]
    if not rows:
        return None
    narrow = width < WIDE
    control = report.students.get("control")
    floor = control.mean if control else None
    without = report.students.get("control_unlabelled", control)
    seen = [edge for student in rows for edge in _edges(student)]
    base = min(seen) if floor is None else floor
    high = max(*seen, base)
    low = max(min(seen), base - max(3.0, high - base))
    margin = max(0.05 * (high - low), 0.2)

    def draw(axes: Axes) -> None:
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(rows) - 0.5, -0.7 if narrow else -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("Test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 8))
        # a narrow page has words between the bars
        above, below = (0.22, 0.28) if narrow else (0.5, 0.5)
        for place, student in enumerate(rows):
            own = without if student.labels is False else control
            start = base if own is None or own.mean is None else own.mean
            _bar(axes, place, student, start, low - margin / 2)
            _words(axes, place, student, narrow)
            if own is not None:
                axes.vlines(start, place - above, place + below, _PAINT["ink"], (0, (4, 3)), linewidth=1.3, zorder=4)

    words = "; ".join(f"{clean(student.label)} {spread(student)}" for student in rows)
    return Plot("Students", _svg(draw, width, (46 if narrow else 32) * len(rows) + 56, words))


def _edges(student: Student) -> Iterator[float]:
    """How far a student reaches to the left and to the right: mean, standard deviation and seeds."""
    yield from (value for value in student.values if value is not None)
    if student.mean is not None:
        yield from (student.mean - (student.sd or 0), student.mean + (student.sd or 0))


def _bar(axes: Axes, place: int, student: Student, base: float, lowest: float) -> None:
    colour, mean = _PAINT[student.role], student.mean or 0.0
    end = max(mean, lowest)
    axes.barh(place, end - base, left=base, height=0.34, color=colour, alpha=0.4, linewidth=0)
    if mean < lowest:
        axes.plot([lowest], [place], "<", color=colour, markersize=8, zorder=5)
        return
    axes.errorbar(mean, place, xerr=student.sd, color=colour, capsize=4, linewidth=1.8, fmt="|", markersize=14)
    seeds = [value for value in student.values if value is not None]
    places = [place] * len(seeds)
    axes.plot(seeds, places, "o", color=colour, alpha=0.75, markeredgewidth=0, zorder=5)


def _words(axes: Axes, place: int, student: Student, narrow: bool) -> None:
    edges = axes.get_yaxis_transform()
    label, value = _short(student.label, 30 if narrow else 38), spread(student)
    muted = _PAINT["muted"]
    if narrow:
        axes.text(0, place - 0.42, label, transform=edges, va="center")
        axes.text(1, place - 0.42, value, transform=edges, va="center", ha="right", color=muted)
    else:
        axes.text(-0.02, place, label, transform=edges, va="center", ha="right")
        axes.text(1.02, place, value, transform=edges, va="center", color=muted)


def _short(text: str, length: int = 30) -> str:
    """Clean text that fits; the tables have all of it."""
    text = clean(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def reliability(report: Report) -> Iterator[Plot]:
    """Accuracy over confidence for the original and the boxed model; dot areas are shares of images."""
    original = "original_ft" if "original_ft" in report.models else "original"
    shown = [report.models[name] for name in (original, "boxed") if name in report.models]
    shown = [model for model in shown if model.reliability]
    if not shown:
        return

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_PAINT["muted"], linestyle=(0, (4, 3)), linewidth=1)
        for model, role, mark in zip(shown, _SERIES, "os", strict=False):
            bins = [
                (item.confidence, item.accuracy, 8 + 220 * (item.share or 0))
                for item in model.reliability
                if item.confidence is not None and item.accuracy is not None and _many(item.share, model.n_images)
            ]
            x, y, area = zip(*bins, strict=True) if bins else ((), (), ())
            axes.plot(x, y, color=_PAINT[role], linewidth=1.5, marker=mark, markersize=3, label=_short(model.label))
            axes.scatter(x, y, area, color=_PAINT[role], alpha=0.35, linewidth=0, marker=mark)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="Confidence", ylabel="Accuracy")
        _legend(axes)

    words = (
        "Accuracy over confidence; on the dashed line they agree. Large dots hold many images; bins of fewer than "
        f"{FEW} are left out."
    )
    yield Plot("Reliability", _svg(draw, NARROW, 320, words))


def _many(share: float | None, images: int | None) -> bool:
    """Whether the accuracy of so many images is more than luck; of old reports it is not known how many they are."""
    return share is None or images is None or round(share * images) >= FEW


def curves(report: Report) -> Iterator[Plot]:
    """The curves of a report, each series with its bounds."""
    for curve in report.curves.values():
        words = f"{clean(curve.y_label)} over {clean(curve.x_label)}."
        yield Plot(clean(curve.title), _svg(_curve(curve), NARROW, 320, words))


def _curve(curve: Curve) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for index, (name, points) in enumerate(curve.series.items()):
            colour = _PAINT[_SERIES[index % len(_SERIES)]]
            known = sorted(_known(points, log=curve.x_log))
            x, y, low, high = zip(*known, strict=True) if known else ((), (), (), ())
            axes.plot(
                x, y, color=colour, linewidth=1.8, marker=_MARKS[index % len(_MARKS)], markersize=5, label=clean(name)
            )
            if low != high:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        if curve.x_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=_short(curve.x_label), ylabel=_short(curve.y_label))
        if curve.series:
            _legend(axes)

    return draw


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides no curve; in two columns if the names are short."""
    names = axes.get_legend_handles_labels()[1]
    axes.figure.legend(loc="outside upper left", ncols=2 if max(map(len, names), default=0) < 18 else 1)


def trade_off(reports: Mapping[str, Report], cost: str, words: str) -> Plot | None:
    """What a student gains from each of several boxes, over what the box costs its users or gives key holders.

    Args:
        reports: Reports by the name of a setting.
        cost: Path of that in a report.
        words: What it is.
    """
    known = [
        (name, price, gain)
        for name, report in reports.items()
        if (gain := report.unauthorized_advantage.api.labelled).mean is not None
        and (price := report.get(cost)) is not None
    ]
    if not known:
        return None

    known.sort(key=lambda point: point[2].mean or 0.0)

    def draw(axes: Axes) -> None:
        for _, price, gain in known:
            assert gain.mean is not None
            low, high = (gain.mean if bound is None else bound for bound in (gain.low, gain.high))
            axes.plot([price, price], [low, high], color=_PAINT["attack"], linewidth=1.2, alpha=0.6)
            axes.plot([price], [gain.mean], color=_PAINT["attack"], marker="o")
        axes.axhline(0, color=_PAINT["ink"], linewidth=1, linestyle="--")
        low, high = axes.get_ylim()
        heights = _apart([((gain.mean or 0.0) - low) / (high - low) for *_, gain in known], 1 / len(known))
        for (name, price, gain), height in zip(known, heights, strict=True):
            axes.annotate(
                clean(name),
                (price, gain.mean or 0.0),
                xytext=(1.04, height),
                textcoords="axes fraction",
                verticalalignment="center",
                fontsize=11,
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": _PAINT["attack"], "alpha": 0.5},
            )
        axes.set(xlabel=words, ylabel="Advantage, points")

    text = f"Advantage without the key over the floor, by setting, over {words.lower()}."
    return Plot(words, _svg(draw, NARROW, 320, text))


def _apart(heights: list[float], most: float) -> list[float]:
    """Rising heights in [0, 1], moved until they are 0.07 (at most ``most``) from each other."""
    gap, moved = min(0.07, most), list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    last = len(moved) - 1
    return [min(height, 1 - (last - i) * gap) for i, height in enumerate(moved)]


def _known(points: tuple[Point, ...], *, log: bool) -> Iterator[tuple[float, float, float, float]]:
    """The points that can be drawn; a bound that is missing is the point itself."""
    for point in points:
        if point.x is not None and point.y is not None and (point.x > 0 or not log):
            low = point.y if point.low is None else point.low
            high = point.y if point.high is None else point.high
            yield point.x, point.y, low, high


def _svg(draw: Callable[[Axes], None], width: int, height: int, description: str) -> Markup:
    """Draw a figure and turn it into SVG that lives in a page: CSS colours and fonts, no prologue."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{width}×{height} {description}"}):
        figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids of groups repeat from figure to figure; nothing uses them
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'="([\d.]+)pt"', r'="\1"', text, count=2)
    for name, colour in _PAINT.items():
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", text)
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(text.removeprefix("<svg"))
