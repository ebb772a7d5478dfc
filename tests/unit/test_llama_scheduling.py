"""What the llama.cpp engine computes once, what it keeps, and what it does when the KV cache is full after all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promptmill.types import ErrorClass, SamplingParams
from promptmill_workers.engines.contract import EngineOptions, EngineRequest, Rejected
from promptmill_workers.engines.llama.backend import PREFIXES, LlamaBackend
from promptmill_workers.engines.llama.sequence import LlamaSequence
from promptmill_workers.engines.scheduler import Scheduler
from tests.engine_runs import finished, run, texts
from tests.unit.tiny_models import write_tiny_gguf

CONTEXT = 512

Load = Callable[..., Scheduler[LlamaSequence]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", context=CONTEXT)


@pytest.fixture
def load(model: Path) -> Iterator[Load]:
    loaded: list[Scheduler[LlamaSequence]] = []

    def load(slots: int = 2, **options: Any) -> Scheduler[LlamaSequence]:
        options = {"threads": 1, "exact": True} | options
        loaded.append(Scheduler(LlamaBackend.load(model, "tiny", EngineOptions(slots=slots, **options))))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def raw(key: int, prompt: str, **sampling: Any) -> EngineRequest:
    return EngineRequest(key, SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling}), prompt=prompt)


def occupy(engine: Scheduler[LlamaSequence], cells: int) -> None:
    """Fill KV cells that the engine believes free: there is no honest way to make its book-keeping wrong."""
    backend: Any = engine.backend
    context, sequence = backend._context, engine.info.slots  # the last one that a prefix would take
    for start in range(0, cells, 64):
        context.batch.clear()
        context.batch.put(sequence, start, np.full(min(64, cells - start), 5, dtype=np.int32), wanted=0)
        assert context.decode() == 0


def text_of(size: int, kind: str) -> str:
    """About ``size`` tokens that begin unlike every other ``kind``."""
    return (kind + "0123456789") * (size // 11)


def test_a_request_starts_again_when_the_cache_is_full_after_all(load: Load) -> None:
    requests = [raw(key, text_of(110, "abc"[key]), max_tokens=60) for key in range(3)]
    expected = {key: text for each in requests for key, text in texts(run(load(slots=1), [each])).items()}
    engine = load(slots=2, kv_cells=CONTEXT)
    occupy(engine, 200)

    events = run(engine, requests)

    assert texts(events) == expected
    assert engine.counters.wasted_tokens > 0
    assert engine.counters.decode_tokens == 180 + engine.counters.wasted_tokens


def test_a_request_that_has_no_room_even_alone_is_an_error_and_the_next_one_runs(load: Load) -> None:
    engine = load(slots=2, kv_cells=CONTEXT)
    occupy(engine, 420)

    events = run(engine, [raw(0, text_of(200, "a")), raw(1, "short"), raw(2, text_of(200, "b"))])

    for key in (0, 2):
        event = events[key]
        assert isinstance(event, Rejected)
        assert event.error_class == ErrorClass.OUT_OF_MEMORY
    assert texts({1: events[1]}) == texts(run(load(slots=1), [raw(1, "short")]))


def test_a_shared_prefix_that_has_no_room_is_given_up(load: Load) -> None:
    engine = load(slots=2, kv_cells=CONTEXT)
    occupy(engine, 400)

    events = run(engine, [raw(key, text_of(220, "a") + str(key)) for key in range(4)])

    assert {type(event) for event in events.values()} == {Rejected}


def test_a_request_takes_over_what_a_running_one_has_computed(load: Load) -> None:
    engine = load(slots=2)
    engine.add([raw(0, text_of(110, "a") + "first", max_tokens=40)])
    engine.step()
    engine.step()

    events = run(engine, [raw(1, text_of(110, "a") + "second")])

    usage = finished(events[1]).usage
    assert usage.cached_tokens == 110
    assert engine.counters.prefill_tokens == finished(events[0]).usage.prompt_tokens + usage.prompt_tokens - 110
    assert texts({1: events[1]}) == texts(run(load(slots=1), [raw(1, text_of(110, "a") + "second")]))


def test_what_was_taken_over_outlives_the_one_that_computed_it(load: Load) -> None:
    engine = load(slots=2)
    engine.add([raw(0, text_of(110, "a") + "first", max_tokens=3)])
    engine.step()
    long = raw(1, text_of(110, "a") + "second", max_tokens=50)

    events = run(engine, [long, *(raw(key, text_of(66, "xyz"[key - 2])) for key in range(2, 5))])

    assert finished(events[1]).usage.cached_tokens == 110
    assert texts({1: events[1]}) == texts(run(load(slots=1), [long]))


def test_nested_prefixes_are_computed_once_each(load: Load) -> None:
    task, left, right = text_of(110, "t"), text_of(66, "l"), text_of(66, "r")
    requests = [raw(key, task + (left if key % 2 else right) + str(key)) for key in range(8)]
    engine = load(slots=3)

    events = run(engine, requests)

    own = sum(finished(event).usage.prompt_tokens - 176 for event in events.values())
    assert engine.counters.prefill_tokens == 110 + 2 * 66 + own
    assert texts(events) == {key: text for each in requests for key, text in texts(run(load(), [each])).items()}


def test_a_prefix_is_found_again_by_later_requests(load: Load) -> None:
    engine = load()
    run(engine, [raw(key, text_of(110, "a") + str(key)) for key in range(3)])

    later = finished(run(engine, [raw(9, text_of(110, "a") + "9")])[9])

    assert later.usage.cached_tokens == 110


def test_the_prefix_that_waiting_requests_want_is_kept_before_others(load: Load) -> None:
    engine = load()
    wanted = text_of(66, "w")
    run(engine, [raw(key, wanted + str(key)) for key in range(2)])
    for kind in "abcdefghij"[: PREFIXES + 1]:
        engine.add([raw(99, wanted + "9")])
        pair = [raw(ord(kind) * 2 + key, text_of(66, kind) + str(key)) for key in range(2)]
        assert finished(run(engine, pair)[99]).usage.cached_tokens == 66


def test_requests_that_share_a_prefix_need_no_cells_of_their_own_for_it(load: Load) -> None:
    engine = load(slots=8, kv_cells=CONTEXT)

    run(engine, [raw(key, text_of(330, "a") + str(key), max_tokens=16) for key in range(16)])

    assert engine.counters.peak_active == 8


def test_many_new_requests_do_not_hold_up_a_running_one(load: Load) -> None:
    engine = load(slots=2)
    engine.add([raw(0, "runs", max_tokens=400)])
    engine.step()
    engine.add([raw(key, text_of(220, "a") + str(key)) for key in range(1, 2000)])

    # A collection of garbage in a step looks at what this test made, and at no other test's objects.
    gc.freeze()
    longest = 0.0
    for _ in range(30):
        started = time.process_time()
        engine.step()
        longest = max(longest, time.process_time() - started)

    assert longest < 0.5
    assert engine.waiting > 1900
