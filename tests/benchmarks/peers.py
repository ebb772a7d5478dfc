"""Whole jobs, by their rows, against llama-server and llama-batched-bench on the same machine and in the same run.

    python tests/benchmarks/peers.py [--plain] [--cases short-16 json-16] [--repeat 3] [--limit 64]

Sides take turns, and the median counts. Needs the shared folder with ``peers`` beside the repository, and what its
README says to build. ``--plain`` runs all sides without AMX and repacked weights, for machines on which those end
llama.cpp.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servers import folder, on_sqlite, report

SHARED = Path(os.environ.get("PROMPTMILL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
HOME = Path(os.environ.get("PROMPTMILL_PEERS", Path.home() / ".cache/promptmill-peers"))


@dataclass(frozen=True)
class Case:
    """A workload at a number of slots. ``bar``: the least ratio to llama-server that is asked of us."""

    workload: str
    slots: int
    lines: int
    bar: float
    #: tok/s, or requests/s where the two sides write answers of different lengths.
    by_requests: bool = False
    #: The least ratio to llama-batched-bench for prompts of 24 and answers of 32 tokens.
    ceiling_bar: float | None = None


CASES = {
    "short-8": Case("short", 8, 64, 1.0, ceiling_bar=0.97),
    "short-16": Case("short", 16, 128, 1.0, ceiling_bar=0.97),
    "shared-16": Case("shared", 16, 256, 2.0),
    "shared-8": Case("shared", 8, 256, 2.0),
    "shared-32": Case("shared", 32, 256, 2.0),
    "shared-64": Case("shared", 64, 256, 2.0),
    # On a GPU: at least 0.97 of the ceiling, and 1.5 times the server where a prefix is shared.
    "short-64": Case("short", 64, 512, 1.0, ceiling_bar=0.97),
    "short-128": Case("short", 128, 1024, 1.0, ceiling_bar=0.97),
    "shared-128": Case("shared", 128, 256, 1.5),
    "json-16": Case("json", 16, 128, 4.0, by_requests=True),
}


def server(args: argparse.Namespace, case: Case, lines: int) -> float:
    command = [args.peer_python, str(SHARED / "peers/run_llama_server.py"), f"{case.workload}.jsonl",
               "--slots", str(case.slots), "--limit", str(lines), "--model", str(args.model)]  # fmt: skip
    command += ["--no-repack"] if args.plain else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"requests/s=([\d.]+)" if case.by_requests else r"tok/s=([\d.]+)", done.stdout)
    if not found:
        raise SystemExit(f"llama-server did not finish: {done.stderr[-500:]}")
    return float(found[1])


def ceiling(args: argparse.Namespace, case: Case) -> float:
    """Generated tokens of one full batch over the seconds that it took, prefill included."""
    program = next(HOME.glob("build/**/llama-batched-bench"))
    command = [str(program), "-m", str(args.model), "-npp", "24", "-ntg", "32", "-npl", str(case.slots),
               "-c", str(256 * case.slots), "-t", str(os.cpu_count()), "-ngl", "99"]  # fmt: skip
    command += ["--no-repack"] if args.plain else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.split("|") for line in done.stdout.splitlines() if re.match(r"\|\s+24 \|", line)]
    if not rows:
        raise SystemExit(f"llama-batched-bench did not finish: {done.stderr[-500:]}")
    return 32 * case.slots / float(rows[0][9])


def ours(args: argparse.Namespace, case: Case, lines: int) -> float:
    with folder() as where:
        found, _ = report(
            on_sqlite(where), "run", str(HOME / f"{case.workload}.jsonl"), "--model", str(args.model),
            "--slots", str(case.slots), "--limit", str(lines), "--device", args.device,
        )  # fmt: skip
    return float(found["items_per_s"] if case.by_requests else found["output_tps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["short-8", "short-16", "shared-16", "json-16"])
    parser.add_argument("--model", type=Path, default=HOME / "qwen3-0.6b-q4_k_m.gguf")
    parser.add_argument("--device", default="auto", help="where our side runs; the peers use what they were built for")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has aiohttp")
    parser.add_argument("--limit", type=int, help="fewer lines than the workload has, for a quick look")
    args = parser.parse_args()
    for name in args.cases:
        case = CASES[name]
        lines = min(case.lines, args.limit or case.lines)
        sides: dict[str, Callable[[], float]] = {
            "server": lambda case=case, lines=lines: server(args, case, lines),  # type: ignore[misc]
            "ours": lambda case=case, lines=lines: ours(args, case, lines),  # type: ignore[misc]
        }
        if case.ceiling_bar is not None:
            sides["ceiling"] = lambda case=case: ceiling(args, case)  # type: ignore[misc]
        runs: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.repeat):
            for side, measure in sides.items():
                runs[side].append(measure())
        middle = {side: statistics.median(found) for side, found in runs.items()}
        unit = "requests/s" if case.by_requests else "tok/s"
        text = f"{name}, {lines} requests: {middle['ours']:.2f} {unit}"
        text += f", llama-server {middle['server']:.2f}: ratio {middle['ours'] / middle['server']:.2f} (bar {case.bar})"
        if case.ceiling_bar is not None:
            text += f", batched-bench {middle['ceiling']:.2f}: ratio {middle['ours'] / middle['ceiling']:.2f}"
            text += f" (bar {case.ceiling_bar})"
        print(text, {side: [round(each, 2) for each in found] for side, found in runs.items()}, flush=True)


if __name__ == "__main__":
    main()
