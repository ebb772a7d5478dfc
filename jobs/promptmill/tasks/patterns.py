"""Regular expressions that others wrote: searched without backtracking where that can be, else for a limited time."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import regex

#: Seconds of computing that an expression may take on one text, and one scorer in all: then its texts are given up.
SEARCH_S = 1.0
ALL_SEARCHES_S = 10.0

#: A search that takes less is an ordinary one, and does not count.
SLOW_S = 0.02

#: Bytes that re2 may use for one expression.
MOST_BYTES = 8 * 2**20


class SearchTime:
    """What searches of one scorer may still take together. Only slow ones count, so that many rows are no trouble."""

    def __init__(self, seconds: float = ALL_SEARCHES_S) -> None:
        self._left_s = seconds

    def search(self, pattern: regex.Pattern[str], text: str) -> regex.Match[str] | None:
        """The first match. Raises TimeoutError."""
        if self._left_s <= 0:
            raise TimeoutError("the regular expression took too long on the rows before")
        started = time.thread_time()
        try:
            return pattern.search(text, timeout=SEARCH_S)
        finally:
            spent = time.thread_time() - started
            if spent > SLOW_S:
                self._left_s -= spent


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> regex.Pattern[str]:
    """In Python's syntax. Raises ``regex.error``."""
    # Few tasks have one, and every command would wait for the import.
    import regex

    return regex.compile(pattern)


def is_found(pattern: str, text: str) -> bool:
    """Whether ``pattern`` of a JSON schema is found in ``text``. Raises TimeoutError, and ValueError for no pattern.

    By re2, in a time that grows with the text only; what it does not know (look-around, back-references) is searched
    for a limited time.
    """
    linear = _linear(pattern)
    if linear is not None:
        return linear.search(text.encode(errors="replace").decode()) is not None
    import regex

    try:
        return compiled(pattern).search(text, timeout=SEARCH_S) is not None
    except regex.error:
        raise ValueError("no regular expression") from None


@lru_cache(maxsize=1024)
def _linear(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors, options.max_mem = False, MOST_BYTES
    try:
        return re2.compile(pattern.encode(errors="replace").decode(), options)
    except re2.error:
        return None
