"""Views and queries, equal on SQLite and PostgreSQL."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.database import reader_role
from promptmill.database.engine import connect, reading, writing
from promptmill.database.reader_role import reader
from promptmill.database.revision import upgrade
from promptmill.database.tables import api_keys
from promptmill.database.views import QUERIES, VIEWS
from promptmill.errors import PromptmillError
from promptmill.store.queries import QueryError, querying, write_jsonl, write_parquet
from tests.conftest import Command
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


#: Through a statement that PostgreSQL runs as part of another: as whom it runs, the query itself may have set before.
INSIDE = """
WITH a AS MATERIALIZED (SELECT set_config('{setting}', '{value}', true) AS x)
SELECT t.word FROM a, LATERAL ts_stat('select to_tsvector(''simple'', ({call})::text)' || left(a.x, 0)) t
"""

#: What a superuser may do, and who reads tables must not.
POWERS = (
    "pg_read_file(''PG_VERSION'')", "pg_ls_dir(''.'')", "pg_reload_conf()", "lo_export(987654, ''/tmp/promptmill-lo'')",
    "pg_terminate_backend({victim})", "pg_read_binary_file(''global/pg_control'')", "lo_import(''/etc/hostname'')",
)  # fmt: skip


def as_reader(db: sa.Engine, sql: str) -> None:
    """By the role alone, whatever names are refused before."""
    with reader(db, None) as login, reading(login) as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql(sql.replace("%", "%%")).all()


#: Queries that would wait for ever, take promptmill's own locks, end other readers, or lift their own limits.
DISTURBING = (
    "SELECT pg_advisory_lock(hashtext('promptmill.migrations'))", "SELECT pg_sleep(1000000)",
    "SELECT Pg_Try_Advisory_Xact_Lock_Shared(1, 2)", 'SELECT "pg_sleep_for"(\'1 day\')',
    "SELECT pg_catalog . pg_advisory_lock (7)", 'SELECT U&"pg\\005fsleep"(9)',
    'SELECT u&"!0070g_sleep" UESCAPE \'!\' (9)',
    "SELECT set_config('statement_timeout', '0', false)", "SELECT pg_notify('a', 'b')",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity", "WITH a AS (SELECT pg_sleep(9)) SELECT * FROM a",
    "SELECT * FROM ts_stat('select to_tsvector(pg_adv' || 'isory_lock(1)::text)')",
    "SELECT query_to_xml('select pg_sl' || 'eep(9)', true, true, '')", "SELECT (9).pg_sleep", "SELECT lo_create(1)",
    "EXPLAIN ANALYZE SELECT pg_sleep(9)",
)  # fmt: skip


def test_a_query_disturbs_nobody(migrated_postgres_url: str) -> None:
    db = connect(migrated_postgres_url)
    for sql in DISTURBING:
        with pytest.raises(PromptmillError, match="may not name"):
            rows_of(db, sql)
    assert rows_of(db, "SELECT state AS sleep FROM jobs WHERE name = 'pg sleep'") == []
    db.dispose()


def test_a_query_whose_client_is_gone_is_ended_by_the_server(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = connect(migrated_postgres_url)
    monkeypatch.setattr(reader_role, "GRACE_S", 0.0)
    # Nobody counts the seconds here.
    monkeypatch.setattr(threading.Timer, "start", lambda timer: None)
    monkeypatch.setattr(threading.Timer, "join", lambda timer: None)
    with pytest.raises(QueryError, match="statement timeout"):
        rows_of(db, "SELECT count(*) FROM generate_series(1, 100000000000)", 0.3)
    asked = "SELECT current_setting('client_connection_check_interval', true) AS looks"
    assert rows_of(db, asked) in ([{"looks": "10s"}], [{"looks": None}])
    db.dispose()


def test_a_query_never_has_the_powers_of_who_owns_the_database(postgres_url: str) -> None:
    db = connect(postgres_url)
    upgrade(db)
    try:
        with db.connect() as victim:
            pid = victim.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            owner = victim.exec_driver_sql("SELECT session_user").scalar()
            assert victim.exec_driver_sql("SELECT current_setting('is_superuser')").scalar() == "on"
            for power in POWERS:
                call = power.format(victim=pid)
                asked = [f"SELECT {call}".replace("''", "'")]
                for setting in ("role", "session_authorization"):
                    asked += [INSIDE.format(setting=setting, value=value, call=call) for value in (owner, "none")]
                for sql in asked:
                    with pytest.raises(sa.exc.DBAPIError, match=r"permission denied|must be|cannot|invalid|not exist"):
                        as_reader(db, sql)
            assert victim.exec_driver_sql("SELECT 1").scalar() == 1
        assert rows_of(db, "SELECT current_user = session_user AS same") == [{"same": True}]
        with pytest.raises(QueryError, match="permission denied"):
            rows_of(db, "SELECT * FROM pg_authid")
    finally:
        db.dispose()


def test_keys_are_shown_to_no_query(filled: sa.Engine) -> None:
    with writing(filled) as connection:
        connection.execute(
            sa.insert(api_keys).values(id="K", name="boss", key_sha256="c0ffee", scopes="admin", created_at=0)
        )
    other = "(SELECT 1 AS key_sha256, 2 AS id) b"
    for sql in (
        "SELECT key_sha256 FROM api_keys", "SELECT * FROM api_keys", "SELECT max(k.key_sha256) FROM api_keys k",
        "SELECT name FROM api_keys WHERE key_sha256 LIKE 'c%'", "SELECT count(*) FROM api_keys",
        f"SELECT key_sha256 FROM {other} FULL JOIN api_keys USING (key_sha256)",
        f"SELECT id FROM api_keys NATURAL JOIN {other}", "WITH t AS (SELECT * FROM api_keys) SELECT name FROM t",
        f"SELECT x.* FROM (SELECT key_sha256 FROM {other} FULL JOIN api_keys USING (key_sha256, id)) x",
        "SELECT count(*) FROM sqlite_dbpage",
    ):  # fmt: skip
        with pytest.raises(
            QueryError, match=r"permission denied|prohibited|not authorized|does not exist|no such table"
        ):
            rows_of(filled, sql)
    assert rows_of(filled, "SELECT count(*) AS n FROM files NATURAL JOIN batches") == [{"n": 0}]
    # The owner's own connection is as it was.
    with reading(filled) as connection:
        assert connection.execute(sa.select(api_keys.c.key_sha256)).scalar() == "c0ffee"


@pytest.fixture
def roles(postgres_url: str) -> Iterator[Callable[[str, str], str]]:
    """Make a user of PostgreSQL with some rights; returns the URL of its connections."""
    admin, made = connect(postgres_url), []

    def make(name: str, rights: str) -> str:
        with admin.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD 'p' {rights}")
        made.append(name)
        return sa.make_url(postgres_url).set(username=name, password="p").render_as_string(hide_password=False)

    yield make
    with admin.begin() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP OWNED BY {name} CASCADE")
            connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()


def test_where_no_reader_can_be_made_a_query_says_what_to_do(
    postgres_url: str, roles: Callable[[str, str], str], tmp_path: Path
) -> None:
    name = f"plain_{uuid.uuid4().hex[:8]}"
    url = roles(name, "")
    admin = connect(postgres_url)
    with admin.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA own AUTHORIZATION {name}")
        connection.exec_driver_sql(f"ALTER ROLE {name} SET search_path = own")
    command = Command(tmp_path, {"JOBS_DATABASE_URL": url})
    assert command("db", "upgrade").code == 0
    done = command("query", "jobs")
    assert (done.code, done.out) == (2, "")
    assert "permission denied to create role" in done.err
    assert "JOBS_QUERY_DATABASE_URL" in done.err
    # What it says is what helps.
    told = " ".join(done.err.split())
    told = told[told.index("CREATE ROLE") :].partition("; then")[0]
    readers = f"reader_{uuid.uuid4().hex[:8]}"
    roles(readers, "")
    with admin.begin() as connection:
        for statement in told.replace("promptmill_reader", readers).split("; ")[1:]:
            connection.exec_driver_sql(statement)
    reader_url = sa.make_url(url).set(username=readers).render_as_string(hide_password=False)
    command.environment["JOBS_QUERY_DATABASE_URL"] = reader_url
    done = command("query", "SELECT count(*) AS n FROM v_jobs", "--format", "csv")
    assert (done.code, done.out) == (0, "n\n0\n"), done.err
    # One that may do more is no reader.
    for wrong, said in ((postgres_url, "may do more than"), (url, "may do more"), ("sqlite:///x", "no postgresql")):
        command.environment["JOBS_QUERY_DATABASE_URL"] = wrong
        done = command("query", "jobs")
        assert done.code == 2
        assert said in " ".join(done.err.split())
    admin.dispose()


def test_queries_side_by_side_each_log_in(postgres_url: str) -> None:
    db = connect(postgres_url)
    upgrade(db)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: rows_of(db, "SELECT count(*) AS n FROM v_jobs"), range(12)))
    assert found == [[{"n": 0}]] * 12
    db.dispose()


def test_a_view_that_was_made_again_is_read_again(postgres_url: str) -> None:
    db = connect(postgres_url)
    upgrade(db)
    assert rows_of(db, "jobs") == []
    with writing(db) as connection:
        connection.exec_driver_sql("DROP VIEW v_jobs")
        connection.exec_driver_sql(f"CREATE VIEW v_jobs AS {VIEWS['v_jobs']}")
    assert rows_of(db, "jobs") == []
    db.dispose()


def test_a_query_finds_out_what_columns_there_are(filled: sa.Engine) -> None:
    place = "pragma_table_info('jobs')" if filled.dialect.name == "sqlite" else "information_schema.columns"
    name = "name" if filled.dialect.name == "sqlite" else "column_name"
    assert {"name": "dataset_sha256"} in rows_of(filled, f"SELECT {name} AS name FROM {place}")


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
