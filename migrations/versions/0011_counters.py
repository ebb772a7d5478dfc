"""Counters of results as they are stored, and what is needed to let old samples, old workers and texts go in steps."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # They begin at zero: what was counted before is not counted again, and Prometheus takes it for a restart.
    op.create_table(
        "counters",
        sa.Column("worker_id", sa.String(64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("counts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", "model", name="pk_counters"),
    )
    op.create_index("ix_worker_samples_at", "worker_samples", ["at"])
    op.create_index("ix_attempts_worker_id", "attempts", ["worker_id"])
    op.add_column("jobs", sa.Column("forgetting_until", sa.Double()))


def downgrade() -> None:
    op.drop_column("jobs", "forgetting_until")
    op.drop_index("ix_attempts_worker_id", "attempts")
    op.drop_index("ix_worker_samples_at", "worker_samples")
    op.drop_table("counters")
