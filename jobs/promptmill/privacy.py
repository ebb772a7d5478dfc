"""What stays of prompts and answers once a job has ended: all, their SHA-256, or nothing. Figures always stay."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import epoch, reading, writing
from promptmill.tables import jobs, requests, results, retries
from promptmill.types import JobState

#: What ``--store`` asks for -> what ``jobs.store`` says when it is done.
DONE = {"hash": "hashed", "none": "removed"}

#: Seconds after the end of a job of the queue that its texts can still be fetched.
FETCH_S = 3600.0

#: Rows changed in one transaction.
BATCH_ROWS = 10_000

#: Columns of results with what the model wrote, besides the text itself.
WRITTEN = ("reasoning", "choices", "logprobs", "choice_probs", "continuations", "embedding", "error_message")


def redact(db: Engine, job_id: str, how: str) -> None:
    """Replace prompts and answers of an ended job by their hashes ('hash') or remove them ('none').

    Cut off half-way it goes on when asked again: a hash is not hashed twice.
    """
    with reading(db) as connection:
        last = connection.execute(sa.select(sa.func.max(requests.c.row)).where(requests.c.job_id == job_id)).scalar()
    for first in range(0, (last if last is not None else -1) + 1, BATCH_ROWS):
        with writing(db) as connection:
            _redact_rows(connection, job_id, (first, first + BATCH_ROWS - 1), how)
    with writing(db) as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(store=DONE[how]))


def _redact_rows(db: Connection, job_id: str, span: tuple[int, int], how: str) -> None:
    gone = dict.fromkeys(WRITTEN)
    asked = [requests.c.job_id == job_id, requests.c.row.between(*span)]
    answered = [results.c.job_id == job_id, results.c.row.between(*span)]
    if how == "hash":
        prompts = db.execute(sa.select(requests.c.row, requests.c.input, requests.c.expected).where(*asked)).all()
        texts = db.execute(sa.select(results.c.row, results.c.text).where(*answered)).all()
        known = {row: hashed(text) for row, text in texts}
        _update(db, requests, job_id, [
            {"input": _json({"prompt": hashed(text)}) if text and not _is_hashed(text) else text,
             "expected": _json(hashed(expected)) if expected and not _is_hashed(expected) else expected, "at_row": row}
            for row, text, expected in prompts
        ])  # fmt: skip
        _update(db, results, job_id, [{"text": text, "at_row": row} for row, text in known.items()])
    else:
        db.execute(sa.update(requests).where(*asked).values(input=None, expected=None))
        db.execute(sa.update(results).where(*answered).values(text=None))
    db.execute(sa.update(requests).where(*asked).values(meta=None))
    db.execute(sa.update(results).where(*answered).values(**gone))
    own = (retries.c.job_id == job_id, retries.c.row.between(*span))
    db.execute(sa.update(retries).where(*own).values(error_message=None))


def _update(db: Connection, table: sa.Table, job_id: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns: dict[str, Any] = {name: sa.bindparam(name) for name in rows[0] if name != "at_row"}
    place = sa.and_(table.c.job_id == job_id, table.c.row == sa.bindparam("at_row"))
    db.execute(sa.update(table).where(place).values(columns), rows)


def hashed(text: str | None) -> str | None:
    """``sha256:`` and the hexadecimal digest of the text in UTF-8. What is one already stays."""
    if text is None or text.startswith("sha256:"):
        return text
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _is_hashed(text: str) -> bool:
    return text.startswith(('"sha256:', '{"prompt": "sha256:'))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def overdue(db: Engine) -> list[tuple[str, str]]:
    """Jobs of the queue that ended FETCH_S ago and asked for it, each with what it asked."""
    ended = [state.value for state in JobState if state.is_final]
    query = sa.select(jobs.c.id, jobs.c.store).where(
        jobs.c.store.in_(DONE), jobs.c.state.in_(ended), jobs.c.finished_at < epoch() - FETCH_S
    )
    with reading(db) as connection:
        return [(job_id, how) for job_id, how in connection.execute(query)]
