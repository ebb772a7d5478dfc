"""Reports: what a job did, from its rows alone. A form is a file here and a line below."""

from __future__ import annotations

#: Name -> what makes a file of a summary: ``text(summary)``. HTML reads more of the job: ``text(db, summary)``.
TEXTS = {
    "md": "promptmill.reports.render.markdown:text",
    "csv": "promptmill.reports.render.csv:text",
    "json": "promptmill.reports.render.json:text",
}
