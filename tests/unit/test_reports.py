"""The report of a job: every figure is recomputed here from the rows that went in."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from rich.console import Console

from promptmill.core.registry import resolve
from promptmill.database.engine import connect
from promptmill.database.figure_sql import FIGURE_SQL
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results, worker_samples, workers
from promptmill.errors import UnknownName
from promptmill.reports import TEXTS
from promptmill.reports.figures import distributions, percentiles
from promptmill.reports.figures.checks import Check
from promptmill.reports.figures.columns import Series
from promptmill.reports.figures.metrics import METRICS
from promptmill.reports.figures.summary import JSON_KEYS, Summary, summarise
from promptmill.reports.render.terminal import render
from promptmill.service.service import keep_scores
from promptmill.tasks.task_file import parse_task

JOB, WORKER = "01JOB", "box/cpu/1"

#: When the first request of every job here was published.
START = 1_700_000_000.0

TASK = """\
task: ads
prompt: {user: "{{ input.comment }}"}
output:
  schema: {type: object, required: [is_ad], properties: {is_ad: {type: boolean}}}
scores:
  - {exact: is_ad}
"""

Values = dict[str, Any]


@pytest.fixture
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


def answer(row: int, **changes: Any) -> Values:
    """An answered row: 2 s in a slot from second ``row`` on, half a second to the first of 11 tokens."""
    begin = START + 1 + row
    return {
        "row": row, "state": "ok", "text": '{"is_ad": true}', "finish_reason": "stop", "prompt_tokens": 40,
        "cached_tokens": 30, "output_tokens": 11, "max_tokens": 64, "enqueued_at": START, "received_at": START + 0.5,
        "admitted_at": begin, "first_token_at": begin + 0.5, "finished_at": begin + 2, "committed_at": begin + 2.1,
        "attempt": 1, "worker_id": WORKER, "chunk": 0,
    } | changes  # fmt: skip


def failure(row: int, error_class: str = "timeout", message: str = "no answer within 30 s", **changes: Any) -> Values:
    """A row that never got a slot."""
    return {
        "row": row, "state": "error", "error_class": error_class, "error_message": message, "enqueued_at": START,
        "committed_at": START + 9, "attempt": 1, "worker_id": WORKER, "chunk": 0,
    } | changes  # fmt: skip


def counters(**changes: Any) -> Values:
    """An attempt of ten seconds with its engine's counters."""
    return {
        "number": 0, "attempt": 1, "worker_id": WORKER, "started_at": START, "ended_at": START + 10, "outcome": "done",
        "slots": 4, "steps": 90, "prefill_s": 2.0, "decode_s": 6.0, "overhead_s": 1.0, "idle_s": 1.0, "starved_s": 0.5,
        "prefill_tokens": 100, "decode_tokens": 110, "wasted_tokens": 0, "peak_active": 2, "peak_kv_cells": 100,
    } | changes  # fmt: skip


def store(
    db: sa.Engine,
    stored: list[Values],
    *,
    tried: list[Values] | None = None,
    expected: dict[int, Any] | None = None,
    job_id: str = JOB,
    **job: Any,
) -> None:
    """A job with these results; every other value is a default."""
    values: Values = {
        "id": job_id, "name": "evening", "state": "completed", "mode": "embedded", "dataset_name": "ads.jsonl",
        "dataset_sha256": "0123456789abcdef" * 4, "dataset_format": "jsonl", "model": "demo", "sampling": "{}",
        "priority": 5, "rows": len(stored), "slots": 4, "env": "{}", "submitted_at": START, "started_at": START,
    } | job  # fmt: skip
    total = max([values["rows"], *(each["row"] + 1 for each in stored)])
    labels = expected or {}
    with db.begin() as connection:
        connection.execute(sa.insert(jobs).values(values))
        for row in range(total):
            label = json.dumps(labels[row]) if row in labels else None
            connection.execute(
                sa.insert(requests).values(job_id=job_id, row=row, custom_id=f"row-{row}", input="{}", expected=label)
            )
        for each in stored:
            connection.execute(sa.insert(results).values({"job_id": job_id, "committed_at": START} | each))
        for each in tried or []:
            _store_attempt(connection, job_id, each)


def _store_attempt(connection: sa.Connection, job_id: str, attempt: Values) -> None:
    chunk = {
        "job_id": job_id, "number": attempt["number"], "first_row": 0, "rows": 1, "state": "done", "attempt": 1,
        "ok": 0, "errors": 0, "output_tokens": 0,
    }  # fmt: skip
    known = sa.select(chunks.c.number).where(chunks.c.job_id == job_id, chunks.c.number == attempt["number"])
    if connection.execute(known).scalar() is None:
        connection.execute(sa.insert(chunks).values(chunk))
    connection.execute(sa.insert(attempts).values({"job_id": job_id} | attempt))


def store_worker(db: sa.Engine, worker_id: str = WORKER, **changes: Any) -> None:
    values = {
        "id": worker_id, "host": "box", "pid": 1, "state": "idle", "device_asked": "auto", "device_got": "cpu",
        "engine": "llamacpp", "slots": 4, "started_at": START, "heartbeat_at": START,
    }  # fmt: skip
    with db.begin() as connection:
        connection.execute(sa.insert(workers).values(values | changes))


def check(summary: Summary, name: str) -> Check:
    return next(each for each in summary.checks if each.name == name)


def page(summary: Summary, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("wanted", "named", "expected"),
    [("a" * 64, "a" * 64, True), ("a" * 64, "b" * 64, False), ("a" * 64, None, None), (None, None, None)],
)
def test_the_model_that_answered_is_the_one_of_the_job(
    db: sa.Engine, wanted: str | None, named: str | None, expected: bool | None
) -> None:
    idle = counters(attempt=2, outcome="released", decode_tokens=0, model_fingerprint=None)
    store(db, [answer(0)], tried=[counters(model_fingerprint=named), idle], model_fingerprint=wanted)
    assert check(summarise(db, JOB), "model").ok is expected


# --- the figures, from rows ------------------------------------------------------------------------------------------


def test_every_figure_is_the_one_that_the_rows_give(db: sa.Engine) -> None:
    rng = np.random.default_rng(7)
    rows = [
        answer(
            row, output_tokens=int(tokens), first_token_at=START + 1 + row + first, finished_at=START + 1 + row + last
        )
        for row, tokens, first, last in zip(
            range(50), rng.integers(1, 40, 50), rng.uniform(0.1, 1, 50), rng.uniform(1, 3, 50), strict=True
        )
    ]
    store(db, rows, slots=9)
    found = summarise(db, JOB)

    wall = max(each["finished_at"] for each in rows) - min(each["admitted_at"] for each in rows)
    latency = [each["finished_at"] - each["admitted_at"] for each in rows]
    gaps = [
        (each["finished_at"] - each["first_token_at"]) / (each["output_tokens"] - 1)
        for each in rows
        if each["output_tokens"] > 1
    ]
    tokens = sum(each["output_tokens"] for each in rows)
    assert found.wall_s == pytest.approx(wall)
    assert found.items_per_s == pytest.approx(50 / wall)
    assert found.output_tps == pytest.approx(tokens / wall)
    assert found.total_tps == pytest.approx((50 * 10 + tokens) / wall)
    assert found.mean_active == pytest.approx(sum(latency) / wall)
    assert found.latency_s.p95 == pytest.approx(np.percentile(latency, 95), rel=1e-6)
    assert found.latency_s.mean == pytest.approx(np.mean(latency), rel=1e-6)
    assert found.tpot_s.n == len(gaps)
    assert found.tpot_s.p50 == pytest.approx(np.median(gaps), rel=1e-5)
    assert found.queue_s.p50 == pytest.approx(1 + 24.5)
    assert found.cached_share == 0.75
    assert all(each.ok is not False for each in found.checks)


def test_f1_tokens_are_counted_from_token_ids_and_never_from_text(db: sa.Engine) -> None:
    store(db, [answer(0, text="x" * 928, prompt_tokens=7, output_tokens=3)])
    found = summarise(db, JOB)
    assert (found.prompt_tokens, found.output_tokens) == (7, 3)


def test_f2_an_answer_longer_than_its_limit_is_found_out(db: sa.Engine) -> None:
    store(db, [answer(0), answer(1, output_tokens=59, max_tokens=50)])
    found = check(summarise(db, JOB), "limits")
    assert found.ok is False
    assert "1 rows over max_tokens" in found.detail


def test_more_cached_than_prompt_tokens_are_found_out(db: sa.Engine) -> None:
    store(db, [answer(0, cached_tokens=41)])
    assert check(summarise(db, JOB), "limits").ok is False


def test_f3_a_job_with_errors_never_says_passed(db: sa.Engine) -> None:
    store(db, [*(answer(row) for row in range(9)), failure(9)])
    found = summarise(db, JOB)
    assert found.verdict == "completed with 1 error"
    assert found.success_rate == 0.9
    assert "passed" not in page(found)


def test_f3_a_job_whose_figures_disagree_never_says_passed(db: sa.Engine) -> None:
    store(db, [answer(0, output_tokens=65)])
    assert summarise(db, JOB).verdict == "completed, but figures disagree: limits"


def test_f3_only_a_complete_job_without_error_has_passed(db: sa.Engine) -> None:
    store(db, [answer(0), answer(1)])
    assert summarise(db, JOB).verdict == "completed"
    assert page(summarise(db, JOB)).rstrip().endswith("completed")


def test_f4_every_report_says_which_job_data_and_configuration_it_is_of(db: sa.Engine) -> None:
    store(db, [answer(0)])
    store(db, [answer(0)], job_id="02JOB", sampling='{"temperature": 1}')
    one, other = summarise(db, JOB), summarise(db, "02JOB")
    for text in (JOB, "evening", "ads.jsonl", "0123456789ab", "of 1", one.config_sha256[:12]):
        assert text in page(one)
    assert one.dataset_sha256 == other.dataset_sha256
    assert one.config_sha256 != other.config_sha256


def test_f7_a_rate_of_a_job_with_errors_has_an_interval(db: sa.Engine) -> None:
    store(db, [*(answer(row) for row in range(9)), failure(9)])
    low, high = summarise(db, JOB).success_ci95 or (0, 0)
    assert (low, high) == pytest.approx((0.596, 0.982), abs=1e-3)


def test_f10_throughput_is_a_ratio_of_sums_and_not_a_mean_of_rates(db: sa.Engine) -> None:
    rows = [
        answer(0, output_tokens=2, first_token_at=START + 1.1, finished_at=START + 1.2),
        answer(1, output_tokens=60, first_token_at=START + 2.1, finished_at=START + 11),
    ]
    store(db, rows)
    assert summarise(db, JOB).output_tps == pytest.approx(62 / 10)


def test_f11_littles_law_is_printed_and_holds(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(20)])
    found = check(summarise(db, JOB), "little")
    assert found.ok is True
    assert found.detail == "1.90 active = 0.952 requests/s x 2.00 s"


def test_f13_wall_is_from_the_first_slot_to_the_last_token_in_whatever_order_rows_come(db: sa.Engine) -> None:
    store(db, [answer(0, admitted_at=START + 7, first_token_at=START + 7.5, finished_at=START + 8), answer(1)])
    # Row 1 has its slot from second 2 on, row 0 ends at second 8; publishing at second 0 is not part of it.
    assert summarise(db, JOB).wall_s == pytest.approx(6)


def test_f15_memory_of_the_process_and_of_the_device_are_told_apart(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(3)])
    store_worker(db)
    samples = [(START - 50, 9e9, 9e9), (START + 2, 1e9, 2e9), (START + 3, 1.5e9, 1e9)]
    with db.begin() as connection:
        for at, memory, device in samples:
            connection.execute(
                sa.insert(worker_samples).values(
                    worker_id=WORKER, at=at, memory_bytes=int(memory), device_memory_bytes=int(device)
                )
            )
    (worker,) = summarise(db, JOB).workers
    assert (worker.memory_bytes, worker.device_memory_bytes) == (1_500_000_000, 2_000_000_000)
    assert "1,431" in page(summarise(db, JOB))
    assert "1,907" in page(summarise(db, JOB))


def test_every_attempted_request_is_in_the_denominator(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1), failure(2, "oom", "out of memory"), failure(3)])
    found = summarise(db, JOB)
    assert (found.attempted, found.ok, found.errors, found.success_rate) == (4, 1, 3, 0.25)
    assert dict(found.errors_by_class) == {"timeout": 2, "oom": 1}


def test_work_of_requests_that_failed_in_a_slot_is_part_of_the_time(db: sa.Engine) -> None:
    late = failure(1, admitted_at=START + 3, first_token_at=START + 4, finished_at=START + 13, output_tokens=9)
    store(db, [answer(0), late])
    found = summarise(db, JOB)
    assert found.wall_s == pytest.approx(12)
    assert found.mean_active == pytest.approx(1)
    assert found.output_tokens == 11
    assert found.latency_s.n == 1


def test_time_per_output_token_needs_two_tokens(db: sa.Engine) -> None:
    store(db, [answer(0, output_tokens=1), answer(1, output_tokens=0)])
    assert summarise(db, JOB).tpot_s == percentiles.Distribution(0)


def test_a_clock_that_runs_ahead_gives_no_negative_queue_time(db: sa.Engine) -> None:
    store(db, [answer(0, enqueued_at=START + 1.005)])
    found = summarise(db, JOB)
    assert found.queue_s.mean == 0
    assert check(found, "order").ok is True


def test_percentiles_are_linear_between_neighbours() -> None:
    found = percentiles.distribution(np.arange(10.0))
    assert (found.p50, found.p90, found.p95) == pytest.approx((4.5, 8.1, 8.55))


# --- slots and workers -----------------------------------------------------------------------------------------------


def test_slots_of_workers_that_ran_together_add_up(db: sa.Engine) -> None:
    store(db, [answer(0), answer(1, worker_id="box/cpu/2")])
    store_worker(db)
    store_worker(db, "box/cpu/2")
    found = summarise(db, JOB)
    assert found.slots == 8
    assert found.device_got == "cpu x 2"


def test_a_worker_that_took_a_dead_ones_place_brings_no_slots_in_addition(db: sa.Engine) -> None:
    store(db, [answer(0), answer(9, worker_id="box/cpu/2")])
    store_worker(db)
    store_worker(db, "box/cpu/2")
    assert summarise(db, JOB).slots == 4


def test_more_active_rows_than_slots_are_found_out(db: sa.Engine) -> None:
    store(db, [answer(row, finished_at=START + 60) for row in range(5)])
    found = summarise(db, JOB)
    assert found.peak_active == 5
    assert check(found, "slots").ok is False


# --- checks ----------------------------------------------------------------------------------------------------------


def test_rows_and_waste_account_for_every_token_of_the_engine(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(10)], tried=[counters(decode_tokens=115, wasted_tokens=5)])
    found = summarise(db, JOB)
    assert check(found, "tokens") == Check("tokens", True, "110 in rows + 5 wasted = 115 generated")
    assert found.wasted_tokens == 5


def test_a_token_that_is_nowhere_is_found_out(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(10)], tried=[counters(decode_tokens=111)])
    assert check(summarise(db, JOB), "tokens").ok is False


def test_the_parts_of_an_engines_time_fit_into_its_workers_time(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(10)], tried=[counters()])
    found = summarise(db, JOB)
    assert check(found, "time").ok is True
    assert (found.prefill_tps, found.starved_share, found.idle_share) == (50, 0.05, 0.1)
    assert found.decode_tps == pytest.approx(110 / 6)


def test_batch_efficiency_is_of_attempts_with_all_their_counters(db: sa.Engine) -> None:
    lost = counters(number=1, slots=None, outcome="lost", steps=50, decode_tokens=7)
    store(db, [answer(row) for row in range(10)], tried=[counters(), lost])
    found = summarise(db, JOB)
    assert found.batch_efficiency == 110 / (90 * 4)
    with db.connect() as connection:
        sql = FIGURE_SQL["batch_efficiency"].replace("JOB", JOB)
        assert connection.execute(sa.text(sql)).scalar() == pytest.approx(found.batch_efficiency)


def test_valid_output_is_what_the_task_could_read_in_the_time_of_the_job(db: sa.Engine) -> None:
    broken = [answer(6, text="no idea"), answer(7, text='{"is_ad": tr', finish_reason="length"), failure(8)]
    rows = [*(answer(row) for row in range(6)), *broken]
    task = TASK + "  - {exact: is_ad, as: again}\n"
    sha = parse_task(task, "ads").sha256
    labels = {row: {"is_ad": True} for row in range(9)}
    store(db, rows, expected=labels, task_text=task, task_sha256=sha)
    found = summarise(db, JOB)
    assert found.valid_per_s == 6 / 9
    assert "0.889 requests/s, 0.667 valid" in page(found)
    keep_scores(JOB, db)
    with db.connect() as connection:
        run = connection.execute(sa.text("SELECT id FROM score_runs")).scalar()
        sql = FIGURE_SQL["valid_per_s"].replace("JOB", JOB).replace("RUN", str(run))
        assert connection.execute(sa.text(sql)).scalar() == pytest.approx(6 / 9)
        judged = summarise(connection, JOB)
        assert judged.scores == found.scores
        connection.execute(sa.text("UPDATE results SET text = 'changed' WHERE job_id = :job"), {"job": JOB})
        # Answers were judged at the end of the job, and are not judged again.
        assert summarise(connection, JOB).scores == found.scores
    store(db, [answer(0)], job_id="01PLAIN")
    assert summarise(db, "01PLAIN").valid_per_s is None


def test_chunks_that_ran_together_share_their_workers_time(db: sa.Engine) -> None:
    half = {"prefill_s": 1.0, "decode_s": 3.0, "overhead_s": 0.5, "idle_s": 0.5}
    tried = [counters(**half), counters(number=1, started_at=START + 1, **half)]
    store(db, [answer(0)], tried=tried)
    assert check(summarise(db, JOB), "time").ok is True


def test_an_engine_that_was_busy_while_its_worker_held_no_lease_is_found_out(db: sa.Engine) -> None:
    store(db, [answer(0)], tried=[counters(decode_s=8.0)])
    found = check(summarise(db, JOB), "time")
    assert found.ok is False
    assert "2.00 + 8.00 + 1.00 + 1.00 s of 10.0 s" in found.detail


def test_an_engine_may_be_busy_for_less_than_its_worker_holds_leases(db: sa.Engine) -> None:
    store(db, [answer(0)], tried=[counters(decode_s=2.0)])
    assert check(summarise(db, JOB), "time").ok is True


def test_what_a_killed_worker_did_beyond_the_rows_was_wasted(db: sa.Engine) -> None:
    lost = counters(outcome="lost", attempt=1, slots=None, decode_tokens=30, wasted_tokens=0)
    store(db, [answer(row) for row in range(10)], tried=[lost, counters(attempt=2)])
    found = summarise(db, JOB)
    assert found.wasted_tokens == 30 + 110 - found.output_tokens == 30
    assert check(found, "tokens").ok is True
    assert "1 lost attempts: by subtraction" in check(found, "tokens").detail
    assert check(found, "time").ok is None


@pytest.mark.parametrize(
    ("generated", "wasted", "holds"),
    [(110, 0, True), (115, 5, True), (111, 0, False), (109, 0, False), (110, 1, False)],
)
def test_a_lost_attempt_hides_no_mistake_of_another_worker(
    db: sa.Engine, generated: int, wasted: int, holds: bool
) -> None:
    """What was lost is known by subtraction; a worker that lost nothing must account for each token by itself."""
    lost = counters(outcome="lost", attempt=1, worker_id="box/gpu/lost", slots=None, decode_tokens=30)
    tried = [lost, counters(attempt=2, decode_tokens=generated, wasted_tokens=wasted)]
    rows = [answer(row) for row in range(10)] + [answer(10, worker_id="box/gpu/lost")]
    store(db, rows, tried=tried)
    found = check(summarise(db, JOB), "tokens")
    assert found.ok is holds, found.detail
    if not holds:
        assert found.detail == f"worker {WORKER}: 110 in rows + {wasted} wasted ≠ {generated} generated"


def test_a_mistake_is_said_even_where_the_books_as_a_whole_cannot_be_closed(db: sa.Engine) -> None:
    lost = {"outcome": "lost", "slots": None} | dict.fromkeys(("decode_tokens", "prefill_s", "wasted_tokens"))
    tried = [counters(attempt=1, worker_id="box/gpu/lost", **lost), counters(attempt=2, decode_tokens=100)]
    store(db, [answer(row, worker_id=WORKER if row < 10 else "box/gpu/lost") for row in range(20)], tried=tried)
    assert check(summarise(db, JOB), "tokens").ok is False


def test_a_lost_workers_last_counters_are_not_made_up(db: sa.Engine) -> None:
    """Rows of a lost attempt whose counters were lost with it: the books cannot be closed, and nothing is claimed."""
    lost = {"outcome": "lost", "slots": None} | dict.fromkeys(("decode_tokens", "prefill_s", "wasted_tokens"))
    store(db, [answer(row) for row in range(20)], tried=[counters(attempt=1, **lost), counters(attempt=2)])
    found = summarise(db, JOB)
    assert check(found, "tokens").ok is None
    assert found.verdict == "completed"


def test_engines_that_ran_another_job_meanwhile_say_nothing_of_this_one(db: sa.Engine) -> None:
    store(db, [answer(0)], tried=[counters()])
    store(db, [answer(0)], tried=[counters(started_at=START + 5, ended_at=START + 20)], job_id="02JOB")
    assert check(summarise(db, JOB), "tokens").detail == "not measured: other jobs ran on the same engines"


def test_without_counters_nothing_is_said_of_the_engine(db: sa.Engine) -> None:
    store(db, [answer(0)])
    found = summarise(db, JOB)
    assert [check(found, name).ok for name in ("tokens", "time")] == [None, None]
    assert (found.prefill_tps, found.wasted_tokens, found.starved_share) == (None, None, None)
    assert "not measured" in page(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"first_token_at": START + 0.9},
        {"finished_at": START + 1.2},
        {"enqueued_at": START + 5},
    ],
)
def test_rows_out_of_order_are_found_out(db: sa.Engine, changes: Values) -> None:
    store(db, [answer(0, **changes), answer(1)])
    assert check(summarise(db, JOB), "order").ok is False


def test_a_completed_job_with_too_few_rows_is_found_out(db: sa.Engine) -> None:
    store(db, [answer(0)], rows=3)
    found = summarise(db, JOB)
    assert check(found, "counts").ok is False
    assert found.verdict == "INCOMPLETE 1/3"


def test_a_job_on_its_way_is_incomplete_and_that_is_no_fault(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1)], rows=5, state="running")
    found = summarise(db, JOB)
    assert check(found, "counts") == Check("counts", None, "INCOMPLETE 2/5: 1 ok + 1 errors")
    assert found.verdict == "running, 2 of 5 done"


def test_cancelled_requests_are_errors_and_counted(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1, "cancelled", "the job was cancelled")], state="cancelled")
    found = summarise(db, JOB)
    assert (found.errors, found.cancelled) == (1, 1)
    assert "(1 cancelled)" in check(found, "counts").detail
    assert found.verdict == "cancelled, complete"


def test_the_curve_holds_every_token(db: sa.Engine) -> None:
    rng = np.random.default_rng(3)
    rows = [answer(row, output_tokens=int(tokens)) for row, tokens in enumerate(rng.integers(0, 60, 200))]
    rows += [answer(200, output_tokens=40, first_token_at=START + 203, finished_at=START + 203)]
    store(db, rows)
    found = summarise(db, JOB)
    assert found.curve is not None
    assert found.curve.tokens == pytest.approx(found.output_tokens)
    assert min(found.curve.output_tps) > -1e-6
    assert check(found, "curve").ok is True


def test_the_curve_shows_when_tokens_came() -> None:
    column = np.array([0.0, 5.0])
    series = Series(column, column, column, np.array([1.0, 10.0]), np.array([11.0, 51.0]))
    spread = distributions.Spread(0.0, 10.0, slices=10)
    distributions.add_output(spread, series)
    assert tuple(spread.tokens()) == pytest.approx((11, 0, 0, 0, 0, 11, 10, 10, 10, 10))


# --- states of a job -------------------------------------------------------------------------------------------------


def test_an_empty_job_has_a_report(db: sa.Engine) -> None:
    store(db, [], rows=4, state="queued", started_at=None)
    found = summarise(db, JOB)
    assert found.verdict == "queued, 0 of 4 done"
    assert (found.wall_s, found.items_per_s, found.success_rate, found.mean_active) == (None, None, None, None)
    assert all(each.ok is None for each in found.checks)
    assert "INCOMPLETE 0/4" in page(found)


def test_a_job_whose_every_row_failed_has_failed_whatever_its_state(db: sa.Engine) -> None:
    store(db, [failure(0), failure(1)])
    assert summarise(db, JOB).verdict == "failed: no request was answered"


def test_answers_that_took_no_time_give_no_rates(db: sa.Engine) -> None:
    now = START + 1
    store(db, [answer(0, admitted_at=now, first_token_at=now, finished_at=now)])
    found = summarise(db, JOB)
    assert (found.wall_s, found.items_per_s, found.output_tps) == (0, None, None)
    assert page(found)


def test_an_unknown_job_is_one_clear_error(db: sa.Engine) -> None:
    with pytest.raises(UnknownName, match="there is no job nothing"):
        summarise(db, "nothing")


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_labelled_job_with_a_task_has_its_accuracy(db: sa.Engine) -> None:
    rows = [answer(0), answer(1, text='{"is_ad": false}'), answer(2, text="an ad"), failure(3)]
    labels = {row: {"is_ad": True} for row in range(4)}
    store(db, rows, expected=labels, task_name="ads", task_text=TASK, task_sha256="f" * 64)
    score = summarise(db, JOB).to_json()["scores"]["is_ad"]
    assert score["value"] == pytest.approx(1 / 3)
    assert (score["metric"], score["n"], score["correct"], score["unparsed"], score["infra_error"]) == (
        "accuracy", 3, 1, 1, 1,
    )  # fmt: skip
    assert score["majority_baseline"] == 1
    assert score["ci95"] == pytest.approx([0.0615, 0.7923], abs=1e-3)
    assert "accuracy 33.3 %  95 % CI [6.1, 79.2]" in page(summarise(db, JOB))


def test_a_job_without_a_task_has_no_scores(db: sa.Engine) -> None:
    store(db, [answer(0)], expected={0: {"is_ad": True}})
    assert summarise(db, JOB).scores == {}


# --- what is printed -------------------------------------------------------------------------------------------------


def test_the_json_report_keeps_its_keys(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1)])
    found = summarise(db, JOB).to_json()
    promised = (
        "job_id state attempted ok errors wall_s items_per_s output_tps prompt_tokens cached_tokens output_tokens "
        "mean_active slots latency_s ttft_s tpot_s queue_s errors_by_class checks scores"
    )
    assert set(promised.split()) <= set(found)
    assert tuple(found) == JSON_KEYS
    for name in ("latency_s", "ttft_s", "tpot_s", "queue_s"):
        assert set(found[name]) == {"p50", "p90", "p95", "p99", "mean", "n", "exact"}
    assert set(found["checks"][0]) == {"name", "ok", "detail"}
    assert found["errors_by_class"] == {"timeout": 1}


def test_the_json_report_is_json_even_of_an_empty_job(db: sa.Engine) -> None:
    store(db, [], rows=1, state="queued")
    assert json.loads(resolve("report", "json", TEXTS)(summarise(db, JOB)))["latency_s"]["n"] == 0


#: Numbers of the JSON report that say what the job is, and are no figures.
NOT_FIGURES = {"schema_version", "submitted_at", "started_at", "finished_at"}


def test_every_number_of_the_report_has_its_entry_among_the_figures(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(10)], tried=[counters()])
    found = summarise(db, JOB).to_json()
    numbers = {
        name
        for name, value in found.items()
        if (isinstance(value, (int, float)) and not isinstance(value, bool))
        or (isinstance(value, dict) and "p50" in value)
    }
    assert numbers - NOT_FIGURES <= set(METRICS)
    assert {"output_tps", "latency_s", "starved_share"} <= numbers


def test_percentiles_that_the_rows_cannot_support_say_how_many_would(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(40)])
    latency = next(line for line in page(summarise(db, JOB)).splitlines() if line.strip().startswith("latency"))
    assert "n<72" in latency
    assert "n<368" in latency
    assert "n<36 " not in latency


def test_errors_are_shown_by_class_with_the_first_row_as_example(db: sa.Engine) -> None:
    long = "the prompt has\n9,000 tokens " + "and so on " * 40
    store(db, [answer(0), failure(1, "context_overflow", long), failure(2, "context_overflow", "other"), failure(3)])
    text = page(summarise(db, JOB))
    assert "row 1: the prompt has 9,000 tokens" in text
    assert "…" in text
    assert "row 2" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_page_fits_its_terminal_and_never_grows_over_a_hundred_columns(db: sa.Engine, width: int) -> None:
    rows = [answer(row) for row in range(30)] + [failure(30, message="word " * 60)]
    labels = {row: {"is_ad": row % 2 == 0} for row in range(31)}
    store(db, rows, tried=[counters()], expected=labels, task_name="ads", task_text=TASK, task_sha256="f" * 64)
    store_worker(db, device_got="cuda:0 (NVIDIA GeForce RTX 4090)")
    lines = page(summarise(db, JOB), width).splitlines()
    assert max(map(len, lines)) <= min(width, 100)


def test_markup_in_names_and_messages_is_printed_as_it_is(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1, message="[red]boom[/red] [/x]")], name="[bold]", dataset_name="a[b].jsonl")
    text = page(summarise(db, JOB))
    for literal in ("[red]boom[/red] [/x]", "[bold]", "a[b].jsonl"):
        assert literal in text


def test_two_summaries_of_the_same_rows_are_equal(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(10)] + [failure(10)], tried=[counters()])
    one = summarise(db, JOB)
    assert one == summarise(db, JOB)
    assert one != replace(one, figures={**one.figures, "wall_s": 0.0})
    assert not math.isnan(one.latency_s.mean or math.nan)
