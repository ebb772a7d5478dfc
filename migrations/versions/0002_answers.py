"""What an answer may hold beside its text: reasoning, choices, log-probabilities, vectors; and copies of answers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TEXTS = ("reasoning", "choices", "logprobs", "choice_probs", "continuations", "embedding")


def upgrade() -> None:
    for name in TEXTS:
        op.add_column("results", sa.Column(name, sa.Text()))
    op.add_column("results", sa.Column("deduplicated", sa.Boolean(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("use_cache", sa.Boolean(), nullable=False, server_default="0"))
    op.create_table(
        "answers",
        sa.Column("key_sha256", sa.String(64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("output_tokens", sa.Integer(), nullable=False),
        sa.Column("reasoning_tokens", sa.Integer(), nullable=False),
        sa.Column("extras", sa.Text()),
        sa.Column("stored_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key_sha256", name=op.f("pk_answers")),
    )
    op.create_table(
        "verifications",
        sa.Column("id", sa.String(26), nullable=False),
        sa.Column("job_id", sa.String(26), nullable=False),
        sa.Column("compared", sa.Integer(), nullable=False),
        sa.Column("left_out", sa.Integer(), nullable=False),
        sa.Column("mismatches", sa.Integer(), nullable=False),
        sa.Column("examples", sa.Text(), nullable=False),
        sa.Column("sums", sa.Text(), nullable=False),
        sa.Column("verified_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_verifications")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_verifications_job_id"), ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("verifications")
    op.drop_table("answers")
    op.drop_column("jobs", "use_cache")
    for name in ("deduplicated", *TEXTS):
        op.drop_column("results", name)
