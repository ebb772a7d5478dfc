"""Bodies of the API: null is "not set" wherever a client may write it, and a whole number may be a decimal."""

from __future__ import annotations

from typing import Any

import pytest

from promptmill.api.openai.request_parsing import read
from promptmill.tasks.openai import ANSWERED, CHAT, COMPLETIONS, EMBEDDINGS, HARMLESS, NOTES

ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    EMBEDDINGS: {"model": "m", "input": "hi"},
}

OPTIONAL = sorted({*ANSWERED, *HARMLESS, *NOTES, "stream_options", "suffix", "dimensions"})


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("url", sorted(ASKED))
def test_null_in_a_body_is_not_set(url: str, name: str) -> None:
    assert read({**ASKED[url], name: None}, url) == read(ASKED[url], url)


@pytest.mark.parametrize(
    "name", ["name", "tool_calls", "tool_call_id", "reasoning_content", "annotations", "refusal", "audio"]
)
def test_null_in_a_message_is_not_set(name: str) -> None:
    turn = {"role": "assistant", "content": "hi"}
    assert read({"model": "m", "messages": [turn | {name: None}]}, CHAT) == read(
        {"model": "m", "messages": [turn]}, CHAT
    )


def test_null_inside_tools_and_formats_is_not_set() -> None:
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    form = {"type": "json_schema", "json_schema": {"name": "x", "description": None, "strict": None, "schema": {}}}
    assert read({**ASKED[CHAT], "tools": [{"type": "function", "function": function}]}, CHAT).offer is not None
    assert read({**ASKED[CHAT], "response_format": form}, CHAT).sampling["json_schema"] == "{}"
    assert not read({**ASKED[CHAT], "stream": True, "stream_options": {"include_usage": None}}, CHAT).include_usage


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"max_tokens": 8.0}, {"max_tokens": 8}),
        ({"max_completion_tokens": 8.0, "max_tokens": None}, {"max_tokens": 8}),
        ({"n": 2.0, "seed": 5.0, "temperature": 1}, {"n": 2, "seed": 5, "temperature": 1.0}),
        ({"logprobs": True, "top_logprobs": 3.0}, {"logprobs": True, "top_logprobs": 3}),
        ({"best_of": 1.0}, {}),
    ],
)
def test_a_whole_number_may_be_written_as_a_decimal(body: dict[str, Any], found: dict[str, Any]) -> None:
    sampling = read({**ASKED[CHAT], **body}, CHAT).sampling
    assert sampling == {"max_tokens": sampling["max_tokens"], **found}
    assert all(isinstance(value, int) for value in sampling.values() if value != 1.0)
