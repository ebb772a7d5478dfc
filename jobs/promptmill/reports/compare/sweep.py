"""What a sweep found: one line for each setting, the knee, and the settings to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from promptmill.reports.compare.compare import SAME_WORK
from promptmill.reports.figures.figures import metric_of, score_name, value_of
from promptmill.reports.figures.summary import Summary
from promptmill.reports.render import markdown, plots
from promptmill.reports.render.csv import lines
from promptmill.reports.render.html import document, safe, section, table
from promptmill.reports.render.json import dumped
from promptmill.scoring.statistics import unpaired
from promptmill.scoring.statistics.paired import Change
from promptmill.store.spreadsheets import inert

#: Share of the best output rate from which on a smaller setting is as good.
KNEE_SHARE = 0.95

#: Figures of each setting: the mean over its runs.
FIGURES = ("output_tps", "items_per_s", "latency_s.p50", "latency_s.p95", "mean_active", "success_rate")

#: Settings of an engine that may be swept; what is not among them is of a request.
ENGINE = ("batch_tokens", "kv_cells", "kv_type", "threads", "context_tokens", "deduplicate")


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination of settings and the jobs that ran with it; ``failures`` are the messages of runs that did not."""

    values: Mapping[str, Any]
    runs: tuple[Summary, ...]
    failures: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values.items()) or "default"

    def mean(self, name: str) -> float | None:
        """The geometric mean of a rate or a time, the arithmetic one of a share; None where no run has it."""
        values = self._values(name)
        if not values:
            return None
        if metric_of(name).unit == "%" or min(values) <= 0:
            return sum(values) / len(values)
        return math.exp(sum(map(math.log, values)) / len(values))

    def cv(self, name: str) -> float | None:
        """Standard deviation over the runs by their mean; None of fewer than two."""
        values = self._values(name)
        mean = sum(values) / len(values) if values else 0.0
        if len(values) < 2 or mean == 0:
            return None
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / mean

    def scores(self) -> list[str]:
        """Names of the scores of its jobs."""
        return [score_name(name, score.metric) for run in self.runs[:1] for name, score in run.scores.items()]

    def _values(self, name: str) -> list[float]:
        found = []
        for run in self.runs:
            try:
                value = value_of(run, name)
            except KeyError:
                value = None
            if value is not None:
                found.append(value)
        return found


@dataclass(frozen=True, slots=True)
class Sweep:
    """All settings, in the order they were asked for."""

    tag: str
    settings: tuple[Setting, ...]

    def label(self, setting: Setting) -> str:
        """The values of a setting that are not the same in all."""
        varying = [name for name in setting.values if len({str(each.values[name]) for each in self.settings}) > 1]
        return ", ".join(f"{name}={setting.values[name]}" for name in varying) or setting.label

    def best(self, setting: Setting) -> Setting | None:
        """The fastest setting that did the same work as this one."""
        done = [each for each in self.settings if _work(each) == _work(setting) and each.mean("output_tps")]
        return max(done, key=lambda each: each.mean("output_tps") or 0.0, default=None)

    def rivals(self, setting: Setting) -> list[Setting]:
        """Settings of the same model that did the same work: which of them is the smallest to be fast enough?"""
        own = (_model(setting), _work(setting))
        return [each for each in self.settings if (_model(each), _work(each)) == own and each.mean("output_tps")]

    def knees(self) -> list[Setting]:
        """The smallest setting within 5 % of the best, for each model and each work, in the order of the settings."""
        found: list[Setting] = []
        for setting in self.settings:
            rivals = self.rivals(setting)
            top = max((each.mean("output_tps") or 0.0 for each in rivals), default=0.0)
            near = [each for each in rivals if (each.mean("output_tps") or 0.0) >= KNEE_SHARE * top]
            knee = min(near, key=_size, default=None)
            if knee is not None and not any(knee is each for each in found):
                found.append(knee)
        return found

    def against_best(self, setting: Setting) -> Change | None:
        """Change of the output rate against the fastest setting; with an interval from three runs of each on."""
        best = self.best(setting)
        if best is None or best is setting or not setting.runs:
            return None
        rates = [[run.output_tps or 0.0 for run in each.runs] for each in (best, setting)]
        return unpaired.runs(*rates)

    def score_names(self) -> list[str]:
        return list(dict.fromkeys(name for each in self.settings for name in each.scores()))

    def to_json(self) -> dict[str, Any]:
        names = [*FIGURES, *self.score_names()]
        knees = self.knees()
        return {
            "schema_version": 1, "tag": self.tag,
            "settings": [
                {
                    "values": dict(each.values), "jobs": [run.job_id for run in each.runs],
                    "failures": list(each.failures), "figures": {name: each.mean(name) for name in names},
                    "output_tps_cv": each.cv("output_tps"), "knee": each in knees, "best": each is self.best(each),
                }
                for each in self.settings
            ],
            "recommended": [recommended(each) for each in knees],
        }  # fmt: skip


def _model(setting: Setting) -> str:
    return str(setting.values.get("model") or (setting.runs[0].model if setting.runs else ""))


def _work(setting: Setting) -> list[tuple[str, Any]]:
    """Swept sampling that makes other work: tokens of short answers a second are no better than those of long ones."""
    return sorted((name, str(value)) for name, value in setting.values.items() if name in SAME_WORK)


def _size(setting: Setting) -> tuple[tuple[int, float, str], ...]:
    """Smaller slots before larger ones, then the other settings."""
    values = {name: value for name, value in setting.values.items() if name != "model"}
    return tuple(
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value)) for value in values.values()
    )


def recommended(setting: Setting) -> str:
    """Lines to paste into a shell or an .env file."""
    own = [name for name in setting.values if name in ("model", "slots", *ENGINE)]
    lines = [f"JOBS_{name.upper()}={setting.values[name]}" for name in own]
    lines += [f"# --param {name}={value}" for name, value in setting.values.items() if name not in own]
    return "\n".join(lines)


def rows(found: Sweep) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the one table that every form prints."""
    names = ["items_per_s", "latency_s.p95", "mean_active", *found.score_names()]
    titles = ["requests/s", "p95 s", "active", *found.score_names()]
    if any((each.mean("success_rate") or 0.0) < 1 for each in found.settings):
        names.append("success_rate")
        titles.append("success %")
    knees = found.knees()
    cells = []
    for each in found.settings:
        cv = each.cv("output_tps")
        marks = [word for word, holds in (("best", each is found.best(each)), ("knee", each in knees)) if holds]
        marks += [f"failed: {message}" for message in each.failures[:1]]
        cells.append([
            found.label(each), str(len(each.runs)), _shown(each, "output_tps"),
            "–" if cv is None else f"{100 * cv:.1f}", _against(found.against_best(each)),
            *(_shown(each, name) for name in names), " ".join(marks),
        ])  # fmt: skip
    return ["setting", "runs", "output tok/s", "CV %", "against best", *titles, ""], cells


def _shown(setting: Setting, name: str) -> str:
    return metric_of(name).text(setting.mean(name))


def _against(change: Change | None) -> str:
    if change is None or math.isnan(change.value):
        return ""
    interval = change.interval()
    if interval is None:
        return f"{100 * change.value:+.0f} %"
    return f"{100 * change.value:+.0f} % [{100 * interval[0]:+.0f}, {100 * interval[1]:+.0f}]"


def verdict(found: Sweep) -> str:
    """What to do, in a sentence for each model and work."""
    parts = []
    for knee in found.knees():
        top = max(each.mean("output_tps") or 0.0 for each in found.rivals(knee))
        rate = knee.mean("output_tps") or 0.0
        parts.append(f"{found.label(knee)}: {rate:,.1f} tok/s, {100 * rate / top:.0f} % of the best")
    if not parts:
        return "no setting ran to its end"
    fewest = min(len(each.runs) for each in found.settings if each.runs)
    # A machine's mood makes a single run faster or slower than its setting is.
    untested = f"; with {fewest} of each the runs are not tested" if fewest < unpaired.LEAST_RUNS else ""
    return f"smallest within 5 % of the best: {'; '.join(parts)}{untested}"


def text(found: Sweep, format_: str) -> str:
    """The sweep as ``md``, ``json``, ``csv`` or ``html``."""
    columns, cells = rows(found)
    if format_ == "json":
        return dumped(found.to_json())
    if format_ == "csv":
        return lines(inert(columns), cells)
    blocks = [recommended(each) for each in found.knees()]
    if format_ == "md":
        kept = "".join(f"```\n{block}\n```\n" for block in blocks)
        return (
            f"## Sweep {markdown.escaped(found.tag)}\n\n{verdict(found)}\n\n{markdown.table(columns, cells)}\n\n{kept}"
        )
    figures = "".join(f"<figure>{svg}</figure>" for svg in _plots(found))
    kept = "".join(f"<pre>{safe(block)}</pre>" for block in blocks)
    return document(f"promptmill: sweep {found.tag}", "".join((
        f"<h1>Sweep {safe(found.tag)}</h1><p class='verdict good'>{safe(verdict(found))}</p>",
        section("Settings", table(columns, cells, range(1, len(columns) - 1))), f"<div class=plots>{figures}</div>",
        section("Recommended", kept),
    )))  # fmt: skip


def _plots(found: Sweep) -> list[str]:
    shown = [plots.bars([(found.label(each), each.mean("output_tps") or 0.0, each.cv("output_tps") or 0.0)
                         for each in found.settings], "Output tok/s by setting")]  # fmt: skip
    for name in found.score_names():
        points = [(found.label(each), each.mean("output_tps"), each.mean(name)) for each in found.settings]
        known = [(label, rate, 100 * score) for label, rate, score in points if rate is not None and score is not None]
        if known:
            shown.append(plots.tradeoff(known, f"{name} against output tok/s"))
    return shown
