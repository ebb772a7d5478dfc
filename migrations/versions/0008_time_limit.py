"""When a job's time limit began, and when it was paused: a retry starts the limit anew, a pause holds it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("limit_from", sa.Double()))
    op.add_column("jobs", sa.Column("paused_at", sa.Double()))
    op.execute("UPDATE jobs SET limit_from = started_at WHERE time_limit_s IS NOT NULL")


def downgrade() -> None:
    for name in ("paused_at", "limit_from"):
        op.drop_column("jobs", name)
