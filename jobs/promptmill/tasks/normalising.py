"""Labels that differ in their spelling only, made one: what ``normalise`` of a task file names."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Step = Literal["nfkc", "casefold", "strip"]

#: ``nfkc``: full-width letters and ligatures as plain ones; ``casefold``: no capitals; ``strip``: no spaces around.
STEPS: Mapping[Step, Callable[[str], str]] = {
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "casefold": str.casefold,
    "strip": str.strip,
}


def normalised(text: str, steps: Sequence[Step]) -> str:
    """The text after each of the steps, in their order."""
    for step in steps:
        text = STEPS[step](text)
    return text
