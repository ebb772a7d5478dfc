"""Tools by the official client: offered, called, answered; whole, streamed and in batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.conftest import ECHO, Starter, batch_lines, finished
from tests.unit.test_tool_calls import TOOL_TEMPLATE
from tests.unit.tiny_models import write_tiny_gguf

PLACE = {
    "type": "object", "properties": {"place": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["place"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": PLACE}}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'


def ask(client: openai.OpenAI, text: str, model: str = ECHO, **options: Any) -> Any:
    asked = {"tools": [WEATHER, TIME]} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **asked)


def test_an_answer_that_calls_something(client: openai.OpenAI) -> None:
    answer = ask(client, f"Let me see. {CALL}{CALL}")
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert [each.function.name for each in choice.message.tool_calls] == ["weather", "weather"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"place": "Rome"}
    assert len({each.id for each in choice.message.tool_calls}) == 2
    assert ask(client, CALL).choices[0].message.content is None
    assert len(ask(client, CALL + CALL, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    plain = ask(client, CALL, tool_choice="none").choices[0]
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", CALL, None)


def test_what_was_called_goes_on_as_history(client: openai.OpenAI) -> None:
    message = ask(client, CALL).choices[0].message
    turns: list[Any] = [
        {"role": "user", "content": "How is Rome?"}, message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny in Rome"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model=ECHO, messages=turns, tools=[WEATHER])
    assert answer.choices[0].message.content == "sunny in Rome"


@pytest.mark.parametrize("lead", ["", "Let me see. "])
def test_calls_are_streamed_whole_and_text_as_it_comes(client: openai.OpenAI, lead: str) -> None:
    chunks = list(ask(client, f"{lead}{CALL}{CALL}", stream=True, logprobs=True))
    deltas = [each.choices[0].delta for each in chunks]
    assert "".join(each.content or "" for each in deltas) == lead.strip()
    calls = [call for each in deltas for call in each.tool_calls or ()]
    assert [(each.index, each.function.name) for each in calls] == [(0, "weather"), (1, "weather")]
    assert json.loads(calls[1].function.arguments) == {"place": "Rome"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    tokens = [t for each in chunks if each.choices[0].logprobs for t in each.choices[0].logprobs.content]
    assert "".join(each.token for each in tokens) == f"{lead}{CALL}{CALL}"
    braces = list(ask(client, "{a set} of words", stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in braces) == "{a set} of words"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": openai.NOT_GIVEN, "tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ],
)
def test_tools_that_cannot_be_used(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x", **changes)
    assert caught.value.param == param


def test_a_batch_has_calls_in_its_output(client: openai.OpenAI) -> None:
    lines = [json.loads(each) for each in batch_lines(2).splitlines()]
    lines[0]["body"] |= {"messages": [{"role": "user", "content": CALL}], "tools": [WEATHER]}
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("b.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    ended = finished(client, batch.id)
    assert ended.request_counts.completed == 2
    found = [json.loads(each) for each in client.files.content(ended.output_file_id).text.splitlines()]
    first, second = (each["response"]["body"]["choices"][0] for each in found)
    assert first["finish_reason"] == "tool_calls"
    assert first["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"place": "Rome"}'}
    assert second["finish_reason"] == "stop"
    assert "tool_calls" not in second["message"]


def test_a_real_model_is_bound_to_a_call_and_one_without_tools_refuses_them(start: Starter, tmp_path: Path) -> None:
    knows = write_tiny_gguf(tmp_path / "knows.gguf", context=2048, chat_template=TOOL_TEMPLATE)
    plain = write_tiny_gguf(tmp_path / "plain.gguf", context=2048)
    start.worker(str(knows), str(plain))
    client = start.server().client()
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = ask(client, "How is it?", "knows", tool_choice=choice, tools=[WEATHER], max_tokens=200)
        assert answer.choices[0].finish_reason == "tool_calls"
        call = answer.choices[0].message.tool_calls[0].function
        assert call.name == "weather"
        assert json.loads(call.arguments)["place"] in ("Rome", "Oslo")
    streamed = list(ask(client, "How is it?", "knows", tool_choice="required", tools=[WEATHER], stream=True))
    assert [each.choices[0].finish_reason for each in streamed][-1] == "tool_calls"
    free = ask(client, "How is it?", "knows", max_tokens=5)
    # The tools are in the prompt.
    assert (
        free.usage.prompt_tokens > ask(client, "How is it?", "knows", tools=[], max_tokens=5).usage.prompt_tokens + 50
    )
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        ask(client, "How is it?", "plain", max_tokens=5)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
