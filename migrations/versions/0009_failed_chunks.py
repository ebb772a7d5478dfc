"""An index of chunks that failed and wait: they, and the pieces they were split into, are tried before all others."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    failed = sa.text("state = 'queued' AND failures > 0")
    op.create_index("ix_chunks_failed", "chunks", ["job_id"], sqlite_where=failed, postgresql_where=failed)


def downgrade() -> None:
    op.drop_index("ix_chunks_failed", "chunks")
