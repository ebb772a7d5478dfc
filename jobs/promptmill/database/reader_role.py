"""The user of PostgreSQL as whom people's queries run: it may read, and nothing else.

A role that is only *set* on the owner's connection can be left again by the query itself. So the query gets a
connection of its own, whose login has no more rights than to read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import connect, libpq_address, lock_name, reading, writing
from promptmill.database.tables import metadata
from promptmill.database.views import VIEWS
from promptmill.errors import DatabaseError, PromptmillError

#: Seconds for which a password of the reader is good: the time to log in with it.
PASSWORD_S = 60

#: Tables that no query shows.
SECRET = ("api_keys",)

#: Functions that every reader may also call, and that reach beyond their query: locks that promptmill itself takes,
#: sessions of other readers, limits of this one, waiting. Then those that run SQL out of a text, in which these could
#: hide. PostgreSQL can only take them from everybody in a database, and that needs a superuser; so their names are
#: refused, wherever they stand. A name can be written with escapes after U&.
_DISTURBING = re.compile(
    r"""(?ix) \b (?: pg_(try_)?advisory\w* | pg_sleep\w* | set_config | pg_notify | pg_logical_emit_message |
    pg_(cancel|terminate)_backend | lo_\w+ | pg_export_snapshot |
    ts_stat | ts_rewrite | query_to_xml\w* | cursor_to_xml\w* | dblink\w* | crosstab\w* | connectby | xpath_table
    ) \b | \b u&" """
)

#: Seconds after its time in which PostgreSQL itself ends a statement, its client being gone; and between its looks
#: at whether the client is still there.
GRACE_S = 5.0
LOOK_S = 10

#: What an administrator does where the reader cannot be made.
BY_HAND = (
    "CREATE ROLE promptmill_reader LOGIN PASSWORD '...'; GRANT USAGE ON SCHEMA {schema} TO promptmill_reader; "
    "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO promptmill_reader; "
    "REVOKE SELECT ON {schema}.api_keys FROM promptmill_reader"
)

#: Roles whose members may do more than read tables, the owner of ours among them: a superuser is a member of each.
_POWERS = sa.text("""
SELECT count(*) FROM pg_roles
WHERE pg_has_role(session_user, oid, 'MEMBER') AND (rolsuper OR rolcreaterole OR rolreplication OR rolname IN
    ('pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program', 'pg_signal_backend',
     'pg_write_all_data')
    OR oid = (SELECT relowner FROM pg_class WHERE oid = to_regclass('jobs')))
""")

_KEYS = sa.text("SELECT has_column_privilege('api_keys', 'key_sha256', 'SELECT')")


class NoReader(DatabaseError):
    """There is no user that may only read."""


class Disturbing(PromptmillError):
    """A query would do more than read."""


@contextmanager
def reader(owner: Engine, url: str | None) -> Iterator[Engine]:
    """An engine whose user may only read: of ``url``, or a role of this database that the owner makes.

    Raises :class:`NoReader`, with what an administrator has to do.
    """
    engine = connect(url) if url else _own(owner)
    if engine.dialect.name != "postgresql":
        raise NoReader("JOBS_QUERY_DATABASE_URL is no postgresql:// URL", hint="Name a user that may only read.")
    _look_where(owner, engine)
    try:
        _check(owner, engine)
        yield engine
    finally:
        engine.dispose()


def refuse_disturbing(sql: str) -> None:
    """Raises :class:`Disturbing` for a query that names what would disturb others."""
    found = _DISTURBING.search(sql)
    if found:
        raise Disturbing(
            f"a query may not name {found[0]}: it reaches beyond the query", hint="Only ask for what is in the tables."
        )


def bound(db: Connection, seconds: float) -> None:
    """Let the server end what runs in this transaction after so many seconds, or soon after its client is gone."""
    db.exec_driver_sql(f"SET LOCAL statement_timeout = {min(int((seconds + GRACE_S) * 1000), 2**31 - 1)}")
    if db.scalar(sa.text("SELECT current_setting('client_connection_check_interval', true)")) is not None:
        # Servers before 14 cannot look.
        db.exec_driver_sql(f"SET LOCAL client_connection_check_interval = '{LOOK_S}s'")


def prepare(db: Connection) -> str:
    """Make the reader of this database where it is missing, and let it read what it may not yet; returns its name."""
    lock_name(db, "promptmill reader")
    # Roles are of all databases of a server.
    of_this = db.scalar(sa.text("SELECT oid FROM pg_database WHERE datname = current_database()"))
    name = f"promptmill_reader_{of_this}"
    if not db.scalar(sa.text("SELECT count(*) FROM pg_roles WHERE rolname = :name"), {"name": name}):
        db.exec_driver_sql(f"CREATE ROLE {name} LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION")
    for what in _missing(db, name):
        db.exec_driver_sql(f"GRANT {what} TO {name}")
    return name


def _missing(db: Connection, name: str) -> list[str]:
    """Privileges that the reader lacks: a table or a view that a migration made has none."""
    quote = db.dialect.identifier_preparer.quote
    schema = db.scalar(sa.text("SELECT current_schema()"))
    asked = {f"USAGE ON SCHEMA {quote(schema)}": sa.func.has_schema_privilege(name, schema, "USAGE")}
    for table in ("v_results", *VIEWS, "alembic_version", *(each for each in metadata.tables if each not in SECRET)):
        asked[f"SELECT ON {quote(table)}"] = sa.func.has_table_privilege(name, table, "SELECT")
    held = db.execute(sa.select(*(each.label(f"p{at}") for at, each in enumerate(asked.values())))).one()
    return [what for what, may in zip(asked, held, strict=True) if not may]


def _own(owner: Engine) -> Engine:
    """An engine with one login, made with a password that was never used and that is soon worthless."""
    import psycopg

    try:
        # No other password is set before this one was used.
        with writing(owner) as waiting:
            lock_name(waiting, "promptmill reader's password")
            with writing(owner) as db:
                name, password = prepare(db), secrets.token_urlsafe(24)
                _set_password(db, name, password)
                address = libpq_address(db)
            login = psycopg.connect(address, user=name, password=password)
    except (sa.exc.DBAPIError, psycopg.Error, DatabaseError) as problem:
        raise _refused(owner, problem) from None
    return sa.create_engine(
        "postgresql+psycopg://", creator=lambda: login, poolclass=sa.StaticPool, hide_parameters=True
    )


def _set_password(db: Connection, name: str, password: str) -> None:
    """As a hash made here: servers may log statements."""
    driver: Any = db.connection.driver_connection
    hashed = driver.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    until = db.scalar(sa.text(f"SELECT (clock_timestamp() + interval '{PASSWORD_S} s')::text"))
    db.exec_driver_sql(f"ALTER ROLE {name} PASSWORD '{hashed}' VALID UNTIL '{until}'")


def _look_where(owner: Engine, engine: Engine) -> None:
    """Let transactions of ``engine`` find tables where the owner's do, whatever the users' own settings are."""
    with reading(owner) as db:
        path = db.scalar(sa.text("SELECT string_agg(quote_ident(each), ', ') FROM unnest(current_schemas(false)) each"))

    def look(connection: Connection) -> None:
        connection.exec_driver_sql(f"SET LOCAL search_path = {path}".replace("%", "%%"))

    sa.event.listen(engine, "begin", look)


def _check(owner: Engine, engine: Engine) -> None:
    """Raises :class:`NoReader` for a user that may do more than read, or read what is secret."""
    try:
        with engine.connect() as connection:
            powers = connection.scalar(_POWERS)
            keys = not powers and connection.scalar(_KEYS)
    except sa.exc.DBAPIError as problem:
        raise _refused(owner, problem) from None
    if powers or keys:
        what = "may do more than read tables" if powers else "may read the hashes of API keys"
        raise _refused(owner, DatabaseError(f"the user of JOBS_QUERY_DATABASE_URL {what}"))


def _refused(owner: Engine, problem: Exception) -> NoReader:
    cause = getattr(problem, "orig", problem)
    said = problem.message if isinstance(problem, DatabaseError) else (str(cause).strip().splitlines() or ["?"])[0]
    # This says so itself where the database cannot be reached.
    with reading(owner) as connection:
        schema = connection.scalar(sa.text("SELECT quote_ident(current_schema())"))
    return NoReader(
        f"a query needs a user of PostgreSQL that may only read, and there is none: {said}",
        hint=f"An administrator runs: {BY_HAND.format(schema=schema)}; "
        "then set JOBS_QUERY_DATABASE_URL to that user's postgresql:// URL. "
        "A pooler knows only the users of its own list: add that user (pgbouncer: auth_file), or go past the pooler.",
    )
