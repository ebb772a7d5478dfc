"""The report for programs: one JSON object with stable keys, no decoration."""

from __future__ import annotations

import json

from rich.console import Console

from promptmill.reports.figures.summary import Summary


def text(summary: Summary) -> str:
    """The object. What was not measured is null."""
    return json.dumps(summary.to_json(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def render(summary: Summary, console: Console) -> None:
    """Print the object."""
    console.print(text(summary).rstrip("\n"), markup=False, highlight=False, emoji=False, soft_wrap=True)
