"""Workers under a steady stream of jobs: their memory, and the connections they hold, must stay flat.

python -m tests.faults.soak [--minutes 10]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from dataclasses import dataclass

import psutil

from tests.faults.arena import ENDED, Arena, Violation, check

#: Rows of a job; one follows the other.
ROWS = 2000

#: Seconds that one may take.
JOB_S = 300.0

#: Share of the time that counts as warming up, and the growth after it that is still called flat.
WARM_SHARE = 0.2
FLAT = 1.1


@dataclass(frozen=True)
class Sample:
    """One look at the workers. Bytes are of the supervisor, the workers and their hosts together."""

    at_s: float
    memory_bytes: int
    postgres: int
    redis: int


def look(arena: Arena, began: float) -> Sample:
    memory = 0
    for supervisor in arena.supervisors:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(supervisor.pid)
            for each in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    memory += each.memory_info().rss
    [(postgres,)] = arena.rows("SELECT count(*)::int FROM pg_stat_activity WHERE datname = current_database()")
    with arena.redis() as client:
        clients = len(client.client_list())
    return Sample(time.monotonic() - began, memory, int(postgres), clients)


def soak(minutes: float) -> list[str]:
    """Run for so long; returns what was not flat, as sentences."""
    samples: list[Sample] = []
    began = time.monotonic()
    jobs = 0
    with Arena() as arena:
        arena.fresh()
        arena.start_workers(2)
        while time.monotonic() - began < minutes * 60:
            arena.submit(ROWS)
            deadline = time.monotonic() + JOB_S
            while arena.state not in ENDED:
                if time.monotonic() > deadline:
                    raise Violation(f"a job of {ROWS} rows did not end within {JOB_S:g} s")
                samples.append(look(arena, began))
                time.sleep(2)
            # A look at least at the end: on a busy machine a job may be over before anybody can look.
            samples.append(look(arena, began))
            check(arena)
            jobs += 1
    warm = WARM_SHARE * minutes * 60
    rest = [each for each in samples if each.at_s >= warm]
    quarter = max(1, len(rest) // 4)
    problems = []
    for name in ("memory_bytes", "postgres", "redis"):
        first = statistics.median(getattr(each, name) for each in rest[:quarter])
        last = statistics.median(getattr(each, name) for each in rest[-quarter:])
        size = f"{first / 2**20:.1f} to {last / 2**20:.1f} MiB" if name == "memory_bytes" else f"{first:g} to {last:g}"
        print(f"{name}: {size} ({last / first - 1:+.1%})", flush=True)
        if last > first * FLAT + 2:
            problems.append(f"{name} grew from {first:g} to {last:g}")
    print(f"{jobs} jobs, {jobs * ROWS:,} requests in {minutes:g} minutes, each job checked")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    problems = soak(parser.parse_args().minutes)
    for problem in problems:
        print(f"NOT FLAT: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
