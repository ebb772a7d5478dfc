"""Reasoning marks that are control tokens, templates that open a reasoning, and texts that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promptmill.types import Extras, FinishReason, Message, SamplingParams
from promptmill_workers.checkpoints import Checkpoint, build_engine
from promptmill_workers.engines import prompts
from promptmill_workers.engines.answer import END_OF_THINK, THINK, Generation
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Event, Finished, Rejected
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.llama.text import LlamaPromptReader
from promptmill_workers.engines.mlx_lm.text import MlxTokenizer
from promptmill_workers.host.process import wrapped
from tests.unit.tiny_mlx import write_tiny_mlx
from tests.unit.tiny_models import CHATML, write_tiny_gguf

#: As templates of models that always reason write it.
OPENING = CHATML.replace("assistant\n'", f"assistant\n{THINK}\n'")

MARKS = (THINK, END_OF_THINK)

Load = Callable[[str], Engine]


@pytest.fixture(params=["llamacpp", "mlx"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Load]:
    """Loads a tiny model whose reasoning marks are control tokens."""
    loaded: list[Engine] = []

    def load(template: str) -> Engine:
        if request.param == "mlx":
            pytest.importorskip("mlx_lm")
            path = write_tiny_mlx(tmp_path / "tiny", chat_template=template, marks=MARKS)
        else:
            path = write_tiny_gguf(tmp_path / "tiny.gguf", chat_template=template, marks=MARKS)
        options = EngineOptions(slots=2, context_tokens=256, threads=1)
        loaded.append(wrapped(build_engine(Checkpoint("tiny", request.param, path), options)))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def chat(**sampling: Any) -> EngineRequest:
    settings = SamplingParams(**{"max_tokens": 24, **sampling})
    return EngineRequest(0, settings, messages=(Message("user", "Is it an ad?"),))


def answer(engine: Engine, request: EngineRequest) -> Finished:
    engine.add([request])
    events: list[Event] = []
    while engine.active or engine.waiting:
        events.extend(engine.step())
    events.extend(engine.step())
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


def extras(event: Finished) -> Extras:
    assert event.extras is not None
    return event.extras


def tools_of(engine: Any) -> Any:
    """The tokeniser of the engine behind all that stands in front of it."""
    while hasattr(engine, "_engine"):
        engine = engine._engine
    return engine.backend._tools


def token(engine: Engine, text: str) -> int:
    """The one token that is ``text``."""
    (only,) = tools_of(engine).tokens(text)
    return int(only)


@pytest.mark.parametrize("thinking", [None, "on"])
def test_an_answer_after_a_mark_that_is_a_control_token_is_not_lost(load: Load, thinking: str | None) -> None:
    engine = load(OPENING if thinking is None else CHATML)
    close = token(engine, END_OF_THINK)

    # The model ends its reasoning at once, and writes the mark again and again.
    found = answer(engine, chat(thinking=thinking, logit_bias=((close, 100.0),), max_tokens=3, ignore_eos=True))

    assert found.text == END_OF_THINK * 2
    assert extras(found).reasoning == ""
    assert found.usage.reasoning_tokens == 0


def test_a_reasoning_that_the_model_opens_by_a_control_token_is_told_apart(load: Load) -> None:
    engine = load(CHATML)
    bias = ((token(engine, THINK), 100.0),)

    found = answer(engine, chat(logit_bias=bias, max_tokens=2, ignore_eos=True))

    assert found.text == ""
    assert extras(found).reasoning == THINK


#: Writes the last message's text last, and nothing behind it.
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("asked", [{}, {"thinking": "off"}, {"thinking": "0"}])
def test_a_text_that_ends_in_the_mark_opens_no_reasoning(load: Load, asked: dict[str, Any]) -> None:
    engine = load(BARE)
    settings = SamplingParams(max_tokens=6, ignore_eos=True, **asked)
    for text in (f"What is the tag {THINK}", f"{THINK}\n"):
        found = answer(engine, EngineRequest(0, settings, messages=(Message("user", text),)))
        assert found.text
        assert found.usage.reasoning_tokens == 0
    # The same in a field of a template that is a whole prompt; what its author wrote is meant.
    data = answer(engine, EngineRequest(0, settings, prompt=f"Say {THINK}", own=((0, 4),)))
    assert data.text
    assert data.usage.reasoning_tokens == 0


def test_a_template_that_opens_a_reasoning_behind_such_a_text_is_obeyed(load: Load) -> None:
    engine, settings = load(OPENING), SamplingParams(max_tokens=6, ignore_eos=True)
    found = answer(engine, EngineRequest(0, settings, messages=(Message("user", THINK),)))
    assert found.usage.reasoning_tokens == 6
    meant = answer(engine, EngineRequest(0, settings, prompt=f"Say {THINK}", own=((0, 11),)))
    assert meant.usage.reasoning_tokens == 6


ENDLESS = """{%- for m in messages %}{{ m['content'] }}{% if 'SLOW' in m['content'] %}
{%- for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"""


def test_a_template_that_never_ends_for_one_text_ends_that_request_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "RENDER_S", 0.3)
    engine, settings = load(ENDLESS), SamplingParams(max_tokens=2, ignore_eos=True)
    asked = [EngineRequest(key, settings, messages=(Message("user", text),)) for key, text in enumerate(("a", "SLOW"))]
    engine.add(asked)
    events: list[Event] = []
    while engine.active or engine.waiting:
        events.extend(engine.step())
    events.extend(engine.step())
    ended = {event.key: event for event in events}
    assert isinstance(ended[0], Finished)
    assert isinstance(ended[1], Rejected)
    assert "takes more than 0.3 s" in ended[1].message


@pytest.mark.parametrize("said", ["<think>Hm.</think>\n\nyes <b>", "\n yes", "<thin air>", "<", "<think>", " \n"])
def test_somebody_who_waits_is_told_no_reasoning(load: Load, said: str) -> None:
    tools = tools_of(load(CHATML))
    written = Generation(tools, SamplingParams(), np.zeros(1, np.int32), 64)
    told = ""
    for each in tools.tokens(said):
        written.take(each)
        told += written.fresh()

    text = written.finish(FinishReason.STOP)[0]

    assert text == ("yes <b>" if "yes <b>" in said else "" if said == THINK else said)
    # What is too little to be told from a mark comes with the end.
    assert told == (text if len(text.strip()) > 1 else "")


@pytest.mark.parametrize("asked", [{"thinking": "off"}, {"choices": ("yes", "no")}, {"continuations": ("yes", "no")}])
def test_what_a_template_opens_is_closed(load: Load, asked: dict[str, Any]) -> None:
    engine = load(OPENING)

    shown = engine.render(chat(**asked))

    assert shown.endswith(f"assistant\n{THINK}\n\n{END_OF_THINK}\n\n")
    assert engine.render(chat()).endswith(f"assistant\n{THINK}\n")


def test_choices_are_scored_after_the_reasoning(load: Load) -> None:
    """As likely as the same texts after the same prompt as it is."""
    engine = load(OPENING)
    labels = ("yes", "no", "perhaps")
    raw = EngineRequest(0, SamplingParams(continuations=labels), prompt=engine.render(chat(thinking="off")))

    chosen = extras(answer(engine, chat(choices=labels))).choice_probs
    scored = extras(answer(engine, raw)).continuations

    assert chosen is not None
    assert scored is not None
    assert max(chosen, key=chosen.__getitem__) == max(scored, key=lambda each: each["logprob"])["text"]


# --- continuations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "baichuan", "llama-bpe", "gemma-4"])
def test_a_continuation_has_the_tokens_of_the_whole_text(llama_models: Path, name: str) -> None:
    """As plain llama.cpp has them, where prompt and continuation meet between two tokens of the whole."""
    model = LlamaModel(llama_models / f"ggml-vocab-{name}.gguf", vocab_only=True)
    words, reader = model.vocabulary, LlamaPromptReader(model)
    alike = 0
    for prompt, text in product(
        ("Is it an ad? Answer:", "Answer with yes or no.\n", "A"), (" yes", "yes", "\nyes", " not an ad", "é")
    ):
        found = reader.prompt(EngineRequest(0, SamplingParams(), prompt=prompt, continuation=text), 512)

        alone = words.tokens(prompt, parse_special=True).tolist()
        whole = words.tokens(prompt + text, parse_special=True).tolist()
        if whole[: len(alone)] == alone:
            alike += 1
            assert found.tokens.tolist() == whole
        assert b"".join(words.piece(int(each)) for each in found.tokens[len(alone) :]).decode() == text
    assert alike > 6
    model.close()


def test_a_continuation_begins_with_one_space_at_most(llama_models: Path) -> None:
    model = LlamaModel(llama_models / "ggml-vocab-llama-spm.gguf", vocab_only=True)
    request = EngineRequest(0, SamplingParams(), prompt="Answer:", continuation=" yes")

    found = LlamaPromptReader(model).prompt(request, 512)

    assert [model.vocabulary.piece(int(each)) for each in found.tokens[-found.scored :]] == [b" yes"]
    model.close()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_continuation_begins_with_one_space_for_mlx_too(tmp_path: Path, legacy: bool) -> None:
    """As SentencePiece's tokenizers are written for transformers, by a normaliser or by a pre-tokeniser."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder = write_tiny_mlx(tmp_path / "tiny")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *spelled],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["Answer: yes, Answer: no, yes yes no no x"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    reader = MlxTokenizer(folder)
    prompt = EngineRequest(0, SamplingParams(), prompt="Answer:")

    tokens = reader.tokens(prompt).tolist()
    more = reader.continuation(" yes", closed=False, after=tokens[-1]).tolist()

    whole = reader.tokens(EngineRequest(0, SamplingParams(), prompt="Answer: yes")).tolist()
    assert [*tokens, *more] == whole
    assert [*tokens, *reader.continuation("yes", closed=False, after=tokens[-1])] == reader.tokens(
        EngineRequest(0, SamplingParams(), prompt="Answer:yes")
    ).tolist()
