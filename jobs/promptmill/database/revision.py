"""The schema's revision: what this version needs, what a database has, and the way from one to the other."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import connect, lock_name, reading, writing
from promptmill.errors import DatabaseError, first_line

#: What to do about a database that is not what it says.
RESTORE = "Another version made it, or it was changed by hand. Restore a backup, or start with a new database."

#: What databases say of a migration that finds what it is to make, or does not find what it is to change.
MISSTATED = re.compile("already exists|duplicate column|no such|does not exist", re.IGNORECASE)


def open_database(url: str, *, connections: int | None = None, idle_s: float | None = None) -> Engine:
    """An engine at the right revision, as :func:`connect` makes it.

    SQLite is migrated by itself; PostgreSQL must have been, by ``promptmill db upgrade``.
    Raises :class:`DatabaseError` when the database is unreachable or at another revision.
    """
    engine = connect(url, connections=connections, idle_s=idle_s)
    try:
        _require_revision(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """:func:`open_database` for a while: of a process that is one of many, no connection stays open."""
    engine = open_database(url)
    try:
        yield engine
    finally:
        engine.dispose()


def _require_revision(engine: Engine) -> None:
    current, head = current_revision(engine), head_revision()
    if current == head:
        return
    if engine.dialect.name != "sqlite":
        raise DatabaseError(
            f"the database is at revision {current or 'none (empty)'}, this version of promptmill needs {head}",
            hint="Run 'promptmill db upgrade'.",
        )
    upgrade(engine)


# Both without Alembic: they run at every start, and to import it takes longer than most commands.


def current_revision(engine: Engine) -> str | None:
    """The revision the database is at; None for an empty one. Raises DatabaseError for what is no revision of ours."""
    with reading(engine) as connection:
        there = sa.inspect(connection)
        is_kept = there.has_table("alembic_version")
        found = (
            connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() if is_kept else []
        )
        if not found and not there.has_table("jobs"):
            return None
    if len(found) != 1:
        said = f"has {len(found)} revisions: {', '.join(sorted(found))}" if found else "has tables and no revision"
        raise DatabaseError(f"the database {said}", hint=RESTORE)
    current = str(found[0])
    if current not in _revisions():
        raise DatabaseError(
            f"the database is at revision {current[:40] or 'of no name'}, which this version does not know",
            hint=f"It was made by a newer version; this one works with {head_revision()}. Update promptmill.",
        )
    return current


def head_revision() -> str:
    """The revision this version of the program works with."""
    return _revisions()[-1]


def _revisions() -> list[str]:
    """By the names of the migration files (``0001_initial.py``), which sort by time."""
    return sorted(path.stem.split("_")[0] for path in migrations_folder().glob("versions/[0-9]*.py"))


def migrations_folder() -> Path:
    """In the wheel beside the code, in a checkout at its root."""
    here = Path(__file__).parents[1]
    packaged = here / "_migrations"
    return packaged if packaged.is_dir() else here.parents[1] / "migrations"


def upgrade(engine: Engine) -> None:
    """Bring the database to :func:`head_revision`, in one transaction.

    Raises :class:`DatabaseError` for one that cannot be brought there, or lacks something then; it stays as it was.
    """
    current = current_revision(engine)
    from alembic import command
    from alembic.config import Config

    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    with writing(engine) as connection:
        # Two programs that start together must not both migrate.
        lock_name(connection, "promptmill.migrations")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except sa.exc.DBAPIError as problem:
            if not MISSTATED.search(str(problem.orig)):
                raise
            raise DatabaseError(
                f"the database says that it is at revision {current}, and is not: {first_line(problem)}", hint=RESTORE
            ) from problem
        _require_schema(connection)


def _require_schema(connection: Connection) -> None:
    """Raise DatabaseError where the revision says more than the tables hold: a number proves nothing."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from promptmill.database.tables import metadata
    from promptmill.database.views import VIEWS

    there = sa.inspect(connection)
    lacking = [f"view {name}" for name in ("v_results", *VIEWS) if name not in there.get_view_names()]
    lacking += [
        f"column {view}.{name}"
        for view, columns in _view_columns().items()
        if view in there.get_view_names()
        for name in sorted(columns - {each["name"] for each in there.get_columns(view)})
    ]
    for table in metadata.tables.values():
        if there.has_table(table.name):
            key = there.get_pk_constraint(table.name)["constrained_columns"]
            if set(key) != {column.name for column in table.primary_key}:
                lacking.append(f"primary key of {table.name}")
    for difference in compare_metadata(MigrationContext.configure(connection), metadata):
        match difference:
            case ("add_table", table):
                lacking.append(f"table {table.name}")
            case ("add_column", _, table, column):
                lacking.append(f"column {table}.{column.name}")
            case ("add_index", index):
                lacking.append(f"index {index.name}")
            case ("add_constraint" | "add_fk", constraint):
                lacking.append(f"constraint {constraint.name} of {constraint.table.name}")
    if lacking:
        revision = MigrationContext.configure(connection).get_current_revision()
        raise DatabaseError(
            f"the database says that it is at revision {revision}, and lacks: {', '.join(sorted(lacking))}",
            hint=RESTORE,
        )


def _view_columns() -> dict[str, set[str]]:
    """The columns that each view has, by making it."""
    from promptmill.database.tables import metadata
    from promptmill.database.views import VIEWS

    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        metadata.create_all(connection)
        for name, select in VIEWS.items():
            connection.execute(sa.text(f"CREATE VIEW {name} AS {select}"))
        there = sa.inspect(connection)
        found = {name: {each["name"] for each in there.get_columns(name)} for name in VIEWS}
    engine.dispose()
    return found
