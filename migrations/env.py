"""Alembic's environment: the connection is given by promptmill.database.upgrade, so that no ini file is needed."""

from alembic import context

from promptmill.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
