"""CSV for people: spreadsheets run a cell that begins in certain ways as a formula, even one a model wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: How a formula begins, in any of the spreadsheets; the last four are what some locales type for the first four.
_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf)( ?%)?")


def inert(cells: Iterable[Any]) -> list[Any]:
    """Cells with a ' before each text that would be run. Numbers stay numbers, also those that are written as text."""
    return [f"'{each}" if _is_formula(each) else each for each in cells]


def _is_formula(cell: Any) -> bool:
    return isinstance(cell, str) and cell.startswith(_BEGINNINGS) and not _NUMBER.fullmatch(cell)
