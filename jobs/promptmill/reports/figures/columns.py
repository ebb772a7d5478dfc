"""The rows of a job as columns of numbers, and what they are counted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from promptmill.database.tables import attempts, results
from promptmill.types import ErrorClass, FinishReason

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Truths = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Key:
    """What rows are counted by."""

    worker_id: str | None
    state: str
    finish_reason: str | None
    error_class: str | None


@dataclass(frozen=True, slots=True)
class Series:
    """Columns of rows that had a slot, all of one length. Seconds since the epoch; NaN where a stamp is missing.

    The tokens of an answer that was copied from an identical request are 0: they were computed once, for that one.
    """

    enqueued_at: Floats
    admitted_at: Floats
    first_token_at: Floats
    finished_at: Floats
    output_tokens: Floats
    #: Prompt tokens that were computed; empty where no plot needs them.
    prefill_tokens: Floats = field(default_factory=lambda: np.empty(0))
    #: Place of the row's worker among the workers that were asked for; empty where no plot needs it.
    worker: Floats = field(default_factory=lambda: np.empty(0))

    def __len__(self) -> int:
        return len(self.admitted_at)

    def where(self, chosen: Truths) -> Series:
        """The rows for which ``chosen`` is true."""
        if chosen.all():
            return self
        columns = (getattr(self, name) for name in self.__slots__)
        return Series(*(column[chosen] if len(column) else column for column in columns))

    def part(self, first: int, last: int) -> Series:
        """Rows ``first`` to before ``last``."""
        return Series(*(getattr(self, name)[first:last] for name in self.__slots__))

    @property
    def timed(self) -> Truths:
        """Rows that had a slot to their end."""
        return np.isfinite(self.admitted_at) & np.isfinite(self.finished_at)

    @staticmethod
    def joined(parts: list[Series]) -> Series:
        """All rows of ``parts``, which is emptied: large columns are not held twice."""
        columns = [[getattr(part, name) for part in parts] for name in Series.__slots__]
        parts.clear()
        found = []
        for column in columns:
            found.append(np.concatenate(column) if column else np.empty(0))
            column.clear()
        return Series(*found)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of rows, copies with those of the row that they were copied from. -1: unknown."""

    output: Floats
    prompt: Floats
    cached: Floats
    reasoning: Floats
    most: Floats
    is_copy: Truths


@dataclass(frozen=True, slots=True)
class Places:
    """Every key that rows of these workers can have, and the place of each: numbers cross the border of a database much
    faster than texts. ``workers``: None among them is for rows that no worker has had."""

    workers: tuple[str | None, ...]

    @staticmethod
    def of(db: Connection, job_id: str) -> Places:
        """The workers that had an attempt of the job: few rows, where the job's results may be millions."""
        found = db.execute(sa.select(attempts.c.worker_id).where(attempts.c.job_id == job_id).distinct()).scalars()
        return Places((None, *sorted(found)))

    @staticmethod
    def scanned(db: Connection, job_id: str) -> Places:
        """The workers that the results name."""
        found = db.execute(sa.select(results.c.worker_id).where(results.c.job_id == job_id).distinct()).scalars()
        return Places((None, *sorted(name for name in found if name is not None)))

    def worker_of(self, place: Ints) -> Floats:
        """The place of its worker among ``workers``, of a key's place."""
        found: Floats = (place // (len(STATES) * len(REASONS) * len(ERRORS))).astype(np.float64)
        return found

    @property
    def keys(self) -> list[Key]:
        return [
            Key(worker, state, reason, error)
            for worker in self.workers for state in STATES for reason in REASONS for error in ERRORS
        ]  # fmt: skip

    @property
    def sql(self) -> sa.ColumnElement[Any]:
        """The place of a row's key; NULL for a key that is none of these."""
        each = results.c
        place: sa.ColumnElement[Any] = sa.literal(0)
        columns: tuple[tuple[sa.Column[Any], Sequence[str | None]], ...] = (
            (each.worker_id, self.workers), (each.state, STATES), (each.finish_reason, REASONS),
            (each.error_class, ERRORS),
        )  # fmt: skip
        for column, values in columns:
            place = place * len(values) + _place(column, values)
        return place


class UnknownKey(LookupError):
    """A row has a key that was not expected."""


#: What a result's state, finish reason and error class may be.
STATES: tuple[str, ...] = ("ok", "error")
REASONS: tuple[str | None, ...] = (None, *(reason.value for reason in FinishReason))
ERRORS: tuple[str | None, ...] = (None, *(error.value for error in ErrorClass))


def _place(column: sa.Column[Any], values: Sequence[str | None]) -> sa.ColumnElement[Any]:
    named = {value: place for place, value in enumerate(values) if value is not None}
    known = sa.case(named, value=column) if named else sa.null()
    return sa.case((column.is_(None), values.index(None)), else_=known) if None in values else known


def parted(block: list[Floats]) -> tuple[Ints, Series, Tokens]:
    """The places of a block's keys, its columns, and its tokens. Raises :class:`UnknownKey`."""
    key, enqueued, admitted, first, finished, output, prompt, cached, reasoning, most, copied = block
    if (key < 0).any():
        raise UnknownKey
    for stamp in (enqueued, admitted, first, finished):
        # From SQLite what is missing comes as infinity.
        stamp[np.isinf(stamp)] = np.nan
    is_copy = copied > 0
    generated = np.where(is_copy, 0.0, np.maximum(output, 0.0))
    prefill = np.where(is_copy | (prompt < 0), 0.0, prompt - np.maximum(cached, 0.0))
    series = Series(enqueued, admitted, first, finished, generated, prefill)
    return key.astype(np.int64), series, Tokens(output, prompt, cached, reasoning, most, is_copy)
