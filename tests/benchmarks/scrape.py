"""``/metrics`` and ``promptmill workers`` over 10,000,000 results and 3,000,000 samples of workers.

python tests/benchmarks/scrape.py [--results 10000000] [--samples 3000000] [--databases sqlite postgresql]
    [--keep DIR]

The rows are made by SQL, as a year of ten workers might have left them; what they were counted as is in the rows of
``counters``. With ``--keep`` they stay in that folder, and the next run takes them from there. A scrape is timed as a
client sees it, each time after what is kept has run out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import sqlalchemy as sa
from servers import PROMPTMILL, call, folder, on_queue

from promptmill.api.prometheus import KEPT_S
from promptmill.database.counting import Counts
from promptmill.database.engine import connect, epoch, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import counters, jobs, workers

#: Rows of a job and of a chunk; workers, and the seconds between two of their samples.
JOB_ROWS, CHUNK, WORKERS, BETWEEN_S = 1_000_000, 64, 10, 5

#: Scrapes that are timed. One job in ten still runs, and a tenth of its chunks wait.
SCRAPES = 20

#: Seconds in which the server is watched while nobody asks it.
QUIET_S = 10.0

#: Seconds that the workers are alive: longer than this takes.
ALIVE_FOR_S = 3600.0

SERIES = {
    "postgresql": "SELECT n FROM generate_series(0, {count} - 1) AS s(n)",
    "sqlite": "WITH RECURSIVE s(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM s WHERE n < {count} - 1) SELECT n FROM s",
}

RESULTS = """
INSERT INTO results (job_id, row, state, text, finish_reason, prompt_tokens, cached_tokens, output_tokens,
    reasoning_tokens, enqueued_at, admitted_at, first_token_at, finished_at, committed_at, attempt, worker_id, chunk,
    deduplicated)
SELECT '{job}', n, 'ok', 'answer', 'stop', 40, 16, 30, 0, 1.0, 2.0, 2.1, 3.0, 3.1, 1, 'w' || (n / {chunk} % {workers}),
    n / {chunk}, {false} FROM ({series}) AS each
"""
CHUNKS = """
INSERT INTO chunks (job_id, number, first_row, "rows", state, attempt, ok, errors, output_tokens)
SELECT '{job}', n, n * {chunk}, {chunk}, CASE WHEN {open} AND n % 10 = 0 THEN 'queued' ELSE 'done' END, 1, {chunk}, 0,
    30 * {chunk} FROM ({series}) AS each
"""
ATTEMPTS = """
INSERT INTO attempts (job_id, number, attempt, worker_id, started_at, ended_at, outcome, steps, prefill_s, decode_s)
SELECT '{job}', n, 1, 'w' || (n % {workers}), 2.0, 3.0, 'done', 100, 1.0, 0.5 FROM ({series}) AS each
"""
SAMPLES = """
INSERT INTO worker_samples (worker_id, at, cpu_ratio, memory_bytes, active_sequences, kv_cells_used, output_tps, state)
SELECT 'w' || (n % {workers}), {now} - (n / {workers}) * {between}, 1.0, 1000000000, 16, 1000, 500.0, 'busy'
FROM ({series}) AS each
"""


def make(db: sa.Engine, rows: int, samples: int) -> None:
    """Unless they are there: all are made in one transaction."""
    upgrade(db)
    with writing(db) as connection:
        if connection.execute(sa.update(workers).values(heartbeat_at=epoch() + ALIVE_FOR_S)).rowcount:
            return
    kind = db.dialect.name
    # Their requests are not made: nothing here reads them.
    if kind == "sqlite":
        sa.event.listen(db, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = OFF"))
        db.dispose()
    with writing(db) as connection:
        if kind == "postgresql":
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        now = connection.execute(sa.select(epoch())).scalar_one()
        common = {"chunk": CHUNK, "workers": WORKERS, "false": "false" if kind == "postgresql" else "0"}
        for number in range(-(-rows // JOB_ROWS)):
            job, is_open = f"01BENCH{number:05}", number % 10 == 9
            connection.execute(sa.insert(jobs).values(_job(job, is_open, now)))
            of_rows = common | {"job": job, "series": SERIES[kind].format(count=min(JOB_ROWS, rows))}
            of_chunks = of_rows | {"series": SERIES[kind].format(count=JOB_ROWS // CHUNK), "open": str(is_open).lower()}
            connection.exec_driver_sql(RESULTS.format(**of_rows).replace("%", "%%" if kind == "postgresql" else "%"))
            for text in (CHUNKS, ATTEMPTS):
                text = text.format(**of_chunks)
                connection.exec_driver_sql(text.replace("%", "%%" if kind == "postgresql" else "%"))
        for place in range(WORKERS):
            connection.execute(sa.insert(workers).values(_worker(f"w{place}", now)))
            connection.execute(sa.insert(counters).values(_counter(f"w{place}", rows // WORKERS)))
        text = SAMPLES.format(**common, now=now, between=BETWEEN_S, series=SERIES[kind].format(count=samples))
        connection.exec_driver_sql(text.replace("%", "%%" if kind == "postgresql" else "%"))
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def _job(job: str, is_open: bool, now: float) -> dict[str, object]:
    return {
        "id": job, "name": job, "state": "running" if is_open else "completed", "mode": "queue", "dataset_name": "d",
        "dataset_sha256": "0" * 64, "dataset_format": "jsonl", "model": "echo", "sampling": "{}", "priority": 5,
        "rows": JOB_ROWS, "env": "{}", "submitted_at": now, "finished_at": None if is_open else now,
    }  # fmt: skip


def _worker(name: str, now: float) -> dict[str, object]:
    return {
        "id": name, "host": "here", "pid": 1, "state": "idle", "models": '["echo"]', "device_asked": "cpu",
        "engine": "echo", "model": "echo", "slots": 32, "started_at": now, "heartbeat_at": now + ALIVE_FOR_S,
    }  # fmt: skip


def _counter(name: str, rows: int) -> dict[str, str]:
    counts = Counts()
    counts.add("items.ok", rows)
    for each in ("prompt", "cached", "output"):
        counts.add(f"tokens.{each}", 30 * rows)
    for each in ("queue", "ttft", "tpot", "latency", "output", "prompt"):
        counts.observe(each, 0.7)
    return {"worker_id": name, "model": "echo", "counts": counts.to_json()}


@contextlib.contextmanager
def serving(environment: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of ``/metrics``, and the server's process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [PROMPTMILL, "api", "--port", str(port)], env=os.environ | environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/metrics", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def timed(environment: dict[str, str], command: list[str]) -> tuple[float, float]:
    """Seconds that a command took, and those of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, wall_s = call(environment, *command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(environment: dict[str, str], rows: int, samples: int) -> None:
    began = time.perf_counter()
    db = connect(environment["JOBS_DATABASE_URL"])
    make(db, rows, samples)
    db.dispose()
    print(f"  filled in {time.perf_counter() - began:.0f} s", flush=True)
    with serving(environment) as (url, server):
        taken = []
        for place in range(SCRAPES):
            if place == 1:
                # The first scrape imports and connects.
                used_s, watched = cpu_s(server), time.perf_counter()
            began = time.perf_counter()
            with urllib.request.urlopen(url, timeout=300) as answer:
                size = len(answer.read())
            taken.append(1000 * (time.perf_counter() - began))
            time.sleep(KEPT_S + 0.1)
        used_s, watched_s = cpu_s(server) - used_s, time.perf_counter() - watched
        quiet_s = cpu_s(server)
        time.sleep(QUIET_S)
        quiet_s = cpu_s(server) - quiet_s
        each_s = (used_s - quiet_s / QUIET_S * watched_s) / (SCRAPES - 1)
    first, *rest = taken
    print(
        f"  scrape of {size / 1000:.0f} kB: p50 {statistics.median(rest):.1f} ms, max {max(rest):.1f} ms; "
        f"the first {first:.1f} ms; CPU of the server for each {1000 * each_s:.1f} ms", flush=True
    )  # fmt: skip
    for command in (["workers"], ["db", "current"], ["--version"]):
        wall_s, command_cpu_s = map(min, zip(*(timed(environment, command) for _ in range(5)), strict=True))
        print(f"  promptmill {' '.join(command)}: {wall_s:.2f} s, CPU {command_cpu_s:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=10_000_000)
    parser.add_argument("--samples", type=int, default=3_000_000)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the databases stay for the next run")
    asked = parser.parse_args()
    for kind in asked.databases:
        with folder() as where:
            kept = where if asked.keep is None else asked.keep / f"{asked.results}-{asked.samples}"
            kept.mkdir(parents=True, exist_ok=True)
            with on_queue(where, None if asked.keep is None else kept / "pg") as environment:
                print(f"{kind}, {asked.results:,} results, {asked.samples:,} samples:", flush=True)
                if kind == "sqlite":
                    environment |= {"JOBS_DATABASE_URL": f"sqlite:///{kept / 'bench.sqlite'}"}
                # None of the samples is to go while this runs.
                measure(environment | {"JOBS_SAMPLES_DAYS": "3650"}, asked.results, asked.samples)


if __name__ == "__main__":
    main()
