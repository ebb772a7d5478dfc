"""Bodies of calls, checked by hand: clients are told what OpenAI's API would tell them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

from promptmill.api.http.errors import ApiError, bad, missing
from promptmill.tasks.sampling import as_whole

#: JSON type -> how it is called in an error.
KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"), (int, "an integer"), (float, "a decimal"), (str, "a string"), (list, "an array"),
    (dict, "an object"), (type(None), "null"),
)  # fmt: skip

#: Levels of arrays and objects in a body. JSON is written to 254 at most, and schemas are checked by recursion.
DEEPEST = 100

#: Values of a body, counted by what stands between them: a tenth of a second of reading.
MOST_VALUES = 250_000

MOST_METADATA, LONGEST_METADATA_KEY, LONGEST_METADATA_VALUE = 16, 64, 512


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises a 400 for anything else."""
    data = await request.body()
    opening = data.count(b"[") + data.count(b"{")
    if opening + data.count(b",") > MOST_VALUES:
        raise ApiError(413, f"The body holds more than {MOST_VALUES:,} values: send large data as a file.")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise bad("We could not parse the JSON body of your request.") from None
    if opening > DEEPEST and _is_deep(value):
        raise bad(f"The body is nested more than {DEEPEST} levels deep.", None, "invalid_value")
    if not isinstance(value, dict):
        raise bad(
            f"Invalid type for the body: expected an object, but got {kind(value)} instead.", None, "invalid_type"
        )
    return value


def _is_deep(value: Any) -> bool:
    """Whether a parsed body has more than DEEPEST levels: what works on it calls itself for each."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values]
        if not level:
            return False
    return True


def kind(value: Any) -> str:
    return next((name for each, name in KINDS if isinstance(value, each)), "another value")


def wrong_type(name: str, wanted: str, value: Any) -> ApiError:
    return bad(f"Invalid type for '{name}': expected {wanted}, but got {kind(value)} instead.", name, "invalid_type")


def text(
    body: Mapping[str, Any], name: str, *, required: bool = False, longest: int = 4096, within: str = ""
) -> str | None:
    """A text of the body; None when it is absent or null. ``within`` is what its name begins with in an error."""
    value = body.get(name)
    name = within + name
    if value is None:
        if required:
            raise missing(name)
        return None
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if len(value) > longest or (required and not value):
        raise bad(f"Invalid value for '{name}': expected 1 to {longest} characters.", name, "invalid_value")
    if "\0" in value or not _is_unicode(value):
        raise bad(f"Invalid value for '{name}': it holds what is no text.", name, "invalid_value")
    return value


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_of(
    body: Mapping[str, Any], name: str, allowed: tuple[str, ...], *, required: bool = False, within: str = ""
) -> str | None:
    value = text(body, name, required=required, within=within)
    name = within + name
    if value is not None and value not in allowed:
        listed = ", ".join(f"'{each}'" for each in allowed)
        raise bad(f"Invalid value: '{value[:100]}'. Supported values are: {listed}.", name, "invalid_value")
    return value


def whole(
    body: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None, *, within: str = ""
) -> int | None:
    value = as_whole(body.get(name))
    name = within + name
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    if not low <= value <= high:
        raise bad(f"Invalid value for '{name}': expected {low} to {high:,}.", name, "invalid_value")
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return value


def metadata(body: Mapping[str, Any]) -> dict[str, str] | None:
    """Up to 16 pairs of short texts."""
    value = body.get("metadata")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type("metadata", "an object", value)
    if len(value) > MOST_METADATA:
        raise bad(f"Invalid 'metadata': at most {MOST_METADATA} pairs.", "metadata", "object_above_max_properties")
    for name in value:
        if len(name) > LONGEST_METADATA_KEY:
            raise bad(f"Invalid 'metadata': a name is longer than {LONGEST_METADATA_KEY}.", "metadata", "invalid_value")
        if text(value, name, longest=LONGEST_METADATA_VALUE, within="metadata.") is None:
            raise wrong_type(f"metadata.{name}", "a string", None)
    return value


def known_only(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises a 400 for a field without a meaning: it is never passed over in silence."""
    unknown = sorted(body.keys() - set(known))
    if unknown:
        name = unknown[0][:100]
        raise bad(f"Unknown parameter: '{name}'.", name, "unknown_parameter")


def query_whole(request: Request, name: str, low: int, high: int, default: int) -> int:
    """A number of the query."""
    value = request.query_params.get(name)
    if value is None:
        return default
    number = number_in(value)
    if number is None or not low <= number <= high:
        raise bad(f"Invalid value for '{name}': expected {low} to {high:,}.", name, "invalid_value")
    return number


def number_in(text: str) -> int | None:
    """A whole number of up to 12 digits; None for anything else, such as digits that are no ASCII."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,12}", text) else None


def page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A list as OpenAI's API has it; ``has_more`` always, or clients ask for ever."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
