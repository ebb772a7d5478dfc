"""Reports: what a job did, from its rows alone. A form is a file here and a line below."""

from __future__ import annotations

#: Name -> what prints a summary: ``render(summary, console)``.
REPORTS = {
    "terminal": "promptmill.reports.terminal:render",
    "json": "promptmill.reports.json_form:render",
}

#: Name -> what makes a file of a summary: ``text(summary)``. HTML reads more of the job: ``text(db, summary)``.
TEXTS = {
    "md": "promptmill.reports.markdown:text",
    "csv": "promptmill.reports.csv_form:text",
    "json": "promptmill.reports.json_form:text",
}
