"""Bodies of the API: null is "not set" wherever a client may write it, and a whole number may be a decimal."""

from __future__ import annotations

import time
from typing import Any

import pytest

from promptmill.api.batches.batches import BatchBody
from promptmill.api.http.errors import ApiError
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


MANY = {f"k{n}": n for n in range(200_000)}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (MANY, "k0", "unknown_parameter"),
        ({"zz": None}, "zz", "unknown_parameter"),
        ({"output_expires_after": MANY}, "output_expires_after.k0", "unknown_parameter"),
        ({"metadata": MANY}, "metadata", "object_above_max_properties"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"priority": 10}, "priority", "invalid_value"),
        ({"endpoint": 5}, "endpoint", "invalid_type"),
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_body_is_told_at_once(body: dict[str, Any], param: str, code: str) -> None:
    whole = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"} | body
    started = time.process_time()
    with pytest.raises(ApiError) as caught:
        BatchBody.of(whole)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert time.process_time() - started < 0.25


@pytest.mark.parametrize("options", [None, [], "", {}, {"include_usage": None}])
def test_empty_options_of_a_stream_are_none(options: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream_options": options}
    assert read(body, CHAT).include_usage is False
