"""Simulated pairs of jobs through the whole comparison: what it calls a difference is one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, copy_rows, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import attempts, chunks, jobs, requests, results
from promptmill.reports.compare.compare import compare
from promptmill.reports.compare.comparison import Comparison
from tests.unit.test_reports import START, answer, store

ROWS, SLOTS, CHUNK, PAIRS = 512, 16, 64, 200


@pytest.fixture(scope="module")
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    upgrade(engine)
    yield engine
    engine.dispose()


def run(db: sa.Engine, job_id: str, work: Any, seed: int, slowdown: float = 0.0) -> None:
    """A job on 16 slots: rows differ in their work, neighbours in time share a load of the machine, rows have noise."""
    generator = np.random.default_rng(seed)
    load = np.exp(0.04 * generator.normal(size=4000))
    noise = np.exp(generator.normal(0, 0.05, ROWS)) * (1 + slowdown)
    free = [0.0] * SLOTS
    rows = []
    for row in range(ROWS):
        begin = heapq.heappop(free)
        end = begin + float(work[row] * noise[row] * load[int(begin // 1.0)])
        heapq.heappush(free, end)
        rows.append(answer(row, admitted_at=START + begin, first_token_at=START + begin + 0.1 * (end - begin),
                           finished_at=START + end, output_tokens=50, chunk=row // CHUNK))  # fmt: skip
    store(db, [], rows=0, job_id=job_id)
    named = [(job_id, row, f"r{row}") for row in range(ROWS)]
    columns = ("job_id", *rows[0])
    with writing(db) as connection:
        copy_rows(connection, requests, ("job_id", "row", "custom_id"), named)
        copy_rows(connection, results, columns, [(job_id, *each.values()) for each in rows])


def compared(db: sa.Engine, seed: int, slowdown: float) -> Comparison:
    generator = np.random.default_rng(seed)
    work = np.exp(generator.normal(0, 0.5, ROWS))
    run(db, "01A", work, 2 * seed + 10_000)
    run(db, "01B", work, 2 * seed + 10_001, slowdown)
    found = compare(db, "01A", "01B")
    with writing(db) as connection:
        for table in (results, attempts, chunks, requests, jobs):
            connection.execute(sa.delete(table))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_pairs_of_identical_jobs_end_in_no_detectable_difference_in_95_percent(db: sa.Engine) -> None:
    verdicts = [compared(db, seed, 0.0).verdict for seed in range(PAIRS)]
    quiet = sum(each.startswith("no detectable difference") for each in verdicts)
    print(f"{quiet} of {PAIRS} pairs of identical jobs: no detectable difference")
    assert quiet >= 0.95 * PAIRS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_slowdowns_of_5_percent_are_found_in_95_percent(db: sa.Engine) -> None:
    words = []
    for seed in range(PAIRS):
        lines = {line.name: line.word for line in compared(db, seed, 0.05).lines}
        words.append(lines["latency_s.mean"])
    print(f"{words.count('worse')} of {PAIRS} slowdowns of 5 % found, {words.count('better')} taken for a gain")
    assert words.count("worse") >= 0.95 * PAIRS
    assert "better" not in words
