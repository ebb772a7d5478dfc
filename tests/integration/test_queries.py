"""Views and queries, equal on SQLite and PostgreSQL."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.queries import QueryError, querying, write_jsonl, write_parquet
from promptmill.views import QUERIES, VIEWS
from tests.unit.test_reports import JOB, START, answer, counters, failure, store, store_worker


def rows_of(db: sa.Engine, sql: str, seconds: float = 30) -> list[dict[str, object]]:
    with querying(db, sql, seconds) as (columns, rows):
        return [dict(zip(columns, row, strict=True)) for row in rows]


@pytest.fixture
def filled(database: sa.Engine) -> sa.Engine:
    store_worker(database)
    answers = [answer(row, finished_at=START + 1 + row + 1 + (row * 7) % 11) for row in range(37)]
    store(database, [*answers, failure(37), failure(38)], tried=[counters()])
    return database


def test_each_view_and_each_named_query_answers(filled: sa.Engine) -> None:
    for name in ("v_results", *VIEWS):
        rows_of(filled, f"SELECT * FROM {name}")
    for name in QUERIES:
        rows_of(filled, name)


def test_percentiles_of_the_view_are_those_of_numpy(filled: sa.Engine) -> None:
    latencies = [1 + (row * 7) % 11 for row in range(37)]
    found = rows_of(filled, "SELECT * FROM v_percentiles WHERE metric = 'latency_s'")[0]
    assert found["n"] == 37
    for name, point in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert float(found[name]) == pytest.approx(np.percentile(latencies, point), abs=1e-5)  # type: ignore[arg-type]


def test_errors_and_workers(filled: sa.Engine) -> None:
    error = rows_of(filled, "SELECT * FROM v_errors")[0]
    assert (error["rows"], error["first_row"], error["error_class"]) == (2, 37, "timeout")
    assert rows_of(filled, "SELECT * FROM v_workers")[0]["decode_tokens"] == 110


def test_a_query_that_writes_is_refused(filled: sa.Engine) -> None:
    for sql in ("DELETE FROM jobs", "SELECT 1; DELETE FROM jobs", "WITH x AS (SELECT 1) DELETE FROM jobs"):
        with pytest.raises(QueryError):
            rows_of(filled, sql)
    assert rows_of(filled, "SELECT id FROM jobs")[0]["id"] == JOB


def test_a_percent_sign_is_what_it_is_in_sql(filled: sa.Engine) -> None:
    assert rows_of(filled, "SELECT 7 % 4 AS rest, '100%' AS share") == [{"rest": 3, "share": "100%"}]


def test_a_plan_is_explained_and_nothing_comes_after_it(filled: sa.Engine) -> None:
    assert rows_of(filled, "EXPLAIN SELECT * FROM jobs")
    with pytest.raises(QueryError):
        rows_of(filled, "EXPLAIN SELECT 1; COMMIT; DELETE FROM jobs")
    with pytest.raises(QueryError):
        rows_of(filled, "EXPLAIN ANALYZE DELETE FROM jobs")
    assert rows_of(filled, "SELECT id FROM jobs")[0]["id"] == JOB


def test_a_query_of_a_superuser_reads_tables_and_nothing_else(filled: sa.Engine) -> None:
    for sql in ("SELECT pg_read_file('postgresql.conf')", "SELECT pg_ls_dir('.')"):
        with pytest.raises(QueryError, match=r"permission denied|no such function"):
            rows_of(filled, sql)
    assert rows_of(filled, "SELECT * FROM v_jobs")


def test_a_query_without_end_is_ended(filled: sa.Engine) -> None:
    endless = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT COUNT(*) FROM x"
    with pytest.raises(QueryError, match="longer than"):
        rows_of(filled, endless, 0.3)


def test_a_query_whose_pages_are_each_quick_is_ended_all_the_same(filled: sa.Engine) -> None:
    endless = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT n FROM x"
    begun = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0\.5 s"):
        rows_of(filled, endless, 0.5)
    assert time.monotonic() - begun < 10
    assert rows_of(filled, "SELECT id FROM jobs")[0]["id"] == JOB


def taken_slowly(db: sa.Engine, seconds: float) -> None:
    with querying(db, "SELECT * FROM requests", seconds) as (_, rows):
        next(rows)
        time.sleep(2 * seconds)
        next(rows)


def test_a_query_whose_rows_are_taken_slowly_is_ended(filled: sa.Engine) -> None:
    with pytest.raises(QueryError, match="longer than"):
        taken_slowly(filled, 0.3)
    assert rows_of(filled, "SELECT id FROM jobs")[0]["id"] == JOB


def test_two_columns_of_one_name_are_one_clear_error(filled: sa.Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with querying(filled, "SELECT 1 AS n, 2 AS n", 30) as (columns, rows):
        with pytest.raises(QueryError, match="two columns are called 'n'"):
            write_parquet(columns, rows, str(path))
        with pytest.raises(QueryError, match="two columns are called 'n'"):
            write_jsonl(columns, rows, io.StringIO())
    assert not path.exists()


def test_a_wrong_query_is_one_clear_error(filled: sa.Engine) -> None:
    with pytest.raises(QueryError, match="the query is wrong"):
        rows_of(filled, "SELECT nothing_such FROM jobs WHERE name LIKE 'a%'")


def test_a_query_becomes_parquet(filled: sa.Engine, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = str(tmp_path / "out.parquet")
    with querying(filled, 'SELECT "row", state, latency_s FROM v_results ORDER BY "row"', 30) as (columns, rows):
        write_parquet(columns, rows, path)
    read = pq.read_table(path)
    assert read.column_names == ["row", "state", "latency_s"]
    assert read.num_rows == 39


def test_types_of_parquet_are_those_of_all_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [(number, None, number) for number in range(12_000)] + [(0.5, "late", "text")]
    path = tmp_path / "out.parquet"
    write_parquet(["number", "late", "mixed"], iter(rows), str(path))
    found = pq.read_table(path)
    assert [str(field.type) for field in found.schema] == ["double", "string", "string"]
    assert found.num_rows == 12_001
    assert found["late"][12_000].as_py() == "late"
    assert list(tmp_path.iterdir()) == [path]


def test_a_query_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        raise QueryError("the query took too long")

    with pytest.raises(QueryError):
        write_parquet(["n"], rows(), str(tmp_path / "out.parquet"))
    assert list(tmp_path.iterdir()) == []
