"""Seconds from a kill to the victim's requests running again: of a worker, in leases, and of an engine host.

python -m tests.benchmarks.recovery [--times 5]      (from the repository's root)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time

from tests.faults.arena import LEASE_S, MODEL, PROMPTMILL, Arena, Violation, check, until

#: Chunks of the job whose Redis is emptied, at least; the rows that make as many; and the model that runs them in a
#: minute.
LEAST_CHUNKS = 100
FLUSHED_ROWS = 9000
FAST_MODEL = MODEL.replace("token_s=0.05", "token_s=0.01")


def held_by(arena: Arena, pid: int) -> list[tuple[int, int]]:
    """Chunks and attempts that the worker with this process id holds."""
    return [
        (number, attempt)
        for number, attempt in arena.rows(
            "SELECT c.number, c.attempt FROM chunks c JOIN workers w ON w.id = c.worker_id "
            f"WHERE c.state = 'leased' AND w.pid = {pid}"
        )
    ]


def begin(arena: Arena) -> None:
    arena.fresh()
    arena.start_workers(2)
    arena.submit(600)
    arena.wait_for_results(60)


def worker(arena: Arena) -> float:
    """Until every chunk that the killed worker held is leased again by another one."""
    begin(arena)
    victim = next(each for each in arena.consumers() if held_by(arena, each.pid))
    chunks = held_by(arena, victim.pid)
    victim.kill()
    killed = time.time()
    for number, attempt in chunks:
        again = f"SELECT started_at FROM attempts WHERE number = {number} AND attempt > {attempt}"
        # A chunk whose last results were stored before the kill is done and needs nobody.
        ended = f"SELECT 1 FROM chunks WHERE number = {number} AND state = 'done'"
        until(lambda a=again, e=ended: bool(arena.rows(a) or arena.rows(e)), "the chunk runs again", 60)  # type: ignore[misc]
    began = [
        at
        for number, attempt in chunks
        for (at,) in arena.rows(f"SELECT started_at FROM attempts WHERE number = {number} AND attempt > {attempt}")
    ]
    arena.wait_for_end()
    check(arena, lossy=True)
    return float(max(began, default=killed)) - killed


def host(arena: Arena) -> tuple[float, float]:
    """Until the worker of a killed host admits a request again; and the seconds its model took to load."""
    begin(arena)
    [victim] = [arena.hosts()[0]]
    pid = victim.parent().pid
    victim.kill()
    killed = time.time()
    query = (
        "SELECT min(r.admitted_at) FROM results r JOIN workers w ON w.id = r.worker_id "
        f"WHERE w.pid = {pid} AND r.admitted_at > {killed}"
    )
    until(lambda: arena.rows(query)[0][0] is not None, "the worker admits requests again", 60)
    [(again,)] = arena.rows(query)
    [(load_s,)] = arena.rows(f"SELECT model_load_s FROM workers WHERE pid = {pid}")
    arena.wait_for_end()
    check(arena, lossy=True)
    return float(again) - killed, float(load_s or 0.0)


def flushed(arena: Arena) -> int:
    """A job of LEAST_CHUNKS or more whose Redis is emptied in its middle, while a worker holds nothing.

    Returns its chunks. That worker must find work again by itself.
    """
    arena.fresh()
    arena.model = FAST_MODEL
    arena.start_workers(3)
    idle = arena.consumers()[0]
    # It waits for a message: suspended before there is one, it leases nothing.
    idle.suspend()
    arena.submit(FLUSHED_ROWS)
    arena.wait_for_results(FLUSHED_ROWS // 2)
    if held := held_by(arena, idle.pid):
        raise Violation(f"the worker that was to hold nothing holds {held}")
    with arena.redis() as client:
        client.flushall()
    idle.resume()
    arena.wait_for_end(300)
    check(arena)
    if not arena.chunks_done_by(idle.pid):
        raise Violation("the worker that held nothing ran no chunk after it")
    [(chunks,)] = arena.rows("SELECT count(*)::int FROM chunks")
    if chunks < LEAST_CHUNKS:
        raise Violation(f"the job had {chunks} chunks only")
    return int(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    assert json.loads(subprocess.run([PROMPTMILL, "config", "--json"], capture_output=True, check=True).stdout)
    with Arena() as arena:
        after = [worker(arena) for _ in range(times)]
        print(f"worker killed ({MODEL}): its chunks run elsewhere after {statistics.median(after):.1f} s, at most "
              f"{max(after):.1f} s = {max(after) / LEASE_S:.2f} leases (bar 1.2)", flush=True)  # fmt: skip
        hosts = [host(arena) for _ in range(times)]
        beyond = [again - load_s for again, load_s in hosts]
        print(f"host killed: requests run again after {statistics.median(again for again, _ in hosts):.2f} s, at most "
              f"{max(beyond):.2f} s beyond the model's load (bar 2)", flush=True)  # fmt: skip
        chunks = flushed(arena)
        print(f"Redis emptied in the middle of {chunks} chunks (bar {LEAST_CHUNKS}) while a worker held nothing: "
              "no request lost, no hand needed, and that worker ran chunks after it", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
