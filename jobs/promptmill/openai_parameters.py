"""The parameters of OpenAI's request bodies as ours. What would change an answer and cannot be obeyed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promptmill.registry import suggestion
from promptmill.sampling import ALIASES, PARAMETERS, BadParameter, check_parameters

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

#: Parameters that change nothing about an answer of ours: with these values they may be given.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "stream": (False, None), "store": (False, None), "echo": (False, None), "best_of": (1, None),
    "encoding_format": ("float", None), "tool_choice": ("none", None), "tools": ([], None),
}  # fmt: skip

#: Notes of the client to itself.
NOTES = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}

KNOWN = {*PARAMETERS, *ALIASES, "response_format"}

#: Parameters of embeddings that are not offered, and why.
NOT_OFFERED = {
    "encoding_format": "vectors are lists of numbers: give 'float'",
    "dimensions": "vectors have the model's own size",
}

#: Highest temperature of that format; lines of our own may go higher.
HOTTEST = 2


def translate(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """``body`` without model, messages, prompt and input, as sampling parameters.

    Raises :class:`BadParameter` naming the field.
    """
    asked: dict[str, Any] = {}
    for name, value in body.items():
        if name in NOT_OFFERED and value not in (None, *HARMLESS.get(name, ())):
            raise BadParameter(f"unsupported parameter 'body.{name}': {NOT_OFFERED[name]}")
        if name in HARMLESS:
            if not any(value == each and type(value) is type(each) for each in HARMLESS[name]):
                raise BadParameter(f"unsupported parameter 'body.{name}': it would change the answer")
        elif name not in NOTES and value is not None:
            if name not in KNOWN:
                raise BadParameter(f"unsupported parameter 'body.{name[:40]}'. {suggestion(name, KNOWN)}")
            asked[name] = value
    asked |= _response_format(asked.pop("response_format", None))
    if url == COMPLETIONS:
        asked |= _completions_logprobs(asked.pop("logprobs", None))
    found = check_parameters(asked)
    if found.get("temperature", 0) > HOTTEST:
        raise BadParameter(f"'temperature' must be a number from 0 to {HOTTEST}")
    if url == EMBEDDINGS:
        if found:
            raise BadParameter(f"unsupported parameter 'body.{min(found)}' of an embedding")
        return {"embedding": True}
    return found


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
