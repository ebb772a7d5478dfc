"""Tags and notes of jobs, what a job keeps of its texts, and what workers did when they were sampled."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("note", sa.Text()))
    op.add_column("jobs", sa.Column("engine_settings", sa.Text()))
    op.add_column("jobs", sa.Column("store", sa.String(8), nullable=False, server_default="full"))
    op.add_column("worker_samples", sa.Column("state", sa.String(16)))
    op.create_table(
        "job_tags",
        sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id", ondelete="CASCADE", name="fk_job_tags_job_id"),
                  nullable=False),
        sa.Column("tag", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "tag", name="pk_job_tags"),
    )  # fmt: skip
    op.create_index("ix_job_tags_tag", "job_tags", ["tag"])


def downgrade() -> None:
    op.drop_table("job_tags")
    op.drop_column("worker_samples", "state")
    for name in ("store", "engine_settings", "note"):
        op.drop_column("jobs", name)
