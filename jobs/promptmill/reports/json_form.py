"""The report for programs: one JSON object with stable keys, no decoration."""

from __future__ import annotations

import json

from rich.console import Console

from promptmill.reports.summary import Summary


def render(summary: Summary, console: Console) -> None:
    """Print the object. What was not measured is null."""
    text = json.dumps(summary.to_json(), ensure_ascii=False, indent=2, allow_nan=False)
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
