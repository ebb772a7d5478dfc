"""Both databases: the schema that migrations make, the ledger's behaviour, and what is refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import InternalError, OperationalError, errors

from promptmill.database.engine import connect, copy_rows, writing
from promptmill.database.refusals import connecting
from promptmill.database.revision import current_revision, head_revision, migrations_folder, open_database, upgrade
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results
from promptmill.database.timeouts import end_silent_connections
from promptmill.errors import DatabaseError
from promptmill.ledger import Ledger
from promptmill.types import ChunkId, ErrorClass, JobState
from promptmill_workers.worker.database_retry import PASSING
from tests.conftest import wait_until
from tests.unit.test_ledger import JOB, add_job, failed, ok


def test_migrations_make_the_tables_of_the_code(database: sa.Engine) -> None:
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert current_revision(database) == head_revision()


def test_the_newest_migration_is_alembic_s_head() -> None:
    assert ScriptDirectory(str(migrations_folder())).get_current_head() == head_revision()


def test_upgrading_twice_changes_nothing(database: sa.Engine) -> None:
    upgrade(database)
    assert current_revision(database) == head_revision()


def test_a_database_of_a_newer_version_is_refused(database: sa.Engine, migrated_url: str) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="revision 9999"):
        open_database(migrated_url)


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db", "postgresql://127.0.0.1:1/none"])
def test_a_database_that_cannot_be_used_is_one_clear_error(url: str) -> None:
    with pytest.raises(DatabaseError):
        open_database(url)


def test_the_view_shows_each_result_with_its_question(database: sa.Engine) -> None:
    add_job(database, 2, 2, state="running")
    ledger = Ledger(database)
    lease = ledger.claim(ChunkId(JOB, 0), "w")
    assert lease is not None
    ledger.finish(lease, last=[ok(0), failed(1)])
    with database.connect() as connection:
        rows = connection.execute(
            sa.text("SELECT id, prompt, answer, state, error_class FROM v_results ORDER BY row")
        ).all()
    assert [tuple(row) for row in rows] == [
        ("r0", "p", "answer 0", "ok", None),
        ("r1", "p", None, "error", "internal"),
    ]


def test_many_workers_racing_on_one_job_run_each_row_once(database: sa.Engine) -> None:
    """Twelve threads claim, record and finish the chunks of one job; some give theirs back."""
    add_job(database, 120, 4, state="queued")
    ledger = Ledger(database)
    problems: list[BaseException] = []

    def work(name: str) -> None:
        try:
            while (lease := ledger.claim_next(JOB, name)) is not None:
                rows = [row.row for row in ledger.pending(lease)]
                ledger.record(lease, [ok(row) for row in rows[:2]])
                if lease.attempt == 1 and lease.chunk.number % 3 == 0:
                    ledger.release(lease)
                else:
                    assert ledger.finish(lease, last=[ok(row) for row in rows[2:]])
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    progress = ledger.progress(JOB)
    assert (progress.state, progress.ok, progress.errors) == (JobState.COMPLETED, 120, 0)
    assert _scalar(database, sa.select(sa.func.count()).select_from(results)) == 120
    assert _scalar(database, sa.select(sa.func.count()).where(attempts.c.ended_at.is_(None))) == 0


def test_one_chunk_claimed_by_many_at_once_has_one_holder(database: sa.Engine) -> None:
    add_job(database, 4, 4)
    ledger = Ledger(database)
    start, held = threading.Barrier(8), []

    def claim(name: str) -> None:
        start.wait()
        lease = ledger.claim(ChunkId(JOB, 0), name)
        if lease is not None:
            held.append(name)

    threads = [threading.Thread(target=claim, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1


def test_the_first_claims_of_a_job_start_it_once(database: sa.Engine) -> None:
    add_job(database, 8, 1)
    ledger = Ledger(database)
    start, leases = threading.Barrier(8), []

    def claim(number: int) -> None:
        start.wait()
        leases.append(ledger.claim(ChunkId(JOB, number), f"w{number}"))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(lease.chunk.number, lease.worker_id) for lease in leases if lease} == {(n, f"w{n}") for n in range(8)}
    with database.connect() as connection:
        job = connection.execute(sa.select(jobs)).one()
        began = connection.execute(
            sa.select(attempts.c.started_at, chunks.c.leased_at).join(
                chunks, sa.and_(chunks.c.job_id == attempts.c.job_id, chunks.c.number == attempts.c.number)
            )
        ).all()
    assert (job.state, job.limit_from) == ("running", pytest.approx(job.started_at, abs=0.1))
    assert len(began) == 8
    assert all(started_at == leased_at for started_at, leased_at in began)


def _scalar(database: sa.Engine, query: sa.Executable) -> Any:
    with database.connect() as connection:
        return connection.execute(query).scalar()


def test_a_sqlite_file_is_made_and_migrated_by_itself(tmp_path: Any) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/new/folder/jobs.sqlite")
    assert current_revision(engine) == head_revision()
    engine.dispose()
    assert connect(f"sqlite:///{tmp_path}/new/folder/jobs.sqlite").dialect.name == "sqlite"


def test_last_words_with_a_nul_are_stored(database: sa.Engine) -> None:
    add_job(database, 1, 1)
    ledger = Ledger(database, max_attempts=1)
    lease = ledger.claim_next(JOB, "a")
    assert lease is not None
    assert ledger.fail(lease, ErrorClass.ENGINE_CRASH, "exit\x00 code 1")
    assert _scalar(database, sa.select(results.c.error_message)) == "exit\N{REPLACEMENT CHARACTER} code 1"


def test_a_retry_and_the_end_of_a_chunk_do_not_wait_for_each_other(migrated_postgres_url: str) -> None:
    database = connect(migrated_postgres_url)
    add_job(database, 2, 2)
    ledger = Ledger(database)
    lease = ledger.claim_next(JOB, "a")
    assert lease is not None
    ledger.finish(lease, last=[failed(0), ok(1)])
    with database.begin() as connection:
        # As every end of a chunk does: the chunk first, then its job.
        connection.execute(sa.select(chunks.c.number).with_for_update())
        retrying = threading.Thread(target=ledger.retry, args=(JOB,))
        retrying.start()
        _wait_for_a_blocked_session(migrated_postgres_url)
        connection.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
        connection.execute(sa.select(jobs.c.id).with_for_update(key_share=True))
    retrying.join(timeout=30)
    assert ledger.progress(JOB).state is JobState.QUEUED
    database.dispose()


def test_a_server_that_is_cut_off_is_noticed_and_a_lock_not_waited_for_for_ever(migrated_postgres_url: str) -> None:
    engine = connect(migrated_postgres_url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SHOW lock_timeout")).scalar() == "30s"
        said = connection.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
    engine.dispose()
    assert said["keepalives"] == "1"
    probes_s = int(said["keepalives_interval"]) * int(said["keepalives_count"])
    assert int(said["keepalives_idle"]) + probes_s <= 10
    assert int(said["tcp_user_timeout"]) <= 10_000
    patient = connect(
        f"{migrated_postgres_url}{'&' if '?' in migrated_postgres_url else '?'}options=-c%20lock_timeout%3D100ms"
    )
    with patient.connect() as connection:
        assert connection.execute(sa.text("SHOW lock_timeout")).scalar() == "100ms"
    add_job(patient, 2, 2)
    with writing(patient) as other:
        other.execute(sa.select(jobs.c.id).with_for_update())
        with pytest.raises(DatabaseError, match="another transaction"):
            Ledger(patient).cancel(JOB)
    # What workers wait for and try again.
    assert issubclass(DatabaseError, PASSING)
    assert Ledger(patient).cancel(JOB)
    patient.dispose()


def _wait_for_a_blocked_session(url: str) -> None:
    blocked = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    watcher = connect(url)
    wait_until(lambda: _scalar(watcher, blocked) > 0, "a session waits for a lock", 30)
    watcher.dispose()


def test_a_transaction_that_stands_still_gives_its_locks_back(database: sa.Engine, migrated_url: str) -> None:
    """A worker suspended in the middle of one keeps nobody from its chunks; SQLite has no such transactions."""
    if database.dialect.name != "postgresql":
        pytest.skip("SQLite's writers hold no lock while nothing happens in them")
    other = connect(migrated_url, idle_s=0.5)
    add_job(database, 2, 2, state="running")
    started = time.monotonic()
    change = sa.update(chunks).values(failures=3)

    def suspended() -> None:
        with writing(other) as connection:
            connection.execute(change)
            with writing(database) as free:
                free.execute(change)
            assert time.monotonic() - started < 10
            connection.execute(change)

    with pytest.raises(DatabaseError, match="in which nothing happened"):
        suspended()
    with writing(other) as connection:
        connection.execute(change)
    other.dispose()


def test_an_answer_that_never_comes_is_not_waited_for(migrated_postgres_url: str) -> None:
    engine = connect(migrated_postgres_url)
    end_silent_connections(engine, 1.0)
    add_job(engine, 2, 2)
    ledger = Ledger(engine)
    with engine.connect() as connection:
        server = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    # The one connection of the pool. It lives, as TCP sees it, and says nothing.
    os.kill(server, signal.SIGSTOP)
    try:
        began = time.monotonic()
        # The look at the connection before its use finds it silent: another one is made.
        assert ledger.claim(ChunkId(JOB, 0), "a") is not None
        assert 0.9 < time.monotonic() - began < 10
        with engine.connect() as connection:
            server_too = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            os.kill(server_too, signal.SIGSTOP)
            try:
                with pytest.raises(sa.exc.OperationalError, match="no answer within 1 s"):
                    connection.execute(sa.text("SELECT 1"))
            finally:
                os.kill(server_too, signal.SIGCONT)
        assert ledger.progress(JOB).ok == 0
    finally:
        os.kill(server, signal.SIGCONT)
        engine.dispose()


def test_a_server_that_is_read_only_for_a_while_is_waited_for(postgres_url: str) -> None:
    """Its connections of then stay read-only: they are not used again."""
    admin, engine = connect(postgres_url), connect(postgres_url)
    upgrade(admin)
    add_job(admin, 2, 2)
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.execute(sa.text("SELECT current_database()")).scalar()
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        with pytest.raises(PASSING, match="it is read-only"):
            Ledger(engine).claim(ChunkId(JOB, 0), "a")
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = off')
    assert Ledger(engine).claim(ChunkId(JOB, 0), "a") is not None
    engine.dispose()
    admin.dispose()


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (errors.DiskFull("could not extend file"), "the disk of the database is full"),
        (errors.OutOfMemory("out of memory"), "has run out of memory"),
        (errors.TooManyConnections("too many clients"), "has no connection left"),
        (errors.DeadlockDetected("deadlock detected"), "waited for each other"),
        (errors.QueryCanceled("canceling statement"), "ended a statement"),
        (errors.AdminShutdown("terminating connection"), "cannot use the database .*: terminating connection"),
        (OperationalError("consuming input failed"), "cannot use the database .*: consuming input failed"),
        (InternalError("received 2 results from command 'COMMIT'"), "cannot use the database .*: received 2 results"),
    ],
)
def test_what_a_server_refuses_is_one_clear_sentence(problem: OperationalError, said: str) -> None:
    """As SQLAlchemy raises it, and as COPY does."""
    engine = connect("postgresql://nobody@localhost/nothing")
    with pytest.raises(DatabaseError, match=said), connecting(engine):
        raise problem
    wrapped = sa.exc.OperationalError("INSERT", {}, problem, connection_invalidated=problem.sqlstate is None)
    with pytest.raises(DatabaseError, match=said), connecting(engine):
        raise wrapped


def test_an_error_that_is_a_fault_of_ours_stays_what_it_is() -> None:
    engine = connect("postgresql://nobody@localhost/nothing")
    for fault in (errors.UniqueViolation("duplicate key"), errors.ProgramLimitExceeded("row is too big")):
        with pytest.raises(type(fault)), connecting(engine):
            raise fault


def test_a_copy_that_a_lock_or_a_time_limit_ends_says_so(migrated_postgres_url: str) -> None:
    engine = connect(migrated_postgres_url)
    add_job(engine, 2, 2)
    columns, row = ("job_id", "row", "custom_id"), (JOB, 2, "r2")

    def copy_within(limit: str) -> None:
        with writing(engine) as connection:
            connection.exec_driver_sql(f"SET LOCAL {limit} = '100ms'")
            copy_rows(connection, requests, columns, [row])

    with writing(engine) as other:
        copy_rows(other, requests, columns, [row])
        for limit, said in (("lock_timeout", "another transaction"), ("statement_timeout", "ended a statement")):
            with pytest.raises(DatabaseError, match=said):
                copy_within(limit)
    engine.dispose()


def test_an_error_of_a_statement_names_no_text_of_anybody(database: sa.Engine) -> None:
    row = {"job_id": JOB, "row": 0, "state": "ok", "text": "a secret answer"}
    statement = sa.text(
        'INSERT INTO results (job_id, "row", state, text) VALUES (:job_id, :row, :state, no_such_function(:text))'
    )
    with pytest.raises(sa.exc.DBAPIError) as raised, writing(database) as connection:
        connection.execute(statement, row)
    assert "secret" not in str(raised.value)


def test_a_sqlite_file_is_for_its_user_alone(tmp_path: Any) -> None:
    def modes() -> dict[str, int]:
        return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}

    folder, before = tmp_path / "new", os.umask(0o000)
    try:
        for _ in range(2):
            engine = open_database(f"sqlite:///{folder / 'jobs.sqlite'}")
            with engine.connect() as connection:
                connection.execute(sa.text("INSERT INTO answers VALUES ('k', 't', 'stop', 1, 1, 0, NULL, 0)"))
                assert modes() == dict.fromkeys(("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"), 0o600)
                assert folder.stat().st_mode & 0o777 == 0o700
            # Of an earlier version: whoever could look into the folder could read it.
            for path in folder.iterdir():
                path.chmod(0o644)
            engine.dispose()
    finally:
        os.umask(before)


def test_a_sqlite_file_in_a_folder_that_is_there_leaves_the_folder_as_it_is(tmp_path: Any) -> None:
    tmp_path.chmod(0o755)
    open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}").dispose()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
