"""The summary of a job: every figure of its report, computed from its rows by the definitions in ``metrics``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from promptmill.reports.figures.aggregate import Plots
from promptmill.reports.figures.checks import Check
from promptmill.reports.figures.distributions import Curve
from promptmill.reports.figures.inputs import ErrorExample, Facts, consistent, read_facts
from promptmill.reports.figures.measured import Measured, WorkerShare
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, SINGLE
from promptmill.scoring.scorers.tally import Score
from promptmill.scoring.statistics.means import wilson
from promptmill.scoring.stored_scores import scores_of
from promptmill.types import JobState

if TYPE_CHECKING:
    from promptmill.scoring.gates import GateVerdict

#: Version of the JSON report: goes up when a key leaves or changes its meaning.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Summary:
    """A job's report. Seconds, tokens and rates are as ``metrics.py`` defines them; None was not measured."""

    job_id: str
    name: str | None
    state: JobState
    stop_reason: str | None
    note: str | None
    tags: tuple[str, ...]
    mode: str
    dataset_name: str
    dataset_sha256: str
    model: str
    model_fingerprint: str | None
    task_name: str | None
    task_sha256: str | None
    config_sha256: str
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    #: First admission and last end of a row.
    began_at: float | None
    ended_at: float | None
    #: Every figure of the job, by its name in the registry (``metrics``): also attributes of the summary.
    figures: Mapping[str, Any]
    success_ci95: tuple[float, float] | None
    curve: Curve | None
    errors_by_class: Mapping[str, int]
    error_examples: tuple[ErrorExample, ...]
    checks: tuple[Check, ...]
    scores: Mapping[str, Score]
    workers: tuple[WorkerShare, ...]
    #: The gates of the job's task, judged once it has ended.
    gates: tuple[GateVerdict, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """A figure by its name; only what is no field comes here."""
        if name in METRICS:
            return self.figures[name]
        raise AttributeError(name)

    @property
    def schema_version(self) -> int:
        return SCHEMA_VERSION

    @property
    def complete(self) -> bool:
        """Whether every row of the dataset has its result."""
        return bool(self.attempted == self.rows)

    @property
    def completeness(self) -> str:
        return "complete" if self.complete else f"INCOMPLETE {self.attempted}/{self.rows}"

    @property
    def device_got(self) -> str | None:
        """The devices that workers really had, each with how often: ``cpu x 2``."""
        return ", ".join(_counted(worker.device_got for worker in self.workers)) or None

    @property
    def verdict(self) -> str:
        """The job in a few words, computed from its counts: one whose gates all hold, and without a doubt, passed."""
        if self.attempted and not self.ok:
            return "failed: no request was answered"
        if not self.state.is_final:
            return f"{self.state}, {self.attempted:,} of {self.rows:,} done"
        if self.state is not JobState.COMPLETED:
            return f"{self.state}, {self.completeness}"
        if not self.complete:
            return self.completeness
        return self._doubt() or ("empty" if not self.ok else "passed" if self.gates else "completed")

    @property
    def is_good(self) -> bool:
        """Whether every row was answered, without a doubt, and every gate holds."""
        return self.verdict in ("passed", "completed")

    def _doubt(self) -> str | None:
        broken = [check.name for check in self.checks if check.ok is False]
        failed = [gate.name for gate in self.gates if not gate.passed]
        ended = "completed"
        if self.errors:
            ended += f" with {self.errors:,} errors" if self.errors > 1 else " with 1 error"
        if broken:
            return f"{ended}, but figures disagree: {', '.join(broken)}"
        if failed:
            return f"{ended}, but gates failed: {', '.join(failed)}"
        return ended if self.errors else None

    def to_json(self) -> dict[str, Any]:
        """The report as one object with stable keys; None was not measured."""
        return {name: _plain(getattr(self, name)) for name in JSON_KEYS}


#: Columns of the job that its report tells.
JOB_FIELDS = (
    "name", "stop_reason", "note", "mode", "dataset_name", "dataset_sha256", "model", "model_fingerprint", "task_name",
    "task_sha256", "submitted_at", "started_at", "finished_at",
)  # fmt: skip

#: Keys of the JSON report. They stay: beside the figures new ones go to the end.
JSON_KEYS = (
    "schema_version", "job_id", "state", "verdict", "complete", "completeness", *JOB_FIELDS, "tags", "config_sha256",
    "device_got", *SINGLE, "success_ci95", *DISTRIBUTIONS, "errors_by_class", "error_examples", "checks", "scores",
    "workers", "curve", "gates",
)  # fmt: skip


def summarise(db: Engine | Connection, job_id: str) -> Summary:
    """The summary of a job at any time of its life. Raises what :func:`summarise_with_plots` raises."""
    return summarise_with_plots(db, job_id, detailed=False)[0]


def summarise_with_plots(db: Engine | Connection, job_id: str, detailed: bool = True) -> tuple[Summary, Plots | None]:
    """The summary with what its plots show, of one pass over the rows; None where there is nothing to plot.

    Raises :class:`promptmill.errors.UnknownName` when there is no such job, and
    :class:`promptmill.errors.TaskFileError` for scores that cannot be computed.
    """
    with consistent(db) as connection:
        facts = read_facts(connection, job_id, detailed)
        scores = scores_of(connection, facts.job)
    summary = _summary(facts, scores)
    return replace(summary, gates=_gates(facts.job, summary)), facts.folded.plots


def _gates(job: Row[Any], summary: Summary) -> tuple[GateVerdict, ...]:
    """A verdict on each gate of the job's task; none before the job has ended."""
    if job.task_text is None or "gates" not in job.task_text or not summary.state.is_final:
        return ()
    from promptmill.scoring.gates import judge
    from promptmill.tasks.task_file import parse_task

    asked = parse_task(job.task_text, job.task_name or "task", job.task_folder).model.gates
    return tuple(judge(asked, summary.to_json())) if asked else ()


def _summary(facts: Facts, scores: Mapping[str, Score]) -> Summary:
    job, measured = facts.job, Measured(facts, scores)
    return Summary(
        job_id=job.id,
        state=JobState(job.state),
        tags=facts.tags,
        config_sha256=_config_sha256(job),
        began_at=facts.folded.began_at,
        ended_at=facts.folded.ended_at,
        figures={metric.name: metric.of(measured) for metric in METRICS.values() if metric.of},
        success_ci95=_success_interval(
            measured.ok, measured.errors, (job.effective_rows or job.rows) / max(1, job.rows)
        ),
        curve=facts.folded.curve,
        errors_by_class=measured.by_class,
        error_examples=facts.examples,
        checks=measured.checks,
        scores=scores,
        workers=measured.workers,
        **{name: getattr(job, name) for name in JOB_FIELDS},
    )


def _success_interval(ok: int, errors: int, share: float) -> tuple[float, float] | None:
    """Wilson's, of as many rows as there would be without copies: a row and its copies fail together."""
    return wilson(ok * share, (ok + errors) * share)


def _config_sha256(job: sa.Row[Any]) -> str:
    """Names what was run on the dataset: model, task, prompt and sampling. Two jobs of one configuration share it."""
    parts = [job.model, job.model_fingerprint, job.task_sha256, job.system_prompt, json.loads(job.sampling)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _counted(names: Iterable[str | None]) -> list[str]:
    totals = Counter(name for name in names if name is not None)
    return [name if count == 1 else f"{name} x {count}" for name, count in totals.items()]


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, StrEnum) else value
