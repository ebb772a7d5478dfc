"""``/metrics`` for Prometheus: from rows, from the workers' own rows, and of this server's calls.

Counters come from what is stored, so that no worker that died takes any along. Ids and prompts are never labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request
from sqlalchemy.engine import Connection
from starlette.responses import Response

from promptmill.api import documents
from promptmill.api.keys import Principal
from promptmill.api.middleware import BOUNDS_S, OVERHEAD_BOUNDS_S, Timings
from promptmill.api.services import Parts, Reader, Services, in_thread
from promptmill.broker import Broker
from promptmill.database import COMMITS, CommitTimes, epoch, reading
from promptmill.dispatch import ALIVE_S
from promptmill.ledger.jobs import UNENDED
from promptmill.tables import (
    attempts,
    batches,
    chunks,
    jobs,
    results,
    retries,
    score_runs,
    scores,
    worker_samples,
    workers,
)

router = APIRouter(tags=["System"])

#: Seconds that the sums over all rows are kept: a scrape every 15 s must not read a table of millions each time.
KEPT_S = 10.0

#: Keys whose scores are kept at one time.
MOST_KEPT = 100

#: Bucket bounds of the OpenTelemetry conventions for model servers, in seconds.
LATENCY_BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TPOT_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)

Labels = dict[str, Any]
Sample = tuple[Labels, float]


def family(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """One metric in the text format."""
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{_labels(labels)} {value:g}" if value != int(value) else f"{name}{_labels(labels)} {int(value)}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def histogram(
    name: str, help_text: str, bounds: tuple[float, ...], rows: Iterable[Any], label: str = "model"
) -> Iterator[str]:
    """``rows``: value of the label, one cumulative count per bound, count, sum."""
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} histogram"
    for value, *counts, total, summed in rows:
        for bound, count in zip(bounds, counts, strict=True):
            yield f"{name}_bucket{_labels({label: value, 'le': f'{bound:g}'})} {int(count or 0)}"
        yield f"{name}_bucket{_labels({label: value, 'le': '+Inf'})} {int(total)}"
        yield f"{name}_sum{_labels({label: value})} {float(summed or 0):.6f}"
        yield f"{name}_count{_labels({label: value})} {int(total)}"


@router.get("/metrics", summary="Prometheus metrics", responses=documents.content(kind="text/plain"))
async def metrics(request: Request, parts: Parts, principal: Reader) -> Response:
    """The text format of Prometheus. With keys, give the scraper one with the scope ``read``."""
    state = request.app.state
    kept = getattr(state, "exposed", None)
    if kept is None or time.monotonic() - kept[0] > KEPT_S:
        state.exposed = kept = time.monotonic(), await in_thread(_from_rows, parts)
    scored = await _kept_scores(state, parts, principal)
    lines = [*kept[1], *scored, *_calls(state.timings), *_overhead(state.timings), *await _commits(parts), *family(
        "promptmill_live_requests", "gauge", "Requests whose clients wait for them.", [({}, parts.live.waiting)]
    )]  # fmt: skip
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _kept_scores(state: Any, parts: Services, principal: Principal) -> list[str]:
    """Scores have names of jobs: those of another key's jobs are not told."""
    kept: dict[str | None, tuple[float, list[str]]] = state.scores
    owner = None if principal.is_operator else principal.key_id
    if owner not in kept or time.monotonic() - kept[owner][0] > KEPT_S:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[owner] = time.monotonic(), await in_thread(_scores, parts, principal)
    return kept[owner][1]


def _overhead(timings: Timings) -> Iterator[str]:
    row = ("/v1/chat/completions", *accumulate(timings.overhead), timings.overhead_s)
    return histogram(
        "promptmill_api_overhead_seconds",
        "This server's own time on a chat: to the queue, and from the worker's last token.",
        OVERHEAD_BOUNDS_S, [row], "route",
    )  # fmt: skip


async def _commits(parts: Services) -> Iterator[str]:
    """Of this server, and of each live worker by its sign of life."""
    if not parts.models.is_fresh:
        await in_thread(parts.models.refresh)
    beats = await parts.live.beats([each["id"] for each in parts.models.workers])
    rows = [("api", *COMMITS.cumulative())]
    rows += [(worker, *beat["commits"]) for worker, beat in beats.items() if "commits" in beat]
    return histogram(
        "promptmill_db_commit_seconds", "Commits of the database, of this server and of each worker.",
        CommitTimes.BOUNDS, rows, "process",
    )  # fmt: skip


def _calls(timings: Timings) -> Iterator[str]:
    name = "promptmill_http_requests_total"
    yield from family(
        name, "counter", "Calls of the API.",
        [({"method": m, "route": r, "status": s}, count) for (m, r, s), count in sorted(timings.counts.items())],
    )  # fmt: skip
    name = "promptmill_http_request_duration_seconds"
    yield f"# HELP {name} Time of calls, streams to their end."
    yield f"# TYPE {name} histogram"
    for route, summed in sorted(timings.sums.items()):
        total = sum(count for (_, each, _), count in timings.counts.items() if each == route)
        for bound in BOUNDS_S:
            yield f"{name}_bucket{_labels({'route': route, 'le': f'{bound:g}'})} {timings.buckets[route, bound]}"
        yield f"{name}_bucket{_labels({'route': route, 'le': '+Inf'})} {total}"
        yield f"{name}_sum{_labels({'route': route})} {summed:.6f}"
        yield f"{name}_count{_labels({'route': route})} {total}"


def _from_rows(parts: Services) -> list[str]:
    with reading(parts.db) as db:
        return [
            *_jobs(db), *_items(db), *_histograms(db), *_engines(db), *_workers(db), *_queues(db, parts),
            *family("promptmill_build_info", "gauge", "This version.", [({"version": version("promptmill")}, 1)]),
        ]  # fmt: skip


def _pairs(db: Connection, query: Any, *names: str) -> list[Sample]:
    return [(dict(zip(names, row[:-1], strict=True)), float(row[-1] or 0)) for row in db.execute(query)]


def _jobs(db: Connection) -> Iterator[str]:
    query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
    yield from family("promptmill_jobs", "gauge", "Jobs by state.", _pairs(db, query, "state"))


def _of_results(*columns: Any) -> Any:
    return sa.select(*columns).select_from(results).join(jobs, jobs.c.id == results.c.job_id)


def _items(db: Connection) -> Iterator[str]:
    by_state = _of_results(jobs.c.model, results.c.state, sa.func.count()).group_by(jobs.c.model, results.c.state)
    yield from family("promptmill_items_total", "counter", "Results.", _pairs(db, by_state, "model", "status"))
    errors = (
        _of_results(jobs.c.model, results.c.error_class, sa.func.count())
        .where(results.c.state == "error")
        .group_by(jobs.c.model, results.c.error_class)
    )
    yield from family(
        "promptmill_item_errors_total", "counter", "Errors by class.", _pairs(db, errors, "model", "error_type")
    )
    again = sa.select(jobs.c.model, sa.func.count()).join(retries, retries.c.job_id == jobs.c.id).group_by(jobs.c.model)
    yield from family("promptmill_item_retries_total", "counter", "Errors tried again.", _pairs(db, again, "model"))
    lost = (
        sa.select(jobs.c.model, sa.func.count())
        .join(attempts, attempts.c.job_id == jobs.c.id)
        .where(attempts.c.outcome.in_(("failed", "lost")))
        .group_by(jobs.c.model)
    )
    yield from family(
        "promptmill_chunk_redeliveries_total", "counter", "Attempts on chunks that ended badly.",
        _pairs(db, lost, "model"),
    )  # fmt: skip
    for name, column, text in (
        ("prompt_tokens", results.c.prompt_tokens, "Prompt tokens of answers."),
        ("prompt_tokens_cached", results.c.cached_tokens, "Of these, not computed for the request."),
        ("output_tokens", results.c.output_tokens, "Tokens of answers."),
        ("reasoning_tokens", results.c.reasoning_tokens, "Of these, reasoning."),
    ):
        query = (
            _of_results(jobs.c.model, results.c.worker_id, sa.func.sum(column))
            .where(results.c.deduplicated.is_(False))
            .group_by(jobs.c.model, results.c.worker_id)
        )
        yield from family(f"promptmill_{name}_total", "counter", text, _pairs(db, query, "model", "worker"))


def _histograms(db: Connection) -> Iterator[str]:
    tokens, queued_s = results.c.output_tokens, results.c.admitted_at - results.c.enqueued_at
    times: tuple[tuple[str, str, tuple[float, ...], Any], ...] = (
        ("item_queue_seconds", "From the queue to a slot.", LATENCY_BOUNDS, queued_s),
        ("item_ttft_seconds", "From the slot to the first token.", LATENCY_BOUNDS,
         results.c.first_token_at - results.c.admitted_at),
        ("item_tpot_seconds", "Per token after the first.", TPOT_BOUNDS,
         sa.case((tokens > 1, (results.c.finished_at - results.c.first_token_at) / (tokens - 1)))),
        ("item_latency_seconds", "From the slot to the last token.", LATENCY_BOUNDS,
         results.c.finished_at - results.c.admitted_at),
        ("item_output_tokens", "Tokens of an answer.", TOKEN_BOUNDS, tokens),
        ("item_prompt_tokens", "Tokens of a prompt.", TOKEN_BOUNDS, results.c.prompt_tokens),
    )  # fmt: skip
    for name, text, bounds, value in times:
        counts = [sa.func.sum(sa.case((value <= bound, 1), else_=0)) for bound in bounds]
        query = (
            _of_results(jobs.c.model, *counts, sa.func.count(value), sa.func.sum(value))
            .where(results.c.state == "ok", results.c.deduplicated.is_(False))
            .group_by(jobs.c.model)
        )
        yield from histogram(f"promptmill_{name}", text, bounds, db.execute(query))


def _engines(db: Connection) -> Iterator[str]:
    def summed(column: Any) -> Any:
        return sa.select(attempts.c.worker_id, sa.func.sum(column)).group_by(attempts.c.worker_id)

    steps = _pairs(db, summed(attempts.c.steps), "worker")
    yield from family("promptmill_engine_steps_total", "counter", "Steps of the engine.", steps)
    phases = {
        "prefill": attempts.c.prefill_s, "decode": attempts.c.decode_s, "host": attempts.c.overhead_s,
        "idle": attempts.c.idle_s,
    }  # fmt: skip
    spent = [
        (labels | {"phase": phase}, value)
        for phase, column in phases.items()
        for labels, value in _pairs(db, summed(column), "worker")
    ]
    yield from family("promptmill_engine_seconds_total", "counter", "Seconds of the engine by phase.", spent)
    wasted = _pairs(db, summed(attempts.c.wasted_tokens), "worker")
    yield from family("promptmill_wasted_tokens_total", "counter", "Tokens in no answer.", wasted)


def _workers(db: Connection) -> Iterator[str]:
    latest = (
        sa.select(worker_samples.c.worker_id, sa.func.max(worker_samples.c.at).label("at"))
        .group_by(worker_samples.c.worker_id)
        .subquery()
    )
    query = (
        sa.select(workers, worker_samples)
        .outerjoin(latest, latest.c.worker_id == workers.c.id)
        .outerjoin(
            worker_samples,
            sa.and_(worker_samples.c.worker_id == latest.c.worker_id, worker_samples.c.at == latest.c.at),
        )
        .where(workers.c.heartbeat_at > epoch() - 86_400)
    )
    found = db.execute(query).mappings().all()
    now = float(db.execute(sa.select(epoch())).scalar() or 0)
    gauges: tuple[tuple[str, str, str, Any], ...] = (
        ("worker_up", "gauge", "1 while its heartbeat is fresh.",
         lambda w: w["state"] != "stopped" and w["heartbeat_at"] > now - ALIVE_S),
        ("worker_last_heartbeat_timestamp_seconds", "gauge", "Of the database's clock.", lambda w: w["heartbeat_at"]),
        ("worker_restarts_total", "counter", "Engine hosts started again.", lambda w: w["host_restarts"]),
        ("engine_slots", "gauge", "Sequences decoded together.", lambda w: w[workers.c.slots]),
        ("engine_active_sequences", "gauge", "Sequences that hold a slot.", lambda w: w["active_sequences"]),
        ("engine_kv_used_ratio", "gauge", "Share of the KV cells that sequences and shared prefixes hold.",
         lambda w: w["kv_cells_used"] / w["kv_cells"] if w["kv_cells"] and w["kv_cells_used"] is not None else None),
        ("worker_cpu_ratio", "gauge", "CPU seconds per second.", lambda w: w["cpu_ratio"]),
        ("worker_gpu_ratio", "gauge", "Use of the device.", lambda w: w["device_use_ratio"]),
        ("worker_output_tokens_per_second", "gauge", "Since its last sample.", lambda w: w["output_tps"]),
        ("clock_offset_seconds", "gauge", "The database's clock minus the worker's.", lambda w: w["clock_offset_s"]),
    )  # fmt: skip
    for name, kind, text, value in gauges:
        samples = [({"worker": w["id"]}, float(value(w))) for w in found if value(w) is not None]
        yield from family(f"promptmill_{name}", kind, text, samples)
    loads = [({"worker": w["id"], "model": w["model"]}, float(w["model_load_s"])) for w in found if w["model_load_s"]]
    yield from family("promptmill_model_load_seconds", "gauge", "Of the model that is loaded.", loads)
    memory = [
        ({"worker": w["id"], "kind": kind}, float(w[column]))
        for w in found
        for kind, column in (("rss", "memory_bytes"), ("device", "device_memory_bytes"))
        if w[column] is not None
    ]
    yield from family("promptmill_worker_memory_bytes", "gauge", "Memory by kind.", memory)


def _scores(parts: Services, principal: Principal) -> list[str]:
    # The job of a batch is called by the batch's id, and ids are no labels.
    named = sa.and_(
        jobs.c.name.is_not(None), ~sa.exists().where(batches.c.job_id == jobs.c.id), principal.owned(jobs.c.api_key_id)
    )
    newest = (
        sa.select(sa.func.max(score_runs.c.id))
        .join(jobs, jobs.c.id == score_runs.c.job_id)
        .where(named)
        .group_by(jobs.c.name)
    )
    query = (
        sa.select(jobs.c.name, scores.c.metric, sa.func.avg(sa.func.coalesce(scores.c.value, 0.0)))
        .join(score_runs, score_runs.c.id == scores.c.score_run_id)
        .join(jobs, jobs.c.id == score_runs.c.job_id)
        .where(named, scores.c.outcome != "infra_error", score_runs.c.id.in_(newest))
        .group_by(jobs.c.name, scores.c.metric)
    )
    with reading(parts.db) as db:
        found = _pairs(db, query, "task", "metric")
    return list(family("promptmill_score", "gauge", "Of the last scored job of each name.", found))


def _queues(db: Connection, parts: Services) -> Iterator[str]:
    rows = chunks.c.rows - chunks.c.ok - chunks.c.errors - chunks.c.moved
    waiting = sa.and_(jobs.c.state.in_(UNENDED), jobs.c.mode == "queue")
    joined = sa.select(jobs.c.model, sa.func.sum(rows)).join(chunks, chunks.c.job_id == jobs.c.id)
    items = _pairs(db, joined.where(waiting).group_by(jobs.c.model), "queue")
    yield from family("promptmill_queue_items", "gauge", "Requests without a result.", items)
    age = sa.select(jobs.c.model, sa.func.max(epoch() - jobs.c.submitted_at)).where(waiting).group_by(jobs.c.model)
    oldest = _pairs(db, age, "queue")
    yield from family("promptmill_queue_oldest_age_seconds", "gauge", "Age of the oldest job that waits.", oldest)
    try:
        broker = Broker(parts.settings.redis_url)
        messages = [(labels, float(broker.waiting(labels["queue"]))) for labels, _ in items]
    except Exception:
        messages = []
    yield from family("promptmill_queue_messages", "gauge", "Messages in Redis.", messages)
