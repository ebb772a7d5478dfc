"""Simulated runs of two settings through the whole comparison: what it calls a difference is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, copy_rows, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import attempts, chunks, jobs, requests, results
from promptmill.reports.compare.compare import compare_all
from promptmill.reports.compare.comparison import Comparison
from tests.unit.test_reports import START, answer, store

ROWS, RUNS, PAIRS = 64, 5, 10


@pytest.fixture(scope="module")
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    upgrade(engine)
    yield engine
    engine.dispose()


def run(db: sa.Engine, job_id: str, generator: np.random.Generator, slowdown: float) -> None:
    """A job whose rows share the mood of the machine, 1 % from run to run, and have 5 % of noise of their own."""
    mood = float(np.exp(generator.normal(0, 0.01))) * (1 + slowdown)
    noise = np.exp(generator.normal(0, 0.05, ROWS)) * mood
    begins = np.cumsum(noise) - noise
    rows = [
        answer(row, admitted_at=START + begin, first_token_at=START + begin + 0.1 * spent,
               finished_at=START + begin + spent, output_tokens=50, chunk=row // 8)
        for row, (begin, spent) in enumerate(zip(begins.tolist(), noise.tolist(), strict=True))
    ]  # fmt: skip
    store(db, [], rows=0, job_id=job_id)
    with writing(db) as connection:
        copy_rows(
            connection, requests, ("job_id", "row", "custom_id"), [(job_id, row, f"r{row}") for row in range(ROWS)]
        )
        columns = ("job_id", *rows[0])
        copy_rows(connection, results, columns, [(job_id, *each.values()) for each in rows])


def compared(db: sa.Engine, seed: int, slowdown: float) -> Comparison:
    generator = np.random.default_rng(seed)
    sides = [[f"0{side}{number}" for number in range(RUNS)] for side in "AB"]
    for side, slower in zip(sides, (0.0, slowdown), strict=True):
        for job_id in side:
            run(db, job_id, generator, slower)
    (found,) = compare_all(db, sides[0], [sides[1]])
    with writing(db) as connection:
        for table in (results, attempts, chunks, requests, jobs):
            connection.execute(sa.delete(table))
    return found


def test_ten_pairs_of_equal_settings_show_no_difference(db: sa.Engine) -> None:
    verdicts = [compared(db, seed, 0.0).verdict for seed in range(PAIRS)]
    assert [each for each in verdicts if not each.startswith("no detectable difference")] == []


def test_a_setting_that_is_5_percent_slower_is_found_each_time(db: sa.Engine) -> None:
    words = []
    for seed in range(PAIRS):
        lines = {line.name: line.word for line in compared(db, seed, 0.05).lines}
        words.append(lines["latency_s.mean"])
    assert words == ["worse"] * PAIRS
