"""What all measuring costs: timestamps of requests, counters of attempts, samples of workers, and their storage.

python tests/benchmarks/measuring.py [--rows 100000] [--times 5]

An embedded run of the echo engine, which does nothing else, with and without them in turns. Compared are the best CPU
seconds of the whole command, because other programs move the wall time.
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


def spent(where: Path, path: str, without: bool) -> float:
    """CPU seconds of one run, its host's included."""
    url = f"sqlite:///{where / f'{without}.sqlite'}"
    environment = os.environ | {
        "JOBS_DATABASE_URL": url, "PYTHONPATH": str(UNMEASURED), "WITHOUT_MEASURING": str(int(without)),
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [PROMPTMILL, "run", path, "--model", "echo", "--json"], env=environment, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    assert found["ok"] == found["rows"], found["verdict"]
    # That what is compared is what it says.
    assert (found["latency_s"]["n"] == 0) is without, found["latency_s"]
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--times", type=int, default=5)
    given = options.parse_args()
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.times):
        for without in (False, True):
            with folder() as where:
                taken[without].append(spent(where, dataset(where / "m.jsonl", given.rows, "say this again"), without))
    own, bare = min(taken[False]), min(taken[True])
    print(f"CPU seconds of {given.rows:,} rows, best of {given.times}: {own:.2f} measured, {bare:.2f} without")
    print(f"cost of measuring: {own / bare - 1:+.1%} (bar 5 %)")


if __name__ == "__main__":
    main()
