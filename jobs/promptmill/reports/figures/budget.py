"""What the engines say they did, from the counters of ``attempts``: the other side of the books."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from promptmill.reports.figures.distributions import covered_s

#: Parts of an engine's time, in the order they are printed.
PARTS = ("prefill_s", "decode_s", "overhead_s", "idle_s")

#: Counters that a budget has as sums.
SUMS = ("prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "starved_s")


@dataclass(frozen=True, slots=True)
class WorkerBudget:
    """One worker's time on this job: ``wall_s`` with a lease, and what its engine did then (PARTS)."""

    worker_id: str
    attempts: int
    wall_s: float
    parts_s: tuple[float, ...]
    measured: bool

    @property
    def accounted_s(self) -> float | None:
        return sum(self.parts_s) if self.measured else None


@dataclass(frozen=True, slots=True)
class WorkerTokens:
    """Output tokens of one worker on this job, as its engine counted them and as its rows have them."""

    worker_id: str
    in_rows: int
    wasted: int
    generated: int


@dataclass(frozen=True, slots=True)
class Budget:
    """Counters of all attempts of a job. None: not measured; ``missing`` says why the books cannot be closed."""

    workers: tuple[WorkerBudget, ...]
    prefill_tokens: int | None
    prefill_s: float | None
    decode_tokens: int | None
    decode_s: float | None
    starved_s: float | None
    generated_tokens: int | None
    wasted_tokens: int | None
    #: Tokens of attempts with all their counters, by the tokens that as many steps could have made in all slots.
    batch_efficiency: float | None
    #: Attempts whose worker or host was lost: known up to their last stored results.
    lost_attempts: int
    missing: str | None
    #: Workers that lost no attempt, and whose engine generated something else than their rows hold and they wasted.
    unbalanced: tuple[WorkerTokens, ...] = ()

    @property
    def prefill_tps(self) -> float | None:
        return _ratio(self.prefill_tokens, self.prefill_s)

    @property
    def decode_tps(self) -> float | None:
        return _ratio(self.decode_tokens, self.decode_s)

    @property
    def starved_share(self) -> float | None:
        return _ratio(self.starved_s, self._engine_s)

    @property
    def idle_share(self) -> float | None:
        return _ratio(sum(each.parts_s[-1] for each in self.workers if each.measured), self._engine_s)

    @property
    def _engine_s(self) -> float:
        return sum(each.accounted_s or 0.0 for each in self.workers)


def budget(attempts: Sequence[sa.Row[Any]], shared: int, worker_tokens: Mapping[str | None, int]) -> Budget:
    """The sums over a job's attempts. The books close only when every attempt has ended.

    ``shared``: attempts of other jobs that ran on the same engines meanwhile; counters are of an engine, not of a job.
    ``worker_tokens``: output tokens of each worker's rows. What lost attempts generated beyond the rows was wasted with
    them. The books of a worker that lost no attempt close by themselves, whatever another one lost; those of a single
    attempt need not, for an engine runs two at once.
    """
    counted = [each for each in attempts if each.decode_tokens is not None]
    lost = sum(_is_lost(each) for each in attempts)
    missing = _missing(attempts, shared)
    unbalanced = () if missing else tuple(_unbalanced(attempts, worker_tokens))
    row_tokens = sum(worker_tokens.values())
    generated, wasted = _total(counted, "decode_tokens"), _total(counted, "wasted_tokens")
    if lost and generated is not None and wasted is not None:
        if generated < row_tokens + wasted:
            missing = missing or f"not measured: {lost:,} attempts were lost with a part of their counters"
        else:
            wasted = generated - row_tokens
    return Budget(
        workers=tuple(_worker_budgets(attempts)),
        **{name: _total(counted, name) for name in SUMS},
        generated_tokens=None if missing else generated,
        wasted_tokens=wasted,
        batch_efficiency=_batch_efficiency(counted),
        lost_attempts=lost,
        missing=missing,
        unbalanced=unbalanced,
    )


def _batch_efficiency(counted: Sequence[sa.Row[Any]]) -> float | None:
    whole = [each for each in counted if each.slots is not None and each.steps is not None]
    return _ratio(sum(each.decode_tokens for each in whole), sum(each.steps * each.slots for each in whole))


def _missing(attempts: Sequence[sa.Row[Any]], shared: int) -> str | None:
    running = sum(each.ended_at is None for each in attempts)
    if running:
        return f"not measured: {running:,} of {len(attempts):,} attempts still run"
    if shared:
        return "not measured: other jobs ran on the same engines"
    if live := sum(each.live_requests or 0 for each in attempts):
        return f"not measured: {live:,} requests of the API ran on the same engines"
    return None if attempts else "not measured"


def _is_lost(attempt: sa.Row[Any]) -> bool:
    """Slots are written together with an attempt's last counters."""
    return attempt.ended_at is not None and attempt.slots is None


def _unbalanced(attempts: Sequence[sa.Row[Any]], worker_tokens: Mapping[str | None, int]) -> Iterator[WorkerTokens]:
    for worker_id, own in _by_worker(attempts):
        if any(_is_lost(each) or each.decode_tokens is None for each in own):
            continue
        found = WorkerTokens(
            worker_id,
            in_rows=worker_tokens.get(worker_id, 0),
            wasted=sum(each.wasted_tokens or 0 for each in own),
            generated=sum(each.decode_tokens for each in own),
        )
        if found.in_rows + found.wasted != found.generated:
            yield found


def _worker_budgets(attempts: Sequence[sa.Row[Any]]) -> list[WorkerBudget]:
    return [_worker_budget(worker_id, own) for worker_id, own in _by_worker(attempts)]


def _by_worker(attempts: Sequence[sa.Row[Any]]) -> list[tuple[str, list[sa.Row[Any]]]]:
    by_worker: dict[str, list[sa.Row[Any]]] = defaultdict(list)
    for each in attempts:
        by_worker[each.worker_id].append(each)
    return sorted(by_worker.items())


def _worker_budget(worker_id: str, attempts: Sequence[sa.Row[Any]]) -> WorkerBudget:
    ended = [each for each in attempts if each.ended_at is not None]
    return WorkerBudget(
        worker_id=worker_id,
        attempts=len(ended),
        wall_s=covered_s([(each.started_at, each.ended_at) for each in ended]),
        parts_s=tuple(sum(getattr(each, part) or 0.0 for each in ended) for part in PARTS),
        measured=len(ended) == len(attempts) and bool(ended) and not any(_is_lost(each) for each in ended),
    )


def _total(attempts: Sequence[sa.Row[Any]], name: str) -> Any:
    values = [getattr(each, name) for each in attempts if getattr(each, name) is not None]
    return sum(values) if values else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
