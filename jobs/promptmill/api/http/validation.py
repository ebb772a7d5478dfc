"""Bodies of calls as models, and queries: clients are told what OpenAI's API would tell them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import orjson
from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
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


#: Pairs of metadata at most; and the kind of our own error for a field without a meaning.
MOST_PAIRS, UNKNOWN = 16, "unknown_parameter"


def _plain(value: str) -> str:
    if "\0" in value:
        raise ValueError("it holds a NUL character")
    return value


#: On texts that are stored: PostgreSQL has no NUL.
PLAIN = AfterValidator(_plain)

#: A whole number, which some clients write as 8.0.
Whole = Annotated[int, BeforeValidator(as_whole)]


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_PAIRS:
        raise PydanticCustomError("too_long", "at most {most} pairs", {"most": MOST_PAIRS})
    return value


#: Up to 16 pairs of short texts.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64), PLAIN], Annotated[str, Field(max_length=512), PLAIN]],
    BeforeValidator(_few),
    Field(max_length=MOST_PAIRS),
]

#: What pydantic calls a wrong type -> what was expected.
EXPECTED = {
    "string_type": "a string", "int_type": "an integer", "bool_type": "a boolean", "float_type": "a number",
    "dict_type": "an object", "model_type": "an object", "list_type": "an array",
}  # fmt: skip


class Body(BaseModel):
    """A body, or an object in one. A field without a meaning is never passed over in silence; null is not set."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # Not left to pydantic, which would list each of a body's 250,000 fields.
        if cls.model_config.get("extra") == "forbid" and (unknown := given.keys() - cls.model_fields.keys()):
            raise PydanticCustomError(UNKNOWN, "{name}", {"name": min(unknown)})
        return {name: each for name, each in given.items() if each is not None}

    @classmethod
    async def read(cls, request: Request) -> Self:
        """Raises a 400 for a body that is none."""
        return cls.of(await read_object(request))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises a 400."""
        try:
            return cls.model_validate(given)
        except ValidationError as problem:
            raise _refusal(problem.errors(include_url=False)) from None


def _refusal(found: Sequence[ErrorDetails]) -> ApiError:
    """The first thing that is wrong, in OpenAI's words."""
    first = found[0]
    parts = [*first["loc"], first["msg"]] if first["type"] == UNKNOWN else first["loc"]
    name = ".".join(str(part) for part in parts if part != "[key]")[:100].replace("\0", "\N{REPLACEMENT CHARACTER}")
    match first["type"], first["input"]:
        case "missing", _:
            return missing(name)
        case kind_of_error, _ if kind_of_error == UNKNOWN:
            return bad(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        case kind_of_error, value if kind_of_error in EXPECTED:
            return wrong_type(name, EXPECTED[kind_of_error], value)
        case "literal_error", str(value):
            listed = first["ctx"]["expected"]
            return bad(f"Invalid value: '{value[:100]}'. Supported values are: {listed}.", name, "invalid_value")
        case "literal_error", value:
            return wrong_type(name, "a string", value)
        case kind_of_error, _:
            what = first["msg"].removeprefix("Value error, ")
            code = "object_above_max_properties" if kind_of_error == "too_long" else "invalid_value"
            return bad(f"Invalid value for '{name}': {what[0].lower()}{what[1:]}.", name, code)


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
