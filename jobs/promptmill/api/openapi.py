"""What the OpenAPI document says of bodies, queries and errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip

MEANINGS = {
    400: "The request cannot be served as it is.", 401: "No valid API key.", 403: "The key, or the page, may not.",
    404: "There is no such object, or it is another key's.", 408: "The body came too slowly.",
    409: "The object's state does not allow it.", 413: "Too large.", 415: "Not that kind of content.",
    429: "Too much at a time; Retry-After says when to come back.", 431: "The headers are too long.",
    500: "A bug.", 502: "The model could not answer.",
    503: "The database, Redis or a worker is away; try again.", 504: "No answer in time.",
}  # fmt: skip

#: Any call may end like this.
ALWAYS = (400, 401, 403, 408, 413, 415, 429, 503)


def responses(*more: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a call, beside those of every call."""
    return {
        status: {"description": MEANINGS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in sorted({*ALWAYS, *more})
    }


def content(*more: int, kind: str = "application/octet-stream") -> dict[int | str, dict[str, Any]]:
    """The same for a call that answers with other content than JSON."""
    ok: dict[str, Any] = {"description": "The content", "content": {kind: {}}}
    found: dict[int | str, dict[str, Any]] = {200: ok, **responses(*more)}
    if kind == "application/octet-stream":
        found |= {206: ok, 416: {"description": "Not a part of it"}}
    return found


def body(schema: dict[str, Any] | type[BaseModel], kind: str = "application/json") -> dict[str, Any]:
    found = schema if isinstance(schema, dict) else _of_model(schema)
    return {"requestBody": {"required": True, "content": {kind: {"schema": found}}}}


def _of_model(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model, with what it refers to in place: the document has no place for definitions of one call."""
    whole = model.model_json_schema()
    parts = whole.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {name: inlined(each) for name, each in value.items() if name != "$ref"}
            return inlined(parts[value["$ref"].rpartition("/")[2]]) | kept if "$ref" in value else kept
        return [inlined(each) for each in value] if isinstance(value, list) else value

    found: dict[str, Any] = inlined(whole)
    return found


def query(*parameters: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": [{"in": "query", "required": False, **each} for each in parameters]}


def number(name: str, low: int, high: int, default: int) -> dict[str, Any]:
    return {"name": name, "schema": {"type": "integer", "minimum": low, "maximum": high, "default": default}}


def words(name: str, *allowed: str) -> dict[str, Any]:
    return {"name": name, "schema": {"type": "string", **({"enum": list(allowed)} if allowed else {})}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


TEXT: dict[str, Any] = {"type": "string"}

UPLOAD = body(
    _object(
        ["file", "purpose"], file={"type": "string", "format": "binary"},
        purpose={"type": "string", "enum": ["batch", "user_data"]},
    ),
    "multipart/form-data",
)  # fmt: skip

FILE_LIST = query(number("limit", 1, 10_000, 10_000), words("after"), words("order", "asc", "desc"), words("purpose"))
PAGED = query(number("limit", 1, 100, 20), words("after"))

_TOOL = _object(
    ["type", "function"], type={"type": "string", "enum": ["function"]},
    function=_object(
        ["name"], name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, description=TEXT,
        parameters={"type": "object", "description": "A JSON schema."}, strict={"type": ["boolean", "null"]},
    ),
)  # fmt: skip

_TOOL_CHOICE: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        _object(
            ["type", "function"], type={"type": "string", "enum": ["function"]}, function=_object(["name"], name=TEXT)
        ),
    ]
}

_CALL = _object(
    ["function"], id=TEXT, type={"type": "string", "enum": ["function"]},
    function=_object(["name", "arguments"], name=TEXT, arguments={"type": "string", "description": "A JSON object."}),
)  # fmt: skip

_MESSAGE = _object(
    ["role"],
    role={"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
    content={"anyOf": [TEXT, {"type": "array", "items": _object(["type", "text"], type=TEXT, text=TEXT)}]},
    tool_calls={"type": "array", "items": _CALL, "minItems": 1},
    tool_call_id=TEXT,
    reasoning_content={"type": ["string", "null"], "description": "What the assistant thought before it answered."},
)

#: What all completions take; OpenAI's own documents say what each means.
_SAMPLING: dict[str, Any] = {
    "model": TEXT,
    "stream": {"type": "boolean"},
    "stream_options": _object([], include_usage={"type": "boolean"}),
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
    "seed": {"type": "integer"},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "user": TEXT,
}

CHAT = body(
    _object(
        ["model", "messages"], **_SAMPLING,
        messages={"type": "array", "minItems": 1, "items": _MESSAGE},
        max_completion_tokens={"type": "integer", "minimum": 1},
        logprobs={"type": "boolean"}, top_logprobs={"type": "integer", "minimum": 0, "maximum": 20},
        tools={"type": "array", "items": _TOOL, "maxItems": 128}, tool_choice=_TOOL_CHOICE,
        parallel_tool_calls={"type": "boolean"},
        response_format=_object(["type"], type={"type": "string", "enum": ["text", "json_object", "json_schema"]}),
    )
)  # fmt: skip

COMPLETION = body(
    _object(
        ["model", "prompt"], **_SAMPLING,
        prompt={"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 128}]},
        logprobs={"type": "integer", "minimum": 0, "maximum": 20},
    )
)  # fmt: skip

EMBEDDING = body(
    _object(
        ["model", "input"], model=TEXT,
        input={"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2048}]},
        encoding_format={"type": "string", "enum": ["float", "base64"]}, user=TEXT,
    )
)  # fmt: skip

JOB_LIST = query(
    number("limit", 1, 100, 20), words("after"),
    words("state", "queued", "running", "paused", "completed", "failed", "cancelled", "expired"),
)  # fmt: skip
RESULTS = query(number("after", -1, 2**31 - 1, -1), words("failed", "true", "false"))
REPORT = query(words("format", "json", "html"))
