"""Layers with a sliding window forget: what is shared between sequences must still be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill.types import Message, SamplingParams
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Event, Finished
from promptmill_workers.engines.llama.backend import LlamaBackend
from promptmill_workers.engines.scheduler import Scheduler
from tests.unit.tiny_models import write_tiny_gguf

RULES = "Is this comment an advertisement? Answer with JSON such as the one below, and nothing else. "

#: Tokens that the model's first layer looks back on: far fewer than its prompts have.
WINDOW = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("window") / "tiny.gguf", window=WINDOW)


def request(key: int) -> EngineRequest:
    """Prompts that have more or less of their start in common."""
    turns = (
        Message("system", RULES * (1 + key % 3)),
        Message("user", f"Subscribe {key % 7} to my channel {key % 5} " * (1 + key % 4) + str(key)),
    )
    return EngineRequest(key, SamplingParams(max_tokens=4 + key % 13), messages=turns)


def run(engine: Engine, requests: list[EngineRequest]) -> dict[int, Finished]:
    engine.add(requests)
    events: list[Event] = []
    while engine.active or engine.waiting:
        events.extend(engine.step())
    assert all(isinstance(each, Finished) for each in events)
    return {each.key: each for each in events if isinstance(each, Finished)}


def opened(path: Path, slots: int, cells: int) -> Engine:
    options = EngineOptions(slots=slots, threads=1, context_tokens=512, kv_cells=cells, exact=True)
    return Scheduler(LlamaBackend.load(path, "tiny", options))


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[int, str]:
    """Each answer by an engine that was made for it."""
    found: dict[int, str] = {}
    for key in range(144):
        engine = opened(model, 1, 512)
        found[key] = run(engine, [request(key)])[key].text
        engine.close()
    return found


@pytest.mark.parametrize("cells", [512, 1200, 2048])
def test_shared_cells_that_left_the_window_change_no_answer(model: Path, alone: dict[int, str], cells: int) -> None:
    """With 512 cells 69 of 144 answers were other ones, with 2,048 23."""
    engine = opened(model, 16, cells)

    together = run(engine, [request(key) for key in range(144)])
    computed = engine.counters.prefill_tokens
    engine.close()

    assert {key: each.text for key, each in together.items()} == alone
    # A prefix is still shared as a whole.
    assert computed < sum(each.usage.prompt_tokens for each in together.values()) / 2
