"""Names to objects, imported on demand: engines, readers, scorers, reports and commands are all listed this way."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from promptmill.errors import UnknownName


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that lists ``known`` names, the nearest to ``name`` first where one is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object that ``table[name]`` ("module:attribute") names.

    Raises :class:`UnknownName` with the known names when ``name`` is not in the table.
    """
    if name not in table:
        raise UnknownName(f"unknown {kind} '{name}'", hint=suggestion(name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
