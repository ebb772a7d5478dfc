"""What a job's figures are made of: sums over its rows, its engines' books, its slots, its workers, and its checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from promptmill.reports.figures import checks
from promptmill.reports.figures.aggregate import Folded, Group, Totals
from promptmill.reports.figures.budget import Budget, budget
from promptmill.reports.figures.checks import Check, Occupancy
from promptmill.reports.figures.distributions import most_at_once
from promptmill.reports.figures.inputs import Facts
from promptmill.scoring.scorers.tally import Score
from promptmill.types import ErrorClass, FinishReason, JobState


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


class Measured:
    """One job, ready for the formulas of ``metrics``."""

    def __init__(self, facts: Facts, scores: Mapping[str, Score]) -> None:
        self.facts = facts
        self.job: Row[Any] = facts.job
        self.folded: Folded = facts.folded
        self.totals: Totals = facts.totals
        self.answered: list[Group] = [group for group in facts.folded.groups if group.state == "ok"]
        self.ok: int = _sum(self.answered, "rows")
        self.errors: int = _sum(facts.folded.groups, "rows") - self.ok
        self.output_tokens: int = _sum(self.answered, "output_tokens")
        self.cut_off: int = sum(group.rows for group in self.answered if group.finish_reason == FinishReason.LENGTH)
        self.by_class: dict[str, int] = _by_class(facts.folded.groups)
        self.books: Budget = budget(facts.attempts, facts.shared, _tokens_by_worker(self.answered))
        self.occupancy: Occupancy = Occupancy(
            rows=facts.folded.timed, began_at=facts.folded.began_at, ended_at=facts.folded.ended_at,
            active_s=facts.folded.active_s, peak_active=facts.folded.peak_active, slots=_slots(facts),
        )  # fmt: skip
        self.wall_s: float | None = self.occupancy.wall_s
        read = [score.readable for score in scores.values() if score.readable is not None]
        #: Answers that the score which read the fewest could read; None where no task reads the answers.
        self.valid: int | None = min(read, default=None)

    @cached_property
    def workers(self) -> tuple[WorkerShare, ...]:
        return _workers(self.facts)

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """Whether the figures agree with each other."""
        groups = self.folded.groups
        named = {each.model_fingerprint for each in self.facts.attempts if _answered(each)}
        return (
            checks.counts(JobState(self.job.state), self.job.rows, self.ok, self.by_class),
            checks.little(self.occupancy),
            checks.slots(self.occupancy),
            checks.tokens(self.output_tokens, self.books),
            checks.time_budget(self.books),
            checks.limits(self.totals, _sum(groups, "rows")),
            checks.order(self.totals, _sum(groups, "timed")),
            checks.curve(self.folded.curve, self.output_tokens),
            checks.model(self.job.model_fingerprint, named),
        )


def _tokens_by_worker(answered: Iterable[Group]) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for group in answered:
        found[group.worker_id] = found.get(group.worker_id, 0) + group.output_tokens
    return found


def _answered(attempt: Row[Any]) -> bool:
    """Whether rows have their results from it: one that was given back at once, or lost at once, has generated none."""
    return attempt.outcome == "done" or bool(attempt.decode_tokens)


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


def _sum(groups: Iterable[Group], name: str) -> int:
    return sum(int(getattr(group, name)) for group in groups)
