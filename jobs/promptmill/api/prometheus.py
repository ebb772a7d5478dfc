"""``/metrics`` for Prometheus: from rows, from the workers' own rows, and of this server's calls.

Counters come from what is stored, so that no worker that died takes any along. Ids and prompts are never labels.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.engine import Connection, RowMapping
from starlette.responses import Response

from promptmill.api import openapi
from promptmill.api.dependencies import Parts, Reader, Services, in_thread
from promptmill.api.http.middleware import BOUNDS_S, OVERHEAD_BOUNDS_S, Timings
from promptmill.api.keys import Principal
from promptmill.database import counting
from promptmill.database.counting import BOUNDS, NO_WORKER, Counts
from promptmill.database.engine import COMMITS, CommitTimes, epoch, reading
from promptmill.database.tables import batches, chunks, jobs, score_runs, worker_samples, workers
from promptmill.ledger.values import OPEN_STATES
from promptmill.queue.broker import Broker
from promptmill.queue.dispatcher import ALIVE_S
from promptmill.store.catalog import with_newest_samples

router = APIRouter(tags=["System"])

#: Seconds that an answer is kept: many scrapers ask the database no more than one does.
KEPT_S = 1.0

#: Seconds without a sign of life after which a worker is not shown. One that was stopped on purpose is not at all.
SHOWN_S = 86_400.0

#: Keys whose scores are kept at one time.
MOST_KEPT = 100

Labels = dict[str, Any]
Sample = tuple[Labels, float]


class _Found(Collector):
    """What was found, for ``generate_latest``."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def text_of(found: list[Metric]) -> bytes:
    """The metrics in the text format."""
    return generate_latest(_Found(found))


def family(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> Metric:
    """One metric."""
    found = Metric(name.removesuffix("_total"), help_text, kind)
    for labels, value in samples:
        found.add_sample(name, {key: str(each) for key, each in labels.items()}, float(value))
    return found


def histogram(
    name: str, help_text: str, bounds: tuple[float, ...], rows: Iterable[Any], label: str = "model"
) -> Metric:
    """``rows``: value of the label, one cumulative count per bound, count, sum."""
    found = Metric(name, help_text, "histogram")
    for value, *counts, total, summed in rows:
        labels = {label: str(value)}
        for bound, count in zip((*bounds, "+Inf"), (*counts, total), strict=True):
            le = bound if isinstance(bound, str) else f"{bound:g}"
            found.add_sample(f"{name}_bucket", labels | {"le": le}, int(count or 0))
        found.add_sample(f"{name}_sum", labels, float(summed or 0))
        found.add_sample(f"{name}_count", labels, int(total))
    return found


@router.get("/metrics", summary="Prometheus metrics", responses=openapi.content(kind="text/plain"))
async def metrics(request: Request, parts: Parts, principal: Reader) -> Response:
    """The text format of Prometheus. With keys, give the scraper one with the scope ``read``."""
    state = request.app.state
    lock: asyncio.Lock = state.scraping
    # One at a time: scrapes that were given up would go on, and each would make the next one slower.
    async with lock:
        kept = getattr(state, "exposed", None)
        if kept is None or time.monotonic() - kept[0] > KEPT_S:
            state.exposed = kept = time.monotonic(), await in_thread(_from_rows, parts)
        scored = await _kept_scores(state, parts, principal)
    waiting: list[Sample] = [({}, parts.live.waiting)]
    found = [
        *kept[1], scored, *_calls(state.timings), _overhead(state.timings), await _commits(parts),
        family("promptmill_live_requests", "gauge", "Requests whose clients wait for them.", waiting),
    ]  # fmt: skip
    return Response(text_of(found), media_type="text/plain; version=0.0.4")


async def _kept_scores(state: Any, parts: Services, principal: Principal) -> Metric:
    """Scores have names of jobs: those of another key's jobs are not told."""
    kept: dict[str | None, tuple[float, Metric]] = state.scores
    owner = None if principal.is_operator else principal.key_id
    if owner not in kept or time.monotonic() - kept[owner][0] > KEPT_S:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[owner] = time.monotonic(), await in_thread(_scores, parts, principal)
    return kept[owner][1]


def _overhead(timings: Timings) -> Metric:
    row = ("/v1/chat/completions", *accumulate(timings.overhead), timings.overhead_s)
    return histogram(
        "promptmill_api_overhead_seconds",
        "This server's own time on a chat: to the queue, and from the worker's last token.",
        OVERHEAD_BOUNDS_S, [row], "route",
    )  # fmt: skip


async def _commits(parts: Services) -> Metric:
    """Commits of this server, and of each live worker by its sign of life."""
    if not parts.models.is_fresh:
        await in_thread(parts.models.refresh)
    beats = await parts.live.beats([each["id"] for each in parts.models.workers])
    rows = [("api", *COMMITS.cumulative())]
    rows += [(worker, *beat["commits"]) for worker, beat in beats.items()]
    return histogram(
        "promptmill_db_commit_seconds", "Commits of the database, of this server and of each worker.",
        CommitTimes.BOUNDS, rows, "process",
    )  # fmt: skip


def _calls(timings: Timings) -> Iterator[Metric]:
    totals: Counter[str] = Counter()
    for (_, route, _), count in timings.counts.items():
        totals[route] += count
    yield family(
        "promptmill_http_requests_total", "counter", "Calls of the API.",
        [({"method": m, "route": r, "status": s}, count) for (m, r, s), count in sorted(timings.counts.items())],
    )  # fmt: skip
    rows = [
        (route, *(timings.buckets[route, bound] for bound in BOUNDS_S), totals[route], summed)
        for route, summed in sorted(timings.sums.items())
    ]
    yield histogram(
        "promptmill_http_request_duration_seconds", "Time of calls, streams to their end.", BOUNDS_S, rows, "route"
    )


def _from_rows(parts: Services) -> list[Metric]:
    with reading(parts.db) as db:
        return [
            _jobs(db), *_counters(db), *_workers(db), *_queues(db, parts),
            family("promptmill_build_info", "gauge", "This version.", [({"version": version("promptmill")}, 1)]),
        ]  # fmt: skip


def _pairs(db: Connection, query: Any, *names: str) -> list[Sample]:
    return [(dict(zip(names, row[:-1], strict=True)), float(row[-1] or 0)) for row in db.execute(query)]


def _jobs(db: Connection) -> Metric:
    query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
    return family("promptmill_jobs", "gauge", "Jobs by state.", _pairs(db, query, "state"))


#: Name in the exposition -> name of the sum, and what it says; each by model and worker.
TOKENS = {
    "prompt_tokens": ("prompt", "Prompt tokens of answers."),
    "prompt_tokens_cached": ("cached", "Of these, not computed for the request."),
    "output_tokens": ("output", "Tokens of answers."),
    "reasoning_tokens": ("reasoning", "Of these, reasoning."),
}

#: The same of histograms by model.
HISTOGRAMS = {
    "item_queue_seconds": ("queue", "From the queue to a slot."),
    "item_ttft_seconds": ("ttft", "From the slot to the first token."),
    "item_tpot_seconds": ("tpot", "Per token after the first."),
    "item_latency_seconds": ("latency", "From the slot to the last token."),
    "item_output_tokens": ("output", "Tokens of an answer."),
    "item_prompt_tokens": ("prompt", "Tokens of a prompt."),
}

#: Phase of an engine -> name of its seconds.
PHASES = {"prefill": "prefill_s", "decode": "decode_s", "host": "overhead_s", "idle": "idle_s"}


def _counters(db: Connection) -> Iterator[Metric]:
    """What was counted as it arose: a few rows, however many results there are."""
    rows = list(counting.stored(db))
    models: dict[str, Counts] = {}
    engines: dict[str, Counts] = {}
    for worker, model, counts in rows:
        models.setdefault(model, Counts()).include(counts)
        if worker != NO_WORKER:
            engines.setdefault(worker, Counts()).include(counts)
    yield from _items(models)
    for name, (key, text) in TOKENS.items():
        samples = [
            ({"model": model, "worker": worker}, counts.part("tokens.").get(key, 0))
            for worker, model, counts in rows
            if worker != NO_WORKER
        ]
        yield family(f"promptmill_{name}_total", "counter", text, samples)
    for name, (key, text) in HISTOGRAMS.items():
        found = [(model, *_cumulative(kept)) for model, each in models.items() if (kept := each.histograms.get(key))]
        yield histogram(f"promptmill_{name}", text, BOUNDS[key], found)
    yield from _engines(engines)


def _cumulative(kept: list[float]) -> tuple[float, ...]:
    """Counts up to each bound, of all, and the sum."""
    return (*accumulate(kept[:-1]), kept[-1])


def _items(models: dict[str, Counts]) -> Iterator[Metric]:
    def by(prefix: str, label: str) -> list[Sample]:
        return [
            ({"model": model, label: name}, value)
            for model, counts in models.items()
            for name, value in sorted(counts.part(prefix).items())
        ]

    def of(name: str) -> list[Sample]:
        return [({"model": model}, value) for model, each in models.items() if (value := each.sums.get(name))]

    yield family("promptmill_items_total", "counter", "Results.", by("items.", "status"))
    yield family("promptmill_item_errors_total", "counter", "Errors by class.", by("errors.", "error_type"))
    yield family("promptmill_item_retries_total", "counter", "Errors tried again.", of("retries"))
    yield family(
        "promptmill_chunk_redeliveries_total", "counter", "Attempts on chunks that ended badly.", of("redeliveries")
    )


def _engines(engines: dict[str, Counts]) -> Iterator[Metric]:
    def of(name: str, **labels: str) -> list[Sample]:
        return [({"worker": worker} | labels, each.sums.get(f"engine.{name}", 0)) for worker, each in engines.items()]

    yield family("promptmill_engine_steps_total", "counter", "Steps of the engine.", of("steps"))
    spent = [each for phase, name in PHASES.items() for each in of(name, phase=phase)]
    yield family("promptmill_engine_seconds_total", "counter", "Seconds of the engine by phase.", spent)
    yield family("promptmill_wasted_tokens_total", "counter", "Tokens in no answer.", of("wasted_tokens"))


def _workers(db: Connection) -> Iterator[Metric]:
    query = (
        sa.select(workers, worker_samples, epoch().label("now"))
        .select_from(with_newest_samples())
        .where(workers.c.state != "stopped", workers.c.heartbeat_at > epoch() - SHOWN_S)
    )
    shown = db.execute(query).mappings().all()
    yield from _gauges(shown, (
        ("worker_up", "gauge", "1 while its heartbeat is fresh.", _is_alive),
        ("worker_last_heartbeat_timestamp_seconds", "gauge", "Of the database's clock.", lambda w: w["heartbeat_at"]),
        ("worker_restarts_total", "counter", "Engine hosts started again.", lambda w: w["host_restarts"]),
    ))  # fmt: skip
    # What a worker that is gone measured last is true no more.
    alive = [each for each in shown if _is_alive(each)]
    yield from _gauges(alive, (
        ("engine_slots", "gauge", "Sequences decoded together.", lambda w: w[workers.c.slots]),
        ("engine_active_sequences", "gauge", "Sequences that hold a slot.", lambda w: w["active_sequences"]),
        ("engine_kv_used_ratio", "gauge", "Share of the KV cells that sequences and shared prefixes hold.",
         lambda w: w["kv_cells_used"] / w["kv_cells"] if w["kv_cells"] and w["kv_cells_used"] is not None else None),
        ("worker_cpu_ratio", "gauge", "CPU seconds per second.", lambda w: w["cpu_ratio"]),
        ("worker_gpu_ratio", "gauge", "Use of the device.", lambda w: w["device_use_ratio"]),
        ("worker_output_tokens_per_second", "gauge", "Since its last sample.", lambda w: w["output_tps"]),
        ("clock_offset_seconds", "gauge", "The database's clock minus the worker's.", lambda w: w["clock_offset_s"]),
    ))  # fmt: skip
    loads = [({"worker": w["id"], "model": w["model"]}, float(w["model_load_s"])) for w in alive if w["model_load_s"]]
    yield family("promptmill_model_load_seconds", "gauge", "Of the model that is loaded.", loads)
    memory = [
        ({"worker": w["id"], "kind": kind}, float(w[column]))
        for w in alive
        for kind, column in (("rss", "memory_bytes"), ("device", "device_memory_bytes"))
        if w[column] is not None
    ]
    yield family("promptmill_worker_memory_bytes", "gauge", "Memory by kind.", memory)


def _is_alive(worker: RowMapping) -> bool:
    return bool(worker["heartbeat_at"] > worker["now"] - ALIVE_S)


def _gauges(
    found: Sequence[RowMapping], gauges: Iterable[tuple[str, str, str, Callable[[RowMapping], Any]]]
) -> Iterator[Metric]:
    """``gauges``: name, kind, what it says, and its value of a worker."""
    for name, kind, text, value in gauges:
        samples = [({"worker": w["id"]}, float(value(w))) for w in found if value(w) is not None]
        yield family(f"promptmill_{name}", kind, text, samples)


def _scores(parts: Services, principal: Principal) -> Metric:
    # The job of a batch is called by the batch's id, and ids are no labels.
    named = sa.and_(
        jobs.c.name.is_not(None), ~sa.exists().where(batches.c.job_id == jobs.c.id), principal.owned(jobs.c.api_key_id)
    )
    newest = (
        sa.select(sa.func.max(score_runs.c.id))
        .join(jobs, jobs.c.id == score_runs.c.job_id)
        .where(named, score_runs.c.figures.is_not(None))
        .group_by(jobs.c.name)
    )
    query = (
        sa.select(jobs.c.name, score_runs.c.figures)
        .join(jobs, jobs.c.id == score_runs.c.job_id)
        .where(named, score_runs.c.id.in_(newest), score_runs.c.figures.is_not(None))
    )
    with reading(parts.db) as db:
        found = [
            ({"task": task, "metric": metric}, figure["value"])
            for task, figures in db.execute(query)
            for metric, figure in json.loads(figures).items()
            if figure["value"] is not None
        ]
    return family("promptmill_score", "gauge", "Of the last scored job of each name.", found)


def _queues(db: Connection, parts: Services) -> Iterator[Metric]:
    rows = chunks.c.rows - chunks.c.ok - chunks.c.errors - chunks.c.moved
    # A job that was paused waits for its operator, not for a worker.
    waiting = sa.and_(jobs.c.state.in_(OPEN_STATES), jobs.c.mode == "queue")
    # Nothing waits for an ended chunk, and there may be a million of them.
    joined = sa.select(jobs.c.model, sa.func.sum(rows)).join(chunks, chunks.c.job_id == jobs.c.id)
    left = joined.where(waiting, chunks.c.state.in_(("queued", "leased")))
    items = _pairs(db, left.group_by(jobs.c.model), "queue")
    yield family("promptmill_queue_items", "gauge", "Requests without a result, of jobs that are not paused.", items)
    age = sa.select(jobs.c.model, sa.func.max(epoch() - jobs.c.submitted_at)).where(waiting).group_by(jobs.c.model)
    oldest = _pairs(db, age, "queue")
    yield family(
        "promptmill_queue_oldest_age_seconds", "gauge", "Age of the oldest job that is queued or runs.", oldest
    )
    try:
        counts = Broker(parts.settings.redis_url).waiting([labels["queue"] for labels, _ in items])
        messages = [(labels, float(count)) for (labels, _), count in zip(items, counts, strict=True)]
    except Exception:
        messages = []
    yield family("promptmill_queue_messages", "gauge", "Messages in Redis.", messages)
