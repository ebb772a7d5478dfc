"""Alembic's environment: the connection is given by promptmill.database.revision.upgrade: no ini file is needed."""

from alembic import context

from promptmill.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
