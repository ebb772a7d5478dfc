"""Output tok/s of a whole job, from its rows, against llama-server on the same machine and in the same run.

    python tests/benchmarks/peers.py [--plain] [--workloads short shared]

Needs the shared folder with ``peers`` beside the repository, and what its README says to build. ``--plain`` runs both
sides without AMX and repacked weights, for machines on which those end llama.cpp.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from servers import folder, on_sqlite, report

SHARED = Path(os.environ.get("PROMPTMILL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
HOME = Path(os.environ.get("PROMPTMILL_PEERS", Path.home() / ".cache/promptmill-peers"))

#: Workload -> (lines, the least ratio that is asked of us).
WORKLOADS = {"short": (128, 0.9), "shared": (128, 2.0)}
SLOTS = 16


def peer(python: str, name: str, lines: int, model: Path, plain: bool) -> float:
    command = [python, str(SHARED / "peers/run_llama_server.py"), f"{name}.jsonl", "--slots", str(SLOTS),
               "--limit", str(lines), "--model", str(model)]  # fmt: skip
    done = subprocess.run([*command, *(["--no-repack"] if plain else [])], capture_output=True, text=True, check=False)
    found = re.search(r"tok/s=([\d.]+)", done.stdout)
    if not found:
        raise SystemExit(f"llama-server did not finish: {done.stderr[-500:]}")
    return float(found[1])


def ours(name: str, lines: int, model: Path) -> float:
    with folder() as where:
        found, _ = report(
            on_sqlite(where), "run", str(HOME / f"{name}.jsonl"), "--model", str(model), "--slots", str(SLOTS),
            "--limit", str(lines),
        )  # fmt: skip
    return float(found["output_tps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--model", type=Path, default=HOME / "qwen3-0.6b-q4_k_m.gguf")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has aiohttp")
    parser.add_argument("--limit", type=int, help="fewer lines than the workload has, for a quick look")
    args = parser.parse_args()
    for name in args.workloads:
        lines, bar = WORKLOADS[name]
        lines = min(lines, args.limit or lines)
        theirs = peer(args.peer_python, name, lines, args.model, args.plain)
        mine = ours(name, lines, args.model)
        print(f"{name}, {SLOTS} slots, {lines} requests: {mine:.1f} tok/s, llama-server {theirs:.1f}: "
              f"ratio {mine / theirs:.2f} (bar {bar})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
