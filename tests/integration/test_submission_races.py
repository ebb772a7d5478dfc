"""Submissions at the same time: what each sees of the others. Over both databases."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.errors import JobExists, QueueFull
from promptmill.readers import open_dataset
from promptmill.submission import JobOrder, submit
from promptmill.tables import jobs

ORDER = JobOrder(model="echo", mode="queue")


def at_once(database: sa.Engine, path: Path, order: JobOrder) -> list[str]:
    """Four submissions of one file; what became of each."""

    def one(_: int) -> str:
        try:
            with open_dataset(str(path)) as dataset:
                return submit(database, dataset, order)
        except (JobExists, QueueFull) as problem:
            return type(problem).__name__

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(one, range(4)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(3000)))
    return path


def test_of_four_that_ask_the_same_one_is_stored(database: sa.Engine, path: Path) -> None:
    became = at_once(database, path, replace(ORDER, if_exists="fail"))
    assert became.count("JobExists") == 3
    with database.connect() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(jobs)).scalar() == 1


def test_four_do_not_fill_the_queue_above_its_limit(database: sa.Engine, path: Path) -> None:
    became = at_once(database, path, replace(ORDER, queue_limit=7000))
    assert became.count("QueueFull") == 2
