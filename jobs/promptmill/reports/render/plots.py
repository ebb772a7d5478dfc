"""Plots as inline SVG: lines in the text's own colour, so that they fit a light page, a dark one and paper."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from promptmill.reports.figures.aggregate import Plots
from promptmill.reports.figures.columns import Floats
from promptmill.reports.figures.timeline import merged
from promptmill.reports.render.details import Details

#: Stands for the colour of the text in what matplotlib draws; replaced afterwards.
INK = "#010203"

#: Blue and orange that both read on white and on near black.
BLUE, ORANGE, GREEN, RED = "#4c8bd6", "#d9822b", "#3f9c6b", "#cf4a4a"

_OUTCOMES = {"done": GREEN, "released": ORANGE, "failed": RED, "lost": RED, "running": BLUE}

_PHASES = {"loading": "#9b7fc4", "idle": "#b8bec4", "busy": BLUE}

#: Widths of a bar that fit into a plot: what lies closer is one bar.
WIDTH = 600

#: Inches of a plot.
SIZE = (6.4, 2.7)


def draw(paint: Callable[[Any], None], label: str, size: tuple[float, float] = SIZE) -> str:
    """An SVG element of what ``paint`` draws on its axes. ``label`` is read out instead of it."""
    # Matplotlib takes half a second to import.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        stream = io.StringIO()
        # Text stays text: the browser has fonts for labels that matplotlib's own cannot show.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are of one document: two plots on a page must not share them.
    prefix, label = re.sub(r"\W+", "-", label), html.escape(label)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def latency_histogram(shapes: Plots) -> str:
    """Rows by latency, and the share of rows up to it. The axis ends at the 99.5th percentile."""

    def paint(axes: Any) -> None:
        axes.stairs(shapes.latency_counts, shapes.latency_edges, fill=True, color=BLUE, alpha=0.75)
        axes.set(xlabel="latency s", ylabel="rows")
        share = axes.twinx()
        points = np.linspace(0, 99.5, 120)
        share.plot(shapes.latency.percentiles(points.tolist()), points, color=ORANGE)
        share.set(ylabel="% of rows up to", ylim=(0, 100))
        share.spines["right"].set_visible(True)

    return draw(paint, "Latency histogram and cumulative curve")


def over_time(
    lines: Sequence[tuple[str, Floats, Floats, str]], label: str, unit: str, step: Literal["pre", "post"] = "post"
) -> str:
    """Lines of (name, seconds, values, colour) over the time of the job. A value is of the time after its second, or,
    with ``step`` 'pre', of the time before it."""

    def paint(axes: Any) -> None:
        for name, at, values, colour in lines:
            axes.plot(at, values, color=colour, label=name, linewidth=1.4, drawstyle=f"steps-{step}")
        axes.set(xlabel="s since the first admission", ylabel=unit)
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")

    return draw(paint, label)


def scatter(shapes: Plots) -> str:
    def paint(axes: Any) -> None:
        axes.plot(
            shapes.scatter_tokens,
            shapes.scatter_latency_s,
            linestyle="",
            marker="o",
            markersize=2.2,
            alpha=0.45,
            color=BLUE,
        )
        axes.set(xlabel="output tokens", ylabel="latency s")
        axes.set_ylim(bottom=0)

    return draw(paint, "Output tokens against latency")


def timeline(details: Details) -> str:
    """What each worker did: below, what it was at, a mark where it began anew; above, its attempts by their end."""
    workers = sorted({span[0] for span in (*details.spans, *details.phases)})
    width = max((span[2] for span in (*details.spans, *details.phases)), default=1.0) / WIDTH

    def paint(axes: Any) -> None:
        for index, name in enumerate(workers):
            for spans, colours, low, high in (
                (details.phases, _PHASES, index - 0.36, 0.16), (details.spans, _OUTCOMES, index - 0.16, 0.52)
            ):  # fmt: skip
                for kind, colour in colours.items():
                    own = [(begin, end) for worker, begin, end, how in spans if (worker, how) == (name, kind)]
                    bars = [(begin, end - begin) for begin, end in merged(own, width)]
                    axes.broken_barh(bars, (low, high), facecolor=colour, alpha=0.8)
            again = [at for worker, at in details.restarts if worker == name]
            axes.plot(again, [index - 0.28] * len(again), linestyle="", marker="v", markersize=7, color=RED)
        axes.set_yticks(range(len(workers)), [name[-28:] for name in workers])
        axes.set(xlabel="s since the first admission")

    return draw(paint, "Workers over time", (6.4, 1.0 + 0.35 * len(workers)))


#: Workers that one plot shows.
MOST_WORKERS = 24


def occupancy(active: Mapping[str, Floats], slots: Mapping[str, int], slice_s: float) -> str:
    """A band for each worker: its active sequences over time, as high as its slots when all are taken."""
    workers = sorted(active)[:MOST_WORKERS]

    def paint(axes: Any) -> None:
        for index, name in enumerate(workers):
            top = float(slots.get(name) or active[name].max())
            at = np.arange(len(active[name])) * slice_s
            low = index - 0.4
            axes.fill_between(at, low, low + 0.8 * active[name] / top, step="post", color=BLUE, alpha=0.75, linewidth=0)
            axes.plot([0, at[-1] + slice_s], [low + 0.8] * 2, color=GREEN, linewidth=1.2)
        names = [f"{name[-24:]} ({slots[name]})" if name in slots else name[-24:] for name in workers]
        axes.set_yticks(range(len(workers)), names)
        axes.set(xlabel="s since the first admission")

    return draw(paint, "Active sequences against slots of each worker", (6.4, 1.0 + 0.45 * len(workers)))


def calibration(name: str, bins: Sequence[Mapping[str, float]]) -> str:
    """How often answers are right against how sure the model was, in bins of equally many answers."""

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
        axes.plot([each["confidence"] for each in bins], [each["share"] for each in bins], color=BLUE, marker="o")
        axes.set(xlabel="probability of the answer", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))

    return draw(paint, f"Calibration of {name}", (3.6, 3.2))


def short(label: str) -> str:
    """A label as it fits beside a matrix; an answer that could not be read has none."""
    text = label.strip('"') or "(unreadable)"
    return text if len(text) <= 18 else text[:17] + "…"


def confusion(labels: list[str], counts: list[list[int]], name: str) -> str:
    """Expected labels down, predicted ones across."""

    def paint(axes: Any) -> None:
        block = np.array(counts, dtype=float)
        shares = block / np.maximum(block.sum(axis=1, keepdims=True), 1)
        # Cells as shapes: an image inside the page would be blurred, and barred by its own security policy.
        edges = np.arange(len(labels) + 1) - 0.5
        axes.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1.4, alpha=0.6, edgecolor=INK, linewidth=0.3)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center")
        axes.set_xticks(range(len(labels)), [short(label) for label in labels], rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), [short(label) for label in labels])
        axes.set(xlabel="predicted", ylabel="expected")

    size = min(1.8 + 0.5 * len(labels), 9.0)
    return draw(paint, f"Confusion matrix of {name}", (size + 0.8, size))


def bars(values: Sequence[tuple[str, float, float]], label: str) -> str:
    """Values of (name, value, coefficient of variation) as bars, the first on top."""

    def paint(axes: Any) -> None:
        places = range(len(values))
        spread = [value * cv for _, value, cv in values]
        axes.barh(places, [value for _, value, _ in values], xerr=spread, color=BLUE, alpha=0.75, ecolor=INK)
        axes.set_yticks(places, [name for name, _, _ in values])
        axes.invert_yaxis()
        axes.set(xlabel="output tok/s; the whisker is the standard deviation between runs")

    return draw(paint, label, (6.4, 1.0 + 0.3 * len(values)))


def tradeoff(points: Sequence[tuple[str, float, float]], label: str) -> str:
    """Speed across and quality up, a named point each."""

    def paint(axes: Any) -> None:
        for name, rate, score in points:
            axes.plot([rate], [score], marker="o", color=BLUE)
            axes.annotate(name, (rate, score), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="output tok/s", ylabel="%", title=label)
        axes.margins(0.2)
        axes.set_xlim(left=0)

    return draw(paint, label)
