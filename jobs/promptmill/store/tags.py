"""Tags and notes: what people write beside their jobs, to find and to compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill.core.registry import suggestion
from promptmill.database.engine import reading, writing
from promptmill.database.tables import job_tags, jobs
from promptmill.errors import PromptmillError, UnknownName

#: Most characters of a tag and of a note.
TAG_CHARACTERS = 100
NOTE_CHARACTERS = 4_000


def tags_of(db: Engine, job_id: str) -> list[str]:
    """The tags of a job, sorted."""
    query = sa.select(job_tags.c.tag).where(job_tags.c.job_id == job_id).order_by(job_tags.c.tag)
    with reading(db) as connection:
        return list(connection.execute(query).scalars())


def add_tags(db: Engine, job_id: str, tags: Sequence[str]) -> None:
    """Raises PromptmillError for what cannot be a tag. A tag that is there already stays."""
    wanted = {checked(tag) for tag in tags} - set(tags_of(db, job_id))
    if wanted:
        with writing(db) as connection:
            connection.execute(sa.insert(job_tags), [{"job_id": job_id, "tag": tag} for tag in sorted(wanted)])


def remove_tags(db: Engine, job_id: str, tags: Sequence[str]) -> None:
    with writing(db) as connection:
        connection.execute(sa.delete(job_tags).where(job_tags.c.job_id == job_id, job_tags.c.tag.in_(tags)))


def checked(tag: str) -> str:
    """The tag itself. Raises PromptmillError."""
    if not tag or tag != tag.strip() or not tag.isprintable() or len(tag) > TAG_CHARACTERS or tag.startswith("-"):
        raise PromptmillError(
            f"{tag[:TAG_CHARACTERS]!r} cannot be a tag",
            hint=f"Up to {TAG_CHARACTERS} printable characters, without spaces around them.",
        )
    return tag


def set_note(db: Engine, job_id: str, text: str | None) -> None:
    """Replace the note of a job; None removes it. Raises PromptmillError for one that is too long."""
    if text is not None and len(text) > NOTE_CHARACTERS:
        raise PromptmillError(f"the note has {len(text):,} characters", hint=f"At most {NOTE_CHARACTERS:,}.")
    with writing(db) as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(note=text))


def set_engine_settings(db: Engine, job_id: str, settings: Mapping[str, Any]) -> None:
    """Write down what a sweep chose for this job, so that comparisons see it."""
    with writing(db) as connection:
        connection.execute(
            sa.update(jobs).where(jobs.c.id == job_id).values(engine_settings=json.dumps(settings, sort_keys=True))
        )


def tagged(db: Engine, tag: str) -> list[Row[Any]]:
    """Jobs with a tag, the oldest first. Raises :class:`UnknownName` when no job has it."""
    query = (
        sa.select(jobs).join(job_tags, job_tags.c.job_id == jobs.c.id).where(job_tags.c.tag == tag).order_by(jobs.c.id)
    )
    with reading(db) as connection:
        found = list(connection.execute(query))
        known = list(connection.execute(sa.select(job_tags.c.tag).distinct().limit(1000)).scalars())
    if not found:
        hint = suggestion(tag, known) if known else "Give a job one with: promptmill tag JOB TAG"
        raise UnknownName(f"no job has the tag '{tag}'", hint=hint)
    return found
