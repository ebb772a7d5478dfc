"""Rows per second of ``promptmill score``: stored answers of a job scored again, one row stored for each.

    PYTHONPATH=tests/benchmarks python tests/benchmarks/scoring.py [--rows 1000000] [--database URL] [--texts 6|all]

``--texts``: different answers among the rows. Classifiers have a handful; ``all`` makes every answer its own text.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from promptmill.database.engine import copy_rows, writing
from promptmill.database.revision import open_database
from promptmill.database.tables import jobs, requests, results
from promptmill.scoring.runs import append_score_run
from promptmill.store import catalog
from promptmill.tasks.task_file import parse_task

LABELS = ("normal", "app", "contact", "site", "scam", "other")
PAGE = 50_000

TASKS = {
    "exact": "scores: [{exact: category}]",
    "exact, closeness, binary": "scores: [{exact: category}, {closeness: ad_score, span: 5}, "
    "{binary: ad_score, threshold: 3, as: is_ad}]",
}


def made_rows(rows: int, texts: str) -> Iterator[tuple[str, str]]:
    rng = random.Random(0)
    for number in range(rows):
        label, stars = rng.choice(LABELS), rng.randrange(6)
        given = label if rng.random() < 0.8 else rng.choice(LABELS)
        answer: dict[str, Any] = {"category": given, "ad_score": rng.randrange(6)}
        if texts == "all":
            answer["why"] = f"because of sign {number}"
        yield json.dumps(answer), json.dumps({"category": label, "ad_score": stars})


def filled(db: sa.Engine, rows: int, texts: str) -> Any:
    job_id = "0" * 26
    with writing(db) as connection:
        connection.execute(
            sa.insert(jobs).values(
                id=job_id, state="completed", mode="embedded", dataset_name="made", dataset_sha256="0" * 64,
                dataset_format="jsonl", model="echo", sampling="{}", env="{}", priority=5, rows=rows, submitted_at=0.0,
            )
        )  # fmt: skip
    pairs = made_rows(rows, texts)
    for first in range(0, rows, PAGE):
        page = [next(pairs) for _ in range(min(PAGE, rows - first))]
        numbered = list(enumerate(page, start=first))
        with writing(db) as connection:
            asked = [(job_id, row, f"row-{row}", '{"prompt": "x"}', want) for row, (_, want) in numbered]
            copy_rows(connection, requests, ("job_id", "row", "custom_id", "input", "expected"), asked)
            copy_rows(
                connection,
                results,
                (
                    "job_id",
                    "row",
                    "state",
                    "text",
                    "finish_reason",
                    "attempt",
                    "committed_at",
                    "prompt_tokens",
                    "cached_tokens",
                    "output_tokens",
                ),
                [(job_id, row, "ok", answer, "stop", 1, 1.0, 9, 0, 9) for row, (answer, _) in numbered],
            )
    return catalog.find_job(db, job_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--database", help="URL of an empty database; a new SQLite file without it")
    parser.add_argument("--texts", choices=("6", "all"), default="6")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        db = open_database(asked.database or f"sqlite:///{Path(folder) / 'jobs.db'}")
        job = filled(db, asked.rows, asked.texts)
        for name, scores in TASKS.items():
            task = parse_task(f"task: t\nprompt: {{user: x}}\n{scores}\n", "t")
            start, cpu = time.perf_counter(), time.process_time()
            run = append_score_run(db, job, task)
            took = time.perf_counter() - start
            busy = time.process_time() - cpu
            kept = len(run.scores) * asked.rows
            rate = f"{asked.rows / took:,.0f} rows/s, {kept / took:,.0f} stored rows/s"
            print(f"{name}: {rate} ({took:.2f} s, {busy:.2f} s of CPU)")


if __name__ == "__main__":
    main()
