"""A database whose revision number says more than its tables hold."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["DELETE FROM alembic_version"], "has tables and no revision"),
        (["DROP TABLE alembic_version"], "has tables and no revision"),
        (["INSERT INTO alembic_version VALUES ('0012')"], "has 2 revisions: 0012, 0013"),
        (["UPDATE alembic_version SET version_num = ''"], "is at revision of no name, which this version"),
        (["UPDATE alembic_version SET version_num = '0010'"], "at revision 0010, and is not: .*already exists"),
        (["DROP VIEW v_jobs", "CREATE VIEW v_jobs AS SELECT 1 AS id"], r"lacks: .*column v_jobs\.name"),
        (
            ["CREATE TABLE copied AS SELECT * FROM job_tags", "DROP TABLE job_tags",
             "ALTER TABLE copied RENAME TO job_tags"],
            "primary key of job_tags",
        ),
    ],
)  # fmt: skip
def test_a_database_that_is_not_what_it_says_is_told_in_a_sentence(
    database_url: str, statements: list[str], problem: str
) -> None:
    engine = damage(database_url, *statements)
    with pytest.raises(DatabaseError, match=problem) as caught:
        upgrade(engine)
    assert caught.value.hint
    engine.dispose()


def test_a_run_into_a_database_that_lacks_a_column_says_so(command: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lacking.sqlite'}"
    damage(url, "ALTER TABLE jobs RENAME COLUMN max_errors TO something_else").dispose()
    command.environment["JOBS_DATABASE_URL"] = url
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    done = command("run", "a.jsonl", "--model", "echo")
    assert done.code == 2
    assert "lacks what this version needs" in done.err
    assert "internal error" not in done.err
