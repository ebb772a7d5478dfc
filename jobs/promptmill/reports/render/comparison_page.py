"""Comparisons as one HTML file, with each change and its interval as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promptmill.reports.compare.comparison import Comparison, Line
from promptmill.reports.render import plots, tables
from promptmill.reports.render.html import document, safe, section, table


def text(found: Sequence[Comparison]) -> str:
    """The whole file."""
    title = "promptmill: comparison with " + (found[0].before.name or found[0].before.job_id)
    return document(title, "".join(_one(each, number) for number, each in enumerate(found, 1)))


def _one(found: Comparison, number: int) -> str:
    names = [each.name or each.job_id for each in (found.before, found.after)]
    good = "bad" if any(line.word == "worse" for line in found.lines) else "good"
    jobs = [(label, each.job_id, each.name or "", each.model, f"{runs}")
            for label, each, runs in zip("AB", (found.before, found.after), found.runs, strict=True)]  # fmt: skip
    flips = [(each.name, f"{each.lost:,}", f"{each.won:,}", "–" if each.p is None else f"{each.p:.3g}",
              ", ".join(each.lost_keys), ", ".join(each.won_keys)) for each in found.flips]  # fmt: skip
    made = tables.changes(found)
    figures = table(made.columns, made.rows, (1, 2, 3, 4))
    parts = [
        f"<h1>{safe(names[1])} against {safe(names[0])}</h1>",
        f'<p class="verdict {good}">{safe(found.verdict)}</p>',
        table(("", "job", "name", "model", "runs"), jobs, (4,)),
        "".join(f"<p class=dim>{safe(each)}</p>" for each in found.warnings),
        section("Figures", _forest(found.lines, number) + figures),
        section("Flipped answers", table(
            ("score", "right in A only", "right in B only", "McNemar p", "A only", "B only"), flips, (1, 2, 3)
        )),
        section("Configuration that differs", table(
            ("name", "A", "B"), tables.differences(found).rows
        )),
    ]  # fmt: skip
    return "".join(parts)


def _forest(lines: Sequence[Line], number: int) -> str:
    """Changes with their intervals, as points and bars about zero."""
    shown = [line for line in lines if line.ci is not None and line.change is not None][::-1]
    if not shown:
        return ""

    def paint(axes: Any) -> None:
        for place, line in enumerate(shown):
            low, high = (100 * each for each in line.ci or (0.0, 0.0))
            colour = {"better": plots.GREEN, "worse": plots.RED}.get(line.word, plots.BLUE)
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([100 * (line.change or 0.0)], [place], marker="o", color=colour)
        axes.axvline(0, color=plots.INK, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [line.name for line in shown])
        axes.set(
            xlabel="change with its interval: %, percentage points, or hundredths of an index",
            ylim=(-0.6, len(shown) - 0.4),
        )

    svg = plots.draw(paint, f"Changes with intervals {number}", (6.4, 1.1 + 0.28 * len(shown)))
    return f"<figure>{svg}</figure>"
