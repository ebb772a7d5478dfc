"""An engine's loop and nothing else, for ``promptmill bench``: no queue, no database, no processes between.

Reads one JSON object from standard input (``model``, ``options``, ``bodies``) and prints one with the figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from promptmill.core import programs
from promptmill.tasks.openai import COMPLETIONS, translate
from promptmill.tasks.sampling import resolve_sampling
from promptmill_workers.checkpoints import build_engine, locate
from promptmill_workers.engines import answer, constraint
from promptmill_workers.engines.contract import EngineOptions, EngineRequest, Finished


def _clocked(owner: Any, name: str, spent: Counter[str], part: str) -> None:
    """Count the seconds of a method under ``part``."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args)
        finally:
            spent[part] += time.perf_counter() - started  # type: ignore[assignment]

    setattr(owner, name, outer)


def main() -> None:
    order = programs.read_order()
    spent: Counter[str] = Counter()
    for name in ("allowed", "take", "forced"):
        _clocked(constraint.Constraint, name, spent, "grammar")
    _clocked(answer.Generation, "draw", spent, "sampling and grammar")
    engine = build_engine(locate(order["model"]), EngineOptions(**order["options"]))
    requests = []
    for key, body in enumerate(order["bodies"]):
        asked = {name: value for name, value in body.items() if name != "prompt"}
        requests.append(EngineRequest(key, resolve_sampling({}, translate(asked, COMPLETIONS)), prompt=body["prompt"]))
    engine.step()
    before = engine.counters
    started = time.monotonic()
    engine.add(requests)
    tokens = answered = 0
    while engine.active or engine.waiting:
        for event in engine.step():
            if isinstance(event, Finished):
                answered += 1
                tokens += event.usage.output_tokens
    seconds = time.monotonic() - started
    after = engine.counters
    grammar = float(spent["grammar"])
    sampling = max(0.0, float(spent["sampling and grammar"]) - grammar)
    budget = {
        "prefill": after.prefill_s - before.prefill_s,
        "decode": after.decode_s - before.decode_s,
        "sampling": sampling,
        "grammar": grammar,
        "Python": max(0.0, after.overhead_s - before.overhead_s - sampling - grammar),
    }
    if answered < len(requests):
        sys.exit(f"{len(requests) - answered} of {len(requests)} requests failed")
    print(  # noqa: T201 - this is its answer
        json.dumps(
            {"seconds": seconds, "requests": answered, "output_tokens": tokens, "steps": after.steps - before.steps,
             "budget_s": budget}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
