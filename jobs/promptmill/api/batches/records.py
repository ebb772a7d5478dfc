"""The table ``batches``: each change of a batch's state is one conditional statement."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from promptmill.database.engine import epoch, id_at, lock_name, now_of, reading
from promptmill.database.tables import batches, jobs
from promptmill.ledger.status import counts_of

#: States that a batch can leave, and those that it cannot.
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
FINAL = ("failed", "completed", "expired", "cancelled")

MOMENTS = (
    "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip


def twin(connection: Connection, idempotency_key: str | None, api_key_id: str | None) -> Row[Any] | None:
    """The batch that was made with this idempotency key. No other one can be made until the transaction's end."""
    if idempotency_key is None:
        return None
    lock_name(connection, f"batch {api_key_id} {idempotency_key}")
    mine = batches.c.api_key_id.is_not_distinct_from(api_key_id)
    return connection.execute(sa.select(batches).where(batches.c.idempotency_key == idempotency_key, mine)).first()


def insert(connection: Connection, values: dict[str, Any], window_s: float) -> Row[Any]:
    """A new batch, to be validated."""
    now = now_of(connection)
    batch_id = f"batch_{id_at(now).lower()}"
    connection.execute(
        sa.insert(batches).values(id=batch_id, state="validating", created_at=now, expires_at=now + window_s, **values)
    )
    return connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()


def move(connection: Connection, batch_id: str, before: tuple[str, ...], after: str, **values: Any) -> bool:
    """Change the state; False when it was not one of ``before``."""
    stamped = {f"{after}_at": epoch()} if f"{after}_at" in batches.c else {}
    changed = connection.execute(
        sa.update(batches)
        .where(batches.c.id == batch_id, batches.c.state.in_(before))
        .values(state=after, **stamped, **values)
    )
    return changed.rowcount == 1


def shape(db: Engine, rows: list[Row[Any]]) -> list[dict[str, Any]]:
    """Batches as OpenAI's API shows them: every key, null where nothing is known."""
    with reading(db) as connection:
        return [_shape(connection, row) for row in rows]


def _shape(db: Connection, row: Row[Any]) -> dict[str, Any]:
    total, completed, failed = row.total, row.completed, row.failed
    if row.job_id is not None and row.state not in FINAL:
        completed, failed = counts_of(db, row.job_id)
    errors = json.loads(row.errors) if row.errors else None
    job = None if row.job_id is None else db.execute(sa.select(jobs.c.id).where(jobs.c.id == row.job_id)).scalar()
    return {
        "id": row.id, "object": "batch", "endpoint": row.endpoint, "model": row.model,
        "errors": None if errors is None else {"object": "list", "data": errors},
        "input_file_id": row.input_file_id, "completion_window": row.completion_window, "status": row.state,
        "output_file_id": row.output_file_id, "error_file_id": row.error_file_id, "created_at": int(row.created_at),
        **{name: None if getattr(row, name) is None else int(getattr(row, name)) for name in MOMENTS},
        "request_counts": {"total": total, "completed": completed, "failed": failed},
        "metadata": json.loads(row.metadata) if row.metadata else None,
        "priority": row.priority, "job_id": job,
    }  # fmt: skip
