"""What the API keeps: owners of jobs, limits of keys, when a batch reached each state and what was wrong with it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0004"
branch_labels = None
depends_on = None

MOMENTS = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
    "claimed_until",
)  # fmt: skip
LIMITS = (
    ("requests_per_s", sa.Double()), ("queued_requests", sa.BigInteger()), ("stored_bytes", sa.BigInteger()),
    ("concurrent", sa.Integer()), ("last_used_at", sa.Double()),
)  # fmt: skip


def upgrade() -> None:
    op.add_column("jobs", sa.Column("api_key_id", sa.String(26)))
    op.add_column("attempts", sa.Column("live_requests", sa.Integer()))
    op.create_index("ix_jobs_api_key_id", "jobs", ["api_key_id"])
    for name, kind in LIMITS:
        op.add_column("api_keys", sa.Column(name, kind))
    op.add_column("files", sa.Column("status", sa.String(16), nullable=False, server_default="processed"))
    with op.batch_alter_table("batches") as batches:
        # An unknown file is no error of the call that creates a batch, and a file may be deleted before its batch.
        for name in ("input_file_id", "output_file_id", "error_file_id"):
            batches.drop_constraint(op.f(f"fk_batches_{name}"), type_="foreignkey")
        batches.add_column(sa.Column("completion_window", sa.String(16), nullable=False, server_default="24h"))
        batches.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="5"))
        batches.add_column(sa.Column("task_text", sa.Text()))
        batches.add_column(sa.Column("model", sa.Text()))
        batches.add_column(sa.Column("errors", sa.Text()))
        batches.add_column(sa.Column("idempotency_key", sa.String(255)))
        batches.add_column(sa.Column("output_expires_after_s", sa.BigInteger()))
        batches.add_column(sa.Column("claimed_by", sa.String(64)))
        batches.add_column(sa.Column("total", sa.Integer(), nullable=False, server_default="0"))
        batches.add_column(sa.Column("completed", sa.Integer(), nullable=False, server_default="0"))
        batches.add_column(sa.Column("failed", sa.Integer(), nullable=False, server_default="0"))
        for name in MOMENTS:
            batches.add_column(sa.Column(name, sa.Double()))
    op.create_index("ix_batches_state", "batches", ["state"])


def downgrade() -> None:
    op.drop_index("ix_batches_state", "batches")
    with op.batch_alter_table("batches") as batches:
        for name in (
            *MOMENTS, "failed", "completed", "total", "claimed_by", "output_expires_after_s", "idempotency_key",
            "errors", "model", "task_text", "priority", "completion_window",
        ):  # fmt: skip
            batches.drop_column(name)
        for name in ("input_file_id", "output_file_id", "error_file_id"):
            batches.create_foreign_key(op.f(f"fk_batches_{name}"), "files", [name], ["id"])
    op.drop_column("files", "status")
    for name, _ in LIMITS:
        op.drop_column("api_keys", name)
    op.drop_index("ix_jobs_api_key_id", "jobs")
    op.drop_column("attempts", "live_requests")
    op.drop_column("jobs", "api_key_id")
