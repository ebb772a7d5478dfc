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

from promptmill.reports.figures import checks
from promptmill.reports.figures.aggregate import Group, Plots
from promptmill.reports.figures.budget import Budget, budget
from promptmill.reports.figures.checks import Check, Occupancy
from promptmill.reports.figures.distributions import Curve, most_at_once
from promptmill.reports.figures.inputs import ErrorExample, Facts, consistent, read_facts
from promptmill.reports.figures.percentiles import Distribution
from promptmill.scoring.scorers.intervals import wilson
from promptmill.scoring.scorers.tally import Score
from promptmill.scoring.stored_scores import scores_of
from promptmill.types import ErrorClass, FinishReason, JobState

if TYPE_CHECKING:
    from promptmill.tasks.gates import GateVerdict

#: Of the JSON report: goes up when a key leaves or changes its meaning.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker did of the job, and what it ran on. None: unknown."""

    id: str
    host: str | None
    engine: str | None
    device_asked: str | None
    device_got: str | None
    layers: int | None
    layers_offloaded: int | None
    slots: int | None
    ok: int
    errors: int
    output_tokens: int
    memory_bytes: int | None
    device_memory_bytes: int | None
    model_load_s: float | None
    host_restarts: int | None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


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
    rows: int
    attempted: int
    ok: int
    errors: int
    cancelled: int
    cut_off: int
    copied: int
    success_ci95: tuple[float, float] | None
    wall_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    wasted_tokens: int | None
    mean_active: float | None
    peak_active: int
    slots: int | None
    prefill_tps: float | None
    decode_tps: float | None
    starved_share: float | None
    idle_share: float | None
    batch_efficiency: float | None
    latency_s: Distribution
    ttft_s: Distribution
    tpot_s: Distribution
    queue_s: Distribution
    curve: Curve | None
    errors_by_class: Mapping[str, int]
    error_examples: tuple[ErrorExample, ...]
    checks: tuple[Check, ...]
    scores: Mapping[str, Score]
    workers: tuple[WorkerShare, ...]
    #: The gates of the job's task, judged once it has ended.
    gates: tuple[GateVerdict, ...] = ()

    @property
    def schema_version(self) -> int:
        return SCHEMA_VERSION

    @property
    def complete(self) -> bool:
        """Whether every row of the dataset has its result."""
        return self.attempted == self.rows

    @property
    def completeness(self) -> str:
        return "complete" if self.complete else f"INCOMPLETE {self.attempted}/{self.rows}"

    @property
    def success_rate(self) -> float | None:
        return ratio(self.ok, self.attempted)

    @property
    def items_per_s(self) -> float | None:
        return ratio(self.ok, self.wall_s)

    @property
    def valid_per_s(self) -> float | None:
        """None where no task reads the answers."""
        read = [score.readable for score in self.scores.values() if score.readable is not None]
        return ratio(min(read), self.wall_s) if read else None

    @property
    def output_tps(self) -> float | None:
        return ratio(self.output_tokens, self.wall_s)

    @property
    def total_tps(self) -> float | None:
        return ratio(self.prompt_tokens - self.cached_tokens + self.output_tokens, self.wall_s)

    @property
    def cached_share(self) -> float | None:
        return ratio(self.cached_tokens, self.prompt_tokens)

    @property
    def mean_output_tokens(self) -> float | None:
        return ratio(self.output_tokens, self.ok - self.copied)

    @property
    def device_got(self) -> str | None:
        """The devices that workers really had, each with how often: ``cpu x 2``."""
        return ", ".join(_counted(worker.device_got for worker in self.workers)) or None

    @property
    def verdict(self) -> str:
        """The job in a few words, computed from its counts: only one without any error or doubt has passed."""
        if self.attempted and not self.ok:
            return "failed: no request was answered"
        if not self.state.is_final:
            return f"{self.state}, {self.attempted:,} of {self.rows:,} done"
        if self.state is not JobState.COMPLETED:
            return f"{self.state}, {self.completeness}"
        if not self.complete:
            return self.completeness
        return self._doubt() or ("passed" if self.ok else "empty")

    def _doubt(self) -> str | None:
        broken = [check.name for check in self.checks if check.ok is False]
        if self.errors:
            return f"completed with {self.errors:,} errors" if self.errors > 1 else "completed with 1 error"
        if broken:
            return f"completed, but figures disagree: {', '.join(broken)}"
        failed = [gate.name for gate in self.gates if not gate.passed]
        return f"completed, but gates failed: {', '.join(failed)}" if failed else None

    def to_json(self) -> dict[str, Any]:
        """The report as one object with stable keys; None was not measured."""
        return {name: _plain(getattr(self, name)) for name in JSON_KEYS}


#: Keys of the JSON report, in order. They stay: new ones go to the end of their line.
JSON_KEYS = (
    "schema_version", "job_id", "name", "state", "verdict", "complete", "completeness", "stop_reason", "mode",
    "note", "tags",
    "submitted_at", "started_at", "finished_at", "dataset_name", "dataset_sha256", "model", "model_fingerprint",
    "task_name", "task_sha256", "config_sha256", "device_got",
    "rows", "attempted", "ok", "errors", "cancelled", "cut_off", "copied", "success_rate",
    "success_ci95",
    "wall_s", "items_per_s", "output_tps", "total_tps", "prefill_tps", "decode_tps",
    "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "wasted_tokens", "cached_share",
    "mean_output_tokens", "mean_active", "peak_active", "slots", "starved_share", "idle_share",
    "latency_s", "ttft_s", "tpot_s", "queue_s", "errors_by_class", "error_examples", "checks", "scores", "workers",
    "curve", "gates", "valid_per_s", "batch_efficiency",
)  # fmt: skip


def summarise(db: Engine | Connection, job_id: str) -> Summary:
    """The summary of a job at any time of its life. Raises what :func:`summarise_with_plots` raises."""
    return _summarised(db, job_id, False)[0]


def summarise_with_plots(db: Engine | Connection, job_id: str) -> tuple[Summary, Plots | None]:
    """The summary with what its plots show, of one pass over the rows; None where there is nothing to plot.

    Raises :class:`promptmill.errors.UnknownName` when there is no such job, and
    :class:`promptmill.errors.TaskFileError` for scores that cannot be computed.
    """
    return _summarised(db, job_id, True)


def _summarised(db: Engine | Connection, job_id: str, detailed: bool) -> tuple[Summary, Plots | None]:
    with consistent(db) as connection:
        facts = read_facts(connection, job_id, detailed)
        scores = scores_of(connection, facts.job)
    summary = _summary(facts, scores)
    return replace(summary, gates=_gates(facts.job, summary)), facts.folded.plots


def _tokens_by_worker(answered: Iterable[Group]) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for group in answered:
        found[group.worker_id] = found.get(group.worker_id, 0) + group.output_tokens
    return found


def _gates(job: Row[Any], summary: Summary) -> tuple[GateVerdict, ...]:
    """A verdict on each gate of the job's task; none before the job has ended."""
    if job.task_text is None or "gates" not in job.task_text or not summary.state.is_final:
        return ()
    from promptmill.tasks.gates import judge
    from promptmill.tasks.task_file import parse_task

    asked = parse_task(job.task_text, job.task_name or "task", job.task_folder).model.gates
    return tuple(judge(asked, summary.to_json())) if asked else ()


def _summary(facts: Facts, scores: Mapping[str, Score]) -> Summary:
    job, folded = facts.job, facts.folded
    groups = folded.groups
    answered = [group for group in groups if group.state == "ok"]
    ok = _sum(answered, "rows")
    errors = _sum(groups, "rows") - ok
    by_class = _by_class(groups)
    books = budget(facts.attempts, facts.shared, _tokens_by_worker(answered))
    occupancy = _occupancy(facts)
    return Summary(
        job_id=job.id,
        state=JobState(job.state),
        tags=facts.tags,
        config_sha256=_config_sha256(job),
        attempted=ok + errors,
        ok=ok,
        errors=errors,
        cancelled=by_class.get(ErrorClass.CANCELLED, 0),
        cut_off=sum(group.rows for group in answered if group.finish_reason == FinishReason.LENGTH),
        copied=facts.totals.copied,
        success_ci95=wilson(ok, ok + errors) if ok + errors else None,
        wall_s=occupancy.wall_s,
        began_at=occupancy.began_at,
        ended_at=occupancy.ended_at,
        mean_active=occupancy.mean_active,
        peak_active=occupancy.peak_active,
        slots=occupancy.slots,
        curve=folded.curve,
        errors_by_class=by_class,
        error_examples=facts.examples,
        checks=_checks(facts, books, occupancy),
        scores=scores,
        workers=_workers(facts),
        **_columns(facts, books),
    )


#: Fields of the summary that are columns of the job, sums over its answers, and figures of its engines' counters.
JOB_FIELDS = (
    "name", "stop_reason", "note", "mode", "dataset_name", "dataset_sha256", "model", "model_fingerprint", "task_name",
    "task_sha256", "rows", "submitted_at", "started_at", "finished_at",
)  # fmt: skip
TOKEN_FIELDS = ("prompt_tokens", "cached_tokens", "reasoning_tokens")
TIME_FIELDS = ("latency_s", "ttft_s", "tpot_s", "queue_s")
ENGINE_FIELDS = ("prefill_tps", "decode_tps", "starved_share", "idle_share", "wasted_tokens", "batch_efficiency")


def _columns(facts: Facts, books: Budget) -> dict[str, Any]:
    """The fields of the summary that need no thought."""
    return {
        **{name: getattr(facts.job, name) for name in JOB_FIELDS},
        **{name: int(getattr(facts.totals, name)) for name in TOKEN_FIELDS},
        **{name: getattr(books, name) for name in ENGINE_FIELDS},
        **{name: getattr(facts.folded, name) for name in TIME_FIELDS},
        "output_tokens": _sum((group for group in facts.folded.groups if group.state == "ok"), "output_tokens"),
    }


def _checks(facts: Facts, books: Budget, occupancy: Occupancy) -> tuple[Check, ...]:
    groups = facts.folded.groups
    answered = [group for group in groups if group.state == "ok"]
    output_tokens = _sum(answered, "output_tokens")
    return (
        checks.counts(JobState(facts.job.state), facts.job.rows, _sum(answered, "rows"), _by_class(groups)),
        checks.little(occupancy),
        checks.slots(occupancy),
        checks.tokens(output_tokens, books),
        checks.time_budget(books),
        checks.limits(facts.totals, _sum(groups, "rows")),
        checks.order(facts.totals, _sum(groups, "timed")),
        checks.curve(facts.folded.curve, output_tokens),
        checks.model(
            facts.job.model_fingerprint, {each.model_fingerprint for each in facts.attempts if _answered(each)}
        ),
    )


def _answered(attempt: Row[Any]) -> bool:
    """Whether rows have their results from it: one that was given back at once, or lost at once, has generated none."""
    return attempt.outcome == "done" or bool(attempt.decode_tokens)


def _occupancy(facts: Facts) -> Occupancy:
    folded = facts.folded
    return Occupancy(
        rows=folded.timed,
        began_at=folded.began_at,
        ended_at=folded.ended_at,
        active_s=folded.active_s,
        peak_active=folded.peak_active,
        slots=_slots(facts),
    )


def _slots(facts: Facts) -> int | None:
    """Slots at one time: a worker that took the place of a dead one brings none in addition."""
    by_worker = _slots_by_worker(facts)
    spans = []
    for worker_id, groups in _by_worker(facts.folded.groups).items():
        begins = [group.first_admitted_at for group in groups if group.first_admitted_at is not None]
        ends = [group.last_finished_at for group in groups if group.last_finished_at is not None]
        if begins and ends:
            spans.append((min(begins), max(ends), by_worker.get(worker_id)))
    known = [(begin, end, slots) for begin, end, slots in spans if slots is not None]
    asked: int | None = facts.job.slots
    # An echo may answer everything in no time, which overlaps nothing.
    most = max([most_at_once(known), *(slots for _, _, slots in known)])
    return most if known and len(known) == len(spans) else asked


def _slots_by_worker(facts: Facts) -> dict[str, int]:
    found = {worker.id: worker.slots for worker in facts.workers if worker.slots is not None}
    for attempt in facts.attempts:
        if attempt.slots is not None:
            found[attempt.worker_id] = max(attempt.slots, found.get(attempt.worker_id, 0))
    return found


def _by_worker(groups: tuple[Group, ...]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.worker_id is not None:
            found.setdefault(group.worker_id, []).append(group)
    return found


def _workers(facts: Facts) -> tuple[WorkerShare, ...]:
    rows, slots = {worker.id: worker for worker in facts.workers}, _slots_by_worker(facts)
    own = _by_worker(facts.folded.groups)
    ids = sorted({*own, *(attempt.worker_id for attempt in facts.attempts)})
    return tuple(
        _worker(id, rows.get(id), own.get(id, []), slots.get(id), facts.memory.get(id, (None, None))) for id in ids
    )


def _worker(
    worker_id: str,
    row: sa.Row[Any] | None,
    groups: list[Group],
    slots: int | None,
    memory: tuple[int | None, int | None],
) -> WorkerShare:
    names = (
        "host", "engine", "device_asked", "device_got", "layers", "layers_offloaded", "model_load_s", "host_restarts",
    )  # fmt: skip
    known = {name: getattr(row, name, None) for name in names}
    answered = [group for group in groups if group.state == "ok"]
    return WorkerShare(
        id=worker_id,
        slots=slots,
        ok=_sum(answered, "rows"),
        errors=_sum(groups, "rows") - _sum(answered, "rows"),
        output_tokens=_sum(answered, "output_tokens"),
        memory_bytes=memory[0],
        device_memory_bytes=memory[1],
        **known,
    )


def _by_class(groups: Iterable[Group]) -> dict[str, int]:
    """Errors of each class, the commonest first."""
    totals: Counter[str] = Counter()
    for group in groups:
        if group.state == "error":
            totals[group.error_class or ErrorClass.INTERNAL.value] += group.rows
    return dict(totals.most_common())


def _config_sha256(job: sa.Row[Any]) -> str:
    """Names what was run on the dataset: model, task, prompt and sampling. Two jobs of one configuration share it."""
    parts = [job.model, job.model_fingerprint, job.task_sha256, job.system_prompt, json.loads(job.sampling)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _counted(names: Iterable[str | None]) -> list[str]:
    totals = Counter(name for name in names if name is not None)
    return [name if count == 1 else f"{name} x {count}" for name, count in totals.items()]


def _sum(groups: Iterable[Group], name: str) -> int:
    return sum(int(getattr(group, name)) for group in groups)


def ratio(part: float, whole: float | None) -> float | None:
    """``part / whole``; None of nothing."""
    return part / whole if whole else None


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, StrEnum) else value
