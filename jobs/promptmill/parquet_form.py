"""Results as Parquet: columns of fixed types, written batch by batch, so that memory does not grow with the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import reading

#: Rows of a row group.
GROUP_ROWS = 50_000

#: Column -> its type by Arrow's name and where it comes from (r: results, q: requests).
COLUMNS = {
    "row": ("int64", 'r."row"'),
    "id": ("string", "q.custom_id"),
    "state": ("string", "r.state"),
    "text": ("string", "r.text"),
    "finish_reason": ("string", "r.finish_reason"),
    "error_class": ("string", "r.error_class"),
    "error_message": ("string", "r.error_message"),
    "prompt_tokens": ("int64", "r.prompt_tokens"),
    "cached_tokens": ("int64", "r.cached_tokens"),
    "output_tokens": ("int64", "r.output_tokens"),
    "enqueued_at": ("float64", "r.enqueued_at"),
    "admitted_at": ("float64", "r.admitted_at"),
    "first_token_at": ("float64", "r.first_token_at"),
    "finished_at": ("float64", "r.finished_at"),
    "attempt": ("int64", "r.attempt"),
    "worker": ("string", "r.worker_id"),
    "chunk": ("int64", "r.chunk"),
}

#: Columns that are written on demand: JSON, as it is stored.
WITH_PROMPTS = {"input": ("string", "q.input"), "expected": ("string", "q.expected"), "meta": ("string", "q.meta")}


def write(db: Engine, job_id: str, path: str, failed_only: bool = False, prompts: bool = False) -> int:
    """Write the job's results to ``path`` in the order of its rows; returns how many."""
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(path, schema_of(prompts), compression="zstd") as writer:
        for batch in record_batches(db, job_id, failed_only, prompts):
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def schema_of(prompts: bool) -> Any:
    """The Arrow schema of the results; ``prompts``: with the columns WITH_PROMPTS."""
    import pyarrow as pa

    chosen = COLUMNS | (WITH_PROMPTS if prompts else {})
    return pa.schema([(name, getattr(pa, kind)()) for name, (kind, _) in chosen.items()])


def record_batches(db: Engine, job_id: str, failed_only: bool = False, prompts: bool = False) -> Iterator[Any]:
    """The job's results in the order of its rows as Arrow record batches of up to GROUP_ROWS."""
    import pyarrow as pa

    schema = schema_of(prompts)
    chosen = COLUMNS | (WITH_PROMPTS if prompts else {})
    selected = ", ".join(source for _, source in chosen.values())
    only = " AND r.state = 'error'" if failed_only else ""
    query = sa.text(
        f"SELECT {selected} FROM results r JOIN requests q "  # noqa: S608 - our names
        'ON q.job_id = r.job_id AND q."row" = r."row" '
        f'WHERE r.job_id = :job{only} ORDER BY r."row"'
    )
    with reading(db) as connection:
        for rows in _pages(connection, query, job_id):
            columns = [
                pa.array(values, each.type) for values, each in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            yield pa.record_batch(columns, schema=schema)


def _pages(connection: Connection, query: sa.TextClause, job_id: str) -> Iterator[Sequence[Sequence[Any]]]:
    """GROUP_ROWS rows at a time. From SQLite as plain tuples: a row object for each of a million costs seconds."""
    if connection.dialect.name != "sqlite":
        streamed: Any = connection.execution_options(yield_per=GROUP_ROWS).execute(query, {"job": job_id})
        # Without a size all rows would be one partition.
        yield from streamed.partitions(GROUP_ROWS)
        return
    driver: Any = connection.connection.driver_connection
    cursor = driver.cursor()
    try:
        cursor.execute(str(query), {"job": job_id})
        while rows := cursor.fetchmany(GROUP_ROWS):
            yield rows
    finally:
        cursor.close()
