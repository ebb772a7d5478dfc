"""Results as Parquet: columns of fixed types, written batch by batch, so that memory does not grow with the job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.arrow_tables import is_as_it_was, is_worth, literal, ranges, rows_with_results, tables
from promptmill.database.engine import reading
from promptmill.database.tables import jobs, requests, results
from promptmill.errors import DatabaseError

#: Most rows of a row group. PostgreSQL joins a range of this size by its indices; 50,000 rows it sorts on its disk.
GROUP_ROWS = 25_000

#: The first row, and the first one after the last.
Span = tuple[int, int]

#: Most characters of a group, of which a few are held at a time: groups of long texts have fewer rows.
GROUP_CHARACTERS = 16 * 2**20
SAMPLED = 50

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

#: Type of Arrow -> a value of SQL that SQLite's driver makes a column of that kind of.
EXAMPLES = {"int64": "0", "bool": "0", "double": "0.5", "string": "'x'"}


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
    """The job's results in the order of its rows, of one moment, as Arrow record batches.

    Raises :class:`DatabaseError` for a job that changes while it is read, where it cannot be read as it was.
    """
    schema = schema_of(prompts)
    wanted = sa.select(jobs.c.id, jobs.c.state, jobs.c.finished_at, jobs.c.rows).where(jobs.c.id == job_id)
    with reading(db) as connection:
        job = connection.execute(wanted).one_or_none()
        if job is None:
            return
        spans = _spans(connection, job_id, prompts)
        queries = (literal(db, _query(job_id, span, failed_only, prompts)) for span in spans)
        if db.dialect.name == "postgresql":
            for table in tables(connection, queries):
                yield from table.cast(schema).combine_chunks().to_batches()
        elif is_worth(db, job.state, job.rows):
            for table in tables(connection, (_typed(query, schema) for query in queries)):
                # The row that tells types has the number -1.
                yield from table.slice(1).cast(schema).combine_chunks().to_batches()
            if not is_as_it_was(db, job):
                raise DatabaseError(f"job {job_id} changed while it was read", hint="Try again when it has ended.")
        else:
            yield from _from_driver(connection, queries, schema)


def _spans(connection: Connection, job_id: str, prompts: bool) -> Iterator[Span]:
    """The ranges of rows that are groups. How large their texts are is told by SAMPLED rows of each GROUP_ROWS."""
    asked, found = requests.c, results.c
    texts = [found.text, found.error_message, *((asked.input, asked.expected, asked.meta) if prompts else ())]
    lengths: sa.ColumnElement[int] = sa.literal(0)
    for text in texts:
        lengths += sa.func.coalesce(sa.func.length(text), 0)
    both = results.join(requests, (asked.job_id == found.job_id) & (asked.row == found.row))
    among = found.row.in_(sa.bindparam("sample", expanding=True))
    mean = sa.select(sa.func.avg(lengths)).select_from(both).where(found.job_id == job_id, among)
    for first, end in ranges(0, rows_with_results(connection, job_id), GROUP_ROWS):
        sample = list(range(first, end, max(1, (end - first) // SAMPLED)))
        each = int(connection.execute(mean, {"sample": sample}).scalar() or 0)
        yield from ranges(first, end, max(1, min(GROUP_ROWS, GROUP_CHARACTERS // max(1, each))))


def _query(job_id: str, span: Span, failed_only: bool, prompts: bool) -> sa.TextClause:
    chosen = COLUMNS | (WITH_PROMPTS if prompts else {})
    selected = ", ".join(f'{source} AS "{name}"' for name, (_, source) in chosen.items())
    only = " AND r.state = 'error'" if failed_only else ""
    # A range of both tables: else PostgreSQL reads all of one table for each range.
    among = "".join(f' AND {each}."row" >= {span[0]} AND {each}."row" < {span[1]}' for each in "rq")
    return sa.text(
        f"SELECT {selected} FROM results r JOIN requests q "  # noqa: S608 - our names
        'ON q.job_id = r.job_id AND q."row" = r."row" '
        f"WHERE r.job_id = :job AND q.job_id = :job{only}{among} ORDER BY 1"
    ).bindparams(job=job_id)


def _typed(query: str, schema: Any) -> str:
    """With a first row of which SQLite's driver takes the types: a column may hold NULL in all rows of a range."""
    values = ["-1", *(EXAMPLES[str(each.type)] for each in list(schema)[1:])]
    named = ", ".join(f'{value} AS "{each.name}"' for value, each in zip(values, schema, strict=True))
    return f"SELECT {named} UNION ALL {query}"


def _from_driver(connection: Connection, queries: Iterable[str], schema: Any) -> Iterator[Any]:
    """Plain tuples of the driver: a row object for each of a million rows costs seconds."""
    import pyarrow as pa

    driver: Any = connection.connection.driver_connection
    for query in queries:
        if rows := driver.execute(query).fetchall():
            columns = [_array(values, each.type) for values, each in zip(zip(*rows, strict=True), schema, strict=True)]
            yield pa.record_batch(columns, schema=schema)


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    # A truth is a whole number in SQLite.
    return pa.array(values).cast(kind) if pa.types.is_boolean(kind) else pa.array(values, kind)
