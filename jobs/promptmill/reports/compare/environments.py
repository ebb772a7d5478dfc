"""What answered a job, by its attempts: which model, by which engine, set up how."""

from __future__ import annotations

import json

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import attempts

#: What stands before the names of an environment's parts among everything by which two jobs can differ.
PREFIX = "engine."


def environment_of(db: Connection, job_id: str) -> dict[str, str]:
    """Everything beside the model that decided the job's answers: name -> its values, with commas between them.

    Empty for a job whose attempts do not tell: it ran before they did.
    """
    each = attempts.c
    query = sa.select(each.environment).where(each.job_id == job_id, each.environment.is_not(None)).distinct()
    values: dict[str, set[str]] = {}
    for text in db.execute(query).scalars():
        for name, value in json.loads(text).items():
            values.setdefault(f"{PREFIX}{name}", set()).add(value)
    return {name: ", ".join(sorted(found)) for name, found in sorted(values.items())}
