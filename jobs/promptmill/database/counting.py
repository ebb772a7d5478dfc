"""What ``/metrics`` counts, kept as it arises: a scrape reads a few rows, however many results there are.

What a transaction counts is stored right before its commit (by ``database.writing``), in the rows of its worker. No one
holds these rows while it waits for another lock, and counters never go down: removing a job leaves them.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import counters
from promptmill.types import EngineCounters, Failed, Ok, Result

#: Bucket bounds of the OpenTelemetry conventions for model servers, in seconds and tokens.
LATENCY_BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TPOT_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)

#: Name of a histogram -> its bounds. They never change: what is stored is by their places.
BOUNDS: dict[str, tuple[float, ...]] = {
    "queue": LATENCY_BOUNDS, "ttft": LATENCY_BOUNDS, "tpot": TPOT_BOUNDS, "latency": LATENCY_BOUNDS,
    "output": TOKEN_BOUNDS, "prompt": TOKEN_BOUNDS,
}  # fmt: skip

#: Stands for the worker of what no worker did, and for those that ended long ago.
NO_WORKER = ""


class Counts:
    """Sums by name, such as ``items.ok``; and histograms by name: a count for each bucket, one above, then the sum."""

    def __init__(self, text: str = "{}") -> None:
        found = json.loads(text)
        self.sums: dict[str, float] = found.get("sums", {})
        self.histograms: dict[str, list[float]] = found.get("histograms", {})

    def add(self, name: str, more: float = 1) -> None:
        if more:
            self.sums[name] = self.sums.get(name, 0) + more

    def observe(self, name: str, values: Iterable[float]) -> None:
        """A time may come out negative where the database's clock was set: sums must not go down."""
        bounds = BOUNDS[name]
        for value in values:
            kept = self.histograms.setdefault(name, [0] * (len(bounds) + 2))
            kept[bisect_left(bounds, value)] += 1
            kept[-1] += max(0.0, value)

    def include(self, other: Counts) -> None:
        for name, more in other.sums.items():
            self.add(name, more)
        for name, values in other.histograms.items():
            kept = self.histograms.setdefault(name, [0] * len(values))
            self.histograms[name] = [one + another for one, another in zip(kept, values, strict=True)]

    def part(self, prefix: str) -> dict[str, float]:
        """The sums whose names begin with ``prefix``, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.sums.items() if name.startswith(prefix)}

    def to_json(self) -> str:
        return json.dumps({"sums": self.sums, "histograms": self.histograms}, separators=(",", ":"))

    # --- what happens ------------------------------------------------------------------------------------------------

    def results(
        self, results: Sequence[Result], enqueued_at: float | None, at: Callable[[float], float] = float
    ) -> None:
        """Results that are stored for good. ``at``: what the database's clock said at a moment of theirs."""
        answers = [each for each in results if isinstance(each, Ok)]
        failed = [each for each in results if isinstance(each, Failed)]
        self.add("items.ok", len(answers))
        self.add("items.error", len(failed))
        for each in failed:
            self.add(f"errors.{each.error_class.value}")
        computed = [each for each in answers if each.extras is None or not each.extras.deduplicated]
        usages = [*(each.usage for each in failed if each.usage), *(each.usage for each in computed)]
        for name in ("prompt", "cached", "output", "reasoning"):
            self.add(f"tokens.{name}", sum(getattr(usage, f"{name}_tokens") for usage in usages))
        self._answers(computed, enqueued_at, at)

    def engine(self, more: EngineCounters) -> None:
        for field in fields(more):
            if not field.name.startswith("peak_"):
                self.add(f"engine.{field.name}", getattr(more, field.name))

    def _answers(self, answers: Sequence[Ok], enqueued_at: float | None, at: Callable[[float], float]) -> None:
        self.observe("output", [each.usage.output_tokens for each in answers])
        self.observe("prompt", [each.usage.prompt_tokens for each in answers])
        timed = [(each.timing, each.usage.output_tokens) for each in answers if each.timing is not None]
        if enqueued_at is not None:
            self.observe("queue", [at(timing.admitted_at) - enqueued_at for timing, _ in timed])
        self.observe("latency", [timing.latency_s for timing, _ in timed])
        self.observe("ttft", [timing.ttft_s for timing, _ in timed])
        spent = [(timing.finished_at - timing.first_token_at, tokens) for timing, tokens in timed if tokens > 1]
        self.observe("tpot", [spent_s / (tokens - 1) for spent_s, tokens in spent])


#: What open transactions have counted, by worker and model.
_open: WeakKeyDictionary[Connection, dict[tuple[str, str], Counts]] = WeakKeyDictionary()


def counting(db: Connection, model: str, worker_id: str | None = None) -> Counts:
    """What this transaction counts for the model, by the worker or by none."""
    return _open.setdefault(db, {}).setdefault((worker_id or NO_WORKER, model), Counts())


def discard(db: Connection) -> None:
    """The transaction was given up, and what it counted with it."""
    _open.pop(db, None)


def store(db: Connection) -> None:
    """Add what the transaction counted to the rows. Nothing may be locked after it."""
    for (worker_id, model), counts in sorted(_open.pop(db, {}).items(), key=lambda each: each[0]):
        if counts.sums or counts.histograms:
            _add(db, worker_id, model, counts)


def _add(db: Connection, worker_id: str, model: str, more: Counts) -> None:
    own = (counters.c.worker_id == worker_id, counters.c.model == model)
    kept = sa.select(counters.c.counts).where(*own).with_for_update()
    text = db.execute(kept).scalar()
    if text is None:
        # Another process may do so at this moment.
        row = {"worker_id": worker_id, "model": model}
        db.execute(
            sa.text("INSERT INTO counters (worker_id, model, counts) VALUES (:worker_id, :model, '{}') "
                    "ON CONFLICT DO NOTHING"), row
        )  # fmt: skip
        text = db.execute(kept).scalar_one()
    total = Counts(text)
    total.include(more)
    db.execute(sa.update(counters).where(*own).values(counts=total.to_json()))


def retire(db: Connection, worker_id: str) -> None:
    """Keep what a worker that is gone counted without its name: names of workers would grow for ever."""
    gone = sa.delete(counters).where(counters.c.worker_id == worker_id).returning(counters.c.model, counters.c.counts)
    for model, text in db.execute(gone).all():
        counting(db, model).include(Counts(text))


def stored(db: Connection) -> Iterator[tuple[str, str, Counts]]:
    """Worker (NO_WORKER for none), model and counts of each row."""
    query: sa.Select[Any] = sa.select(counters.c.worker_id, counters.c.model, counters.c.counts)
    for worker_id, model, text in db.execute(query.order_by(counters.c.model, counters.c.worker_id)):
        yield worker_id, model, Counts(text)
