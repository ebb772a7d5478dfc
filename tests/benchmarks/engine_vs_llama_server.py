"""Output tok/s of the bare llama.cpp engine, without queue and database, against llama-server in the same run.

    python tests/benchmarks/engine_vs_llama_server.py [--plain] [--workloads short shared] [--limit N]

Needs what ``peers.py`` needs. What a whole job loses beside the engine is the difference between the two scripts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from peers import HOME, SLOTS, WORKLOADS, peer

from promptmill.types import SamplingParams
from promptmill_workers.engines.contract import EngineOptions, EngineRequest
from promptmill_workers.engines.llamacpp import LlamaCppEngine


def requests_of(name: str, lines: int) -> list[EngineRequest]:
    bodies = [json.loads(line)["body"] for line in (HOME / f"{name}.jsonl").read_text().splitlines()[:lines]]
    return [
        EngineRequest(
            key,
            SamplingParams(max_tokens=body["max_tokens"], ignore_eos=body.get("ignore_eos", False)),
            prompt=body["prompt"],
        )
        for key, body in enumerate(bodies)
    ]


def ours(name: str, lines: int, model: Path, plain: bool, slots: int) -> float:
    """Output tok/s; where the time went is printed."""
    engine = LlamaCppEngine.load(model, "bench", EngineOptions(slots=slots, plain_kernels=plain))
    before, started = engine.counters, time.perf_counter()
    engine.add(requests_of(name, lines))
    while engine.active or engine.waiting:
        engine.step()
    wall, counters = time.perf_counter() - started, engine.counters
    print(
        f"  engine: {wall:.1f} s in {counters.steps} steps, prefill {counters.prefill_s:.1f} s, decode "
        f"{counters.decode_s:.1f} s, overhead {counters.overhead_s - before.overhead_s:.3f} s, "
        f"{counters.prefill_tokens:,} prompt tokens computed, {counters.peak_kv_cells:,} cells"
    )
    engine.close()
    return counters.decode_tokens / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--model", type=Path, default=HOME / "qwen3-0.6b-q4_k_m.gguf")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has aiohttp")
    parser.add_argument("--limit", type=int, help="fewer lines than the workload has, for a quick look")
    args = parser.parse_args()
    for name in args.workloads:
        lines = min(WORKLOADS[name][0], args.limit or WORKLOADS[name][0])
        mine = ours(name, lines, args.model, args.plain, args.slots)
        theirs = peer(args.peer_python, name, lines, args.model, args.plain)
        print(f"{name}, {args.slots} slots, {lines} requests: {mine:.1f} tok/s, llama-server at {SLOTS} slots "
              f"{theirs:.1f}: ratio {mine / theirs:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
