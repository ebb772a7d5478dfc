"""Reports on either database: each figure equals what pandas makes of the export, of values held or counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from promptmill.core import processes
from promptmill.database import arrow_tables
from promptmill.database.engine import reading, writing
from promptmill.database.figure_sql import FIGURE_SQL, PERCENTILES
from promptmill.database.tables import jobs, results
from promptmill.errors import DatabaseError
from promptmill.reports.figures import percentiles, row_sources
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, SINGLE
from promptmill.reports.figures.summary import summarise
from promptmill.reports.render.html import text as page
from promptmill.store import parquet
from promptmill.store.queries import querying
from tests.unit.test_reports import JOB, START, answer, counters, failure, store, store_worker

ROWS = 400


@pytest.fixture
def db(database: sa.Engine) -> sa.Engine:
    return database


def fill(db: sa.Engine) -> None:
    """Rows with overlaps, errors with and without a slot, copies, and a worker whose name needs quoting."""
    generator = np.random.default_rng(5)
    workers = ("box/cpu/1", "o'box%s/cpu/2")
    rows: list[dict[str, Any]] = []
    for row in range(ROWS):
        begin = START + row / 7 + float(generator.exponential(0.05))
        tokens = int(generator.integers(0, 40))
        first = begin + float(generator.lognormal(-2, 0.5))
        times_ = {"enqueued_at": START - 1, "admitted_at": begin, "first_token_at": first}
        end = first + max(tokens - 1, 0) * 0.02
        worker = workers[row % 2]
        if row % 50 == 3:
            slot = times_ if row % 100 == 3 else {"enqueued_at": START, "admitted_at": None, "first_token_at": None}
            finished = end if row % 100 == 3 else None
            rows.append(failure(row, "timeout", "late", **slot, finished_at=finished, worker_id=worker))
        else:
            rows.append(answer(row, **times_, finished_at=end, output_tokens=tokens, worker_id=worker,
                               finish_reason="length" if tokens == 39 else "stop"))  # fmt: skip
    store(db, rows, tried=[counters()])
    for name in workers:
        store_worker(db, name)


def recomputed(path: Path) -> dict[str, Any]:
    """The figures by their definitions in promptmill.reports.figures.metrics, from the export alone."""
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(path)
    ok, slot = rows[rows.state == "ok"], rows.dropna(subset=["admitted_at", "finished_at"])
    wall = slot.finished_at.max() - slot.admitted_at.min()
    several = ok[ok.output_tokens >= 2]
    columns = {
        "latency_s": ok.finished_at - ok.admitted_at,
        "ttft_s": ok.first_token_at - ok.admitted_at,
        "tpot_s": (several.finished_at - several.first_token_at) / (several.output_tokens - 1),
        "queue_s": (ok.admitted_at - ok.enqueued_at).clip(lower=0),
    }
    changes = pandas.concat([pandas.Series(1, slot.admitted_at), pandas.Series(-1, slot.finished_at)])
    changes = changes.to_frame("change").rename_axis("at").reset_index().sort_values(["at", "change"])
    found = {
        "attempted": len(rows), "ok": len(ok), "errors": len(rows) - len(ok),
        "cut_off": (ok.finish_reason == "length").sum(), "success_rate": len(ok) / len(rows), "wall_s": wall,
        "items_per_s": len(ok) / wall, "output_tps": ok.output_tokens.sum() / wall,
        "total_tps": (ok.prompt_tokens - ok.cached_tokens + ok.output_tokens).sum() / wall,
        "prompt_tokens": ok.prompt_tokens.sum(), "cached_tokens": ok.cached_tokens.sum(),
        "output_tokens": ok.output_tokens.sum(), "cached_share": ok.cached_tokens.sum() / ok.prompt_tokens.sum(),
        "mean_output_tokens": ok.output_tokens.mean(),
        "mean_active": (slot.finished_at - slot.admitted_at).sum() / wall,
        "peak_active": changes.change.cumsum().max(),
    }  # fmt: skip
    for name, values in columns.items():
        found |= {f"{name}.{point}": values.quantile(share / 100) for point, (share, _) in PERCENTILES.items()}
        found[f"{name}.mean"] = values.mean()
    return found


@pytest.mark.parametrize("exact", [True, False], ids=["held", "counted"])
def test_every_figure_equals_what_pandas_makes_of_the_export(
    db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    fill(db)
    parquet.write(db, JOB, str(tmp_path / "out.parquet"))
    if not exact:
        monkeypatch.setattr(percentiles, "EXACT_ROWS", 100)
    found = summarise(db, JOB)
    assert found.latency_s.exact is exact
    for name, value in recomputed(tmp_path / "out.parquet").items():
        stem, _, part = name.partition(".")
        own = getattr(getattr(found, stem), part) if part else getattr(found, stem)
        # A bucket is 0.01 % wide; nothing else is approximate.
        assert own == pytest.approx(value, rel=1e-9 if exact or not part else 2e-4), name


def test_blocks_of_any_size_give_the_same_report(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(db)
    whole = summarise(db, JOB).to_json()
    monkeypatch.setattr("promptmill.reports.figures.row_sources.BLOCK_ROWS", 7)
    again = summarise(db, JOB).to_json()
    assert again.pop("curve")["output_tps"] == pytest.approx(whole.pop("curve")["output_tps"])
    assert str(again) == str(whole)


@pytest.fixture
def read_in_ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that are asked in ranges."""
    monkeypatch.setattr(arrow_tables, "WORTH_ROWS", 100)
    monkeypatch.setattr(processes, "_most", 2)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 90)
    monkeypatch.setattr(row_sources, "BLOCK_ROWS", 90)
    asked: list[str] = []

    def noted(db: sa.Connection, queries: Iterable[str]) -> Iterator[Any]:
        asked.extend(queries := list(queries))
        return arrow_tables.tables(db, queries)

    monkeypatch.setattr(row_sources, "tables", noted)
    monkeypatch.setattr(parquet, "tables", noted)
    return asked


@pytest.mark.parametrize("exact", [True, False], ids=["held", "counted"])
def test_ranges_report_and_export_the_same(
    db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, read_in_ranges: list[str]
) -> None:
    fill(db)
    if not exact:
        monkeypatch.setattr(percentiles, "EXACT_ROWS", 100)
    found = summarise(db, JOB).to_json()
    # Twice, for the attempts do not name the workers.
    assert len(read_in_ranges) == 2 * (5 if exact else 10)
    exported = tmp_path / "many.parquet"
    parquet.write(db, JOB, str(exported), prompts=True)
    assert len(read_in_ranges) == 2 * (5 if exact else 10) + 5
    read_in_ranges.clear()
    monkeypatch.setattr(arrow_tables, "WORTH_ROWS", ROWS + 1)
    alone = summarise(db, JOB).to_json()
    assert not read_in_ranges
    parquet.write(db, JOB, str(tmp_path / "one.parquet"), prompts=True)
    assert found.pop("curve")["output_tps"] == pytest.approx(alone.pop("curve")["output_tps"])
    for name in ("wall_s", "mean_active", "latency_s", "ttft_s", "tpot_s", "queue_s"):
        assert found.pop(name) == pytest.approx(alone.pop(name), rel=1e-9), name
    found.pop("checks"), alone.pop("checks")
    assert str(found) == str(alone)
    assert pq.read_table(exported).equals(pq.read_table(tmp_path / "one.parquet"))
    assert pq.read_table(exported)["row"].to_pylist() == list(range(ROWS))


def test_columns_that_are_empty_in_some_ranges_only(
    db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_in_ranges: list[str]
) -> None:
    fill(db)
    with writing(db) as connection:
        for rows, values in (
            (results.c.row < 200, {"text": None, "reasoning_tokens": None, "first_token_at": None, "worker_id": None}),
            (results.c.row >= 200, {"text": "100 %% 'of' \"it\"\n", "error_message": ""}),
        ):
            connection.execute(sa.update(results).where(rows).values(values))
    parquet.write(db, JOB, str(tmp_path / "many.parquet"))
    assert len(read_in_ranges) == 5
    monkeypatch.setattr(arrow_tables, "WORTH_ROWS", ROWS + 1)
    parquet.write(db, JOB, str(tmp_path / "one.parquet"))
    assert pq.read_table(tmp_path / "many.parquet").equals(pq.read_table(tmp_path / "one.parquet"))


def test_of_a_job_that_goes_on_one_moment_is_read(db: sa.Engine, tmp_path: Path, read_in_ranges: list[str]) -> None:
    fill(db)
    with writing(db) as connection:
        connection.execute(sa.update(jobs).values(state="running"))
    assert summarise(db, JOB).attempted == ROWS
    # Processes would see several moments; PostgreSQL's connections share one.
    assert bool(read_in_ranges) == (db.dialect.name == "postgresql")
    assert parquet.write(db, JOB, str(tmp_path / "out.parquet")) == ROWS
    assert pq.read_table(tmp_path / "out.parquet")["row"].to_pylist() == list(range(ROWS))


def retry(db: sa.Engine, worker: str | None) -> None:
    """A tenth of the rows is to come again; ``worker``: as if one that nobody knew of had answered the others."""
    with writing(db) as connection:
        connection.execute(sa.update(jobs).values(state="running", finished_at=None))
        connection.execute(sa.delete(results).where(results.c.row % 10 == 0))
        if worker is not None:
            connection.execute(sa.update(results).values(worker_id=worker))


@pytest.fixture(params=[None, "new/worker/7"], ids=["same workers", "a new worker"])
def retried_meanwhile(
    db: sa.Engine, read_in_ranges: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The job is retried after the first of the ranges."""
    fill(db)

    def changing(connection: sa.Connection, queries: Iterable[str]) -> Iterator[Any]:
        for number, table in enumerate(arrow_tables.tables(connection, queries)):
            if number == 0:
                retry(db, request.param)
            yield table

    monkeypatch.setattr(row_sources, "tables", changing)
    monkeypatch.setattr(parquet, "tables", changing)
    monkeypatch.setattr(processes, "AHEAD", 1)


@pytest.mark.usefixtures("retried_meanwhile")
def test_a_report_of_a_job_that_changed_meanwhile_is_of_one_moment(db: sa.Engine) -> None:
    found = summarise(db, JOB)
    assert found.attempted == ROWS
    assert {worker.id for worker in found.workers if worker.ok} == {"box/cpu/1", "o'box%s/cpu/2"}


@pytest.mark.usefixtures("retried_meanwhile")
def test_an_export_of_a_job_that_changed_meanwhile_is_of_one_moment(db: sa.Engine, tmp_path: Path) -> None:
    path = str(tmp_path / "out.parquet")
    if db.dialect.name == "postgresql":
        assert parquet.write(db, JOB, path) == ROWS
    else:
        with pytest.raises(DatabaseError, match="changed while it was read"):
            parquet.write(db, JOB, path)


def test_what_the_driver_says_is_one_clear_error(db: sa.Engine) -> None:
    with reading(db) as connection, pytest.raises(DatabaseError, match=r"cannot read the database .*nothing_here"):
        list(arrow_tables.tables(connection, ["SELECT 1 AS n", "SELECT * FROM nothing_here"]))


def test_a_worker_that_only_the_results_name_is_found(db: sa.Engine) -> None:
    fill(db)
    with writing(db) as connection:
        connection.execute(sa.update(results).where(results.c.row % 3 == 0).values(worker_id="nobody/knows/9"))
    found = summarise(db, JOB)
    assert sum(worker.ok for worker in found.workers) == found.ok
    assert "nobody/knows/9" in {worker.id for worker in found.workers}


@pytest.mark.usefixtures("read_in_ranges")
def test_ranges_without_a_result_are_no_obstacle(db: sa.Engine) -> None:
    fill(db)
    with writing(db) as connection:
        connection.execute(sa.delete(results).where(results.c.row < 200))
    assert summarise(db, JOB).attempted == ROWS - 200


def test_html_of_counted_rows(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(db)
    monkeypatch.setattr(percentiles, "EXACT_ROWS", 100)
    text = page(db, JOB)
    assert text.count("<svg") >= 7
    assert "Active sequences against slots of each worker" in text
    assert len(text.encode()) < 1_000_000


def test_the_query_behind_each_figure_gives_it(db: sa.Engine) -> None:
    fill(db)
    found = summarise(db, JOB)
    for name, text_ in FIGURE_SQL.items():
        if "'RUN'" in text_ or "'WORKER'" in text_:
            continue
        with querying(db, text_.replace("JOB", JOB), 60) as (columns, rows):
            (row,) = list(rows)
        value = getattr(found, name)
        if len(columns) == 1:
            assert float(row[0]) == pytest.approx(value, rel=1e-9), name
        else:
            for column, own in zip(columns, row, strict=True):
                assert float(own) == pytest.approx(getattr(value, column), rel=1e-9), f"{name}.{column}"


def test_every_figure_that_is_printed_has_its_query() -> None:
    # Slots at one time need the order of events: no SQL.
    assert {name for name in (*SINGLE, *DISTRIBUTIONS) if name not in FIGURE_SQL} == {"slots"}
    assert set(FIGURE_SQL) <= set(METRICS)
