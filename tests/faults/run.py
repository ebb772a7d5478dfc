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
from pathlib import Path

from tests.faults.arena import Arena, Skipped
from tests.faults.scenarios import SCENARIOS


def run_one(arena: Arena, number: int, seed: int, keep_log: Path | None = None) -> tuple[str, float]:
    """``ok``, ``skipped: ...`` or what was violated, and the seconds it took."""
    start = time.monotonic()
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
    return outcome, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", type=int, nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each scenario")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--logs", type=Path, help="keep the workers' log of a violated run in this folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    table: dict[int, list[tuple[str, float]]] = {number: [] for number in args.scenario}
    for seed in range(args.seed, args.seed + args.seeds):
        with Arena() as arena:
            for number in args.scenario:
                log = args.logs / f"scenario{number}-seed{seed}.log" if args.logs else None
                outcome, seconds = run_one(arena, number, seed, log)
                table[number].append((outcome, seconds))
                name = SCENARIOS[number].__name__
                print(f"{number:>2} {name:<26} seed {seed:<4} {seconds:6.1f} s  {outcome}", flush=True)
    return summary(table)


def summary(table: dict[int, list[tuple[str, float]]]) -> int:
    """Print the table; the exit code is 1 when anything was violated."""
    violated = skipped = total = 0
    print("\n | scenario | runs | held | skipped | mean s |\n |---|---|---|---|---|")
    for number, runs in table.items():
        bad = sum(outcome.startswith("VIOLATED") for outcome, _ in runs)
        none = sum(outcome.startswith("skipped") for outcome, _ in runs)
        mean = sum(seconds for _, seconds in runs) / len(runs)
        held = len(runs) - bad - none
        print(f" | {number} {SCENARIOS[number].__name__} | {len(runs)} | {held} | {none} | {mean:.1f} |")
        violated, skipped, total = violated + bad, skipped + none, total + len(runs)
    print(f"\n{total} runs, {violated} violated, {skipped} skipped")
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
