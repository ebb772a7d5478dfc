"""A database whose revision number says more than its tables hold."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, writing
from promptmill.database.revision import current_revision, head_revision, upgrade
from promptmill.errors import DatabaseError
from promptmill.store.catalog import find_job
from tests.conftest import Command


def damage(url: str, *statements: str) -> sa.Engine:
    engine = connect(url)
    upgrade(engine)
    with writing(engine) as connection:
        for each in statements:
            connection.execute(sa.text(each))
    return engine


def test_upgrading_says_what_is_missing(database_url: str, command: Command) -> None:
    command.environment["JOBS_DATABASE_URL"] = database_url
    engine = damage(
        database_url, "DROP INDEX ix_jobs_name", "ALTER TABLE jobs DROP COLUMN paused_at", "DROP TABLE job_tags",
        "ALTER TABLE jobs ADD COLUMN of_somebody_else TEXT",
    )  # fmt: skip
    found = command("db", "upgrade")
    assert found.code == 2
    assert f"at revision {head_revision()}, and lacks: column jobs.paused_at" in found.err.replace("\n", " ")
    assert "index ix_jobs_name, " in found.err
    assert "table job_tags" in found.err
    assert "of_somebody_else" not in found.err
    engine.dispose()


def test_a_table_without_a_column_is_one_clear_sentence(database_url: str) -> None:
    engine = damage(database_url, "ALTER TABLE jobs DROP COLUMN paused_at")
    with pytest.raises(DatabaseError, match=r"lacks what this version needs: .*paused_at") as caught:
        find_job(engine, "@last")
    assert "db upgrade" in (caught.value.hint or "")
    engine.dispose()


def test_a_view_that_was_dropped_is_told(database_url: str) -> None:
    engine = damage(database_url, "DROP VIEW v_errors")
    with pytest.raises(DatabaseError, match="lacks: view v_errors"):
        upgrade(engine)
    engine.dispose()


#: What 0013 made.
UNDO_13 = (
    "DROP VIEW v_scores", "ALTER TABLE jobs DROP COLUMN effective_rows",
    "ALTER TABLE requests DROP COLUMN input_digest", "ALTER TABLE requests DROP COLUMN prompt_digest",
    "ALTER TABLE scores DROP COLUMN is_right",
    "CREATE VIEW v_scores AS SELECT 1 AS one",
)  # fmt: skip


def test_an_upgrade_that_leaves_something_out_changes_nothing(database_url: str) -> None:
    engine = damage(
        database_url, "ALTER TABLE jobs DROP COLUMN paused_at", "UPDATE alembic_version SET version_num = '0011'",
        "DROP TABLE installation", *UNDO_13,
    )  # fmt: skip
    with pytest.raises(DatabaseError, match=r"lacks: column jobs\.paused_at"):
        upgrade(engine)
    assert current_revision(engine) == "0011"
    engine.dispose()
