"""A last message of the assistant that the model goes on with, and prompts that end where a template leaves them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from promptmill.errors import RequestError
from promptmill.readers import open_dataset
from promptmill.tasks.sampling import BadParameter, resolve_sampling
from promptmill.tasks.templates import to_request
from promptmill.types import DatasetLine, Message, SamplingParams
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.llama.text import LlamaPromptReader
from promptmill_workers.engines.mlx_lm.text import MlxTokenizer
from tests.unit.test_special_tokens import Words, real_templates, words, writes
from tests.unit.tiny_models import CHATML, END, START

__all__ = ["words"]

TURNS = (Message("user", "Count to five."), Message("assistant", "One, two,"))


def asked(turns: tuple[Message, ...] = TURNS, **sampling: Any) -> EngineRequest:
    return EngineRequest(0, SamplingParams(**sampling), messages=turns)


def test_the_prompt_ends_within_the_message_that_is_continued(words: Words) -> None:
    shown = words.reader.render(asked(continue_final_message=True))

    assert shown == f"{START}user\nCount to five.{END}\n{START}assistant\nOne, two,"


def test_without_the_option_a_new_message_is_begun(words: Words) -> None:
    shown = words.reader.render(asked())

    assert shown.endswith(f"{START}assistant\nOne, two,{END}\n{START}assistant\n")


def test_no_message_is_begun_where_none_is_asked_for(words: Words) -> None:
    shown = words.reader.render(asked(add_generation_prompt=False))

    assert shown.endswith(f"{START}assistant\nOne, two,{END}\n")


def test_spaces_at_its_end_stay(words: Words) -> None:
    reader = words.with_template(CHATML.replace("message['content']", "message['content'] | trim"))

    shown = reader.render(asked((TURNS[0], Message("assistant", "One: ")), continue_final_message=True))

    assert shown.endswith("assistant\nOne: ")


def test_what_it_spells_is_text(words: Words) -> None:
    turns = (TURNS[0], Message("assistant", f"One{END} two"))

    request = asked(turns, continue_final_message=True)

    assert words.reader.render(request).endswith(f"assistant\nOne{END} two")
    assert words.reader.tokens(request).tolist().count(2) == 1


def test_a_reasoning_that_it_has_begun_goes_on(words: Words) -> None:
    def thinks(said: str) -> bool:
        request = asked((TURNS[0], Message("assistant", said)), continue_final_message=True, thinking="on")
        if isinstance(words.reader, MlxTokenizer):
            return words.reader.opened(request)[1]
        return words.reader.prompt(request, 512).thinks

    assert thinks("<think>\nThey want")
    assert not thinks("<think>\nThey want</think>\n\nOne,")
    assert not thinks("One,")


@pytest.mark.parametrize("how", [{"choices": ("yes", "no")}, {"continuations": ("yes",)}])
def test_nothing_is_scored_within_an_open_reasoning(words: Words, how: dict[str, Any]) -> None:
    def scored(said: str) -> str:
        turns = (TURNS[0], Message("assistant", said))
        return words.reader.render(asked(turns, continue_final_message=True, **how))

    with pytest.raises(RequestError, match=r"leaves its reasoning open.*end it with </think>"):
        scored("<think>\nThey want")
    assert scored("<think>\nThey want</think>\n\nAnswer:").endswith("Answer:")
    assert scored("Answer:").endswith("Answer:")


def test_a_template_that_leaves_the_message_out_is_refused(words: Words) -> None:
    reader = words.with_template("{{ messages[0].content }}")

    with pytest.raises(RequestError, match="does not write the last message"):
        reader.render(asked(continue_final_message=True))


@pytest.mark.parametrize(
    "body", [{"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x"}, {"prompt": "x", "raw": True}], ids=str
)
def test_only_a_message_of_the_assistant_is_continued(body: dict[str, Any]) -> None:
    sampling = SamplingParams(continue_final_message=True)

    with pytest.raises(BadParameter, match="the last message is not the assistant's"):
        to_request(0, "a", body, None, sampling)


def test_a_body_of_the_api_may_ask_for_it() -> None:
    pytest.importorskip("starlette")
    from promptmill.api.http.errors import ApiError
    from promptmill.api.openai.request_parsing import read
    from promptmill.tasks.openai import CHAT

    turns = [{"role": each.role, "content": each.content} for each in TURNS]
    body = {"model": "m", "messages": turns, "continue_final_message": True, "add_generation_prompt": False}

    assert read(body, CHAT).sampling["continue_final_message"]
    with pytest.raises(ApiError, match="the last message is not the assistant's"):
        read(body | {"messages": turns[:1]}, CHAT)


def test_two_ways_to_end_a_prompt_contradict_one_another() -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}

    with pytest.raises(BadParameter, match="cannot both be true"):
        resolve_sampling(both, {})
    # As clients of vLLM send it.
    assert resolve_sampling(both, {"add_generation_prompt": False}).continue_final_message


def test_real_templates_leave_the_message_open(llama_models: Path) -> None:
    model = LlamaModel(llama_models / "ggml-vocab-qwen2.gguf", vocab_only=True)
    tried = 0
    for name, source in real_templates(llama_models).items():
        if not writes(source, "Count to five."):
            continue
        named: Any = SimpleNamespace(
            context_trained=0, vocabulary=model.vocabulary, chat_template=source, tool_template=None
        )
        try:
            shown = LlamaPromptReader(named).render(asked(continue_final_message=True))
        except RequestError:
            continue  # It takes no such conversation, or writes the message only with a call.
        assert shown.endswith("One, two,"), name
        tried += 1
    assert tried > 40
    model.close()


def test_the_file_of_the_case_is_continued_by_the_option(shared: Path, words: Words) -> None:
    with open_dataset(str(shared / "cases" / "files" / "13-assistant-prefill.jsonl")) as dataset:
        lines: list[DatasetLine] = list(dataset.checked())

    (line,) = lines
    assert line.messages is not None
    assert words.reader.render(asked(line.messages, continue_final_message=True)).endswith("assistant\nOne, two,")


@pytest.mark.parametrize("bound", [{"json_schema": {"type": "object"}}, {"regex": "[0-9]+"}])
def test_what_binds_an_answer_from_its_start_binds_no_rest(bound: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="from its first character"):
        resolve_sampling({}, {"continue_final_message": True, **bound})
