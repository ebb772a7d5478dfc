"""Reports: what a job did, from its rows alone. Each takes a ``Summary`` and a rich console."""

from __future__ import annotations

#: Name -> what prints a summary: ``render(summary, console)``.
REPORTS = {
    "terminal": "promptmill.reports.terminal:render",
    "json": "promptmill.reports.json_form:render",
}
