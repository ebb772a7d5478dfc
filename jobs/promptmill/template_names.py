"""What ``input`` and ``meta`` mean in a template, whatever the fields of a dataset are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promptmill.errors import RequestError

#: The answer key. No template reaches it, by whatever name.
HIDDEN = "expected"


class RenderError(RequestError):
    """A template cannot be filled with a line."""


class Named:
    """A value whose attributes in a template are fields first: ``{{ input.title }}`` is the field ``title``."""

    _fields: Mapping[str, Any]
    _name: str


class Fields(Named, dict[str, Any]):
    """All fields under one name. Written as a whole by mistake it could tell anything, so it is refused."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self)) or "none"
        raise RenderError(
            f"template: '{self._name}' is all fields of the line ({shown[:200]}): name one, such as "
            f"{self._name}.{next(iter(self), 'x')}"
        )


class FieldText(Named, str):
    """The text of a field that is called as its namespace is, with the fields as its attributes."""


class FieldList(Named, list[Any]):
    """The same for a list."""


def names_of(fields: Mapping[str, Any], meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every name that a template sees of a line: its fields, ``input`` with the same fields, and ``meta``."""
    shown = {name: value for name, value in fields.items() if name != HIDDEN}
    about = {name: value for name, value in (meta or {}).items() if name != HIDDEN}
    return {**shown, "input": _named("input", shown, shown), "meta": _named("meta", about, shown)}


def _named(name: str, namespace: Mapping[str, Any], fields: Mapping[str, Any]) -> Named:
    """The namespace ``name``; a field of that name is what it is by itself."""
    own = fields.get(name, namespace)
    found: Named
    if isinstance(own, list):
        found = FieldList(own)
    elif own is None or (isinstance(own, str | int | float) and not isinstance(own, bool)):
        found = FieldText("" if own is None else own)
    else:
        found = Fields(namespace)
    found._fields, found._name = namespace, name
    return found
