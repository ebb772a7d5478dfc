"""What stays of prompts and answers once a job has ended: all, their SHA-256, or nothing. Figures always stay."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import jobs, requests, results, retries
from promptmill.types import GOING, GONE, JobState

#: ``jobs.store`` of jobs that are to lose their texts -> how: of those that wait for it, and those half-way.
LEFT_TO_DO = {store: how for how, going in GOING.items() for store in (how, going)}

#: States in which a job loses its texts.
ENDED = [state.value for state in JobState if state.is_final]

#: Seconds after the end of a job of the queue that its texts can still be fetched.
FETCH_S = 3600.0

#: Rows changed in one transaction: a fraction of a second on SQLite, where all who write wait for it.
BATCH_ROWS = 2_000

#: Beginning of the input of a row that is done: no line of a dataset becomes such an input, whatever it holds.
_DONE_INPUT = '{"hashed": true, '

#: The expected value of a done row that has no input: of a line that could not be read.
_HASH = re.compile('"sha256:[0-9a-f]{64}"')

#: Columns of results with what the model wrote, besides the text itself.
WRITTEN = ("reasoning", "choices", "logprobs", "choice_probs", "continuations", "embedding", "error_message")


def redact(db: Engine, job_id: str, how: str) -> bool:
    """Replace prompts and answers of an ended job by their hashes ('hash') or remove them ('none').

    Cut off half-way it goes on when asked again: a row that is done says so, whatever its texts look like.
    False for a job that was resumed or retried meanwhile: it has all its texts.
    """
    if not begin(db, job_id, how):
        return False
    if how == "none":
        _number_inputs(db, job_id)
    with reading(db) as connection:
        last = connection.execute(sa.select(sa.func.max(requests.c.row)).where(requests.c.job_id == job_id)).scalar()
    for first in range(0, (last if last is not None else -1) + 1, BATCH_ROWS):
        with writing(db) as connection:
            _redact_rows(connection, job_id, (first, first + BATCH_ROWS - 1), how)
    with writing(db) as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(store=GONE[how]))
    return True


def _number_inputs(db: Engine, job_id: str) -> None:
    """Rows of one input stay known as such by the number of the first one: short texts can be guessed from digests.

    Numbers are below zero and small: ``reports.compare.pairs`` takes none of them for a digest.
    """
    of_job = requests.c.job_id == job_id
    with writing(db) as connection:
        for digest in (requests.c.input_digest, requests.c.prompt_digest):
            first = (
                sa.select(digest, sa.func.min(requests.c.row).label("row")).where(of_job).group_by(digest).subquery()
            )
            own = sa.and_(of_job, digest == first.c[digest.name])
            connection.execute(sa.update(requests).where(own).values({digest: -1 - first.c.row}))


def begin(db: Engine, job_id: str, how: str) -> bool:
    """Let nothing of the job be run again from now on; False when it has not ended, or goes on."""
    with writing(db) as connection:
        # Who opens it again locks its row and looks at this: one of the two comes first.
        changed = connection.execute(
            sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(ENDED)).values(store=GOING[how])
        )
    return changed.rowcount == 1


def _redact_rows(db: Connection, job_id: str, span: tuple[int, int], how: str) -> None:
    gone = dict.fromkeys(WRITTEN)
    asked = [requests.c.job_id == job_id, requests.c.row.between(*span)]
    answered = [results.c.job_id == job_id, results.c.row.between(*span)]
    if how == "hash":
        prompts = db.execute(sa.select(requests.c.row, requests.c.input, requests.c.expected).where(*asked)).all()
        left = [each for each in prompts if not (each.input or "").startswith(_DONE_INPUT)]
        _update(db, requests, job_id, [_hashed_request(*each) for each in left])
        texts = {
            row: hashed(text) for row, text in db.execute(sa.select(results.c.row, results.c.text).where(*answered))
        }
        known = [{"text": texts[each.row], "at_row": each.row} for each in left if each.row in texts]
        _update(db, results, job_id, known)
    else:
        db.execute(sa.update(requests).where(*asked).values(input=None, expected=None))
        db.execute(sa.update(results).where(*answered).values(text=None))
    db.execute(sa.update(requests).where(*asked).values(meta=None))
    db.execute(sa.update(results).where(*answered).values(**gone))
    own = (retries.c.job_id == job_id, retries.c.row.between(*span))
    db.execute(sa.update(retries).where(*own).values(error_message=None))


def _hashed_request(row: int, text: str | None, expected: str | None) -> dict[str, Any]:
    done = text is None and _HASH.fullmatch(expected or "")
    return {
        "input": _json({"hashed": True, "prompt": hashed(text)}) if text else text,
        "expected": _json(hashed(expected)) if expected and not done else expected,
        "at_row": row,
    }


def _update(db: Connection, table: sa.Table, job_id: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns: dict[str, Any] = {name: sa.bindparam(name) for name in rows[0] if name != "at_row"}
    place = sa.and_(table.c.job_id == job_id, table.c.row == sa.bindparam("at_row"))
    db.execute(sa.update(table).where(place).values(columns), rows)


def hashed(text: str | None) -> str | None:
    """``sha256:`` and the hexadecimal digest of the text in UTF-8."""
    return None if text is None else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def overdue(db: Engine) -> list[tuple[str, str, float]]:
    """Jobs of the queue that ended FETCH_S ago and asked for it, or are half-way: ids, what is to be done, lateness.

    The last is the seconds that have passed since it was to be done.
    """
    late_s = epoch() - jobs.c.finished_at - FETCH_S
    query = sa.select(jobs.c.id, jobs.c.store, late_s).where(
        jobs.c.store.in_(LEFT_TO_DO), jobs.c.state.in_(ENDED), jobs.c.finished_at < epoch() - FETCH_S
    )
    with reading(db) as connection:
        return [(job_id, LEFT_TO_DO[store], late) for job_id, store, late in connection.execute(query)]
