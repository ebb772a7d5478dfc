"""What all measuring costs: timestamps of requests, counters of attempts, samples of workers, and their storage.

python tests/benchmarks/measuring.py [--rows 100000] [--times 5]

An embedded run of the echo engine, which does nothing else, with and without them in turns. Compared are the best CPU
seconds of the whole command, because other programs move the wall time; and those without what it takes to print the
report at its end, whose percentiles of rows without times cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
from pathlib import Path

from pipeline import dataset
from servers import PROMPTMILL, folder

UNMEASURED = Path(__file__).with_name("unmeasured")


def spent(where: Path, path: str, without: bool) -> tuple[float, float]:
    """CPU seconds of one run, its host's included, and of the report of its job."""
    url = f"sqlite:///{where / f'{without}.sqlite'}"
    environment = os.environ | {
        "JOBS_DATABASE_URL": url, "PYTHONPATH": str(UNMEASURED), "WITHOUT_MEASURING": str(int(without)),
    }  # fmt: skip
    own, said = _cpu(environment, "run", path, "--model", "echo", "--json")
    found = json.loads(said)
    assert found["ok"] == found["rows"], found["verdict"]
    # That what is compared is what it says.
    assert (found["latency_s"]["n"] == 0) is without, found["latency_s"]
    return own, _cpu(environment, "report", "@last", "--json")[0] - _cpu(environment, "list", "--json")[0]


def _cpu(environment: dict[str, str], *arguments: str) -> tuple[float, bytes]:
    """CPU seconds of a command and of its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([PROMPTMILL, *arguments], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--times", type=int, default=5)
    given = options.parse_args()
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(given.times):
        for without in (False, True):
            with folder() as where:
                taken[without].append(spent(where, dataset(where / "m.jsonl", given.rows, "say this again"), without))
    for name, cost in (("report included", _whole), ("without the report", _run_alone)):
        own, bare = min(map(cost, taken[False])), min(map(cost, taken[True]))
        print(
            f"CPU seconds of {given.rows:,} rows, best of {given.times}, {name}: {own:.2f} measured, {bare:.2f} without"
        )
        print(f"cost of measuring: {own / bare - 1:+.1%} (bar 5 %)")


def _whole(spent: tuple[float, float]) -> float:
    return spent[0]


def _run_alone(spent: tuple[float, float]) -> float:
    run, report = spent
    return run - report


if __name__ == "__main__":
    main()
