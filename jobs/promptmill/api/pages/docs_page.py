"""The page of the API: every call of the OpenAPI document, rendered here, without a script."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: Levels of objects in a body that are shown; the document has the rest.
DEEPEST = 3


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter or a field of a body. ``name`` is its path, such as ``stream_options.include_usage``."""

    name: str
    kind: str
    required: bool
    about: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One call."""

    method: str
    path: str
    summary: str
    about: str
    fields: list[Field]
    answers: list[tuple[str, str]]


def calls(document: dict[str, Any]) -> dict[str, list[Operation]]:
    """The calls of an OpenAPI document, by tag."""
    found: dict[str, list[Operation]] = {}
    for path, methods in document["paths"].items():
        for method, each in methods.items():
            for tag in each.get("tags", ["Others"]):
                found.setdefault(tag, []).append(_operation(method, path, each))
    return found


def _operation(method: str, path: str, found: dict[str, Any]) -> Operation:
    fields = [
        Field(each["name"], _kind(each["schema"]), each.get("required", False), _limits(each["schema"]))
        for each in found.get("parameters", ())
    ]
    for content in found.get("requestBody", {}).get("content", {}).values():
        fields += _fields(content["schema"])
    answers = [(status, each["description"]) for status, each in sorted(found["responses"].items())]
    return Operation(method.upper(), path, found.get("summary", ""), found.get("description", ""), fields, answers)


def _fields(schema: dict[str, Any], within: str = "", depth: int = 1) -> Iterator[Field]:
    required = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        about = " ".join(part for part in (each.get("description", ""), _limits(each)) if part)
        yield Field(within + name, _kind(each), name in required, about)
        inner, mark = (each["items"], "[].") if "items" in each else (each, ".")
        if depth < DEEPEST:
            yield from _fields(inner, within + name + mark, depth + 1)


def _kind(schema: dict[str, Any]) -> str:
    """The type in words: ``array of string``, ``string or array of string``."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    return f"array of {_kind(schema['items'])}" if "items" in schema else str(kind)


def _limits(schema: dict[str, Any]) -> str:
    """What values are allowed, and which stands for none."""
    parts = []
    if "enum" in schema:
        parts.append(", ".join(str(each) for each in schema["enum"]) + ".")
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is not None and high is not None:
        parts.append(f"{'more than ' if 'exclusiveMinimum' in schema else ''}{low:,.12g} to {high:,.12g}.")
    elif low is not None:
        parts.append(f"{low:,.12g} or more.")
    if "default" in schema:
        parts.append(f"Default {schema['default']}.")
    return " ".join(parts)
