"""A flat record becomes the input of a template; what is expected, and what names the line, is taken out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from promptmill.tasks.sampling import as_whole, is_empty
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


class BadLine(Exception):
    """Why a line cannot be used."""


def from_fields(number: int, record: Mapping[str, Any], layout: Layout) -> DatasetLine:
    """A line whose keys are all fields of a template but the id, what is expected, and a ``meta`` that is an object.

    Where ``layout`` names the input fields, the line has these and no others. No mapping reaches what is expected.
    """
    expected, visible = split_expected(record, layout.expected)
    fields = dict(visible)
    custom_id = mapped_id(fields, record, layout)
    meta = fields.pop("meta") if isinstance(fields.get("meta"), dict) else None
    try:
        if layout.meta:
            meta = (meta or {}) | {name: lookup(visible, path) for name, path in layout.meta.items()}
        if layout.input:
            fields = {name: lookup(visible, path) for name, path in layout.input.items()}
    except BadLine as problem:
        # A row that cannot be asked may count as wrong: what it expects is known.
        return DatasetLine(number, custom_id, expected=expected, error=str(problem))
    return DatasetLine(number, custom_id, fields=fields, expected=expected, meta=meta)


def mapped_id(fields: dict[str, Any], record: Mapping[str, Any], layout: Layout) -> str | None:
    """The id of a record, which is taken out of its ``fields``: the field that ``layout`` names, else ``id``."""
    if layout.id is None:
        return take_id(fields)
    fields.pop(layout.id, None)
    return as_id(lookup(record, layout.id))


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
    """A text, or a whole number, which table libraries write as 7.0 where another row has none."""
    value = as_whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadLine(f"an id is a text or a whole number, not {kind(value)}")
    if value == "":
        raise BadLine("the id is empty")
    return str(value)


def take_object(fields: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = fields.pop(name, None)
    if not isinstance(value, dict) and not is_empty(value):
        raise BadLine(f"'{name}' is {kind(value)}, not an object")
    return value if isinstance(value, dict) else None


def split_expected(record: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """What is expected, and the record without it: the fields that the task names, and the field ``expected``."""
    named, rest = split_named(record, names)
    given = rest.pop("expected", None)
    if not named:
        return given, rest
    return ({**given, **named} if isinstance(given, dict) else named), rest


def split_named(record: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that the task expects, and the record without them; those that the line lacks are left out."""
    rest = dict(record)
    if not names:
        return {}, rest
    named = {name: lookup(record, field) for name, field in names.items() if has_field(record, field)}
    for field in names.values():
        rest = _without(rest, field)
    return named, rest


def _without(record: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The record without a field, also one inside an object: a template may see the rest of the object."""
    if path in record:
        return {name: value for name, value in record.items() if name != path}
    name, _, inner = path.partition(".")
    value = record.get(name)
    if inner and isinstance(value, dict):
        return {**record, name: _without(value, inner)}
    return dict(record)


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
