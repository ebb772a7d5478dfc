"""What everything but the model costs: the echo engine, embedded, through the queue, and on 16 simulated devices.

make benchmark, or: python tests/benchmarks/pipeline.py [embedded queue submission scaling]
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from servers import call, folder, on_queue, on_sqlite, report, workers

#: Rows of the throughput runs: enough to make the start of processes a small part.
ROWS = 100_000

#: Scaling: ten tokens of 0.1 s each, 8 slots, 60 rounds of them on each device.
SCALING_MODEL = "echo:token_s=0.1"
SCALING_SLOTS = 8
SCALING_ROWS = 480


def dataset(path: Path, rows: int, prompt: str) -> str:
    # Each prompt once: of identical ones only the first would run.
    # Line by line: the memory of this process, too, counts as a child's between fork and exec.
    with path.open("w") as file:
        file.writelines(json.dumps({"id": f"r{row}", "prompt": f"{row} {prompt}"}) + "\n" for row in range(rows))
    return str(path)


def embedded(where: Path) -> None:
    """From file to stored results, the start of the program included."""
    found, seconds = report(
        on_sqlite(where), "run", dataset(where / "e.jsonl", ROWS, "say this again"), "--model", "echo"
    )
    print(f"embedded: {ROWS / seconds:,.0f} requests/s in all, {found['items_per_s']:,.0f} while running (bar 10,000)")


def queue(where: Path) -> None:
    with on_queue(where) as environment, workers(environment, 2, "--device", "sim:2", "--model", "echo"):
        path = dataset(where / "q.jsonl", ROWS, "say this again")
        found, seconds = report(environment, "submit", path, "--model", "echo", "--wait")
    print(
        f"queue, 2 workers: {found['items_per_s']:,.0f} requests/s, {ROWS / seconds:,.0f} with submission (bar 5,000)"
    )


def submission(where: Path) -> None:
    """A million lines of a 200-byte prompt into the database, and the most memory a process of ours took."""
    path = dataset(where / "m.jsonl", 1_000_000, ("word " * 40)[:200])
    with on_queue(where) as environment:
        _, seconds = call(environment, "submit", path, "--model", "echo")
        print(f"submission to PostgreSQL: {1_000_000 / seconds:,.0f} lines/s (bar 15,000)")
        sqlite = environment | on_sqlite(where)
        _, seconds = call(sqlite, "submit", path, "--model", "echo")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"submission to SQLite: {1_000_000 / seconds:,.0f} lines/s (bar 25,000); {memory:.0f} MB at most (bar 250)")


def scaling(where: Path) -> None:
    rates = {}
    for devices in (1, 16):
        here = where / f"s{devices}"
        here.mkdir()
        options = ("--device", f"sim:{devices}", "--model", SCALING_MODEL, "--slots", str(SCALING_SLOTS))
        path = dataset(here / "s.jsonl", SCALING_ROWS * devices, "a b c d e f g h i j")
        with on_queue(here) as environment, workers(environment, devices, *options):
            found, _ = report(environment, "submit", path, "--model", SCALING_MODEL, "--max-tokens", "10", "--wait")
        rates[devices] = found["items_per_s"]
    print(f"scaling: {rates[1]:.2f} requests/s on 1, {rates[16]:.1f} on 16: {rates[16] / rates[1] / 16:.1%} (bar 95 %)")


def main() -> None:
    chosen = sys.argv[1:] or ["embedded", "queue", "submission", "scaling"]
    for name in chosen:
        with folder() as where:
            {"embedded": embedded, "queue": queue, "submission": submission, "scaling": scaling}[name](where)


if __name__ == "__main__":
    main()
