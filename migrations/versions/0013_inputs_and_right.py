"""Which rows ask the same, and which are right by a score."""

import sqlalchemy as sa
from alembic import op

from promptmill.database.views import VIEWS

#: ``v_scores`` as it was from 0004 to 0012.
V_SCORES = """
SELECT s.score_run_id, u.job_id, u.created_at, s."row", q.custom_id AS id, s.metric, s.value, s.predicted, s.expected,
    s.outcome, u.number AS score_run, s.confidence, s.error
FROM scores s
JOIN score_runs u ON u.id = s.score_run_id AND u.figures IS NOT NULL
JOIN requests q ON q.job_id = u.job_id AND q."row" = s."row"
"""

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("effective_rows", sa.Double))
    op.add_column("requests", sa.Column("input_digest", sa.BigInteger))
    op.add_column("requests", sa.Column("prompt_digest", sa.BigInteger))
    op.add_column("scores", sa.Column("is_right", sa.Boolean))
    op.execute("DROP VIEW v_scores")
    op.execute(f"CREATE VIEW v_scores AS {VIEWS['v_scores']}")


def downgrade() -> None:
    op.execute("DROP VIEW v_scores")
    op.execute(f"CREATE VIEW v_scores AS {V_SCORES}")
    op.drop_column("scores", "is_right")
    op.drop_column("requests", "prompt_digest")
    op.drop_column("requests", "input_digest")
    op.drop_column("jobs", "effective_rows")
