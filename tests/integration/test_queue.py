"""The whole way through Redis, Celery workers and PostgreSQL: real processes, real servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect
from tests.conftest import Command, wait_until, workers_alive

ROWS = 400


@pytest.fixture
def queue(tmp_path: Path, migrated_postgres_url: str, redis_url: str) -> Command:
    """The command over PostgreSQL and Redis, with a short lease."""
    return Command(
        tmp_path,
        {
            "JOBS_DATABASE_URL": migrated_postgres_url,
            "JOBS_REDIS_URL": redis_url,
            "JOBS_LEASE_S": "6",
            "JOBS_RUNTIME_DIR": str(tmp_path / "run"),
        },
    )


@pytest.fixture
def workers(queue: Command) -> Iterator[Any]:
    """Starts supervisors and ends them after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, count: int) -> subprocess.Popen[str]:
        started.append(queue.start("worker", *arguments))
        wait_until(lambda: workers_alive(queue.environment) >= count, f"{count} workers are alive", 120)
        return started[-1]

    yield start
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def dataset(folder: Path, rows: int = ROWS) -> str:
    path = folder / "prompts.jsonl"
    lines = (json.dumps({"id": f"id-{row}", "prompt": f"say number {row} to me"}) for row in range(rows))
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def results(queue: Command, job: str = "@last") -> list[dict[str, Any]]:
    return [json.loads(line) for line in queue("results", job).out.splitlines()]


def rows_in(queue: Command, query: str) -> list[Any]:
    engine = connect(queue.environment["JOBS_DATABASE_URL"])
    with engine.connect() as connection:
        found = list(connection.execute(sa.text(query)))
    engine.dispose()
    return found


def consumers(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(supervisor.pid).children(recursive=True)
    return [child for child in children if "promptmill_workers.worker.celery_worker" in child.cmdline()]


def hosts(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(supervisor.pid).children(recursive=True)
    return [child for child in children if "promptmill_workers.host.process" in child.cmdline()]


def has_ended(process: psutil.Process) -> bool:
    """Whether or not somebody has asked for its exit code."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_submitted_job_is_answered_by_the_workers(queue: Command, workers: Any, tmp_path: Path) -> None:
    workers("--device", "sim:2", "--model", "echo", count=2)
    done = queue("submit", dataset(tmp_path), "--model", "echo", "--wait", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["state"], report["attempted"], report["ok"], report["errors"]) == ("completed", ROWS, ROWS, 0)
    lines = results(queue)
    assert [line["text"] for line in lines] == [f"say number {row} to me" for row in range(ROWS)]
    assert [line["id"] for line in lines] == [f"id-{row}" for row in range(ROWS)]
    assert all(check["ok"] is not False for check in report["checks"]), report["checks"]


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.02"
    supervisor = workers("--device", "sim:2", "--model", model, "--slots", "4", count=2)
    waiting = queue.start("submit", dataset(tmp_path), "--model", model, "--wait")
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM results")), "the first results are there")
    victim = consumers(supervisor)[0]
    for process in [victim, *victim.children()]:
        process.send_signal(signal.SIGKILL)
    assert waiting.wait(timeout=120) == 0
    lines = results(queue)
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert all(line["text"] == f"say number {line['row']} to me" for line in lines)
    assert rows_in(queue, "SELECT count(*) FROM attempts WHERE outcome = 'lost'")[0][0] >= 1
    assert rows_in(queue, "SELECT sum(ok), sum(rows) FROM chunks")[0] == (ROWS, ROWS)


def test_a_host_killed_in_the_middle_is_replaced(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.02"
    supervisor = workers("--device", "sim:1", "--model", model, "--slots", "4", count=1)
    waiting = queue.start("submit", dataset(tmp_path, 120), "--model", model, "--wait")
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM results")), "the first results are there")
    before = hosts(supervisor)[0]
    before.send_signal(signal.SIGKILL)
    assert waiting.wait(timeout=120) == 0
    assert [line["row"] for line in results(queue)] == list(range(120))
    assert hosts(supervisor)[0].pid != before.pid


def test_a_job_goes_on_when_redis_was_emptied(queue: Command, workers: Any, tmp_path: Path, redis_url: str) -> None:
    from redis import Redis

    model = "echo:token_s=0.02"
    workers("--device", "sim:1", "--model", model, "--slots", "4", count=1)
    waiting = queue.start("submit", dataset(tmp_path, 300), "--model", model, "--wait")
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM results")), "the first results are there")
    with Redis.from_url(redis_url) as client:
        client.flushall()
    assert waiting.wait(timeout=120) == 0
    assert [line["row"] for line in results(queue)] == list(range(300))


def test_a_poisonous_request_ends_alone(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:crash_on=number 7 "
    workers("--device", "sim:1", "--model", model, count=1)
    done = queue("submit", dataset(tmp_path, 40), "--model", model, "--wait", "--json")
    report = json.loads(done.out)
    assert (done.code, report["ok"], report["errors_by_class"]) == (0, 39, {"engine_crash": 1})
    bad = next(line for line in results(queue) if line["state"] == "error")
    assert bad["row"] == 7
    assert "signal 6" in bad["error"]["message"]


def test_a_second_worker_is_kept_off_a_device(queue: Command, workers: Any) -> None:
    workers("--device", "sim:1", "--model", "echo", count=1)
    second = queue("worker", "--device", "sim:1", "--model", "echo")
    assert second.code == 2
    assert "already has a worker" in second.err


def test_a_device_has_one_host_though_its_supervisor_was_killed(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.1"
    first = workers("--device", "sim:1", "--model", model, "--slots", "2", "--grace", "4", count=1)
    queue("submit", dataset(tmp_path, 40), "--model", model)
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM results")), "the first results are there")
    [orphan] = consumers(first)
    first.kill()
    first.wait()
    second = queue.start("worker", "--device", "sim:1", "--model", model, "--slots", "2")
    try:
        wait_until(lambda: bool(consumers(second)) or has_ended(orphan), "the device is free", 60)
        assert has_ended(orphan)
        wait_until(lambda: "completed" in queue("status", "@last").out, "the job has completed", 120)
    finally:
        second.terminate()
        assert second.wait(timeout=60) == 0
    assert [line["row"] for line in results(queue)] == list(range(40))


def test_resuming_what_runs_is_no_change(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.1"
    workers("--device", "sim:1", "--model", model, "--slots", "2", count=1)
    queue("submit", dataset(tmp_path, 100), "--model", model)
    wait_until(lambda: rows_in(queue, "SELECT state FROM jobs") == [("running",)], "the job runs")
    done = queue("resume", "@last")
    assert done.code == 0
    assert "is running already" in done.out
    assert rows_in(queue, "SELECT state FROM jobs") == [("running",)]


def test_each_host_sees_its_own_device_only(queue: Command, workers: Any) -> None:
    supervisor = workers("--device", "sim:2", "--model", "echo", count=2)
    seen = sorted(process.environ()["PROMPTMILL_DEVICE"] for process in hosts(supervisor))
    assert seen == ["sim:0", "sim:1"]
    assert {process.environ()["CUDA_VISIBLE_DEVICES"] for process in hosts(supervisor)} == {""}
    if len(os.sched_getaffinity(0)) > 1:
        cores = [set(process.cpu_affinity() or []) for process in hosts(supervisor)]
        assert not cores[0] & cores[1]


def test_sigterm_gives_chunks_back_and_another_worker_goes_on(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.02"
    first = workers("--device", "sim:1", "--model", model, "--slots", "2", count=1)
    queue("submit", dataset(tmp_path, 200), "--model", model)
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM results")), "the first results are there")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    assert rows_in(queue, "SELECT count(*) FROM chunks WHERE state = 'leased'")[0][0] == 0
    assert rows_in(queue, "SELECT count(*) FROM attempts WHERE outcome = 'released'")[0][0] >= 1
    workers("--device", "sim:1", "--model", model, "--slots", "8", count=1)
    wait_until(lambda: "completed" in queue("status", "@last").out, "the job has completed", 120)
    assert [line["row"] for line in results(queue)] == list(range(200))


def test_a_cancelled_job_stops_within_seconds(queue: Command, workers: Any, tmp_path: Path) -> None:
    model = "echo:token_s=0.5"
    workers("--device", "sim:1", "--model", model, "--slots", "2", count=1)
    queue("submit", dataset(tmp_path, 200), "--model", model)
    wait_until(lambda: bool(rows_in(queue, "SELECT 1 FROM chunks WHERE state = 'leased'")), "a chunk is leased")
    assert queue("cancel", "@last").code == 0
    wait_until(lambda: not rows_in(queue, "SELECT 1 FROM chunks WHERE state = 'leased'"), "the chunks are dropped", 15)
    assert json.loads(queue("status", "@last", "--json").out)["state"] == "cancelled"


def test_submitting_without_redis_keeps_the_job(queue: Command, tmp_path: Path) -> None:
    queue.environment["JOBS_REDIS_URL"] = "redis://127.0.0.1:1/0"
    done = queue("submit", dataset(tmp_path, 10), "--model", "echo")
    assert done.code == 0
    assert "warning: cannot reach Redis" in done.err
    assert "is stored" in done.err
    assert rows_in(queue, "SELECT state, rows FROM jobs") == [("queued", 10)]


def test_a_worker_whose_database_takes_nothing_says_so(
    queue: Command, workers: Any, tmp_path: Path, migrated_postgres_url: str
) -> None:
    workers("--device", "sim:1", "--model", "echo:token_s=0.02", "--slots", "2", count=1)
    queue("submit", dataset(tmp_path), "--model", "echo:token_s=0.02")
    wait_until(lambda: rows_in(queue, "SELECT count(*) FROM results")[0][0] > 0, "results are stored", 30)
    with contextlib.closing(psycopg.connect(migrated_postgres_url, autocommit=True)) as server:
        refuse_changes(server, True)
        try:
            wait_until(lambda: states(queue) == ["blocked"], "the worker says that it cannot store", 30)
        finally:
            refuse_changes(server, False)
    assert queue("watch", "@last").code == 0
    assert len(results(queue)) == ROWS


def refuse_changes(server: psycopg.Connection[Any], on: bool) -> None:
    """For all connections but this one, which are made anew."""
    name = server.info.dbname
    server.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {"on" if on else "off"}')
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )


def states(queue: Command) -> list[str]:
    return [worker["state"] for worker in json.loads(queue("workers", "--json").out)]


def test_a_database_that_was_not_upgraded_is_refused(tmp_path: Path, postgres_url: str) -> None:
    command = Command(tmp_path, {"JOBS_DATABASE_URL": postgres_url})
    done = command("list")
    assert done.code == 2
    assert "promptmill db upgrade" in done.err


def test_jobs_of_equal_priority_advance_together(queue: Command, workers: Any, tmp_path: Path) -> None:
    for _ in "ab":
        assert queue("submit", dataset(tmp_path, 500), "--model", "echo:token_s=0.02").code == 0
    workers("--device", "sim:1", "--model", "echo:token_s=0.02", "--slots", "8", count=1)
    wait_until(lambda: rows_in(queue, "SELECT count(*) FROM jobs WHERE state = 'completed'") == [(2,)], "both end", 120)
    [(earlier,), (later,)] = rows_in(queue, "SELECT id FROM jobs ORDER BY id")
    order = [job for (job,) in rows_in(queue, "SELECT job_id FROM attempts ORDER BY ended_at")]
    # From the first chunk of the later job to the last one of the earlier they take turns, a window at a time. Their
    # last chunks run side by side: either may end first.
    both = order[order.index(later) : len(order) - order[::-1].index(earlier)]
    assert len(both) >= 10
    longest = max(len(list(run)) for _, run in itertools.groupby(both))
    assert longest <= 5, both


def test_an_urgent_job_overtakes(queue: Command, workers: Any, tmp_path: Path) -> None:
    workers("--device", "sim:1", "--model", "echo:token_s=0.02", "--slots", "8", count=1)
    assert queue("submit", dataset(tmp_path, 4000), "--model", "echo:token_s=0.02", "--priority", "9").code == 0
    assert queue("submit", dataset(tmp_path, 60), "--model", "echo:token_s=0.02", "--priority", "0", "--wait").code == 0
    urgent, bulk = rows_in(queue, "SELECT state FROM jobs ORDER BY priority")
    assert urgent == ("completed",)
    assert bulk == ("running",)
    assert queue("cancel", rows_in(queue, "SELECT id FROM jobs WHERE priority = 9")[0][0]).code == 0


def test_a_worker_of_two_models_does_not_change_them_for_every_chunk(queue: Command, workers: Any) -> None:
    first, second = "echo:token_s=0.001", "echo:token_s=0.0011"
    workers("--device", "cpu", "--model", first, "--model", second, "--slots", "4", count=1)
    data = dataset(queue.folder)
    for model in (first, second):
        assert queue("submit", data, "--model", model).code == 0

    assert queue("watch", "@last").code == 0

    wait_until(lambda: len(json.loads(queue("list", "--json").out)) == 2, "both jobs are listed")
    jobs = json.loads(queue("list", "--json").out)
    wait_until(
        lambda: {each["state"] for each in json.loads(queue("list", "--json").out)} == {"completed"},
        "both jobs end",
        120,
    )
    loads = sum(log.read_text().count("slots, context") for log in queue.folder.glob("*.log"))
    chunks = 2 * len({each["job_id"] for each in jobs}) * 4  # far more than there are loads
    assert 2 <= loads <= 6 < chunks
