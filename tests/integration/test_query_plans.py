"""No statement of the ledger and the dispatcher reads a whole large table: PostgreSQL's plans of all that they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, reading
from promptmill.database.tables import chunks, results, worker_samples
from promptmill.ledger import Ledger, waiting_requests
from promptmill.queue.broker import Broker
from promptmill.queue.dispatcher import Dispatcher, live_workers, waits_for
from promptmill.store.catalog import find_job
from promptmill.types import ChunkId, EngineCounters, ErrorClass, Failed
from tests.unit.test_ledger import JOB, add_job, ok

#: Tables that grow with the work that was ever done.
LARGE = {table.name for table in (chunks, results, worker_samples)}

#: What an installation has after some months: ended jobs with their rows, and workers with their samples.
PAST = (
    "INSERT INTO jobs (id, state, mode, dataset_name, dataset_sha256, dataset_format, model, sampling, priority, rows, "
    "env, submitted_at) SELECT '00OLD' || job, CASE WHEN job < 5 THEN 'running' ELSE 'completed' END, 'queue', 'd', "
    "'0', 'f', CASE WHEN job < 3 THEN 'echo' ELSE 'other' END, '{}', 5, 50, '{}', 0 FROM generate_series(0, 399) job",
    "INSERT INTO requests (job_id, row, custom_id, input) SELECT id, row, row, '{}' "
    "FROM jobs, generate_series(0, 49) AS row",
    "INSERT INTO chunks (job_id, number, first_row, rows, state, attempt, ok, errors, output_tokens) "
    "SELECT id, number, 2 * number, 2, CASE state WHEN 'running' THEN 'queued' ELSE 'done' END, 1, 2, 0, 6 "
    "FROM jobs, generate_series(0, 24) AS number",
    "INSERT INTO attempts (job_id, number, attempt, worker_id, started_at, ended_at, outcome) "
    "SELECT job_id, number, 1, 'w' || number, 0, 1, 'done' FROM chunks WHERE state = 'done'",
    "INSERT INTO results (job_id, row, state, prompt_tokens, cached_tokens, output_tokens, committed_at, attempt, "
    "chunk) SELECT job_id, row, 'ok', 5, 0, 3, 1, 1, row / 2 FROM requests JOIN jobs ON id = job_id "
    "WHERE state = 'completed'",
    "INSERT INTO workers (id, host, pid, state, models, device_asked, started_at, heartbeat_at) "
    "SELECT 'w' || worker, 'h', 1, CASE WHEN worker < 5 THEN 'idle' ELSE 'stopped' END, '[\"echo\"]', 'cpu', 0, "
    "CASE WHEN worker < 5 THEN 1e11 ELSE 1 END FROM generate_series(0, 99) AS worker",
    "INSERT INTO worker_samples (worker_id, at) SELECT id, at FROM workers, generate_series(1, 200) AS at",
)


def change(db: sa.Engine, statement: str) -> None:
    """Over a connection that is not watched."""
    engine = connect(db.url.render_as_string(hide_password=False))
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture
def db(migrated_postgres_url: str) -> Iterator[sa.Engine]:
    engine = connect(migrated_postgres_url)
    with engine.begin() as connection:
        for statement in PAST:
            connection.exec_driver_sql(statement)
    add_job(engine, 40, 4, max_errors="40")
    change(engine, "ANALYZE")
    yield engine
    engine.dispose()


def watch(db: sa.Engine) -> dict[str, Any]:
    """Statements that run from now on, with the parameters of the first time."""
    seen: dict[str, Any] = {}

    def note(connection: object, cursor: object, statement: str, parameters: Any, context: object, many: bool) -> None:
        if statement.startswith(("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")):
            seen.setdefault(statement, parameters[0] if many else parameters)

    sa.event.listen(db, "before_cursor_execute", note)
    return seen


def whole_scans(plan: dict[str, Any]) -> Iterator[str]:
    """Scans of large tables that no condition of an index narrows."""
    if plan.get("Relation Name") in LARGE and plan["Node Type"].endswith("Scan"):
        is_narrow = "Index Cond" in plan or plan["Node Type"] == "Bitmap Heap Scan"
        if not is_narrow:
            yield f"{plan['Node Type']} of {plan['Relation Name']}"
    for part in plan.get("Plans", ()):
        yield from whole_scans(part)


class Called:
    """A ledger that notes which of its methods were called."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._ledger, name)


def work(ledger: Any) -> None:
    """What workers do, in the good case and in bad ones. The ledger tries twice."""
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert ledger.adopt("w1", []) is not None
    assert ledger.answered_by(lease, "f" * 64, {})
    assert len(ledger.pending(lease)) == 4
    ledger.standing(lease)
    ledger.renew(lease)
    assert not ledger.is_suspect(lease)
    late = Failed(1, ErrorClass.TIMEOUT, "no answer"), 16
    assert ledger.record(lease, [ok(0), late], EngineCounters(), maybe_stored=True) == 2
    last = [ok(2), ok(3)]
    assert ledger.finish(lease, EngineCounters(), 1, last, maybe_stored=True)
    given_back = ledger.claim_next(JOB, "w1")
    assert ledger.release(given_back, EngineCounters(), 1, [ok(given_back.first_row)])
    # Split, and one of its rows given up.
    for _ in range(2):
        assert ledger.fail(ledger.claim(ChunkId(JOB, 2), "w1"), ErrorClass.ENGINE_CRASH, "it died")
    piece = ledger.claim_next(JOB, "w1")
    assert piece.rows == 1
    assert ledger.fail(piece, ErrorClass.ENGINE_CRASH, "it died")


def recover(ledger: Any, db: sa.Engine) -> None:
    """What reconcilers do, and a process that takes an embedded job over."""
    lost = ledger.claim(ChunkId(JOB, 3), "w1")
    change(db, "UPDATE chunks SET leased_until = 1 WHERE state = 'leased'")
    assert ledger.requeue_expired() == [lost.chunk]
    assert ledger.mark_published([lost.chunk]) == [lost.chunk]
    ledger.unpublish_chunk(lost.chunk)
    ledger.unpublish(JOB, 0)
    assert ledger.claim(ChunkId(JOB, 4), "w1") is not None
    assert ledger.holders(JOB)
    assert ledger.abandon_leases(JOB) == 1


def dispatch(ledger: Any, db: sa.Engine, redis_url: str) -> None:
    dispatcher = Dispatcher(ledger, Broker(redis_url))
    assert dispatcher.reconcile()
    change(db, "UPDATE chunks SET published_at = published_at - 60")
    # Messages that are lost are looked for.
    dispatcher.reconcile()
    dispatcher.dispatch(JOB, "echo", 5)
    ledger.unpublish(JOB, -60)
    assert ledger.take_window(JOB, 100)
    assert dispatcher.is_served_elsewhere("echo", "w1")
    assert live_workers(db, redis_url)
    waits_for(db, find_job(db, JOB))
    assert ledger.claim_of_model("echo", "w2", "f" * 64) is not None


def order(ledger: Any, db: sa.Engine) -> None:
    """What people do."""
    assert ledger.is_open(JOB)
    assert ledger.open_jobs("queue")
    ledger.progress(JOB)
    ledger.job_spec(JOB)
    ledger.model_of(JOB)
    with reading(db) as connection:
        assert waiting_requests(connection, "queue")
        waiting_requests(connection, "queue", "key")
    assert ledger.pause(JOB)
    ledger.resume(JOB)
    ledger.complete_jobs()
    ledger.expire_overdue()
    assert ledger.stop(JOB, "its model does not load")
    assert ledger.retry(JOB, ErrorClass.ENGINE_CRASH) == 1
    assert ledger.cancel(JOB)


def test_no_statement_of_the_ledger_or_the_dispatcher_reads_a_whole_table(db: sa.Engine, redis_url: str) -> None:
    ledger, seen = Called(Ledger(db, max_attempts=2)), watch(db)
    work(ledger)
    recover(ledger, db)
    dispatch(ledger, db, redis_url)
    order(ledger, db)
    assert {name for name in vars(Ledger) if not name.startswith("_")} <= ledger.names | {"lease_s", "database_clock"}
    statements = dict(seen)
    found = []
    with db.connect() as connection:
        for statement, parameters in statements.items():
            explained = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one()
            found += [(scan, statement) for scan in whole_scans(explained[0]["Plan"])]
    assert len(statements) > 60, "the statements were not noticed"
    assert not found, "\n\n".join(f"{scan}: {statement}" for scan, statement in found)
