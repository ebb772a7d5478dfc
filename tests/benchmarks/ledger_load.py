"""What the ledger costs on PostgreSQL: claims a second, its share of a worker's time, and a thousand workers at once.

PYTHONPATH=tests/benchmarks python tests/benchmarks/ledger_load.py [--workers 1000]
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import sqlalchemy as sa
from servers import folder, on_queue

from promptmill.database.engine import writing
from promptmill.database.tables import chunks, jobs, requests
from promptmill.ledger import Ledger
from promptmill.types import ChunkId, FinishReason, Ok, Result, Timing, Usage

#: Seconds a chunk takes in a fleet: 256 requests of 25 requests/s.
CHUNK_S = 10.0


def add_job(db: sa.Engine, job_id: str, count: int) -> None:
    """A job of ``count`` chunks of one request."""
    job = {
        "id": job_id, "state": "queued", "mode": "queue", "dataset_name": "d", "dataset_sha256": "0",
        "dataset_format": "f", "model": "echo", "sampling": "{}", "priority": 5, "rows": count, "env": "{}",
        "submitted_at": time.time(),
    }  # fmt: skip
    chunk = {"job_id": job_id, "rows": 1, "state": "queued", "attempt": 0, "ok": 0, "errors": 0, "output_tokens": 0}
    with writing(db) as connection:
        connection.execute(sa.insert(jobs).values(job))
        request = {"job_id": job_id, "input": '{"prompt": "p"}'}
        connection.execute(sa.insert(requests), [request | {"row": row, "custom_id": str(row)} for row in range(count)])
        connection.execute(sa.insert(chunks), [chunk | {"number": row, "first_row": row} for row in range(count)])


def answer(row: int) -> tuple[Result, int]:
    return Ok(row, "answer", FinishReason.STOP, Usage(5, 0, 3), Timing(1, 2, 3, 4)), 16


def timed(seconds: list[float], call: Callable[[], object]) -> object:
    start = time.perf_counter()
    found = call()
    seconds.append(time.perf_counter() - start)
    return found


def cycles(url: str, job_id: str, numbers: range, name: str, only_claim: bool) -> dict[str, list[float]]:
    """One worker's process: claim, renew and finish each chunk as fast as it can. Returns the seconds of each call."""
    db = sa.create_engine(url, pool_size=1)
    ledger, spent = Ledger(db), {"claim": [], "renew": [], "finish": []}  # type: ignore[var-annotated]
    for number in numbers:
        lease = timed(spent["claim"], lambda n=number: ledger.claim(ChunkId(job_id, n), name))  # type: ignore[misc]
        if not only_claim:
            timed(spent["renew"], lambda held=lease: ledger.renew(held))  # type: ignore[misc]
            timed(spent["finish"], lambda held=lease: ledger.finish(held, None, 1, [answer(held.first_row)]))  # type: ignore[misc]
    db.dispose()
    return spent


def claims(db: sa.Engine, url: str, workers: int, count: int) -> None:
    """Ten workers, each a process of its own, on one job each: first claims alone, then whole lives of chunks."""
    each = count // workers
    for only_claim in (True, False):
        jobs_of = [f"01{'CLAIM' if only_claim else 'CYCLE'}{index:02}" for index in range(workers)]
        for job_id in jobs_of:
            add_job(db, job_id, each)
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(time.sleep, [0.2] * workers))  # every process is there before the clock starts
            start = time.perf_counter()
            parts = [
                pool.submit(cycles, url, job_id, range(each), f"w{index}", only_claim)
                for index, job_id in enumerate(jobs_of)
            ]
            found = [part.result() for part in parts]
            wall = time.perf_counter() - start
        if only_claim:
            print(f"{workers} workers: {each * workers / wall:,.0f} claims/s (bar 1,000)", flush=True)
    means = {name: statistics.mean(value for part in found for value in part[name]) for name in found[0]}
    # A chunk of CHUNK_S is claimed once, renewed every 5 s and finished once.
    share = (means["claim"] + means["renew"] * CHUNK_S / 5 + means["finish"]) / CHUNK_S
    print(f"{workers} workers: {each * workers / wall:,.0f} chunks/s claimed, renewed and finished;")
    print(f"  {', '.join(f'{name} {1000 * mean:.2f} ms' for name, mean in means.items())}")
    print(f"  {share:.2%} of a worker's time at {CHUNK_S:g}-second chunks, all workers at once (bar 2 %)", flush=True)


def fleet(db: sa.Engine, workers: int, rounds: int, chunk_s: float) -> None:
    """Many workers, each with a chunk of ``chunk_s`` in real time, over the pool of connections of one process."""
    add_job(db, "01FLEET", workers * rounds)
    ledger, spent, late = Ledger(db), [], threading.Lock()  # type: ignore[var-annotated]

    def work(index: int) -> None:
        time.sleep(index / workers * chunk_s)
        for round_ in range(rounds):
            lease = timed(spent, lambda n=index * rounds + round_: ledger.claim(ChunkId("01FLEET", n), f"w{index}"))  # type: ignore[misc]
            time.sleep(chunk_s)
            assert ledger.finish(lease, None, 1, [answer(lease.first_row)])  # type: ignore[union-attr, arg-type]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    with late:
        ordered = sorted(spent)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    print(
        f"{workers} simulated workers, {chunk_s:g}-second chunks: {workers * rounds / wall:,.0f} chunks/s, claim p50 "
        f"{1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms (bar 250)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=4000)
    args = parser.parse_args()
    with folder() as where, on_queue(where) as environment:
        url = sa.make_url(environment["JOBS_DATABASE_URL"]).set(drivername="postgresql+psycopg")
        # As many connections as a pooler before PostgreSQL would hold open.
        db = sa.create_engine(url, pool_size=40, max_overflow=0, pool_timeout=60)
        claims(db, url.render_as_string(hide_password=False), 10, args.chunks)
        fleet(db, args.workers, rounds=3, chunk_s=CHUNK_S)
        db.dispose()


if __name__ == "__main__":
    main()
