"""What the pages show, without a browser."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from promptmill.api.pages.page_queries import STEPS, _by_rows
from promptmill.database.engine import reading


@pytest.mark.parametrize(("seconds", "step"), [(2.0, 1), (14.5, 1), (60.0, 1), (61.0, 2), (3_600.0, 60)])
def test_steps_of_the_throughput_are_whole_seconds(database: sa.Engine, seconds: float, step: int) -> None:
    with reading(database) as db:
        at = _by_rows(db, "none", 1_000.0, 1_000.0 + seconds)["at"]
    assert at == [float(step * each) for each in range(len(at))]
    assert len(at) <= STEPS + 1
    assert at[-1] >= seconds
