"""The parameters of OpenAI's request bodies as ours. What would change an answer and cannot be obeyed is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from promptmill.core.registry import suggestion
from promptmill.tasks.sampling import (
    ALIASES,
    CONSTRAINTS,
    PARAMETERS,
    BadParameter,
    as_whole,
    check_parameter,
    check_parameters,
    is_empty,
    is_unset,
)
from promptmill.tasks.tools import names_of, schema_of_calls

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

#: What clients write for a parameter that they do not set. An empty object may ask for something, as that of
#: ``web_search_options`` does.
NOTHING: tuple[Any, ...] = (None, "", [])

#: Parameters that change nothing about an answer of ours: with these values they may be given.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "store": (False,), "echo": (False,), "best_of": (1,), "encoding_format": ("float",),
}  # fmt: skip

#: Notes of the client to itself.
NOTES = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}

KNOWN = {*PARAMETERS, *ALIASES, "response_format", "tool_choice"}

#: What an interactive request may ask for: its answer has no place for scores of given texts, or for vectors.
ANSWERED = KNOWN - {"continuations", "embedding"}

#: Parameters of embeddings that are not offered, and why.
NOT_OFFERED = {
    "encoding_format": "vectors are lists of numbers: give 'float'",
    "dimensions": "vectors have the model's own size",
}

#: Highest temperature of that format; lines of our own may go higher.
HOTTEST = 2


def translate(body: Mapping[str, Any], url: str, known: Collection[str] = KNOWN) -> dict[str, Any]:
    """``body`` without model, messages, prompt and input, as sampling parameters, of which these are ``known``.

    Raises :class:`BadParameter` naming the field.
    """
    asked: dict[str, Any] = {}
    for name, value in body.items():
        if (value in NOTHING and name not in CONSTRAINTS) or (name in PARAMETERS and is_unset(name, value)):
            continue
        if name in NOT_OFFERED and value not in HARMLESS.get(name, ()):
            raise BadParameter(f"unsupported parameter 'body.{name}': {NOT_OFFERED[name]}")
        if name in HARMLESS:
            if not any(as_whole(value) == each and type(as_whole(value)) is type(each) for each in HARMLESS[name]):
                raise BadParameter(f"unsupported parameter 'body.{name}': it would change the answer")
        elif name not in NOTES and value is not None:
            if name not in known:
                raise BadParameter(f"unsupported parameter 'body.{name[:40]}'. {suggestion(name, known)}")
            asked[name] = value
    asked |= _response_format(asked.pop("response_format", None))
    asked |= _tools(asked.pop("tools", None), asked.pop("tool_choice", None), asked, url)
    if url == COMPLETIONS:
        asked |= _completions_logprobs(asked.pop("logprobs", None))
    if "temperature" in asked:
        asked["temperature"] = _temperature(asked["temperature"])
    found = check_parameters(asked)
    if url == EMBEDDINGS:
        if found:
            raise BadParameter(f"unsupported parameter 'body.{min(found)}' of an embedding")
        return {"embedding": True}
    return found


def _temperature(value: Any) -> float:
    problem = BadParameter(f"'temperature' must be a number from 0 to {HOTTEST}")
    try:
        found: float = check_parameter("temperature", value)
    except BadParameter:
        # Its words are those of our own lines, which may be hotter.
        raise problem from None
    if found > HOTTEST:
        raise problem
    return found


def refusal_of(message: str) -> tuple[str | None, str]:
    """The field that a request was refused for, None where the message begins with none, and the code of the error."""
    named = re.match(r"(?:unsupported (?:parameter )?)?'(?:body\.)?([\w.\[\]]{1,80})'", message)
    # A fault of a chat's message, or a key that it may not have.
    name = named[1] if named else "messages" if re.match(r"(?:unsupported key '.*' in )?messages\[", message) else None
    if name is None:
        return None, "invalid_request"
    is_unsupported = message.startswith("unsupported") or message.endswith("knows no tools")
    return name, "unsupported_parameter" if is_unsupported else "invalid_value"


def _tools(tools: Any, choice: Any, asked: dict[str, Any], url: str) -> dict[str, Any]:
    """``tools`` and ``tool_choice``. A call that must be is bound by the schema of its function."""
    if is_empty(tools):
        if not is_empty(choice) and choice != "none":
            raise BadParameter("'tool_choice' is only allowed when 'tools' are given")
        if "parallel_tool_calls" in asked:
            raise BadParameter("'parallel_tool_calls' is only allowed when 'tools' are given")
        return {}
    if url != CHAT:
        raise BadParameter("unsupported parameter 'body.tools': only chat completions have tools")
    text = check_parameter("tools", tools)
    names = names_of(text)
    forced = _forced(choice, names)
    if choice == "none":
        # The model is not told of what it must not call.
        asked.pop("parallel_tool_calls", None)
        return {}
    bound = next((name for name in CONSTRAINTS if asked.get(name) not in (None, False)), None)
    if bound is not None:
        raise BadParameter(f"'tools' are given with {_called(bound)}: an answer that is bound to it calls nothing")
    if not forced:
        return {"tools": text}
    if asked.get("stop"):
        raise BadParameter("'stop' is given with a 'tool_choice' that asks for a call: it would cut the call")
    try:
        return {"tools": text, "json_schema": check_parameter("json_schema", schema_of_calls(text, forced))}
    except BadParameter as problem:
        raise BadParameter(f"'tools' have parameters that cannot be enforced: {problem.message[:200]}") from None


def _called(constraint: str) -> str:
    return "'response_format'" if constraint == "json_schema" else f"'{constraint}'"


def _forced(choice: Any, names: list[str]) -> list[str]:
    """The functions of which one must be called; none where the model may choose."""
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        return names
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise BadParameter(
            """'tool_choice' must be none, auto, required, or {"type": "function", "function": {"name": ...}}"""
        )
    if name not in names:
        raise BadParameter("'tool_choice' names a function that is not among the 'tools'")
    return [name]


def _completions_logprobs(value: Any) -> dict[str, Any]:
    """``logprobs`` of that endpoint is the number of alternatives."""
    if value is None or value is False:
        return {}
    if value is True:
        return {"logprobs": True}
    return {"logprobs": True, "top_logprobs": value}


def _response_format(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict):
            raise BadParameter("'response_format.json_schema.schema' must be a JSON schema: an object")
        return {"json_schema": schema}
    raise BadParameter("'response_format.type' must be text, json_object or json_schema")
