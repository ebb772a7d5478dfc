"""The report as files: Markdown, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import io
import json

import sqlalchemy as sa

from promptmill.reports import csv_form, html, json_form, markdown
from promptmill.reports.summary import summarise
from tests.unit.test_reports import JOB, START, answer, counters, db, failure, store

__all__ = ["db"]


def test_markdown_escapes_what_it_did_not_write(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1, message="a | <b> *c*")], name="x|y")
    text = markdown.text(summarise(db, JOB))
    assert "x\\|y" in text
    assert "a \\| &lt;b&gt; \\*c\\*" in text
    assert "completed with 1 error" in text


def test_csv_holds_each_figure_unrounded_with_its_definition(db: sa.Engine) -> None:
    store(db, [answer(0), answer(1), answer(2)], tried=[counters()])
    lines = {line["figure"]: line for line in csv.DictReader(io.StringIO(csv_form.text(summarise(db, JOB))))}
    assert float(lines["output_tps"]["value"]) == 33 / 4
    assert lines["output_tps"]["unit"] == "tok/s"
    assert float(lines["latency_s.p50"]["value"]) == 2
    assert lines["success_rate"]["unit"] == "share"
    assert all(line["formula"] for line in lines.values())


def test_json_names_the_version_of_its_schema(db: sa.Engine) -> None:
    store(db, [answer(0)], rows=3, state="running")
    found = json.loads(json_form.text(summarise(db, JOB)))
    assert found["schema_version"] == 1
    assert found["completeness"] == "INCOMPLETE 1/3"


def test_html_escapes_answers_and_runs_nothing(db: sa.Engine) -> None:
    attack = '<script>alert(1)</script><img src="https://example.com/x">'
    rows = [answer(row, text=attack, finished_at=START + 3 + row * 1.5) for row in range(40)]
    store(db, rows, tried=[counters()], name=attack)
    text = html.text(db, JOB)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert text.count("<svg") == 6
    assert len(text.encode()) < 1_000_000


def test_html_of_a_job_without_results_says_so(db: sa.Engine) -> None:
    store(db, [], rows=0, state="failed", stop_reason="the model does not fit")
    text = html.text(db, JOB)
    assert "nothing to plot" in text
    assert "the model does not fit" in text


def test_html_of_one_row_and_of_rows_that_all_failed(db: sa.Engine) -> None:
    store(db, [answer(0)], job_id="01ONE")
    store(db, [failure(0), failure(1)], job_id="01BAD")
    assert "<svg" in html.text(db, "01ONE")
    assert "failed: no request was answered" in html.text(db, "01BAD")
