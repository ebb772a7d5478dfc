"""The report as files: Markdown, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import io
import json
import re
from html import unescape

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.database.tables import worker_samples
from promptmill.reports.figures.summary import summarise
from promptmill.reports.figures.timeline import merged, phases_of, read_phases, without
from promptmill.reports.render import csv as csv_report
from promptmill.reports.render import html, markdown
from promptmill.reports.render import json as json_report
from promptmill.scoring.scorers.aggregates import of_calibration
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.service.service import keep_scores
from promptmill.tasks.task_file import parse_task
from tests.unit.test_reports import JOB, START, TASK, WORKER, answer, counters, db, failure, store, store_worker

__all__ = ["db"]


def test_markdown_escapes_what_it_did_not_write(db: sa.Engine) -> None:
    store(db, [answer(0), failure(1, message="a | <b> *c*")], name="x|y")
    text = markdown.text(summarise(db, JOB))
    assert "x\\|y" in text
    assert "a \\| &lt;b&gt; \\*c\\*" in text
    assert "completed with 1 error" in text


def test_csv_holds_each_figure_unrounded_with_its_definition(db: sa.Engine) -> None:
    store(db, [answer(0), answer(1), answer(2)], tried=[counters()])
    lines = {line["figure"]: line for line in csv.DictReader(io.StringIO(csv_report.text(summarise(db, JOB))))}
    assert float(lines["output_tps"]["value"]) == 33 / 4
    assert lines["output_tps"]["unit"] == "tok/s"
    assert float(lines["latency_s.p50"]["value"]) == 2
    assert lines["success_rate"]["unit"] == "share"
    assert all(line["formula"] for line in lines.values())


def test_json_names_the_version_of_its_schema(db: sa.Engine) -> None:
    store(db, [answer(0)], rows=3, state="running")
    found = json.loads(json_report.text(summarise(db, JOB)))
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
    assert text.count("<svg") == 7
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


def test_html_of_a_scored_job_shows_its_confusion_in_any_script(db: sa.Engine) -> None:
    names = ["正常评论", "诈骗类广告"]
    task = "task: t\nprompt: {user: '{{ input.c }}'}\nexpected: {category: category}\nscores: [{exact: category}]\n"
    rows = [
        answer(row, text=json.dumps({"category": names[row % 2]}), finished_at=START + 3 + row) for row in range(12)
    ]
    store(db, rows, expected={row: {"category": names[row % 3 == 0]} for row in range(12)}, task_text=task)
    text = html.text(db, JOB)
    assert "Confusion matrix of category" in text
    assert "诈骗类广告" in text
    assert "<image" not in text


def test_every_figure_of_the_page_has_the_query_that_gives_it(db: sa.Engine) -> None:
    labels = {row: {"is_ad": row < 9} for row in range(12)}
    sha = parse_task(TASK, "ads").sha256
    store(db, [answer(row) for row in range(12)], tried=[counters()], expected=labels, task_text=TASK, task_sha256=sha)
    store_worker(db)
    with db.begin() as connection:
        connection.execute(sa.insert(worker_samples), [
            {"worker_id": WORKER, "at": START + at, "memory_bytes": size * 2**20, "state": "busy"}
            for at, size in ((2, 100), (5, 300), (500, 900))
        ])  # fmt: skip
    keep_scores(JOB, db)
    cells = [re.findall("<td[^>]*>(.*?)</td>", row) for row in html.text(db, JOB).split("<tr>")]
    found = {row[0]: row for row in cells if len(row) == 5}
    for name, value in (
        ("is_ad.accuracy", 75.0),
        ("is_ad.majority_baseline", 75.0),
        (f"memory_bytes of {WORKER}", 300),
    ):
        assert float(found[name][1]) == value
        with db.connect() as connection:
            given = connection.execute(sa.text(unescape(found[name][4]))).scalar()
        assert given is not None
        assert given * (2**-20 if "memory" in name else 100) == pytest.approx(value)
    assert {"is_ad.macro_f1", "is_ad.kappa"} <= found.keys()


def test_calibration_takes_groups_of_equal_mass() -> None:
    sure = np.linspace(0.5, 1.0, 1000)
    right = np.arange(1000) % 10 < 7
    found = of_calibration(sure, right, Clusters.alone(1000))
    assert [each["n"] for each in found.bins] == [100] * 10
    assert [each["share"] for each in found.bins] == pytest.approx([0.7] * 10)
    confidence = np.array([each["confidence"] for each in found.bins])
    assert found.values["ece"] == pytest.approx(np.mean(np.abs(confidence - 0.7)))
    assert found.values["brier"] == pytest.approx(((sure - right) ** 2).mean())


def test_spans_that_cannot_be_seen_apart_are_one() -> None:
    assert merged([(0, 1), (1.01, 2), (5, 6)], 0.1) == [(0, 2), (5, 6)]


def test_a_worker_is_busy_while_it_holds_a_lease_and_idle_no_longer_than_that(db: sa.Engine) -> None:
    """Samples of a run of 8 s: at its start, 5 s later, at its end; the model took 1 s to load."""
    tried = [
        counters(started_at=START + 1.5, ended_at=START + 8),
        counters(number=1, started_at=START + 9, ended_at=START + 9.5),
    ]
    store(db, [answer(0)], tried=tried)
    store_worker(db, model_load_s=1.0)
    with db.begin() as connection:
        connection.execute(sa.insert(worker_samples), [
            {"worker_id": WORKER, "at": START + at, "state": state}
            for at, state in ((0, "loading"), (5, "busy"), (10, "idle"))
        ])  # fmt: skip
    with db.connect() as connection:
        phases, restarts = read_phases(connection, JOB, START, START + 10)
    assert [(begin, end, state) for _, begin, end, state in phases] == [
        (0, 1, "loading"), (1, 1.5, "idle"), (1.5, 8, "busy"), (8, 9, "idle"), (9, 9.5, "busy"), (9.5, 10, "idle"),
    ]  # fmt: skip
    assert restarts == ()


def test_a_worker_that_takes_the_place_of_a_dead_one_is_marked(db: sa.Engine) -> None:
    tried = [
        counters(ended_at=START + 4, outcome="lost"),
        counters(attempt=2, worker_id="box/cpu/2", started_at=START + 6, ended_at=START + 9),
        counters(number=1, worker_id="other/cpu/1", started_at=START + 6, ended_at=START + 9),
    ]
    store(db, [answer(row, finished_at=START + 9) for row in range(8)], tried=tried)
    store_worker(db, heartbeat_at=START + 4)
    store_worker(db, "box/cpu/2", started_at=START + 5, heartbeat_at=START + 9)
    store_worker(db, "other/cpu/1", host="other", started_at=START + 5, heartbeat_at=START + 9)
    with db.connect() as connection:
        assert read_phases(connection, JOB, START, START + 10)[1] == (("box/cpu/2", 5),)
    assert "a red mark: started anew" in html.text(db, JOB)


def test_requests_of_the_api_are_work_without_a_lease() -> None:
    samples = [(0.0, "idle"), (5.0, "busy"), (10.0, "busy"), (60.0, "idle"), (65.0, "idle")]
    assert phases_of(samples, [(6.0, 9.0)], []) == [
        (0, 5, "busy"), (5, 6, "idle"), (6, 9, "busy"), (9, 10, "idle"), (60, 65, "idle"),
    ]  # fmt: skip
    assert without([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 20)]) == [(0, 1), (2, 3), (6, 8)]
