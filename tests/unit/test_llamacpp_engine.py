"""The llama.cpp engine on the bundled model: exactness of batches, pieces of prompts and characters, spoilt files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from tools.demo_model.float32 import write_float32

from promptmill.errors import DeviceError, ModelError
from promptmill.readers import open_dataset
from promptmill.tasks.sampling import resolve_sampling
from promptmill.tasks.templates import Template
from promptmill.types import ErrorClass, FinishReason, Message, SamplingParams, Usage
from promptmill_workers.checkpoints import bundled
from promptmill_workers.engines.contract import (
    Engine,
    EngineOptions,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    TokenEvent,
)
from promptmill_workers.engines.llama import backend
from promptmill_workers.engines.llama.backend import LlamaBackend
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.llama.text import LlamaAnswerText
from promptmill_workers.engines.scheduler import Scheduler
from tests.conftest import ROOT
from tests.engine_runs import Load, alone, answers, finished, run
from tests.unit.tiny_models import write_tiny_gguf

ODD = "加V：abc123 😂 好听 naïve žluťoučký 👨‍👩‍👧‍👦 ░▒▓"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, in which the order of sums changes no token."""
    path = tmp_path_factory.mktemp("exact") / "demo-f32.gguf"
    write_float32(bundled("demo.gguf"), path)
    return path


@pytest.fixture
def load(exact: Path) -> Iterator[Load]:
    """Loads the float32 demo model with the options given, and closes it."""
    loaded: list[Engine] = []

    def load(slots: int = 4, path: Path = exact, **options: Any) -> Engine:
        # One thread: threads that wait for one another are slow on a machine that does other things too.
        options = {"context_tokens": 2048, "kv_cells": 8192, "threads": 1} | options
        loaded.append(Scheduler(LlamaBackend.load(path, "demo", EngineOptions(slots=slots, **options))))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


@pytest.fixture(scope="module")
def task() -> Template:
    """The template of the bundled task."""
    from promptmill.tasks.task_file import load_task

    prompt = load_task(ROOT / "datasets" / "ad_comments.task.yaml").model.prompt
    assert prompt is not None
    return Template(prompt.user, prompt.system)


def comments() -> list[str]:
    text = (ROOT / "datasets" / "ad_comments.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["comment"] for line in text.split("\n") if line]


def requests_of(task: Template, texts: Sequence[str], **sampling: Any) -> list[EngineRequest]:
    settings = SamplingParams(**{"max_tokens": 32, **sampling})
    return [
        EngineRequest(key, settings, messages=task.render({"comment": text}, None)) for key, text in enumerate(texts)
    ]


def varied(task: Template) -> list[EngineRequest]:
    """48 prompts of one to many comments in every order of length."""
    pool = comments()
    texts = ["\n".join(pool[(7 * key + step) % len(pool)] for step in range(1 + key % 5)) for key in range(48)]
    return requests_of(task, texts)


@pytest.mark.parametrize("options", [{"slots": 16}, {"slots": 5, "batch_tokens": 40}, {"slots": 48, "kv_cells": 3000}])
def test_batches_of_48_comments_are_answered_as_each_alone(
    load: Load, task: Template, options: dict[str, Any], expected: dict[int, tuple[str, FinishReason, int, int]]
) -> None:
    engine = load(**options)

    events = run(engine, varied(task))

    assert answers(events) == expected
    cached = [finished(event).usage.cached_tokens for event in events.values()]
    assert sum(tokens > 50 for tokens in cached) >= 47


@pytest.fixture(scope="module")
def expected(exact: Path, task: Template) -> dict[int, tuple[str, FinishReason, int, int]]:
    """The answer of each of the 48 alone."""

    def load(slots: int, **options: Any) -> Engine:
        asked = EngineOptions(slots=slots, context_tokens=2048, threads=1, **options)
        return Scheduler(LlamaBackend.load(exact, "demo", asked))

    return alone(load, varied(task), kv_cells=2048)


def test_the_demo_model_answers_in_the_asked_for_shape(load: Load, task: Template) -> None:
    events = run(load(slots=16, path=bundled("demo.gguf")), requests_of(task, comments()[::9]))

    for event in events.values():
        said = json.loads(finished(event).text)
        assert set(said) == {"is_ad", "score"}
        assert isinstance(said["is_ad"], bool)
        assert said["score"] in range(6)
        assert finished(event).finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("bound", "stream", "every"),
    [(None, False, 0), ("DECODE_WAITS_S", False, 2), ("DECODE_WAITS_S", True, 0), ("CLIENT_WAITS_S", True, 2)],
)
def test_a_long_prompt_has_passes_of_its_own_within_a_bound(
    load: Load, task: Template, monkeypatch: pytest.MonkeyPatch, bound: str | None, stream: bool, every: int
) -> None:
    """Pieces of the prompt alone; a running answer waits no longer than its bound, and then has a pass of its own."""
    monkeypatch.setattr(backend, "APART_FROM", 1)
    for name in ("DECODE_WAITS_S", "CLIENT_WAITS_S"):
        monkeypatch.setattr(backend, name, 0.0 if name == bound else 1000.0)
    short = replace(requests_of(task, [comments()[0]], max_tokens=200, ignore_eos=True)[0], stream=stream)
    long = EngineRequest(7, SamplingParams(max_tokens=8), messages=(Message("user", " ".join(comments())[:3000]),))
    engine = load(slots=2, batch_tokens=64)
    engine.add([short])
    events: list[Event] = []
    while engine.counters.decode_tokens < 2:
        events.extend(engine.step())
    engine.add([long])
    seen = [engine.counters]
    while len(seen) < 11:
        events.extend(engine.step())
        seen.append(engine.counters)

    passes = [
        (after.decode_tokens - before.decode_tokens, after.prefill_tokens - before.prefill_tokens)
        for before, after in pairwise(seen)
    ]
    assert passes == ([(0, 64), (1, 0)] * 5 if every else [(0, 64)] * 10)
    monkeypatch.undo()
    events = [each for each in events if not isinstance(each, TokenEvent)]
    found = {event.key: event for event in events} | run_whole(engine)
    assert answers(found) == alone(load, [replace(short, stream=False), long], kv_cells=2048)


def test_a_short_prompt_rides_along_with_a_pass_that_decodes(load: Load, task: Template) -> None:
    first, second = requests_of(task, comments()[:2], max_tokens=100, ignore_eos=True)
    brief = EngineRequest(second.key, second.sampling, messages=(Message("user", "hi"),))
    engine = load(slots=2)
    engine.add([first])
    while engine.counters.decode_tokens < 2:
        engine.step()
    before = engine.counters
    engine.add([brief])
    engine.step()
    after = engine.counters
    assert after.prefill_tokens > before.prefill_tokens
    assert after.decode_tokens - before.decode_tokens == 2
    assert after.steps - before.steps == 1


def run_whole(engine: Engine) -> dict[int, Event]:
    """What ends, without the pieces of texts."""
    found: dict[int, Event] = {}
    while engine.active or engine.waiting:
        found |= {event.key: event for event in engine.step() if not isinstance(event, TokenEvent)}
    return found


def test_a_new_request_does_not_wait_for_a_running_one(load: Load, task: Template) -> None:
    slow, quick = requests_of(task, comments()[:2], max_tokens=300, ignore_eos=True)
    quick = EngineRequest(1, SamplingParams(max_tokens=2), messages=quick.messages)
    engine = load(slots=2)
    engine.add([slow])
    engine.step()

    engine.add([quick])
    steps = 0
    while not any(event.key == 1 for event in engine.step()):
        steps += 1
        assert steps < 10

    assert engine.active == 1


def test_an_answer_of_any_bytes_is_put_together_from_its_tokens(exact: Path) -> None:
    model = LlamaModel(exact, vocab_only=True)
    words = model.vocabulary
    ids = words.tokens(ODD, parse_special=False).tolist()
    pieces = [words.piece(token) for token in ids]
    answer = LlamaAnswerText(words.piece, ())

    for token in ids:
        assert not answer.add(token)

    assert answer.finish() == (ODD, False)
    assert any(b"\x80" <= piece[:1] < b"\xc0" for piece in pieces), "no character is split over tokens"
    model.close()


@pytest.mark.parametrize("stop", ["听", "😂 好", "abc123", "👨‍👩‍👧‍👦", "加V：", "░▒▓", ODD])
def test_a_stop_text_is_found_across_tokens_and_characters(exact: Path, stop: str) -> None:
    model = LlamaModel(exact, vocab_only=True)
    words = model.vocabulary
    answer = LlamaAnswerText(words.piece, ("never said", stop))

    read = 0
    for token in words.tokens(ODD + " and more", parse_special=False):
        read += 1
        if answer.add(int(token)):
            break

    assert answer.finish()[0] == ODD[: ODD.index(stop)]
    ended = b"".join(words.piece(int(token)) for token in words.tokens(ODD + " and more", parse_special=False)[:read])
    assert stop.encode() in ended
    model.close()


def test_the_earliest_of_several_stop_texts_ends_the_answer() -> None:
    answer = LlamaAnswerText(lambda token: b"see you later", ("later", "a", "la"))

    assert answer.add(0)
    assert answer.finish()[0] == "see you "


def test_a_character_cut_in_the_middle_is_left_out() -> None:
    answer = LlamaAnswerText(lambda token: "ab😀".encode()[:-1], ())
    answer.add(0)

    assert answer.finish()[0] == "ab"


def test_a_text_that_streams_shows_whole_characters_and_no_start_of_a_stop_text() -> None:
    pieces = [b"ab", "😀".encode()[:2], "😀".encode()[2:], b" st", b"ay st", b"o", b"p now"]
    answer = LlamaAnswerText(pieces.__getitem__, ("stop",))

    shown = []
    for token in range(len(pieces)):
        answer.add(token)
        shown.append(answer.fresh())

    assert shown == ["ab", "", "😀", " ", "stay ", "", ""]
    assert "".join(shown) == answer.finish()[0]


def test_no_answer_of_the_case_ends_well_that_is_no_json(load: Load, shared: Path) -> None:
    """Rows c2, c14 and c20 come to a dead end: they ended as ok, with a text that ends in a comma."""
    with open_dataset(str(shared / "cases" / "files" / "03-schema-dead-end-ends-ok.jsonl")) as dataset:
        lines = list(dataset.checked())
    requests = [
        EngineRequest(key, resolve_sampling({}, line.sampling), messages=(Message("user", line.prompt or ""),))
        for key, line in enumerate(lines)
    ]

    events = run(load(slots=8, path=bundled("demo.gguf")), requests)

    for event in events.values():
        if isinstance(event, Finished) and event.finish_reason is FinishReason.STOP:
            assert set(json.loads(event.text)) == {"score"}
        elif isinstance(event, Rejected):
            assert event.error_class is ErrorClass.GRAMMAR
    assert any(isinstance(event, Rejected) for event in events.values())


@pytest.mark.parametrize("device", ["cuda:0", "metal"])
def test_a_gpu_that_the_build_cannot_use_is_refused(exact: Path, device: str) -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build can use a GPU")
    with pytest.raises(DeviceError, match="without GPU support"):
        LlamaBackend.load(exact, "demo", EngineOptions(device=device))


def test_more_slots_than_llama_cpp_has_sequences_are_refused(exact: Path) -> None:
    with pytest.raises(ModelError, match="at most"):
        LlamaBackend.load(exact, "demo", EngineOptions(slots=300))


def test_what_was_set_up_is_what_the_model_allows(load: Load) -> None:
    info = load(slots=3, context_tokens=100_000, kv_cells=100).info

    assert (info.engine, info.slots, info.context_tokens) == ("llamacpp", 3, 2048)
    assert info.kv_cells >= info.context_tokens
    assert (info.device_got, info.layers, info.layers_offloaded) == ("cpu", 5, 0)
    assert info.version == llama_cpp.__version__


def test_plain_kernels_give_the_same_answers(load: Load, task: Template) -> None:
    some = requests_of(task, comments()[::40])

    assert answers(run(load(plain_kernels=True), some)) == answers(run(load(), some))


@pytest.mark.parametrize("kept", [4, 20, 3000, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_one_clear_error(tmp_path: Path, kept: float) -> None:
    whole = bundled("demo.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])

    _refused(file)


def test_a_file_with_a_spoilt_header_is_one_clear_error(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    whole = bytearray(bundled("demo.gguf").read_bytes())
    whole[8:600] = random.bytes(592)
    file = tmp_path / "spoilt.gguf"
    file.write_bytes(whole)

    _refused(file)


def test_a_folder_or_nothing_in_place_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing.gguf")
    _refused(tmp_path)


def _refused(file: Path) -> None:
    """Neither the engine nor the counter of tokens loads the file, and both say which it is."""
    for load in (lambda: LlamaBackend.load(file, "x", EngineOptions()), lambda: LlamaBackend.token_counter(file)):
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load()
        assert file.name in caught.value.message
        assert "\n" not in caught.value.message


def test_a_model_without_a_chat_template_answers_raw_prompts_only(load: Load, tmp_path: Path) -> None:
    mute = write_tiny_gguf(tmp_path / "mute.gguf", chat_template=None)
    engine = load(slots=2, path=mute, context_tokens=256, kv_cells=512)
    chat = EngineRequest(0, SamplingParams(), messages=(Message("user", "hello"),))
    raw = EngineRequest(1, SamplingParams(max_tokens=3, ignore_eos=True), prompt="hello")

    events = run(engine, [chat, raw])

    refused = events[0]
    assert isinstance(refused, Rejected)
    assert refused.error_class is ErrorClass.INVALID_REQUEST
    assert "no chat template" in refused.message
    assert finished(events[1]).usage == Usage(5, 0, 3)
