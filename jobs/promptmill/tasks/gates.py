"""Gates: what a job's figures must reach, as its task file demands it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from promptmill.tasks.schema import GATE, GateDemand

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """One gate. ``value`` is None when the job has no such figure: then the gate has failed."""

    name: str
    demand: str
    value: float | None
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "demand": self.demand, "value": self.value, "passed": self.passed, "text": str(self)}

    def __str__(self) -> str:
        shown = "there is no such figure" if self.value is None else f"{self.value:.4g}"
        return f"gate {self.name} {self.demand}: {shown}, {'passed' if self.passed else 'FAILED'}"


def judge(gates: Mapping[str, str | GateDemand], summary: Mapping[str, Any]) -> list[GateVerdict]:
    """A verdict on each gate. ``summary``: a report's JSON form."""
    return [_judged(name, asked, summary) for name, asked in gates.items()]


def _judged(name: str, asked: str | GateDemand, summary: Mapping[str, Any]) -> GateVerdict:
    if isinstance(asked, str):
        return _verdict(name, asked, _figure(name, summary))
    return _verdict(f"{name} (lower end of its 95 % interval)", asked.demand, _lower_end(name, summary))


def _verdict(name: str, demand: str, value: float | None) -> GateVerdict:
    found = GATE.fullmatch(demand)
    assert found is not None
    passed = value is not None and _COMPARE[found[1]](value, float(found[2]))
    return GateVerdict(name, demand, value, passed)


def _lower_end(name: str, summary: Mapping[str, Any]) -> float | None:
    """None where the figure has no interval."""
    score, _, figure = name.rpartition(".")
    found = summary["scores"].get(score) or summary["scores"].get(name)
    if found is None:
        return None
    interval = found["ci95"] if figure == found["metric"] else found["figure_ci95"].get(figure)
    return float(interval[0]) if interval else None


def _figure(name: str, summary: Mapping[str, Any]) -> float | None:
    scores = summary["scores"]
    if name == "parsed":
        shares = [1 - (each["unparsed"] + each["truncated"]) / each["n"] for each in scores.values() if each["n"]]
        return min(shares, default=None)
    if name.startswith("latency."):
        percentile: float | None = summary["latency_s"][name.partition(".")[2]]
        return percentile
    score, _, figure = name.rpartition(".")
    # A score may be called after its figure: the second of one field is FIELD.FIGURE.
    for key in (score, name):
        if key in scores and figure in scores[key]["figures"]:
            value: float | None = scores[key]["figures"][figure]
            return value
    return None
