"""The report for programs: one JSON object with stable keys, no decoration."""

from __future__ import annotations

import json
from typing import Any

from promptmill.reports.figures.summary import Summary


def text(summary: Summary) -> str:
    """The object. What was not measured is null."""
    return dumped(summary.to_json(), allow_nan=False)


def dumped(value: Any, allow_nan: bool = True) -> str:
    """``value`` as the text of a file."""
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=allow_nan) + "\n"
