"""Append-only score runs: a job's stored answers scored by a task, row by row. Results are never touched."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.processes import begin_process, processes
from promptmill.database.engine import copy_rows, epoch, id_at, now_of, reading, writing
from promptmill.database.tables import jobs, results, score_runs, scores
from promptmill.errors import JobError
from promptmill.scoring.scorers.scoring import INPUT_KEY, Answer, Judge, answers_query, judge_of
from promptmill.scoring.scorers.tally import Judgement, Score, Tally
from promptmill.scoring.stored_scores import SINCE_END, own_runs
from promptmill.tasks.task_file import Task, parse_task
from promptmill.types import WITHOUT_TEXTS, JobState

COLUMNS = (
    "score_run_id", "row", "metric", "value", "predicted", "expected", "outcome", "confidence", "error", "is_right",
)  # fmt: skip

#: Rows read, judged and stored at a time.
PAGE_ROWS = 20_000

#: Rows from which on scorers of the user's own are called in several processes.
POOL_ROWS = 20_000

#: Pages that wait for the processes of the pool, for each of them.
PAGES_AHEAD = 2

#: The group of rows that have no such value.
NO_GROUP = "(none)"

#: Different answers whose judgements are remembered from page to page.
MOST_KNOWN = 50_000

#: One judgement by each scorer.
Judged = tuple[Judgement | None, ...]

#: The values of one :class:`Answer`, as the database's driver gives them.
Columns = tuple[Any, ...]

#: Some rows, each with its number, the key of its input, and its answer.
Page = tuple[list[int], list[int], list[Columns]]


@dataclass(frozen=True, slots=True)
class ScoreRun:
    """One run: ``JOB@sN`` names it. ``groups``: the scores of each value of the field that was asked for."""

    id: str
    number: int
    scores: dict[str, Score]
    groups: dict[str, dict[str, Score]]

    @property
    def figures(self) -> dict[str, Any]:
        return {name: score.to_json() for name, score in self.scores.items()}


def append_score_run(
    db: Engine,
    job: sa.Row[Any],
    task: Task,
    by: str | None = None,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
) -> ScoreRun:
    """Score the job's answers by ``task`` and store a run of it, which is there as a whole or not at all.

    ``by``: a field of the rows' ``meta``, ``input`` or ``expected``, such as ``meta.group``, to score by group as
    well. ``on_rows`` is told how many rows of how many are done. Raises :class:`JobError` for a task without scores
    and for a field that no row has.
    """
    judge = Judge(task)
    if not judge.scorers:
        raise JobError(f"the task '{task.name}' has no scores", hint="Add 'scores:' to the task file.")
    run_id, number = _open_run(db, job.id, task, judge)
    try:
        return _filled(db, job, task, judge, run_id, number, by, on_rows)
    except BaseException:
        _remove_run(db, run_id)
        raise


def keep_scores(db: Engine, job: sa.Row[Any]) -> None:
    """A score run of an ended job by its own task, unless it has one since its end.

    A job without scores, or in which no row has an expected value, has none. Raises :class:`TaskFileError` for scores
    that cannot be computed here. Any number of processes may do so at once.
    """
    if judge_of(job) is None:
        return
    task = parse_task(job.task_text, job.task_name or "task", job.task_folder)
    if _kept(db, job.id, task.sha256):
        return
    try:
        run = append_score_run(db, job, task)
    except JobError:
        return
    if _kept(db, job.id, task.sha256)[0] != run.id:
        # Another process was first, and may have begun to take texts away while this one still read them.
        _remove_run(db, run.id)


def is_scored(db: Engine, job: sa.Row[Any]) -> bool:
    """Whether no score of the job's own task is left to be kept. Evaluates nothing of a task that a client sent."""
    if job.task_text is None or job.store in WITHOUT_TEXTS or "scores" not in job.task_text:
        return True
    return bool(_kept(db, job.id, job.task_sha256))


def _kept(db: Engine, job_id: str, task_sha256: str | None) -> list[str]:
    with reading(db) as connection:
        return own_runs(connection, job_id, task_sha256)


def unscored(db: Engine, within_s: float) -> list[sa.Row[Any]]:
    """Jobs of the queue that completed within the last seconds and have no run of their task, which a client sent.

    A task file of this machine has a folder; who ran it looks after its scores.
    """
    own = sa.exists().where(SINCE_END, score_runs.c.task_sha256 == jobs.c.task_sha256).correlate(jobs)
    query = sa.select(jobs).where(
        jobs.c.mode == "queue", jobs.c.state == JobState.COMPLETED.value, jobs.c.task_text.is_not(None),
        jobs.c.task_folder.is_(None), jobs.c.store.not_in(WITHOUT_TEXTS), jobs.c.finished_at > epoch() - within_s, ~own,
    )  # fmt: skip
    with reading(db) as connection:
        return list(connection.execute(query.order_by(jobs.c.id)))


def _remove_run(db: Engine, run_id: str) -> None:
    with writing(db) as connection:
        connection.execute(sa.delete(scores).where(scores.c.score_run_id == run_id))
        connection.execute(sa.delete(score_runs).where(score_runs.c.id == run_id))


def _filled(
    db: Engine, job: sa.Row[Any], task: Task, judge: Judge, run_id: str, number: int, by: str | None,
    on_rows: Callable[[int, int], None],
) -> ScoreRun:  # fmt: skip
    group_of = _grouping(by)
    tallies = _tallies(judge)
    groups: dict[str, dict[str, Tally]] = {}
    done = 0
    pages = _pages(db, job.id, whole=judge.needs_item or by is not None)
    for (rows, keys, answers), judged in _judged(pages, task, judge, job.rows):
        # A page is stored by itself: the database is not locked while a slow scorer thinks about the next.
        with writing(db) as connection:
            copy_rows(connection, scores, COLUMNS, _stored(run_id, rows, judged, list(judge.scorers)))
        for answer, key, each in zip(answers, keys, judged, strict=True):
            _count(tallies, each, key)
            if group_of is not None:
                _count(groups.setdefault(group_of(Answer(*answer)), _tallies(judge)), each, key)
        done += len(rows)
        on_rows(done, job.rows)
    if done and all(tally.unlabelled == done for tally in tallies.values()):
        fields = ", ".join(sorted({scorer.field for scorer in judge.scorers.values() if scorer.field}))
        raise JobError(
            f"no row of job {job.id} expects {fields}", hint="Expected values are stored when a job is made."
        )
    if by is not None and groups.keys() <= {NO_GROUP}:
        raise JobError(f"no row has a field '{by}'", hint="Write meta.NAME, input.NAME or expected.NAME.")
    run = ScoreRun(run_id, number, _scored(tallies), {name: _scored(each) for name, each in sorted(groups.items())})
    with writing(db) as connection:
        figures = json.dumps(run.figures, ensure_ascii=False)
        connection.execute(sa.update(score_runs).where(score_runs.c.id == run_id).values(figures=figures))
    return run


def _tallies(judge: Judge) -> dict[str, Tally]:
    return {name: Tally(scorer) for name, scorer in judge.scorers.items()}


def _scored(tallies: dict[str, Tally]) -> dict[str, Score]:
    return {name: tally.score(name) for name, tally in tallies.items()}


def _count(tallies: dict[str, Tally], judged: Judged, key: int) -> None:
    for tally, judgement in zip(tallies.values(), judged, strict=True):
        tally.add(judgement, key)


def _stored(run_id: str, rows: list[int], judged: list[Judged], names: list[str]) -> list[tuple[Any, ...]]:
    """Rows of ``scores`` in the order of its key, in which databases take them fastest."""
    order = sorted(range(len(names)), key=names.__getitem__)
    # Equal answers have one judgement: what is stored of it is put together once.
    tails: dict[int, list[tuple[Any, ...]]] = {}
    stored = []
    for row, each in zip(rows, judged, strict=True):
        found = tails.get(id(each))
        if found is None:
            found = tails[id(each)] = [_tail(names[place], one) for place in order if (one := each[place]) is not None]
        for tail in found:
            stored.append((run_id, row, *tail))
    return stored


def _tail(name: str, found: Judgement) -> tuple[Any, ...]:
    value, predicted, expected, outcome, confidence, error, *_, right = found
    return name, value, predicted, expected, outcome.value, confidence, error, right


def _grouping(by: str | None) -> Callable[[Answer], str] | None:
    if by is None:
        return None
    part, _, name = by.partition(".")
    if part not in ("meta", "input", "expected") or not name:
        raise JobError(f"cannot group by '{by}'", hint="Write meta.NAME, input.NAME or expected.NAME.")

    def group(answer: Answer) -> str:
        text = {"meta": answer.meta, "input": answer.input, "expected": answer.expected}[part]
        found = json.loads(text) if text else {}
        found = found.get("fields", found) if part == "input" else found
        value = found.get(name) if isinstance(found, dict) else None
        if value is None:
            return NO_GROUP
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return group


# --- the rows --------------------------------------------------------------------------------------------------------


def _pages(db: Engine, job_id: str, whole: bool) -> Iterator[Page]:
    """The job's answers in the order of their rows, PAGE_ROWS at a time; no cursor stays open between two."""
    query = answers_query(job_id, whole=whole).add_columns(INPUT_KEY, results.c.row.label("place"))
    query = query.order_by(results.c.row).limit(PAGE_ROWS)
    last = -1
    while True:
        with reading(db) as connection:
            # The driver's own tuples: making a row object of each takes as long as reading it.
            cursor = connection.execute(query.where(results.c.row > last)).cursor
            found = cursor.fetchall() if cursor is not None else []
        if not found:
            return
        yield [each[-1] for each in found], [each[-2] for each in found], [each[:-2] for each in found]
        last = found[-1][-1]


def _judged(pages: Iterator[Page], task: Task, judge: Judge, rows: int) -> Iterator[tuple[Page, list[Judged]]]:
    if judge.needs_item and rows >= POOL_ROWS and processes() > 1:
        yield from _judged_by_many(pages, task)
        return
    known: dict[Columns, Judged] = {}
    for page in pages:
        yield page, _judged_page(judge, page[-1], known)


def _judged_page(judge: Judge, answers: list[Columns], known: dict[Columns, Judged]) -> list[Judged]:
    """``known``: judgements on answers seen before, for scorers that do not care whose answer it is."""
    if judge.needs_item:
        return [judge(Answer(*each)) for each in answers]
    if len(known) > MOST_KNOWN:
        known.clear()
    return [known[each] if each in known else known.setdefault(each, judge(Answer(*each))) for each in answers]


_judge_here: Judge | None = None


def _begin_process(text: str, name: str, folder: str | None) -> None:
    global _judge_here
    begin_process()
    _judge_here = Judge(parse_task(text, name, folder))


def _judge_elsewhere(answers: list[Columns]) -> list[Judged]:
    assert _judge_here is not None
    return _judged_page(_judge_here, answers, {})


def _judged_by_many(pages: Iterator[Page], task: Task) -> Iterator[tuple[Page, list[Judged]]]:
    """In the order of the pages, a few of which are in memory at a time."""
    count = processes()
    waiting: deque[tuple[Page, Future[list[Judged]]]] = deque()
    # Started afresh: a fork of a process that holds connections and threads could hang.
    begin = (task.text, task.name, task.folder)
    with ProcessPoolExecutor(count, get_context("spawn"), _begin_process, begin) as pool:
        for page in pages:
            waiting.append((page, pool.submit(_judge_elsewhere, page[-1])))
            if len(waiting) >= count * PAGES_AHEAD:
                first, judged = waiting.popleft()
                yield first, judged.result()
        while waiting:
            first, judged = waiting.popleft()
            yield first, judged.result()


# --- the runs --------------------------------------------------------------------------------------------------------


def _open_run(db: Engine, job_id: str, task: Task, judge: Judge) -> tuple[str, int]:
    """A run without figures is not finished, and is not shown."""
    with writing(db) as connection:
        now = now_of(connection)
        run_id = id_at(now)
        before = connection.execute(
            sa.select(score_runs.c.id, score_runs.c.number)
            .where(score_runs.c.job_id == job_id, score_runs.c.figures.is_not(None))
            .order_by(score_runs.c.number.desc(), score_runs.c.id.desc())
            .limit(1)
        ).one_or_none()
        highest = connection.execute(
            sa.select(sa.func.max(score_runs.c.number)).where(score_runs.c.job_id == job_id)
        ).scalar()
        number = (highest or 0) + 1
        made = {
            "id": run_id, "job_id": job_id, "task_sha256": task.sha256, "task_text": task.text,
            "scorer_sha256": judge.sha256, "parent_id": before.id if before else None, "number": number,
            "created_at": now,
        }  # fmt: skip
        connection.execute(sa.insert(score_runs).values(**made))
    return run_id, number
