"""What the engines themselves cost and keep to, without a queue and a database.

python tests/benchmarks/engines.py schemas     1,000 varied schemas and prompts, every finished answer validated
python tests/benchmarks/engines.py python      share of a step outside llama_decode, 16 slots, greedy
python tests/benchmarks/engines.py echo        Python per token of 32 sequences on the echo engine, in microseconds
python tests/benchmarks/engines.py mlx         against bare mlx_lm batch_generate, batch 16, float32 tiny model
python tests/benchmarks/engines.py memory      resident memory of an engine over 100,000 requests
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from promptmill.tasks.grammars import grammar_problem
from promptmill.types import FinishReason, SamplingParams
from promptmill_workers.checkpoints import build_engine, bundled, locate
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Event, Finished
from tests.unit.tiny_mlx import write_tiny_mlx
from tests.unit.tiny_models import write_tiny_gguf

HOME = Path(os.environ.get("PROMPTMILL_PEERS", Path.home() / ".cache/promptmill-peers"))


def run(engine: Engine, requests: list[EngineRequest]) -> dict[int, Event]:
    engine.add(requests)
    found: dict[int, Event] = {}
    while engine.active or engine.waiting:
        found.update({event.key: event for event in engine.step()})
    return found


# --- schemas ---------------------------------------------------------------------------------------------------------


def scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"enum": rng.sample(["ad", "not ad", "广告", "spam", "正常", "other", 3, None, True], rng.randint(1, 5))},
            {"type": "string", "maxLength": rng.randint(1, 10)},
            {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^(yes|no)$", "^[0-9]{3}-[0-9]{2}$"])},
            {"const": rng.choice(["fixed", 7])},
        ]
    )


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose answers are bounded in length: the text of a random model is noise and would never end."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return scalar(rng)
    if kind < 0.45:
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if kind < 0.55:
        return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
    names = rng.sample(["is_ad", "score", "category", "理由", "a b", "nested"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(1, len(names))),
        "additionalProperties": False,
    }


def schemas(folder: Path) -> None:
    import jsonschema

    rng = random.Random(11)
    made: list[dict[str, Any]] = []
    while len(made) < 1000:
        one = schema(rng, 3)
        if grammar_problem("json_schema", json.dumps(one, ensure_ascii=False)) is None:
            made.append(one)
    for name, path in (
        ("llamacpp", write_tiny_gguf(folder / "tiny.gguf", context=1024)),
        ("mlx", write_tiny_mlx(folder / "tiny", context=1024)),
    ):
        engine = build_engine(locate(str(path)), EngineOptions(slots=16, context_tokens=1024, threads=1))
        requests = [
            EngineRequest(
                key,
                SamplingParams(max_tokens=500, temperature=key % 2 * 0.8, seed=key, json_schema=json.dumps(one)),
                prompt=f"comment {key}: {' '.join(rng.choices(['buy', 'song', '加我', 'free'], k=key % 9 + 1))}",
            )
            for key, one in enumerate(made)
        ]
        started = time.monotonic()
        found = run(engine, requests)
        finished = cut = bad = failed = 0
        for key, event in found.items():
            if not isinstance(event, Finished):
                failed += 1
            elif event.finish_reason is FinishReason.LENGTH:
                cut += 1
            else:
                finished += 1
                try:
                    jsonschema.validate(json.loads(event.text), made[key])
                except (ValueError, jsonschema.ValidationError):
                    bad += 1
        print(f"{name}: {finished} finished, {bad} of them invalid, {cut} cut at max_tokens, {failed} errors "
              f"({time.monotonic() - started:.0f} s)", flush=True)  # fmt: skip
        engine.close()


# --- cost ------------------------------------------------------------------------------------------------------------


def python(folder: Path) -> None:
    options = EngineOptions(slots=16, context_tokens=512, plain_kernels=True)
    engine = build_engine(locate(str(HOME / "qwen3-0.6b-q4_k_m.gguf")), options)
    lines = [json.loads(line)["body"] for line in (HOME / "short.jsonl").read_text().splitlines()[:32]]
    sampling = SamplingParams(max_tokens=32, ignore_eos=True)
    run(engine, [EngineRequest(key, sampling, prompt=body["prompt"]) for key, body in enumerate(lines)])
    did = engine.counters
    total = did.prefill_s + did.decode_s + did.overhead_s
    print(f"python: {did.overhead_s / total:.2%} of a step outside llama_decode ({did.steps} steps)")


def echo(folder: Path) -> None:
    engine = build_engine(locate("echo:token_s=0.000001"), EngineOptions(slots=32))
    words = " ".join(str(number) for number in range(64))
    costs = []
    for _ in range(5):
        requests = [EngineRequest(key, SamplingParams(max_tokens=64), prompt=words) for key in range(3200)]
        started = time.process_time()
        run(engine, requests)
        costs.append((time.process_time() - started) / (64 * len(requests)) * 1e6)
    print(f"echo: {statistics.median(costs):.2f} microseconds of Python per token, 32 sequences")


def mlx(folder: Path) -> None:
    from mlx_lm import batch_generate, load

    path = write_tiny_mlx(folder / "tiny", context=1024)
    prompts = [f"comment number {number}: buy a free phone, follow the channel" for number in range(64)]
    sampling = SamplingParams(max_tokens=64, ignore_eos=True)
    network, tokenizer = load(str(path))
    tokens = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    tokenizer._eos_token_ids = set()  # the same work on both sides
    bare, ours = [], []
    for _ in range(5):
        started = time.monotonic()
        done = batch_generate(
            network, tokenizer, tokens, max_tokens=64, completion_batch_size=16, prefill_batch_size=16
        )
        bare.append(sum(64 for _ in done.texts) / (time.monotonic() - started))
        engine = build_engine(locate(str(path)), EngineOptions(slots=16, context_tokens=1024))
        started = time.monotonic()
        found = run(engine, [EngineRequest(key, sampling, prompt=prompt) for key, prompt in enumerate(prompts)])
        count = sum(event.usage.output_tokens for event in found.values() if isinstance(event, Finished))
        ours.append(count / (time.monotonic() - started))
        engine.close()
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"mlx: {statistics.median(ours):.0f} tok/s, bare batch_generate {statistics.median(bare):.0f}: {ratio:.2f}")


def memory(folder: Path) -> None:
    engine = build_engine(locate(str(bundled("demo.gguf"))), EngineOptions(slots=16, context_tokens=512))
    process, seen = psutil.Process(), {}
    for thousand in range(1, 101):
        requests = [
            EngineRequest(key, SamplingParams(max_tokens=2), prompt=f"comment {thousand} {key}: buy a free phone")
            for key in range(1000)
        ]
        run(engine, requests)
        seen[thousand] = process.memory_info().rss
        if thousand % 10 == 0:
            print(f"  {thousand},000 requests: {seen[thousand] / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    after, end = seen[10], max(seen[thousand] for thousand in range(10, 101))
    print(f"memory: {after / 2**20:.1f} MiB after 10,000 requests, at most {end / 2**20:.1f} MiB up to 100,000: "
          f"{end / after - 1:+.1%}")  # fmt: skip


PARTS = {"schemas": schemas, "python": python, "echo": echo, "mlx": mlx, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    for name in parser.parse_args().parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
