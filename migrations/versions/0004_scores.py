"""Score runs that stand for themselves: their task, their figures, and more of each row."""

import sqlalchemy as sa
from alembic import op

from promptmill.database.views import VIEWS

_BEFORE = """
SELECT s.score_run_id, u.job_id, u.created_at, s."row", q.custom_id AS id, s.metric, s.value, s.predicted, s.expected,
    s.outcome
FROM scores s
JOIN score_runs u ON u.id = s.score_run_id
JOIN requests q ON q.job_id = u.job_id AND q."row" = s."row"
"""

#: ``v_scores`` as it was from 0004 to 0012.
V_SCORES = """
SELECT s.score_run_id, u.job_id, u.created_at, s."row", q.custom_id AS id, s.metric, s.value, s.predicted, s.expected,
    s.outcome, u.number AS score_run, s.confidence, s.error
FROM scores s
JOIN score_runs u ON u.id = s.score_run_id AND u.figures IS NOT NULL
JOIN requests q ON q.job_id = u.job_id AND q."row" = s."row"
"""

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _recreate() -> str:
    return "always" if op.get_bind().dialect.name == "sqlite" else "never"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("task_folder", sa.Text()))
    op.add_column("score_runs", sa.Column("number", sa.Integer()))
    op.add_column("score_runs", sa.Column("task_text", sa.Text()))
    op.add_column("score_runs", sa.Column("figures", sa.Text()))
    op.execute("DROP VIEW v_scores")
    op.execute("DROP VIEW v_confusion")
    # On SQLite the table is made anew, without row numbers.
    with op.batch_alter_table("scores", recreate=_recreate(), table_kwargs={"sqlite_with_rowid": False}) as table:
        table.add_column(sa.Column("confidence", sa.Double()))
        table.add_column(sa.Column("error", sa.Text()))
    # Runs from before count as finished; they are numbered in the order in which they were made.
    op.execute(
        "UPDATE score_runs SET figures = '{}', number = "
        "(SELECT COUNT(*) FROM score_runs b WHERE b.job_id = score_runs.job_id AND b.id <= score_runs.id)"
    )
    op.execute(f"CREATE VIEW v_scores AS {V_SCORES}")
    op.execute(f"CREATE VIEW v_confusion AS {VIEWS['v_confusion']}")


def downgrade() -> None:
    op.execute("DROP VIEW v_scores")
    op.execute("DROP VIEW v_confusion")
    with op.batch_alter_table("scores", recreate=_recreate()) as table:
        table.drop_column("error")
        table.drop_column("confidence")
    op.drop_column("score_runs", "figures")
    op.drop_column("score_runs", "task_text")
    op.drop_column("score_runs", "number")
    op.drop_column("jobs", "task_folder")
    op.execute(f"CREATE VIEW v_scores AS {_BEFORE}")
    op.execute(f"CREATE VIEW v_confusion AS {VIEWS['v_confusion']}")
