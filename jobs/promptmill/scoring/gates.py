"""Gates: what a job's figures must reach, as its task file demands it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from promptmill.scoring.statistics.means import wilson
from promptmill.tasks.schema import GATE, GateDemand

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}

#: Demanded of every job with gates, unless its task says otherwise: figures of the rows that were answered say little
#: where many were not.
DEFAULT_GATES: Mapping[str, str] = {"success_rate": ">=0.99"}


@dataclass(frozen=True, slots=True)
class Gated:
    """A figure as gates see it: its value, its 95 % interval or why it has none, and the rows behind it."""

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str = ""
    n: int | None = None
    n_effective: float | None = None


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """One gate. ``judged`` is what was set against the demand; None fails, and ``reason`` says why."""

    name: str
    demand: str
    figure: Gated
    judged: float | None
    passed: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        figure = self.figure
        return {
            "name": self.name, "demand": self.demand, "value": self.judged, "passed": self.passed, "text": str(self),
            "figure": figure.value, "ci95": list(figure.interval) if figure.interval else None, "n": figure.n,
            "n_effective": figure.n_effective,
        }  # fmt: skip

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        return f"gate {self.name} {self.demand}: {self.reason or self._seen()}, {word}"

    def _seen(self) -> str:
        figure = self.figure
        parts = [f"{figure.value:.4g}"]
        if figure.interval:
            parts.append("95 % CI [{:.4g}, {:.4g}]".format(*figure.interval))
        if figure.n is not None:
            as_many = figure.n_effective is not None and figure.n_effective < figure.n - 0.5
            parts.append(f"n {figure.n:,}" + (f" (as {figure.n_effective:,.0f} without copies)" if as_many else ""))
        if self.judged != figure.value:
            parts.append(f"judged by {self.judged:.4g}")
        return ", ".join(parts)


def judge(gates: Mapping[str, str | GateDemand], summary: Mapping[str, Any]) -> list[GateVerdict]:
    """A verdict on each gate, and on the default ones. ``summary``: a report's JSON form."""
    return [_judged(name, asked, summary) for name, asked in {**gates, **_unsaid(gates)}.items()]


def _unsaid(gates: Mapping[str, str | GateDemand]) -> Mapping[str, str]:
    return {name: demand for name, demand in DEFAULT_GATES.items() if name not in gates} if gates else {}


def _judged(name: str, asked: str | GateDemand, summary: Mapping[str, Any]) -> GateVerdict:
    demand, by_interval = (asked, False) if isinstance(asked, str) else (asked.demand, True)
    figure = _figure(name, summary)
    found = GATE.fullmatch(demand)
    assert found is not None
    value, reason = (None, "there is no such figure") if figure.value is None else (figure.value, "")
    if value is not None and by_interval:
        # The end that is least in favour: of what must be large the lower one.
        end = 0 if found[1] in (">=", ">") else 1
        value = figure.interval[end] if figure.interval else None
        reason = "" if figure.interval else f"{figure.value:.4g} has no interval: {figure.reason}"
    passed = value is not None and _COMPARE[found[1]](value, float(found[2]))
    return GateVerdict(name, demand, figure, value, passed, reason)


def _figure(name: str, summary: Mapping[str, Any]) -> Gated:
    scores = summary["scores"]
    if name == "success_rate":
        interval = summary["success_ci95"]
        done = summary["ok"] + summary["errors"]
        return Gated(summary["success_rate"], tuple(interval) if interval else None, "no row is done", done)
    if name == "parsed":
        read = {key: _parsed(score) for key, score in scores.items() if score["n"]}
        return min(read.values(), key=lambda each: each.value or 0.0, default=Gated(None))
    if name.startswith("latency."):
        times = summary["latency_s"]
        return Gated(times[name.partition(".")[2]], None, "one run does not tell the noise between runs", times["n"])
    score, _, figure = name.rpartition(".")
    # A score may be called after its figure: the second of one field is FIELD.FIGURE.
    for key in (score, name):
        if key in scores and figure in scores[key]["figures"]:
            return _of_score(scores[key], figure)
    return Gated(None)


def _of_score(score: Mapping[str, Any], figure: str) -> Gated:
    interval = score["ci95"] if figure == score["metric"] else score["figure_ci95"].get(figure)
    reason = score.get("no_interval", {}).get(figure, "too few rows")
    return Gated(
        score["figures"][figure], tuple(interval) if interval else None, reason, score["n"], score.get("n_effective")
    )


def _parsed(score: Mapping[str, Any]) -> Gated:
    """The share of answers that could be read."""
    n, effective = score["n"], score.get("n_effective") or score["n"]
    share = 1 - (score["unparsed"] + score["truncated"]) / n
    return Gated(share, wilson(share * effective, effective), "", n, effective)
