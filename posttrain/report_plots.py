"""The report's figures, drawn with matplotlib: SVG for the page, PNG beside it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.report_panels import INTERVAL, Panel, has_interval, labels
from posttrain.report_runs import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0969da", "#d1572f", "#1a7f37", "#8250df", "#bf8700", "#c4418a", "#0f8b8d", "#6e7781", "#a0522d", "#3d4bb8",
)  # fmt: skip
"""Of runs, or of metrics where there is one run; all of them readable on white."""
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Of metrics where there are several runs."""
MARKS = ("o", "s", "^", "D")
"""Of metrics that are measured once."""
BAD = "#cf222e"
SIZE = (4.8, 3.1)
"""Inches. On a phone's width a letter of the figure is then as large as the page's own."""
SETTINGS = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": True,
    "axes.formatter.useoffset": False,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.frameon": False,
    "legend.fontsize": 9,
    # Letters stay letters: small, sharp at any size, and found by the browser's search.
    "svg.fonttype": "none",
    # The same figure gives the same bytes.
    "svg.hashsalt": "posttrain",
}
SMOOTH_FROM = 40
"""Points from which a mean over neighbours is drawn over the values."""
SMOOTH_SHARE = 20
"""The mean is over this fraction of the points: 1 / 20."""
MAX_POINTS = 400
"""Points of a line; a longer series is drawn as the mean, least and greatest of as many equal parts."""
MIN_DECADES = 1.5
"""How far values spread before a panel that may be logarithmic is."""

# Hundredths of a point are less than a pixel; the rest of a path's digits would be most of the page.
_PATH = re.compile(r'\bd="[^"]*"')
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r"""(?:url\(|href=")#([\w.-]+)""")
_DIGITS = re.compile(r"(\.\d{2})\d+")


def draw(panel: Panel, runs: Sequence[RunRecord], path_png: Any) -> str | None:
    """Draws a panel, and writes it as a PNG.

    Args:
        panel: what to show.
        runs: of whom; those that lack its metrics are left out.
        path_png: where the PNG goes.

    Returns:
        The figure as an `<svg>` element, or None if no run has a value to show; nothing is written then.
    """
    shown = [(number, run, panel.select(run.names)) for number, run in enumerate(runs)]
    shown = [(number, run, names) for number, run, names in shown if any(len(run.series(n).steps) for n in names)]
    if not shown:
        return None
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if len(runs) > 1 and _one_value_each(panel, shown):
            _draw_estimates(axes, panel, shown)
        elif not panel.stacked:
            _draw_lines(axes, panel, shown, many=len(runs) > 1)
        elif len(runs) > 1 or len(shown[0][1].series(shown[0][2][0]).steps) < 3:
            _draw_bars(axes, shown)
        else:
            _draw_areas(axes, shown[0][1], shown[0][2])
        _legend(figure, axes)
        svg = _svg(figure, panel.name)
        axes.set_title(panel.title, fontsize=10, loc="left")
        figure.savefig(path_png, dpi=160, metadata={"Software": None})
    return svg


def _draw_lines(axes: Axes, panel: Panel, shown: Sequence[tuple[int, RunRecord, list[str]]], *, many: bool) -> None:
    metrics = list(dict.fromkeys(name for _, _, names in shown for name in names))
    everything: list[np.ndarray] = []
    for number, run, names in shown:
        for name in names:
            place = metrics.index(name)
            look: dict[str, Any] = (
                {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[place % len(STYLES)]}
                if many
                else {"color": COLOURS[place % len(COLOURS)], "linestyle": "-"}
            )
            series = run.series(name)
            everything.append(series.finite.values)
            _draw_series(axes, series, look)
            _draw_bands(axes, run, name, look["color"], None if many else panel.band)
        if not many:
            for step in run.resumes:
                axes.axvline(step, color="#57606a", linewidth=1, linestyle=(0, (2, 3)), zorder=1)
                axes.text(step, 1.0, "resumed", fontsize=8, ha="center", transform=axes.get_xaxis_transform())
    if many:
        for number, run, _ in shown:
            axes.plot([], [], color=COLOURS[number % len(COLOURS)], label=shortened(run.name, 30))
    if len(metrics) > 1:
        for place, text in enumerate(labels(metrics)):
            look = (
                {"color": "#24292f", "linestyle": STYLES[place % len(STYLES)]}
                if many
                else {"color": COLOURS[place % len(COLOURS)]}
            )
            axes.plot([], [], label=text, **look)
    axes.set_ylabel(panel.unit)
    _scale(axes, panel, np.concatenate(everything))
    _step_axis(axes)


def _one_value_each(panel: Panel, shown: Sequence[tuple[int, RunRecord, list[str]]]) -> bool:
    """Whether each run was measured once, as a pipeline's stages are: a line over the steps would then show nothing."""
    return panel.section == "evaluation" and all(
        len(run.series(name).steps) == 1 for _, run, names in shown for name in names
    )


def _draw_estimates(axes: Axes, panel: Panel, shown: Sequence[tuple[int, RunRecord, list[str]]]) -> None:
    """A place for each run, and a mark with its interval for each metric."""
    metrics = list(dict.fromkeys(name for _, _, names in shown for name in names))
    values = np.array([run.last(name) for _, run, names in shown for name in names])
    for place, (_, run, names) in enumerate(shown):
        for name in names:
            number = metrics.index(name)
            value = run.last(name)
            low, high = (run.series(name + end).values for end in INTERVAL)
            reach = [[value - low[-1]], [high[-1] - value]] if len(low) and len(high) else None
            look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
            where = place + 0.16 * (number - (len(metrics) - 1) / 2)
            axes.errorbar([where], [value], yerr=reach, linestyle="", capsize=3, markersize=5, **look)
    for number, text in enumerate(labels(metrics)):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        axes.plot([], [], linestyle="", markersize=5, label=text, **look)
    axes.set_ylabel(panel.unit)
    _scale(axes, panel, values[np.isfinite(values)])
    axes.set_xticks(range(len(shown)), [shortened(run.name, 14) for _, run, _ in shown])
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="x", rotation=0 if len(shown) <= 4 else 40)
    axes.grid(visible=False, axis="x")


def _draw_series(axes: Axes, series: Series, look: dict[str, Any]) -> None:
    """Draws the values, their running mean where they are many, and a cross where one is not finite."""
    bad = series.steps[~np.isfinite(series.values)]
    if len(bad):
        axes.plot(
            bad, np.full(len(bad), 0.02), "x", color=BAD, markersize=5, transform=axes.get_xaxis_transform(), zorder=5
        )
    count = len(series.steps)
    # A line is broken where a value is not finite, and not drawn across it.
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    if count > MAX_POINTS:
        steps, low, mean, high = buckets(series.steps, values)
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, linewidth=1.4, **look)
    elif count >= SMOOTH_FROM:
        axes.plot(series.steps, values, linewidth=0.8, alpha=0.3, **look)
        axes.plot(series.steps, running_mean(values, max(3, count // SMOOTH_SHARE)), linewidth=1.7, **look)
    else:
        axes.plot(series.steps, values, linewidth=1.5, marker="o", markersize=3 if count < 25 else 0, **look)


def _draw_bands(axes: Axes, run: RunRecord, name: str, colour: str, band: tuple[str, str] | None) -> None:
    """Draws the interval that was logged beside a metric, and the panel's own band."""
    interval = (name + INTERVAL[0], name + INTERVAL[1]) if has_interval(name) else None
    for low_name, high_name in filter(None, (interval, band)):
        low, high = run.series(low_name), run.series(high_name)
        if len(low.steps) and np.array_equal(low.steps, high.steps):
            axes.fill_between(low.steps, low.values, high.values, color=colour, alpha=0.14, linewidth=0)
            if len(low.steps) < 25 and low_name.startswith(name):
                axes.vlines(low.steps, low.values, high.values, color=colour, alpha=0.6, linewidth=1)


def _scale(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    positive = values[values > 0]
    if panel.log and len(positive) and np.log10(positive.max() / positive.min()) >= MIN_DECADES:
        if len(positive) == len(values):
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=float(positive.min()))
    elif panel.unit == "share" and len(values) and values.min() >= 0 and values.max() <= 1:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.set_ylim(-0.03 if values.max() > 0.3 else None, 1.03 if values.max() > 0.5 else None)
        axes.set_ylabel("")


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw_areas(axes: Axes, run: RunRecord, names: Sequence[str]) -> None:
    """One run's parts of a step, stacked over the steps."""
    steps = np.unique(np.concatenate([run.series(name).steps for name in names]))
    columns = []
    for name in names:
        series = run.series(name)
        column = np.zeros(len(steps))
        column[np.searchsorted(steps, series.steps)] = np.nan_to_num(series.values, posinf=0.0, neginf=0.0)
        columns.append(column)
    sums = np.array([column.sum() for column in columns])
    texts = [f"{text} {100 * part / (sums.sum() or 1.0):.0f} %" for text, part in zip(labels(names), sums, strict=True)]
    if len(steps) > MAX_POINTS:
        thinned = [buckets(steps, column) for column in columns]
        steps, columns = thinned[0][0], [mean for _, _, mean, _ in thinned]
    order = np.argsort(-sums)
    axes.stackplot(steps, *(columns[i] for i in order), labels=[texts[i] for i in order], colors=COLOURS, alpha=0.8)
    axes.set_ylabel("seconds")
    axes.margins(x=0)
    _step_axis(axes)


def _draw_bars(axes: Axes, shown: Sequence[tuple[int, RunRecord, list[str]]]) -> None:
    """Several runs' parts of a step: the median of each, stacked."""
    metrics = list(dict.fromkeys(name for _, _, names in shown for name in names))
    places = np.arange(len(shown))
    left = np.zeros(len(shown))
    for number, (name, text) in enumerate(zip(metrics, labels(metrics), strict=True)):
        medians = [float(np.median(one)) if len(one := run.series(name).finite.values) else 0.0 for _, run, _ in shown]
        axes.barh(places, medians, left=left, label=text, color=COLOURS[number % len(COLOURS)], height=0.6)
        left += medians
    axes.set_yticks(places, [shortened(run.name, 18) for _, run, _ in shown])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds, median of each part")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, texts = axes.get_legend_handles_labels()
    if not handles:
        return
    # As many columns as fit, at about 6 points a letter and 34 points for a line's sample.
    columns = max(1, int(SIZE[0] * 72 / (34 + 5.4 * max(map(len, texts)))))
    figure.legend(handles, texts, loc="outside lower left", ncols=min(columns, len(texts)), columnspacing=1.2)
    extra = -(-len(texts) // columns) - 1
    figure.set_size_inches(SIZE[0], SIZE[1] + 0.18 * extra)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element that scales with its place in the page, without what a file needs around it.

    Ids that nothing refers to are left out, and the others begin with `name`, so that figures of a page do not clash.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = _REFERENCE.sub(lambda found: f"{found[0].removesuffix(found[1])}{name}-{found[1]}", text)
    # The element takes its size from the page; the view box keeps its proportions.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return head + ">" + _PATH.sub(lambda found: _DIGITS.sub(r"\1", found[0]), rest)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the finite values among `width` neighbours, float64 [n]; NaN where a value is NaN.

    The window is centred and cut off at the ends.
    """
    half = width // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    number = counts[last] - counts[first]
    means = (sums[last] - sums[first]) / np.maximum(number, 1)
    return np.where(finite, means, np.nan)


def buckets(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A long series as MAX_POINTS parts: middle steps, and the least, mean and greatest finite value of each.

    A part without a finite value is NaN.
    """
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)
    parts = [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]
    found = []
    for part in parts:
        kept = values[part][np.isfinite(values[part])]
        found.append((kept.min(), kept.mean(), kept.max()) if len(kept) else (np.nan,) * 3)
    low, mean, high = np.array(found).T
    return np.array([steps[part].mean() for part in parts]), low, mean, high


def shortened(text: str, width: int) -> str:
    """Text of at most `width` letters, its middle left out: runs differ at their names' ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"
