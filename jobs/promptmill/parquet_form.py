"""Results as Parquet: columns of fixed types, written batch by batch, so that memory does not grow with the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill import parallel
from promptmill.database import reading
from promptmill.tables import jobs

#: Most rows of a row group, and most bytes of it as PostgreSQL sends them.
GROUP_ROWS = 50_000
GROUP_BYTES = 64 * 2**20

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
    "reasoning_tokens": ("int64", "r.reasoning_tokens"),
    "deduplicated": ("bool_", "r.deduplicated"),
    "enqueued_at": ("float64", "r.enqueued_at"),
    "admitted_at": ("float64", "r.admitted_at"),
    "first_token_at": ("float64", "r.first_token_at"),
    "finished_at": ("float64", "r.finished_at"),
    "attempt": ("int64", "r.attempt"),
    "worker": ("string", "r.worker_id"),
    "chunk": ("int64", "r.chunk"),
}

#: Columns of few values: a dictionary of the others would be made in vain.
REPEATED = ["state", "finish_reason", "error_class", "worker"]

#: Columns that are written on demand: JSON, as it is stored.
WITH_PROMPTS = {"input": ("string", "q.input"), "expected": ("string", "q.expected"), "meta": ("string", "q.meta")}


def write(db: Engine, job_id: str, path: str, failed_only: bool = False, prompts: bool = False) -> int:
    """Write the job's results to ``path`` in the order of its rows; returns how many."""
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(path, schema_of(prompts), compression="zstd", use_dictionary=REPEATED) as writer:
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
    """The job's results in the order of its rows as Arrow record batches of up to GROUP_ROWS.

    Of a large job that has ended several processes read, where :mod:`promptmill.parallel` allows it.
    """
    with reading(db) as connection:
        job = connection.execute(sa.select(jobs.c.state, jobs.c.rows).where(jobs.c.id == job_id)).one_or_none()
        if job is None or not parallel.is_worth(job.state, job.rows):
            yield from _batches(connection, _query(None, failed_only, prompts), {"job": job_id}, prompts)
            return
    with parallel.readers(db) as readers:
        spans = parallel.ranges(job.rows)
        for found in readers.each(_range_batches, spans, job_id, failed_only, prompts):
            for data in found:
                yield _unpacked(data)


def _range_batches(
    connection: Connection, span: tuple[int, int], job_id: str, failed_only: bool, prompts: bool
) -> list[bytes]:
    """Record batches of a range of rows, packed for the way to another process."""
    import pyarrow as pa

    schema = schema_of(prompts)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    given = {"job": job_id, "first": span[0], "last": span[1]}
    packed = []
    for batch in _batches(connection, _query(span, failed_only, prompts), given, prompts):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema, options=options) as writer:
            writer.write_batch(batch)
        packed.append(sink.getvalue().to_pybytes())
    return packed


def _unpacked(data: bytes) -> Any:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()


def _query(span: tuple[int, int] | None, failed_only: bool, prompts: bool) -> str:
    """With the parameters ``job``, ``first`` and ``last``, as :class:`sqlalchemy.text` names them."""
    chosen = COLUMNS | (WITH_PROMPTS if prompts else {})
    selected = ", ".join(f'{source} AS "{name}"' for name, (_, source) in chosen.items())
    only = " AND r.state = 'error'" if failed_only else ""
    among = "" if span is None else ' AND r."row" >= :first AND r."row" < :last'
    return (
        f"SELECT {selected} FROM results r JOIN requests q "  # noqa: S608 - our names
        'ON q.job_id = r.job_id AND q."row" = r."row" '
        f'WHERE r.job_id = :job{only}{among} ORDER BY r."row"'
    )


def _batches(connection: Connection, query: str, given: dict[str, Any], prompts: bool) -> Iterator[Any]:
    found = _from_sqlite if connection.dialect.name == "sqlite" else _from_postgresql
    return found(connection, query, given, schema_of(prompts))


def _from_sqlite(connection: Connection, query: str, given: dict[str, Any], schema: Any) -> Iterator[Any]:
    """Plain tuples of the driver: a row object for each of a million rows costs seconds."""
    import pyarrow as pa

    driver: Any = connection.connection.driver_connection
    cursor = driver.cursor()
    try:
        cursor.execute(query, given)
        while rows := cursor.fetchmany(GROUP_ROWS):
            columns = [_array(values, each.type) for values, each in zip(zip(*rows, strict=True), schema, strict=True)]
            yield pa.record_batch(columns, schema=schema)
    finally:
        cursor.close()


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    # A truth is a whole number in SQLite.
    return pa.array(values).cast(kind) if pa.types.is_boolean(kind) else pa.array(values, kind)


def _from_postgresql(connection: Connection, query: str, given: dict[str, Any], schema: Any) -> Iterator[Any]:
    """By COPY as CSV, which Arrow reads at once: a Python object for each value costs seconds.

    All texts are quoted, so that an empty one is told from none at all.
    """
    import pyarrow as pa

    texts = ", ".join(f'"{each.name}"' for each in schema if pa.types.is_string(each.type))
    sql = str(sa.text(query).bindparams(**given).compile(connection, compile_kwargs={"literal_binds": True}))
    driver: Any = connection.connection.driver_connection
    lines: list[bytes] = []
    size = 0
    with driver.cursor() as cursor, cursor.copy(f"COPY ({sql}) TO STDOUT (FORMAT csv, FORCE_QUOTE ({texts}))") as copy:
        for line in copy:
            lines.append(line)
            size += len(line)
            if len(lines) >= GROUP_ROWS or size >= GROUP_BYTES:
                yield _parsed(lines, schema)
                lines, size = [], 0
    if lines:
        yield _parsed(lines, schema)


def _parsed(lines: list[bytes], schema: Any) -> Any:
    """One record batch of lines as PostgreSQL writes them."""
    import pyarrow as pa
    from pyarrow import csv

    data = b"".join(lines)
    table = csv.read_csv(
        pa.BufferReader(data),
        # One block: a batch for each would make small row groups.
        csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=schema.names),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(
            column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False,
            true_values=["t"], false_values=["f"],
        ),
    )  # fmt: skip
    return table.combine_chunks().to_batches()[0]
