"""What stays of a job's texts: on either database, hashes or nothing, and the figures in every case."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.database.engine import epoch
from promptmill.database.tables import jobs, requests, results, score_runs
from promptmill.errors import JobError, TaskFileError
from promptmill.ledger import Ledger
from promptmill.queue.broker import Broker
from promptmill.queue.dispatcher import Dispatcher
from promptmill.reports.compare.compare import compare
from promptmill.reports.figures.summary import summarise
from promptmill.scoring.forgetting import UNSCORED_S, forget, forget_overdue
from promptmill.scoring.mistakes import judged_rows
from promptmill.scoring.runs import unscored
from promptmill.service.service import keep_scores, score_again
from promptmill.store import redaction
from promptmill.store.redaction import FETCH_S, hashed, overdue, redact
from promptmill.tasks.task_file import parse_task
from tests.unit.test_reports import JOB, START, TASK, answer, failure, store

SHA = parse_task(TASK, "ads").sha256

SECRET = '{"is_ad": true}'


@pytest.fixture
def db(database: sa.Engine) -> sa.Engine:
    return database


def fill(db: sa.Engine, **job: Any) -> None:
    rows = [answer(row, text=SECRET, reasoning="thought") for row in range(8)] + [failure(8, message="about secret")]
    labels = {row: {"is_ad": row < 6} for row in range(9)}
    store(db, rows, expected=labels, task_text=TASK, task_name="ads", task_sha256=SHA, finished_at=START, **job)


def texts(db: sa.Engine) -> list[tuple[Any, ...]]:
    columns = (requests.c.input, requests.c.expected, results.c.text, results.c.reasoning, results.c.error_message)
    query = sa.select(*columns).join(
        results, sa.and_(results.c.job_id == requests.c.job_id, results.c.row == requests.c.row)
    )
    with db.connect() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(requests.c.row))]


@pytest.mark.parametrize("how", ["hash", "none"])
def test_texts_go_and_every_figure_and_score_stays(db: sa.Engine, how: str) -> None:
    fill(db, store=how)
    before = summarise(db, JOB).to_json()
    forget(db, JOB, how)
    forget(db, JOB, how)
    kept = texts(db)
    assert SECRET not in str(kept)
    assert "secret" not in str(kept)
    assert "thought" not in str(kept)
    assert {row[2] for row in kept[:8]} == {hashed(SECRET) if how == "hash" else None}
    after = summarise(db, JOB).to_json()
    # Messages of errors may quote a prompt: they are gone too.
    assert [each.pop("error_examples")[0]["class"] for each in (before, after)] == ["timeout", "timeout"]
    assert after == before
    assert stored(db) == {"hash": "hashed", "none": "removed"}[how]


@pytest.mark.parametrize("how", ["hash", "none"])
def test_scores_of_jobs_without_texts_are_compared_as_before(db: sa.Engine, how: str) -> None:
    fill(db)
    labels = {row: {"is_ad": row < 3} for row in range(9)}
    rows = [answer(row, text=SECRET) for row in range(9)]
    store(db, rows, job_id="02OTHER", expected=labels, task_text=TASK, task_name="ads", finished_at=START)
    before = compare(db, JOB, "02OTHER").to_json()
    for job_id in (JOB, "02OTHER"):
        forget(db, job_id, how)
    after = compare(db, JOB, "02OTHER").to_json()
    assert "is_ad.accuracy" in [each["name"] for each in after["figures"]]
    assert (after["figures"], after["flips"]) == (before["figures"], before["flips"])
    assert [each.id for each in judged_rows(db, JOB) if each.is_right is False] == ["row-6", "row-7"]


def test_jobs_of_the_queue_keep_their_scores_when_their_texts_go(db: sa.Engine) -> None:
    fill(db, store="none")
    before = summarise(db, JOB).to_json()["scores"]
    assert forget_overdue(db) == [JOB]
    assert summarise(db, JOB).to_json()["scores"] == before != {}


def test_the_scores_that_are_kept_are_those_of_the_answers_after_a_retry(db: sa.Engine) -> None:
    fill(db)
    keep_scores(JOB, db)
    keep_scores(JOB, db)
    with db.begin() as connection:
        connection.execute(sa.update(score_runs).values(created_at=START + 5))
        connection.execute(sa.update(jobs).values(finished_at=START + 9))
        connection.execute(sa.update(results).where(results.c.row >= 6).values(state="ok", text='{"is_ad": false}',
                           prompt_tokens=1, cached_tokens=0, output_tokens=1))  # fmt: skip
    keep_scores(JOB, db)
    with db.connect() as connection:
        kept = connection.execute(sa.select(score_runs.c.number, score_runs.c.figures).order_by(score_runs.c.number))
        assert [(number, json.loads(text)["is_ad"]["value"]) for number, text in kept] == [(1, 0.75), (2, 1.0)]


def test_what_a_client_sent_with_a_task_is_scored_where_it_was_sent(db: sa.Engine) -> None:
    fill(db, mode="queue")
    store(db, [answer(0)], job_id="01HERE", mode="queue", task_text=TASK, task_folder="/here", finished_at=START)
    assert [each.id for each in unscored(db, 1e12)] == [JOB]
    assert unscored(db, 1.0) == []
    keep_scores(JOB, db)
    assert unscored(db, 1e12) == []


def test_a_job_whose_rows_expect_nothing_keeps_no_scores_and_loses_its_texts(db: sa.Engine) -> None:
    store(db, [answer(0, text=SECRET)], task_text=TASK, task_name="ads", finished_at=START)
    keep_scores(JOB, db)
    forget(db, JOB, "none")
    with db.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(score_runs)).scalar() == 0
    assert SECRET not in str(texts(db))


def test_texts_that_are_gone_are_not_scored_again(db: sa.Engine) -> None:
    fill(db)
    forget(db, JOB, "hash")
    with pytest.raises(JobError, match="nothing to score"):
        score_again(JOB, None, db)


def test_a_task_that_cannot_be_scored_here_keeps_no_text_longer(db: sa.Engine) -> None:
    rows = [answer(row, text=SECRET) for row in range(3)]
    elsewhere = TASK.replace("exact: is_ad", "python: nowhere.py:right")
    store(db, rows, task_text=elsewhere, task_name="ads", finished_at=START, store="none")
    assert forget_overdue(db) == [JOB]
    assert SECRET not in str(texts(db))


def test_a_redaction_that_was_cut_off_goes_on_without_hashing_hashes(db: sa.Engine) -> None:
    fill(db)
    redact(db, JOB, "hash")
    once = texts(db)
    redact(db, JOB, "hash")
    assert texts(db) == once


@pytest.mark.parametrize("how", ["hash", "none"])
def test_a_job_that_goes_on_meanwhile_keeps_all_its_texts(db: sa.Engine, how: str) -> None:
    fill(db, store=how, state="failed")
    before = texts(db)
    assert [each[:2] for each in overdue(db)] == [(JOB, how)]
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(state="running"))
    assert not redact(db, JOB, how)
    assert not forget(db, JOB, how)
    assert texts(db) == before
    assert stored(db) == how


@pytest.mark.parametrize("how", ["hash", "none"])
def test_nothing_is_run_again_while_texts_go(db: sa.Engine, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off it stays so, and goes on by itself; the scores are those of the texts."""
    fill(db, store=how, mode="queue")
    before = summarise(db, JOB).to_json()["scores"]
    with monkeypatch.context() as patch:
        patch.setattr(redaction, "BATCH_ROWS", 4)
        patch.setattr(redaction, "_redact_rows", cut_off_after(2))
        with pytest.raises(InterruptedError):
            forget(db, JOB, how)
    with pytest.raises(JobError, match="has lost its prompts"):
        Ledger(db).retry(JOB)
    assert summarise(db, JOB).to_json()["scores"] == before != {}
    assert stored(db) not in (how, "hashed", "removed")
    assert SECRET in str(texts(db))
    assert forget_overdue(db) == [JOB]
    assert SECRET not in str(texts(db))
    assert summarise(db, JOB).to_json()["scores"] == before


def cut_off_after(batches: int) -> Callable[..., None]:
    left = iter(range(batches - 1))
    redact_rows = redaction._redact_rows

    def some(*asked: Any) -> None:
        if next(left, None) is None:
            raise InterruptedError
        redact_rows(*asked)

    return some


def stored(db: sa.Engine) -> Any:
    with db.connect() as connection:
        return connection.execute(sa.select(jobs.c.store)).scalar()


@pytest.mark.parametrize("text", ["sha256:my secret", "sha256:" + "0123456789abcdef" * 4])
def test_a_text_that_looks_like_a_hash_is_hashed(db: sa.Engine, text: str) -> None:
    store(db, [answer(0, text=text)], expected={0: text}, finished_at=START)
    with db.begin() as connection:
        connection.execute(sa.update(requests).values(input=json.dumps({"prompt": text})))
    redact(db, JOB, "hash")
    assert text not in str(texts(db))
    assert texts(db)[0][2] == hashed(text)
    once = texts(db)
    redact(db, JOB, "hash")
    assert texts(db) == once


def test_jobs_of_the_queue_are_redacted_an_hour_after_their_end(db: sa.Engine) -> None:
    fill(db, store="none")
    store(db, [answer(0)], job_id="01FULL", finished_at=START)
    assert forget_overdue(db) == [JOB]
    assert forget_overdue(db) == []
    with db.connect() as connection:
        assert connection.execute(sa.select(results.c.text).where(results.c.job_id == "01FULL")).scalar() is not None


def test_workers_forget_without_running_a_scorer(db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a scorer ran on a worker")

    monkeypatch.setattr("promptmill.scoring.forgetting.keep_scores", never)
    fill(db, store="none")
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(finished_at=epoch() - FETCH_S - 60))
    # Somebody else is to keep its scores, for another hour.
    assert forget_overdue(db, scoring=False) == []
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(finished_at=epoch() - UNSCORED_S - 60))
    assert forget_overdue(db, scoring=False) == [JOB]
    assert SECRET not in str(texts(db))


def test_who_lacks_what_the_scores_need_leaves_a_job_to_others_for_an_hour(
    db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise TaskFileError("the scorer file s.py cannot be read")

    monkeypatch.setattr("promptmill.scoring.forgetting.keep_scores", lacking)
    fill(db, store="none")
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(finished_at=epoch() - FETCH_S - 60))
    assert forget_overdue(db) == []
    assert SECRET in str(texts(db))
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(finished_at=epoch() - UNSCORED_S - 60))
    assert forget_overdue(db) == [JOB]
    assert SECRET not in str(texts(db))


def test_workers_forget_at_once_what_is_scored(db: sa.Engine) -> None:
    fill(db, store="hash")
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(finished_at=epoch() - FETCH_S - 60))
    keep_scores(JOB, db)
    assert forget_overdue(db, scoring=False) == [JOB]


def test_a_job_is_forgotten_by_one_process_at_a_time(db: sa.Engine) -> None:
    fill(db, store="none")
    with db.begin() as connection:
        connection.execute(sa.update(jobs).values(forgetting_until=epoch() + 60))
    assert forget_overdue(db) == []
    with db.begin() as connection:
        # Of one that died.
        connection.execute(sa.update(jobs).values(forgetting_until=epoch() - 1))
    assert forget_overdue(db) == [JOB]


def test_recovery_scores_and_forgets_nothing(db: sa.Engine, redis_url: str) -> None:
    fill(db, store="none")
    Dispatcher(Ledger(db), Broker(redis_url)).reconcile()
    assert SECRET in str(texts(db))
