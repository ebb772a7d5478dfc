"""What the page says of a job is what its report says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from promptmill.api.pages.page_queries import job_view
from promptmill.database.engine import connect, reading
from promptmill.database.tables import chunks, metadata
from promptmill.reports.figures.summary import summarise
from promptmill.store.catalog import find_job, job_summary
from tests.unit.test_reports import JOB, START, answer, counters, store


@pytest.fixture
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_rates_of_an_ended_job_are_those_of_its_report(db: sa.Engine) -> None:
    store(db, [answer(row, finished_at=START + 3 + row) for row in range(20)], tried=[counters()],
          finished_at=START + 30)  # fmt: skip
    report = summarise(db, JOB)
    with db.begin() as connection:
        # It waited for a model to load before its first row had a slot.
        connection.execute(sa.text("UPDATE jobs SET started_at = started_at - 60"))
        connection.execute(sa.update(chunks).values(ok=20, errors=0, output_tokens=report.output_tokens))
    with reading(db) as connection:
        summary = job_summary(connection, find_job(db, JOB))
    view = job_view(db, summary, now=0.0)
    assert view["rate"] == pytest.approx(report.items_per_s)
    assert view["tps"] == pytest.approx(report.output_tps)
