"""Which model answered an attempt, in which environment, and which one a worker has loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("model_fingerprint", sa.String(length=64)))
    op.add_column("attempts", sa.Column("environment", sa.Text()))
    op.add_column("workers", sa.Column("model_fingerprint", sa.String(length=64)))
    # They were kept under the fingerprint that a job named, whichever model had answered, and for all keys together.
    op.execute("DELETE FROM answers")
    # A fingerprint counts more of the files than before. The first worker that goes on with a job says which it is.
    op.execute("UPDATE jobs SET model_fingerprint = NULL WHERE state IN ('queued', 'running', 'paused')")


def downgrade() -> None:
    op.drop_column("workers", "model_fingerprint")
    for name in ("environment", "model_fingerprint"):
        op.drop_column("attempts", name)
