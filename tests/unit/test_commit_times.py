"""How long commits take is counted: the metric of the database."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.database.engine import COMMITS, CommitTimes, connect, writing


def test_counts_are_cumulative_and_bounds_belong_to_their_bucket() -> None:
    times = CommitTimes()
    for seconds in (0.0005, 0.001, 0.3, 60.0):
        times.add(seconds)
    *counts, total, summed = times.cumulative()
    assert dict(zip(CommitTimes.BOUNDS, counts, strict=True))[0.001] == 2
    assert dict(zip(CommitTimes.BOUNDS, counts, strict=True))[0.5] == 3
    assert total == 4
    assert summed == pytest.approx(60.3015)


def test_commits_are_counted_and_rolled_back_transactions_are_not(tmp_path: Path) -> None:
    db = connect(f"sqlite:///{tmp_path / 'x.sqlite'}")
    before = COMMITS.cumulative()[-2]
    with writing(db) as connection:
        connection.execute(sa.text("create table t (x int)"))
        connection.execute(sa.text("insert into t values (1)"))

    def fail() -> None:
        with writing(db) as connection:
            connection.execute(sa.text("insert into t values (2)"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert COMMITS.cumulative()[-2] == before + 1
    with writing(db) as connection:
        assert connection.execute(sa.text("select count(*) from t")).scalar() == 1
    db.dispose()
