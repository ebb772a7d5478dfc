"""The second driver of PostgreSQL: it reaches the same server, in the same encoding, and never waits for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict

from promptmill.database import arrow_tables
from promptmill.database.engine import connect, libpq_address, reading, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import results
from promptmill.errors import DatabaseError
from promptmill.store import parquet
from tests.conftest import wait_until
from tests.unit.test_reports import JOB, answer, store


@pytest.fixture
def db(migrated_postgres_url: str) -> Iterator[sa.Engine]:
    engine = connect(migrated_postgres_url)
    yield engine
    engine.dispose()


@contextmanager
def reading_by(url: str) -> Iterator[sa.Connection]:
    engine = connect(url)
    with reading(engine) as connection:
        yield connection
    engine.dispose()


def test_the_address_is_that_of_the_server_that_was_reached(db: sa.Engine) -> None:
    url = db.url.update_query_dict({"connect_timeout": "3", "client_encoding": "latin1"})
    with reading_by(url.render_as_string(hide_password=False)) as connection:
        asked = conninfo_to_dict(libpq_address(connection))
        assert asked["host"] == connection.connection.driver_connection.info.host  # type: ignore[union-attr]
    assert asked["dbname"] == db.url.database
    assert asked["connect_timeout"] == "3"
    assert asked["client_encoding"] == "UTF8"
    assert asked["application_name"] == "promptmill"


def test_a_url_that_leaves_the_host_open(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with reading(db) as connection:
        info = connection.connection.driver_connection.info  # type: ignore[union-attr]
        monkeypatch.setenv("PGHOST", info.host)
        monkeypatch.setenv("PGPORT", str(info.port))
        monkeypatch.setenv("PGUSER", info.user)
    with reading_by(f"postgresql:///{db.url.database}") as connection:
        monkeypatch.delenv("PGHOST")
        [table] = arrow_tables.tables(connection, ["SELECT current_database()::text AS name"])
    assert table.to_pylist() == [{"name": db.url.database}]


def test_another_encoding_of_the_database_changes_no_text(db: sa.Engine, tmp_path: Path) -> None:
    name = f"latin_{os.getpid()}"
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    latin = connect(db.url.set(database=name).render_as_string(hide_password=False))
    upgrade(latin)
    store(latin, [answer(row, text="déjà vu", worker_id="wörker") for row in range(5)])
    parquet.write(latin, JOB, str(tmp_path / "out.parquet"))
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["déjà vu"] * 5
    latin.dispose()


def test_a_lock_is_not_waited_for_without_end(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_tables, "LOCK_S", 1)
    store(db, [answer(0)])
    with writing(db) as holder:
        holder.execute(sa.text("LOCK TABLE results IN ACCESS EXCLUSIVE MODE"))
        with reading(db) as connection, pytest.raises(DatabaseError, match="another transaction has kept"):
            list(arrow_tables.tables(connection, ["SELECT count(*) FROM results"]))


def test_who_is_interrupted_does_not_wait_for_the_query(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes where a signal's handler would raise it: in the wait for a query that the server runs."""
    running = sa.text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event = 'PgSleep' AND query LIKE '%pg_sleep(3600)%' AND datname = current_database()"
    )

    def runs() -> bool:
        with reading(db) as connection:
            return bool(connection.execute(running).scalar())

    def interrupted(future: Future[Any], timeout: float | None = None) -> Any:
        wait_until(runs, "the query runs", 60)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with reading(db) as connection, pytest.raises(KeyboardInterrupt):
        # Far longer than any test may take.
        list(arrow_tables.tables(connection, ["SELECT 1 AS n FROM pg_sleep(3600)"]))
    wait_until(lambda: not runs(), "the query is ended", 60)


def test_who_stops_early_leaves_no_connection(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(5)])
    with reading(db) as connection:
        found = arrow_tables.tables(connection, [f"SELECT {number} AS n" for number in range(50)])
        next(found)
        found.close()  # type: ignore[attr-defined]
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )

    def is_alone() -> bool:
        with reading(db) as connection:
            return connection.execute(others).scalar() == 0

    # The server notices the end of a connection when it comes to it.
    wait_until(is_alone, "the connections of the threads are gone")
    with reading(db) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(results)).scalar() == 5
