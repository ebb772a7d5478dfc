"""A flat record becomes the input of a template; what is expected, and what names the line, is taken out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


class BadLine(Exception):
    """Why a line cannot be used."""


def from_fields(number: int, record: Mapping[str, Any], layout: Layout) -> DatasetLine:
    """A line whose fields are all input but id, ``meta``, ``expected`` and the fields that ``layout`` expects.

    Where ``layout`` names the input fields, the line has these and no others.
    """
    fields = dict(record)
    custom_id = mapped_id(fields, layout)
    expected = take_expected(fields, layout.expected)
    meta = take_object(fields, "meta")
    if layout.meta:
        meta = (meta or {}) | {name: lookup(record, path) for name, path in layout.meta.items()}
    if layout.input:
        fields = {name: lookup(record, path) for name, path in layout.input.items()}
    return DatasetLine(number, custom_id, fields=fields, expected=expected, meta=meta)


def mapped_id(fields: dict[str, Any], layout: Layout) -> str | None:
    """Remove the id: the field that ``layout`` names, else ``id`` and ``custom_id``."""
    if layout.id is None:
        return take_id(fields)
    value = lookup(fields, layout.id)
    fields.pop(layout.id, None)
    return as_id(value)


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The field ``path`` of the record: its very name, else a path of names such as ``context.title``."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            here = ", ".join(map(str, record)) or "none"
            raise BadLine(f"the line has no field '{path[:40]}'; its fields: {here[:200]}")
        value = value[name]
    return value


def has_field(record: Mapping[str, Any], path: str) -> bool:
    """Whether :func:`lookup` would find something."""
    try:
        lookup(record, path)
    except BadLine:
        return False
    return True


def take_id(fields: dict[str, Any]) -> str | None:
    """Remove ``id`` and ``custom_id``. Raises BadLine when they differ or are neither text nor whole numbers."""
    found = [fields.pop(name) for name in ("custom_id", "id") if name in fields]
    texts = [as_id(value) for value in found if value is not None]
    if len(set(texts)) > 1:
        raise BadLine("id and custom_id differ")
    return texts[0] if texts else None


def peek_id(record: Any) -> str | None:
    """The id of a line that cannot be used, where it has one: its error is then reported under it."""
    try:
        found = take_id(dict(record)) if isinstance(record, dict) else None
    except BadLine:
        return None
    return found if found is not None and storable(found) == found else None


def storable(text: str) -> str:
    """``text`` without what no database takes: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def as_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadLine(f"an id is a text or a whole number, not {kind(value)}")
    if value == "":
        raise BadLine("the id is empty")
    return str(value)


def take_object(fields: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, dict):
        raise BadLine(f"'{name}' is {kind(value)}, not an object")
    return value


def take_expected(fields: dict[str, Any], names: Mapping[str, str]) -> Any:
    """Remove what is expected: the fields that the task names, and the field ``expected`` itself."""
    named = take_named(fields, names)
    given = fields.pop("expected", None)
    if not named:
        return given
    return {**given, **named} if isinstance(given, dict) else named


def take_named(fields: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Remove the fields that the task expects; those that the line does not have are left out."""
    named = {name: lookup(fields, field) for name, field in names.items() if has_field(fields, field)}
    for field in names.values():
        fields.pop(field, None)
    return named


def kind(value: Any) -> str:
    """What JSON calls the type of ``value``."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
