"""``db``: the schema of the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, print_json
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


@click.group()
def db() -> None:
    """The database: bring it to this version's schema, or ask which one it has."""


@db.command(epilog="Example: promptmill db upgrade")
@json_option
def upgrade(as_json: bool) -> None:
    """Bring the database to the schema of this version. SQLite files are upgraded by themselves."""
    from promptmill.core.settings import load_settings
    from promptmill.database import engine as databases
    from promptmill.database import revision

    engine = databases.connect(load_settings().database_url)
    before = revision.current_revision(engine)
    revision.upgrade(engine)
    after = revision.current_revision(engine)
    _make_reader(engine)
    if as_json:
        print_json({"before": before, "revision": after})
    else:
        say(f"the database is at revision {after}" + ("" if before == after else f" (was {before or 'empty'})"))


def _make_reader(engine: Engine) -> None:
    """The user of PostgreSQL as whom queries run. Where it cannot be made, ``query`` says so, and what to do."""
    from contextlib import suppress

    import sqlalchemy as sa

    from promptmill.database import engine as databases
    from promptmill.database import reader_role
    from promptmill.errors import DatabaseError

    if engine.dialect.name == "postgresql":
        with suppress(sa.exc.DBAPIError, DatabaseError), databases.writing(engine) as connection:
            reader_role.prepare(connection)


@db.command(epilog="Example: promptmill db current")
@json_option
def current(as_json: bool) -> None:
    """Print the revision of the database and the one this version needs."""
    from promptmill.core.addresses import masked
    from promptmill.core.settings import load_settings
    from promptmill.database.engine import connect
    from promptmill.database.revision import current_revision, head_revision

    settings = load_settings()
    revision, head = current_revision(connect(settings.database_url)), head_revision()
    if as_json:
        print_json({"revision": revision, "head": head})
    else:
        say(f"{masked(settings.database_url)}: revision {revision or 'none'}, this version needs {head}")
