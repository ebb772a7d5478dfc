"""Break things, many times, and print what held.

python -m tests.faults.run [--scenario 4 ...] [--seeds 10] [--seed 7]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.faults.arena import BY_SUBTRACTION, EXACT, OPEN, Arena, Skipped
from tests.faults.scenarios import SCENARIOS

#: Books of a run that ended before they were looked at.
UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Run:
    """``outcome``: ``ok``, ``skipped: ...`` or what was violated; ``books``: how well those of tokens closed."""

    outcome: str
    seconds: float
    books: str | None


def run_one(arena: Arena, number: int, seed: int, keep_log: Path | None = None) -> Run:
    """Break one thing at the moments of this seed."""
    start = time.monotonic()
    arena.books = None
    try:
        # A stream of its own for each scenario: else one seed would break all of them at the same moment.
        SCENARIOS[number](arena, random.Random(f"{number}/{seed}"))
        outcome = "ok"
    except Skipped as reason:
        outcome = f"skipped: {reason}"
    except Exception as problem:
        outcome = f"VIOLATED: {type(problem).__name__}: {problem}"
        if keep_log is not None and arena.log.exists():
            keep_log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(arena.log, keep_log)
    return Run(outcome, time.monotonic() - start, arena.books)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", type=int, nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each scenario")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--logs", type=Path, help="keep the workers' log of a violated run in this folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    table: dict[int, list[Run]] = {number: [] for number in args.scenario}
    for seed in range(args.seed, args.seed + args.seeds):
        with Arena() as arena:
            for number in args.scenario:
                log = args.logs / f"scenario{number}-seed{seed}.log" if args.logs else None
                run = run_one(arena, number, seed, log)
                table[number].append(run)
                name = SCENARIOS[number].__name__
                said = f"{run.outcome}, tokens {run.books}" if run.books else run.outcome
                print(f"{number:>2} {name:<26} seed {seed:<4} {run.seconds:6.1f} s  {said}", flush=True)
    return summary(table)


def summary(table: dict[int, list[Run]]) -> int:
    """Print the table; the exit code is 1 when anything was violated."""
    violated = skipped = total = 0
    print("\n | scenario | runs | held | skipped | mean s | tokens |\n |---|---|---|---|---|---|")
    for number, runs in table.items():
        bad = sum(each.outcome.startswith("VIOLATED") for each in runs)
        none = sum(each.outcome.startswith("skipped") for each in runs)
        mean = sum(each.seconds for each in runs) / len(runs)
        held = len(runs) - bad - none
        print(
            f" | {number} {SCENARIOS[number].__name__} | {len(runs)} | {held} | {none} | {mean:.1f} | {_books(runs)} |"
        )
        violated, skipped, total = violated + bad, skipped + none, total + len(runs)
    print(f"\n{total} runs, {violated} violated, {skipped} skipped")
    print(f"tokens: {_books([run for runs in table.values() for run in runs])}")
    return 1 if violated else 0


def _books(runs: list[Run]) -> str:
    """``9 exact, 1 by subtraction``: of how many runs the books of tokens closed how well."""
    counts = Counter(each.books or UNCHECKED for each in runs)
    return ", ".join(f"{counts[kind]} {kind}" for kind in (EXACT, BY_SUBTRACTION, OPEN, UNCHECKED) if counts[kind])


if __name__ == "__main__":
    sys.exit(main())
