"""Conditions of ``--fail-if``: ``output_tps<-5%``, ``latency_s.p95>+10%``, ``category.accuracy<-2pp``, ``errors>0``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from promptmill.core.registry import suggestion
from promptmill.errors import PromptmillError
from promptmill.reports.compare.comparison import Comparison, is_rounding
from promptmill.reports.figures.figures import metric_of, names_of, value_of
from promptmill.reports.figures.metrics import Unit

_FORM = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d+)?)\s*(%|pp)?\s*")

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """``unit`` %: relative change; pp: change of a share in points; none: the value of the later job."""

    text: str
    name: str
    sign: str
    bound: float
    unit: str | None

    def check(self, found: Comparison) -> None:
        """Raises PromptmillError for a figure that there is not, and for a unit in which it does not change."""
        self._value(found, False)
        is_share = metric_of(self.name).unit is Unit.SHARE
        if self.unit and is_share != (self.unit == "pp"):
            what, right = ("is a share", "pp") if is_share else ("is no share", "%")
            raise PromptmillError(
                f"--fail-if {self.text}: {self.name} {what}: its change is not told in {self.unit}",
                hint=f"For instance '{self.name}{self.sign}{self.bound:g}{right}'.",
            )

    def holds(self, found: Comparison) -> bool | None:
        """Whether the condition to fail is met; None where the figure was not measured or is not comparable."""
        for line in found.lines:
            if line.name == self.name and line.note.startswith("not comparable") and self.unit:
                return None
        before, after = self._value(found, True), self._value(found, False)
        if self.unit and is_rounding(metric_of(self.name), before, after):
            after = before
        if after is None or (self.unit and before is None):
            return None
        if self.unit == "pp":
            after = 100 * (after - (before or 0.0))
        elif self.unit == "%":
            if not before:
                return None
            after = 100 * (after / before - 1)
        return _COMPARE[self.sign](round(after, 9), self.bound)

    def basis(self, found: Comparison) -> str:
        """Whether the change behind the condition was tested, or is a point that may be chance."""
        line = next((each for each in found.lines if each.name == self.name), None)
        if line is None or not line.word:
            return "a point, not tested" + (f": {line.note}" if line is not None and line.note else "")
        if line.p is None:
            return line.note
        return (
            f"tested: p = {line.p:.3g}, {'more than chance' if line.word in ('better', 'worse') else 'may be chance'}"
        )

    def _value(self, found: Comparison, before: bool) -> float | None:
        for line in found.lines:
            if line.name == self.name:
                return line.before if before else line.after
        summary = found.before if before else found.after
        try:
            return value_of(summary, self.name)
        except KeyError:
            raise PromptmillError(
                f"--fail-if {self.text}: there is no figure '{self.name}'",
                hint=suggestion(self.name, sorted({*names_of(summary), *(line.name for line in found.lines)})),
            ) from None


def parse(text: str) -> Condition:
    """Raises PromptmillError for what is no condition."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise PromptmillError(
            f"--fail-if {text!r} is no condition", hint="Examples: 'output_tps<-5%', 'is_ad.accuracy<-2pp', 'errors>0'."
        )
    name, sign, bound, unit = match.groups()
    return Condition(text, name, sign, float(bound), unit)
