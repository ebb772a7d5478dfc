"""PostgreSQL behind pgbouncer in transaction mode, and how many connections a worker needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, reading, writing
from promptmill.database.revision import upgrade
from promptmill.errors import DatabaseError
from promptmill.ledger import Ledger
from promptmill.types import ChunkId
from tests.conftest import Command, unavailable, wait_until
from tests.poolers import Pooler, pgbouncer
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


def test_a_busy_worker_has_two_connections(command: Command, postgres_url: str, redis_url: str) -> None:
    command.environment |= {"JOBS_DATABASE_URL": postgres_url, "JOBS_REDIS_URL": redis_url, "JOBS_LEASE_S": "6"}
    assert command("db", "upgrade").code == 0
    (command.folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {row}"}) + "\n" for row in range(400)))
    model = "echo:token_s=0.02"
    workers = command.start("worker", "--device", "sim:2", "--model", model, "--slots", "4")
    db = connect(postgres_url)
    count = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
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
