"""A comparison of two jobs as values: its figures with their changes, its flipped rows, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptmill.metrics import Metric
from promptmill.reports.summary import Summary

#: Note of a figure whose interval tells the noise of one run only.
WITHIN_RUN = "interval within the run; one run of each: no test"


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of two jobs. Shares change by points, all else relatively; ``ci95`` and ``p`` None: cannot be told."""

    name: str
    metric: Metric
    before: float | None
    after: float | None
    change: float | None = None
    ci95: tuple[float, float] | None = None
    #: Corrected for the family of all lines that are tested (Holm).
    p: float | None = None
    #: 'better', 'worse', '≈' (no detectable difference), '=' (equal row by row), '' where nothing was tested.
    word: str = ""
    note: str = ""

    @property
    def _ratio(self) -> float | None:
        return self.after / self.before if self.before and self.after is not None else None

    @property
    def in_points(self) -> bool:
        return self.metric.unit == "%"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": str(self.metric.unit), "before": self.before, "after": self.after,
            "change": self.change, "ratio": self._ratio, "change_unit": "points" if self.in_points else "share",
            "ci95": self.ci95,
            "p_holm": self.p, "word": self.word, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows that one job has right and the other wrong, by one score."""

    name: str
    lost: int
    won: int
    #: McNemar's exact test of the two counts.
    p: float | None
    lost_keys: tuple[str, ...]
    won_keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Comparison:
    """``after`` against ``before``, over their common rows where rows are compared."""

    #: The first run of either, and how many there are.
    before: Summary
    after: Summary
    runs: tuple[int, int]
    common: int
    differences: tuple[tuple[str, Any, Any], ...]
    warnings: tuple[str, ...]
    lines: tuple[Line, ...]
    flips: tuple[Flips, ...]

    @property
    def verdict(self) -> str:
        """One sentence; a difference is only one that its interval and its corrected p-value tell."""
        parts = [
            f"{line.name} {shown_change(line)} ({line.word})" for line in self.lines if line.word in ("better", "worse")
        ]
        if parts:
            return "; ".join(parts)
        tested = [line for line in self.lines if line.word == "≈"]
        equal = ", ".join(line.name for line in self.lines if line.word == "=")
        if not tested:
            also = f"; the same in every row: {equal}" if equal else ""
            return f"nothing could be tested: {self._hindrance()}{also}"
        known = [f"{line.name} within {shown_interval(line)}" for line in tested if line.ci95]
        return "no detectable difference" + (f" ({', '.join(known[:3])})" if known else "")

    def _hindrance(self) -> str:
        notes = (line.note for line in self.lines if line.note and line.word != "=")
        return (
            "; ".join(dict.fromkeys(note for note in notes if note != WITHIN_RUN)) or "no figure was measured in both"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1, "before": self.before.job_id, "after": self.after.job_id, "runs": list(self.runs),
            "common_rows": self.common,
            "verdict": self.verdict, "warnings": list(self.warnings),
            "differences": [{"name": name, "before": one, "after": two} for name, one, two in self.differences],
            "figures": [line.to_json() for line in self.lines], "flips": [each.to_json() for each in self.flips],
        }  # fmt: skip


def shown_change(line: Line) -> str:
    """The signed change: ``+3.1 %`` of the value, or ``+3.1 pp`` of a share."""
    return "–" if line.change is None else f"{100 * line.change:+.1f} {'pp' if line.in_points else '%'}"


def shown_interval(line: Line) -> str:
    """The 95 % interval of the change, with its unit."""
    if line.ci95 is None:
        return "–"
    low, high = (100 * each for each in line.ci95)
    return f"[{low:+.1f}, {high:+.1f}] {'pp' if line.in_points else '%'}"
