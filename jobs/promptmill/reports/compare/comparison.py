"""A comparison of two jobs as values: its figures with their changes, its flipped rows, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from promptmill.reports.figures.metrics import Better, Metric, Unit
from promptmill.reports.figures.summary import Summary
from promptmill.scoring.statistics.families import Verdict
from promptmill.scoring.statistics.paired import Change

#: Note of a figure that a run has one of: a machine's mood is no error of sampling.
ONE_RUN = "one run each: not tested"

#: Note of a figure over rows that are not the same.
UNPAIRED = "not the same rows: not paired"

#: Note of a figure that too few rows are behind.
TOO_FEW = "too few rows to tell"

#: Seconds below which a change of a time is rounding: doubles of seconds since 1970 are 2.4e-7 apart, and a time is the
#: difference of two.
ROUNDING_S = 1e-6

#: Figures that a verdict names for each reason why they were not tested.
NAMED = 3


def not_comparable(why: str) -> str:
    return f"not comparable ({why})"


@dataclass(frozen=True, slots=True)
class Tested:
    """One figure of two jobs before its family is corrected. ``change`` is in the unit of :class:`Line`."""

    name: str
    metric: Metric
    before: float | None
    after: float | None
    change: Change
    note: str = ""
    #: Why there is no test, where not for too few rows.
    why: str = ""

    @property
    def is_comparable(self) -> bool:
        return not self.note.startswith("not comparable")

    def judged(self, verdict: Verdict) -> Line:
        """The line with the word that its family leaves it."""
        value = None if self.change.value != self.change.value else self.change.value
        line = Line(self.name, self.metric, self.before, self.after, value, note=self.note)
        if not self.is_comparable or value is None:
            return line
        if verdict.p is None:
            if value == 0 and verdict.ci == (0.0, 0.0):
                return replace(line, ci=verdict.ci, word="=", note=self.note or "the same in every row")
            return replace(line, note="; ".join(filter(None, (self.note, self.why or TOO_FEW))))
        line = replace(line, ci=verdict.ci, level=verdict.level, p=verdict.p, word="≈")
        if not verdict.is_change or value == 0 or is_rounding(self.metric, self.before, self.after):
            return line
        return replace(line, word="better" if (value > 0) == (self.metric.better is Better.HIGHER) else "worse")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of two jobs. Shares change by points, indices by themselves, all else relatively.

    ``ci`` and ``p`` None: cannot be told.
    """

    name: str
    metric: Metric
    before: float | None
    after: float | None
    change: float | None = None
    #: The interval of the change at ``level``, at which the family's correction tested it: without zero exactly where
    #: the word is 'better' or 'worse'.
    ci: tuple[float, float] | None = None
    level: float = 0.95
    #: Corrected for the family of all lines that are tested (Holm).
    p: float | None = None
    #: 'better', 'worse', '≈' (no detectable difference), '=' (equal row by row), '' where nothing was tested.
    word: str = ""
    note: str = ""

    @property
    def _ratio(self) -> float | None:
        return self.after / self.before if self.before and self.after is not None else None

    @property
    def change_unit(self) -> str:
        return {Unit.SHARE: "points", Unit.INDEX: "index"}.get(self.metric.unit, "share")

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": str(self.metric.unit), "before": self.before, "after": self.after,
            "change": self.change, "ratio": self._ratio, "change_unit": self.change_unit,
            "ci": self.ci, "ci_level": self.level if self.ci else None,
            "p_holm": self.p, "word": self.word, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows that one job has right and the other wrong, by one score."""

    name: str
    lost: int
    won: int
    #: McNemar's exact test of the two counts, to which copies are one; corrected with all other tests.
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
        """One sentence; a difference is only one that its interval and its corrected p-value tell.

        What was measured and not tested is named: it may have changed by any amount.
        """
        parts = [
            f"{line.name} {shown_change(line)} ({line.word})" for line in self.lines if line.word in ("better", "worse")
        ]
        tested = [line for line in self.lines if line.word == "≈"]
        equal = ", ".join(line.name for line in self.lines if line.word == "=")
        untested = self._untested()
        if not parts and tested:
            known = [f"{line.name} within {shown_interval(line)}" for line in tested if line.ci]
            parts = ["no detectable difference" + (f" ({', '.join(known[:3])})" if known else "")]
        elif not parts and equal and not untested:
            return f"no difference: the same in every row: {equal}"
        elif not parts:
            untested += [f"the same in every row: {equal}"] if equal else []
            return f"nothing could be tested: {'; '.join(untested) or 'no figure was measured in both'}"
        return "; ".join([*parts, *untested])

    def _untested(self) -> list[str]:
        """Figures that both have and no test was made of, the most changed first, by the reason."""
        known = [line for line in self.lines if not line.word and None not in (line.before, line.after)]
        # A change from nothing to nothing has no size.
        lines = [line for line in known if line.change is not None or line.note.startswith("not comparable")]
        lines.sort(key=lambda line: -abs(line.change or 0.0))
        found = []
        for reason in dict.fromkeys(map(_reason, lines)):
            own = [_named(line) for line in lines if _reason(line) == reason]
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            found.append(f"{reason}: {', '.join(own[:NAMED])}{more}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1, "before": self.before.job_id, "after": self.after.job_id, "runs": list(self.runs),
            "common_rows": self.common,
            "verdict": self.verdict, "warnings": list(self.warnings),
            "differences": [{"name": name, "before": one, "after": two} for name, one, two in self.differences],
            "figures": [line.to_json() for line in self.lines], "flips": [each.to_json() for each in self.flips],
        }  # fmt: skip


def is_rounding(metric: Metric, before: float | None, after: float | None) -> bool:
    """Whether a change is too small for the clock that measured both times."""
    if metric.unit is not Unit.SECONDS or before is None or after is None:
        return False
    return abs(after - before) < ROUNDING_S


def _reason(line: Line) -> str:
    """Why nothing was tested, in the words of a verdict."""
    why = line.note.rpartition("; ")[2]
    told = why in (TOO_FEW, ONE_RUN) or line.note.startswith("not comparable")
    return why if why in (TOO_FEW, ONE_RUN) else line.note if told else f"not tested ({line.note})"


def _named(line: Line) -> str:
    shown = line.change is not None and not line.note.startswith("not comparable")
    return f"{line.name} {shown_change(line)}" if shown else line.name


def shown_change(line: Line) -> str:
    """The signed change: ``+3.1 %`` of the value, ``+3.1 pp`` of a share, ``+0.031`` of an index."""
    return "–" if line.change is None else f"{_signed(line, line.change)}{_unit(line)}"


def shown_interval(line: Line) -> str:
    """The interval of the change, with its unit."""
    return "–" if line.ci is None else f"[{_signed(line, line.ci[0])}, {_signed(line, line.ci[1])}]{_unit(line)}"


def _signed(line: Line, change: float) -> str:
    return f"{change:+.3f}" if line.change_unit == "index" else f"{100 * change:+.1f}"


def _unit(line: Line) -> str:
    return {"points": " pp", "index": "", "share": " %"}[line.change_unit]
