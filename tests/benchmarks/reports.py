"""Reports, exports and status of large jobs: seconds and most memory, on SQLite and PostgreSQL.

python tests/benchmarks/reports.py [--rows 1000000] [--databases sqlite postgresql]

The rows are made here, as a job of two workers with 32 slots each would have left them. What is timed is the command,
the start of Python included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from servers import PROMPTMILL, folder, postgres

from promptmill.database.engine import connect, copy_rows, refresh_statistics, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import attempts, chunks, jobs, requests, results, worker_samples, workers

START = 1_760_000_000.0

#: Rows of a chunk, and slots of a worker.
CHUNK, SLOTS = 256, 32

#: Rows stored at a time.
BATCH = CHUNK * 200

JOB = "01JBENCHMARK00000000000000"

REQUEST = ("job_id", "row", "custom_id", "input", "expected")
RESULT = (
    "job_id", "row", "state", "text", "finish_reason", "error_class", "error_message", "prompt_tokens",
    "cached_tokens", "output_tokens", "reasoning_tokens", "max_tokens", "enqueued_at", "received_at", "admitted_at",
    "first_token_at", "finished_at", "committed_at", "attempt", "worker_id", "chunk", "deduplicated",
)  # fmt: skip

INPUT = json.dumps({"prompt": ("word " * 40)[:200]})
ANSWER = ("answer " * 20)[:100]


def make(db: sa.Engine, rows: int, running: bool = False) -> None:
    """A job of ``rows`` rows, one in 1,000 an error; ``running``: the last tenth is still to be done."""
    upgrade(db)
    generator = np.random.default_rng(1)
    count = -(-rows // CHUNK)
    done = rows * 9 // 10 // CHUNK * CHUNK if running else rows
    rate = 64 / 0.9
    with writing(db) as connection:
        connection.execute(sa.insert(jobs).values(_job(rows, running, rows / rate)))
        for name in ("w1", "w2"):
            connection.execute(sa.insert(workers).values(_worker(name)))
            samples = [_sample(name, second) for second in range(0, min(int(rows / rate), 100_000), 5)]
            connection.execute(sa.insert(worker_samples), samples)
        numbers = [_chunk(number, rows, done) for number in range(count)]
        copy_rows(connection, chunks, tuple(numbers[0]), [tuple(each.values()) for each in numbers])
    tokens = np.zeros(count, dtype=np.int64)
    for first in range(0, rows, BATCH):
        size = min(BATCH, rows - first)
        with writing(db) as connection:
            copy_rows(connection, requests, REQUEST, [
                (JOB, row, f"r{row}", INPUT, '{"is_ad": true}') for row in range(first, first + size)
            ])  # fmt: skip
            if first < done:
                made = _results(generator, first, min(size, done - first), rate)
                np.add.at(tokens, [row[-2] for row in made], [row[9] for row in made])
                copy_rows(connection, results, RESULT, made)
    with writing(db) as connection:
        tried = [_attempt(number, rate, int(tokens[number])) for number in range(-(-done // CHUNK))]
        copy_rows(connection, attempts, tuple(tried[0]), [tuple(each.values()) for each in tried])
        refresh_statistics(connection, jobs, requests, results, chunks, attempts)


def _results(generator: np.random.Generator, first: int, size: int, rate: float) -> list[tuple[Any, ...]]:
    rows = np.arange(first, first + size)
    admitted = START + 1 + rows / rate
    ttft = generator.lognormal(-2.5, 0.4, size)
    tokens = generator.integers(2, 64, size)
    finished = admitted + ttft + (tokens - 1) * generator.lognormal(-4.2, 0.2, size)
    columns = (
        rows.tolist(), tokens.tolist(), generator.integers(20, 90, size).tolist(), admitted.tolist(),
        (admitted + ttft).tolist(), finished.tolist(),
    )  # fmt: skip
    found = []
    for row, output, prompt, begin, token, end in zip(*columns, strict=True):
        worker, chunk = f"w{1 + row // CHUNK % 2}", row // CHUNK
        if row % 1000 == 7:
            found.append((JOB, row, "error", None, None, "timeout", "took too long", prompt, 0, 0, 0, 64, START,
                          begin - 0.1, begin, None, end, end, 1, worker, chunk, False))  # fmt: skip
        else:
            reason = "length" if output == 63 else "stop"
            found.append((JOB, row, "ok", ANSWER, reason, None, None, prompt, 16, output, 0, 64, START, begin - 0.1,
                          begin, token, end, end, 1, worker, chunk, False))  # fmt: skip
    return found


def _job(rows: int, running: bool, seconds: float) -> dict[str, Any]:
    return {
        "id": JOB, "name": "large", "state": "running" if running else "completed", "mode": "queue",
        "dataset_name": "large.jsonl", "dataset_sha256": "0" * 64, "dataset_format": "jsonl", "model": "echo",
        "sampling": "{}", "priority": 5, "rows": rows, "slots": SLOTS, "env": "{}", "submitted_at": START,
        "started_at": START + 1, "finished_at": None if running else START + 2 + seconds,
    }  # fmt: skip


def _worker(name: str) -> dict[str, Any]:
    return {
        "id": name, "host": "here", "pid": 1, "state": "stopped", "device_asked": "cpu", "device_got": "cpu",
        "engine": "echo", "slots": SLOTS, "started_at": START, "heartbeat_at": START,
    }  # fmt: skip


def _sample(name: str, second: int) -> dict[str, Any]:
    return {"worker_id": name, "at": START + second, "cpu_ratio": 1.0, "memory_bytes": 10**9, "slots": SLOTS}


def _chunk(number: int, rows: int, done: int) -> dict[str, Any]:
    size = min(CHUNK, rows - number * CHUNK)
    ended = number * CHUNK < done
    return {
        "job_id": JOB, "number": number, "first_row": number * CHUNK, "rows": size,
        "state": "done" if ended else "waiting", "attempt": 1, "ok": size if ended else 0, "errors": 0,
        "output_tokens": size * 30 if ended else 0,
    }  # fmt: skip


def _attempt(number: int, rate: float, tokens: int) -> dict[str, Any]:
    begin = START + 1 + number * CHUNK / rate
    return {
        "job_id": JOB, "number": number, "attempt": 1, "worker_id": f"w{1 + number % 2}", "started_at": begin,
        "ended_at": begin + CHUNK / rate, "outcome": "done", "slots": SLOTS, "steps": 100, "prefill_s": 1.0,
        "decode_s": 0.4, "overhead_s": 0.1, "idle_s": CHUNK / rate - 1.5, "starved_s": 0.0, "prefill_tokens": 14_000,
        "decode_tokens": tokens, "wasted_tokens": 0,
    }  # fmt: skip


def timed(environment: dict[str, str], *arguments: str, repeat: int = 3) -> tuple[float, float, float]:
    """Wall and CPU seconds of a command, the best of some, and the most memory of its process in MB.

    On a machine with other work the CPU seconds say more; those of PostgreSQL's server are not in them.
    """
    best, cpu, most = float("inf"), float("inf"), 0.0
    for _ in range(repeat):
        begin = time.perf_counter()
        process = subprocess.Popen(
            [PROMPTMILL, *arguments], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        # wait4 gives the memory of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        best = min(best, time.perf_counter() - begin)
        cpu = min(cpu, usage.ru_utime + usage.ru_stime)
        most = max(most, usage.ru_maxrss / 1024)
        if status:
            raise SystemExit(f"promptmill {' '.join(arguments)}: {process.stderr and process.stderr.read().decode()}")
    return best, cpu, most


def measure(environment: dict[str, str], rows: int, where: Path, repeat: int) -> None:
    page, own, memory = timed(environment, "report", JOB, repeat=repeat)
    _say("report", page, own, memory)
    target = str(where / "out.html")
    html, more, memory = timed(environment, "report", JOB, "-o", target, "--force", repeat=repeat)
    size = Path(target).stat().st_size / 1000
    _say("HTML", html, more, memory, f"{html - page:+.2f} s (CPU {more - own:+.2f}), {size:,.0f} kB")
    target = str(where / "out.parquet")
    export, own, memory = timed(environment, "results", JOB, "-o", target, "--prompts", repeat=1)
    _say("Parquet, prompts", export, own, memory, f"{rows / export:,.0f} rows/s, {rows / own:,.0f} by CPU")
    os.unlink(target)


def _say(name: str, wall: float, cpu: float, memory: float, more: str = "") -> None:
    print(f"  {name:<17} {wall:7.2f} s  (CPU {cpu:.2f})  {memory:5.0f} MB  {more}", flush=True)


def status(environment: dict[str, str], db: sa.Engine) -> None:
    """Of a running job: what the query costs in a process that is up, and the command with Python's start."""
    from promptmill.store.catalog import find_job, job_status

    spent = []
    for _ in range(5):
        begin = time.perf_counter()
        job_status(db, find_job(db, JOB))
        spent.append(time.perf_counter() - begin)
    whole, *_ = timed(environment, "status", JOB)
    bare, *_ = timed(environment, "list", "--limit", "1")
    print(f"  status, running   {1000 * min(spent):7.1f} ms; the command {whole:.2f} s (an empty list {bare:.2f} s)")


@contextlib.contextmanager
def database(kind: str, where: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{where / 'jobs.sqlite'}"
    else:
        with postgres() as url:
            yield url


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--running", action="store_true", help="measure status of a running job only")
    given = options.parse_args()
    for kind in given.databases:
        with folder() as where, database(kind, where) as url:
            db = connect(url)
            begin = time.perf_counter()
            make(db, given.rows, given.running)
            print(f"{kind}, {given.rows:,} rows (made in {time.perf_counter() - begin:.0f} s)", flush=True)
            environment = {"JOBS_DATABASE_URL": url}
            if given.running:
                status(environment, db)
            else:
                db.dispose()
                measure(environment, given.rows, where, given.repeat)
            db.dispose()


if __name__ == "__main__":
    main()
