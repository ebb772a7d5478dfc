"""Where the rows of a report come from: one connection that sees one moment, or several that read ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.arrow_tables import literal, ranges, rows_with_results, tables
from promptmill.reports.figures.columns import BLOCK_ROWS, Floats, Places, block_query, blocks
from promptmill.reports.figures.totals import began_and_ended, span_of, span_query


class RowSource(Protocol):
    """All rows of one job."""

    def began_and_ended(self) -> tuple[float, float] | None: ...

    def blocks(self, places: Places) -> Iterator[list[Floats]]: ...


class Here:
    """Rows of one connection, one after the other."""

    def __init__(self, db: Connection, job_id: str) -> None:
        self._db, self._job_id = db, job_id

    def began_and_ended(self) -> tuple[float, float] | None:
        return began_and_ended(self._db, self._job_id)

    def blocks(self, places: Places) -> Iterator[list[Floats]]:
        return blocks(self._db, self._job_id, places)


class InRanges:
    """Ranges of rows, several at a time."""

    def __init__(self, db: Connection, job_id: str) -> None:
        self._db, self._job_id = db, job_id

    def began_and_ended(self) -> tuple[float, float] | None:
        found = [table.to_pylist()[0] for table in self._tables(span_query(self._job_id))]
        spans = [span for each in found if (span := span_of(list(each.values()))) is not None]
        return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else None

    def blocks(self, places: Places) -> Iterator[list[Floats]]:
        for table in self._tables(block_query(self._db.dialect.name, self._job_id, places)):
            for batch in table.to_batches():
                # By DLPack: ``to_numpy`` imports pandas where that is installed.
                yield [np.from_dlpack(column).astype(np.float64) for column in batch.columns]

    def _tables(self, query: sa.Select[Any]) -> Iterator[Any]:
        # Compiled once, for it takes as long as reading thousands of rows; the condition is its last clause.
        text = literal(self._db.engine, query)
        return tables(
            self._db,
            (
                f'{text} AND results."row" >= {first} AND results."row" < {end}'
                for first, end in ranges(0, rows_with_results(self._db, self._job_id), BLOCK_ROWS)
            ),
        )
