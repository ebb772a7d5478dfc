"""Results as Parquet, and a report recomputed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from promptmill.reports.figures.summary import summarise
from promptmill.store import parquet
from promptmill.store.parquet import write
from tests.unit.test_reports import JOB, START, answer, counters, failure, store


def test_the_figures_of_a_report_are_those_of_its_export(database: sa.Engine, tmp_path: Path) -> None:
    rows = [answer(row, finished_at=START + 2 + row + (row * 7) % 11, output_tokens=2 + row % 9) for row in range(90)]
    untimed = {"admitted_at": None, "first_token_at": None, "finished_at": None}
    copied = answer(91, deduplicated=True, output_tokens=500, **untimed)
    store(database, [*rows, failure(90), copied], tried=[counters()], expected={3: {"is_ad": True}})
    path = tmp_path / "out.parquet"
    assert write(database, JOB, str(path), prompts=True) == 92
    read = {name: column.to_numpy() for name, column in zip(*_columns(path), strict=True)}
    ok = read["state"] == "ok"
    wall = np.nanmax(read["finished_at"]) - np.nanmin(read["admitted_at"])
    summary = summarise(database, JOB)
    assert summary.ok == ok.sum()
    assert summary.success_rate == pytest.approx(ok.mean())
    # Copied answers are in no sum of tokens and in no time.
    own = ok & ~read["deduplicated"].astype(bool)
    assert summary.output_tps == pytest.approx(np.nansum(read["output_tokens"][own]) / wall)
    assert summary.output_tokens == np.nansum(read["output_tokens"][own])
    latencies = (read["finished_at"] - read["admitted_at"])[own].astype(float)
    assert summary.latency_s.p95 == pytest.approx(np.percentile(latencies, 95))
    assert summary.mean_active == pytest.approx(latencies.sum() / wall)
    assert read["expected"][3] == '{"is_ad": true}'


def _columns(path: Path) -> tuple[list[str], list[Any]]:
    table = pq.read_table(path)
    return table.column_names, table.columns


def test_an_empty_job_is_an_empty_file_with_its_columns(database: sa.Engine, tmp_path: Path) -> None:
    store(database, [], rows=0)
    path = tmp_path / "out.parquet"
    assert write(database, JOB, str(path)) == 0
    assert "output_tokens" in pq.read_table(path).column_names


def test_rows_come_in_pages_on_either_database(database: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    store(database, [answer(row) for row in range(25)])
    monkeypatch.setattr("promptmill.store.parquet.GROUP_ROWS", 10)
    assert [batch.num_rows for batch in parquet.record_batches(database, JOB)] == [10, 10, 5]


def test_texts_come_as_they_are_on_either_database(database: sa.Engine) -> None:
    texts = ["", " ", '"', '","', "a\nb\r\nc\\.", "\\.", "\\N", "NULL", "null", "NaN", "t", "一二三", "%s %(x)s :job"]
    store(database, [*(answer(row, text=text) for row, text in enumerate(texts)), failure(len(texts))])
    [batch] = parquet.record_batches(database, JOB)
    assert batch.column("text").to_pylist() == [*texts, None]
    assert batch.column("deduplicated").to_pylist() == [False] * (len(texts) + 1)
    assert batch.column("error_class").null_count == len(texts)


@pytest.mark.parametrize("worth", [1, 100])
def test_groups_of_long_texts_have_fewer_rows(database: sa.Engine, monkeypatch: pytest.MonkeyPatch, worth: int) -> None:
    monkeypatch.setattr("promptmill.database.arrow_tables.WORTH_ROWS", worth)
    monkeypatch.setattr("promptmill.core.processes._most", 2)
    monkeypatch.setattr("promptmill.store.parquet.GROUP_ROWS", 10)
    monkeypatch.setattr("promptmill.store.parquet.GROUP_CHARACTERS", 3500)
    # The first ones say nothing of the others.
    store(database, [answer(row, text="x" * (1000 if row >= 10 else 1)) for row in range(20)])
    assert [batch.num_rows for batch in parquet.record_batches(database, JOB)] == [10, 3, 3, 3, 1]
