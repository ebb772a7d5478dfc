"""PostgreSQL behind pgbouncer in transaction mode, and how many connections a worker needs."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, reading, writing
from promptmill.database.revision import upgrade
from promptmill.errors import DatabaseError
from promptmill.ledger import Ledger
from promptmill.store import queries
from promptmill.store.queries import QueryError
from promptmill.types import ChunkId
from tests.conftest import Command, unavailable, wait_until
from tests.poolers import POOL_SIZE, Pooler, pgbouncer
from tests.unit.test_ledger import JOB, add_job, ok


@pytest.fixture
def pooler(postgres_url: str) -> Iterator[Pooler]:
    binary = pgbouncer()
    if binary is None:
        unavailable("pgbouncer is not installed")
    with Pooler(postgres_url) as running:
        yield running


def test_every_transaction_may_have_another_server(pooler: Pooler) -> None:
    db = connect(pooler.url)
    upgrade(db)
    add_job(db, 240, 1)
    ledger = Ledger(db)

    def work(worker: str, first: int) -> None:
        for number in range(first, 240, 4):
            lease = ledger.claim(ChunkId(JOB, number), worker)
            assert lease is not None
            ledger.renew(lease)
            ledger.finish(lease, None, 4, [ok(number)])

    failures: list[BaseException] = []

    def guarded(worker: str, first: int) -> None:
        try:
            work(worker, first)
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=guarded, args=(f"w{each}", each)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (ledger.progress(JOB).ok, ledger.progress(JOB).state) == (240, "completed")
    db.dispose()


def test_nothing_stays_set_on_a_server_that_others_get_next(pooler: Pooler, postgres_url: str) -> None:
    db, plain = connect(pooler.url, idle_s=5.0), connect(pooler.url)
    shown = sa.text("SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')")
    with writing(db) as connection:
        assert tuple(connection.execute(shown).one()) == ("30s", "5s")
    with reading(plain) as connection:
        assert tuple(connection.execute(shown).one()) == ("30s", "0")
    # Outside a transaction of ours.
    with plain.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert tuple(connection.execute(shown).one()) == ("0", "0")
    db.dispose()
    plain.dispose()


@pytest.mark.parametrize(("options", "prepared"), [("", True), ("prepare_threshold=0", False)])
def test_statements_are_prepared_where_one_server_answers(postgres_url: str, options: str, prepared: bool) -> None:
    url = postgres_url + ("&" if "?" in postgres_url else "?") + options
    db = connect(url)
    with writing(db) as connection:
        for _ in range(8):
            connection.execute(sa.text("SELECT 1"))
        found = connection.execute(sa.text("SELECT count(*) FROM pg_prepared_statements")).scalar()
    assert bool(found) is prepared
    db.dispose()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("prepare_treshold=0", "unknown option 'prepare_treshold'"),
        ("prepare_threshold=never", "prepare_threshold is 0"),
        ("pool_size=3", "unknown option 'pool_size'"),
    ],
)
def test_an_unknown_option_of_the_url_is_one_clear_sentence(command: Command, option: str, said: str) -> None:
    command.environment["JOBS_DATABASE_URL"] = f"postgresql://nobody@localhost/nothing?{option}"
    found = command("list")
    assert (found.code, said in found.err, "internal error" in found.err) == (2, True, False)


def test_an_unknown_option_of_a_file_is_one_clear_sentence() -> None:
    with pytest.raises(DatabaseError, match="unknown option 'pool'"):
        connect("sqlite:///jobs.sqlite?pool=3")


def test_jobs_reports_and_queries_work_behind_the_pooler(pooler: Pooler, command: Command, redis_url: str) -> None:
    command.environment |= {"JOBS_DATABASE_URL": pooler.url, "JOBS_REDIS_URL": redis_url, "JOBS_LEASE_S": "6"}
    assert command("db", "upgrade").code == 0
    (command.folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {row}"}) + "\n" for row in range(200)))
    workers = command.start("worker", "--device", "sim:2", "--model", "echo:token_s=0.005")
    try:
        done = command("submit", "p.jsonl", "--model", "echo:token_s=0.005", "--wait", "--json")
        assert (done.code, json.loads(done.out)["state"]) == (0, "completed"), done.err
        direct = connect(pooler.direct)
        with reading(direct) as connection:
            found = connection.execute(sa.text("SELECT outcome, count(*) FROM attempts GROUP BY outcome")).all()
            assert [outcome for outcome, _ in found] == ["done"]
        direct.dispose()
        assert command("report", "@last").code == 0
        assert command("results", "@last", "-o", "out.parquet").code == 0
        assert command("status", "@last").code == 0
    finally:
        workers.terminate()
        workers.wait(60)


@pytest.fixture
def reader(postgres_url: str) -> Iterator[str]:
    """A user that may only read."""
    name = f"reads_{uuid.uuid4().hex[:8]}"
    db = connect(postgres_url)
    upgrade(db)
    with writing(db) as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD 'read'")
        connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
        connection.exec_driver_sql(f"REVOKE SELECT ON api_keys FROM {name}")
    yield name
    with writing(db) as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}")
        connection.exec_driver_sql(f"DROP ROLE {name}")
    db.dispose()


@pytest.fixture
def asking_pooler(postgres_url: str, reader: str) -> Iterator[Pooler]:
    """A pooler that asks for passwords and knows the owner and the reader."""
    if pgbouncer() is None:
        unavailable("pgbouncer is not installed")
    owner = sa.make_url(postgres_url).username or "postgres"
    with Pooler(postgres_url, {owner: "own", reader: "read"}) as running:
        running.url = running.url_of(owner)
        yield running


def test_behind_a_pooler_that_asks_for_passwords_a_query_needs_a_user_that_it_knows(
    asking_pooler: Pooler, reader: str, command: Command
) -> None:
    command.environment["JOBS_DATABASE_URL"] = asking_pooler.url
    refused = command("query", "jobs")
    assert refused.code == 2
    assert "auth_file" in refused.err
    assert "JOBS_QUERY_DATABASE_URL" in refused.err
    command.environment["JOBS_QUERY_DATABASE_URL"] = asking_pooler.url_of(reader)
    done = command("query", "SELECT count(*) AS n FROM v_jobs", "--format", "csv")
    assert (done.code, done.out) == (0, "n\n0\n"), done.err


@pytest.mark.parametrize("rest", ["", ", 1 / 0"], ids=["answered", "failed"])
def test_a_query_leaves_nothing_to_who_gets_its_server_next(
    asking_pooler: Pooler, reader: str, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    # As a function would do it whose name nobody has thought of.
    monkeypatch.setattr(queries, "refuse_disturbing", lambda text: None)
    db = connect(asking_pooler.url)
    asked = f"SELECT pg_advisory_lock(7)::text, set_config('work_mem', '64kB', false){rest}"
    with (
        contextlib.suppress(QueryError),
        queries.querying(db, asked, 20, asking_pooler.url_of(reader)) as (_, rows),
    ):
        assert len(list(rows)) == 1
    with reading(db) as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")).scalar() == 0
    others = connect(asking_pooler.url_of(reader))
    for _ in range(POOL_SIZE):
        with reading(others) as connection:
            assert connection.execute(sa.text("SHOW work_mem")).scalar() != "64kB"
    others.dispose()
    db.dispose()


def test_a_busy_worker_has_two_connections(command: Command, postgres_url: str, redis_url: str) -> None:
    command.environment |= {"JOBS_DATABASE_URL": postgres_url, "JOBS_REDIS_URL": redis_url, "JOBS_LEASE_S": "6"}
    assert command("db", "upgrade").code == 0
    (command.folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {row}"}) + "\n" for row in range(400)))
    model = "echo:token_s=0.02"
    workers = command.start("worker", "--device", "sim:2", "--model", model, "--slots", "4")
    db = connect(postgres_url)
    count = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    seen: list[int] = []
    try:
        assert command("submit", "p.jsonl", "--model", model).code == 0

        def ended() -> bool:
            with reading(db) as connection:
                seen.append(int(connection.execute(count).scalar_one()))
                return connection.execute(sa.text("SELECT state FROM jobs")).scalar() == "completed"

        wait_until(ended, "the job ends", 120)
    finally:
        workers.terminate()
        workers.wait(60)
        db.dispose()
    # Two workers, whatever they do.
    assert 3 <= max(seen) <= 4


def test_a_server_without_connections_is_told_with_what_helps(postgres_url: str) -> None:
    db = connect(postgres_url)
    with writing(db) as connection:
        name = connection.execute(sa.text("SELECT current_database()")).scalar_one()
        connection.execute(sa.text("CREATE ROLE few LOGIN CONNECTION LIMIT 0"))
        connection.execute(sa.text(f'GRANT CONNECT ON DATABASE "{name}" TO few'))
    other = connect(sa.make_url(postgres_url).set(username="few").render_as_string(hide_password=False))
    try:
        with pytest.raises(DatabaseError, match="no connection left") as caught, reading(other) as connection:
            connection.execute(sa.text("SELECT 1"))
        assert "max_connections" in (caught.value.hint or "")
    finally:
        with writing(db) as connection:
            connection.execute(sa.text(f'REVOKE ALL ON DATABASE "{name}" FROM few'))
            connection.execute(sa.text("DROP ROLE few"))
        db.dispose()
