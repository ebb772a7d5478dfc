"""The rows of two jobs, paired by id and input: what a comparison computes from, as columns of numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from promptmill.database.tables import jobs, requests, results, score_runs, scores
from promptmill.reports.figures.columns import Floats, Ints, Truths
from promptmill.scoring.scorers import ScoreOutcome
from promptmill.scoring.scorers.scoring import DIGESTED, INPUT_KEY, OWN_INPUT, Answer, answers_query, judge_of
from promptmill.scoring.scorers.tally import Judgement
from promptmill.scoring.stored_scores import run_of
from promptmill.types import WITHOUT_TEXTS

#: Rows fetched at a time.
FETCH_ROWS = 20_000

#: An odd number with bits everywhere (2^64 by the golden ratio): tells the second of two equal ids from the first.
AGAIN = 0x9E3779B97F4A7C15

#: Outcomes of rows that no score counts.
UNCOUNTED = (ScoreOutcome.ABSTAIN, ScoreOutcome.INFRA_ERROR)


@dataclass(slots=True)
class ScoredRows:
    """One score of a job's rows, as columns of their length. Labels are places in ``labels``, -1 for none."""

    #: What the score is: kind, field, parameters and how labels are read, as JSON. Equal where scores mean the same.
    definition: str
    #: What the labels are, and the figure that the score adds up to, as its scorer has them.
    kind: str | None
    metric: str
    #: What the row is worth (1 right, 0 wrong, or between, or a distance); NaN: not counted.
    worth: Floats
    #: 1 right, 0 wrong, NaN: not counted, or neither.
    right: Floats
    wanted: Ints
    given: Ints
    #: NaN: none was given.
    confidence: Floats
    labels: dict[str, int]


@dataclass(slots=True)
class JobRows:
    """Columns of a job's results, of one length. Seconds are NaN for rows that had no slot."""

    row: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: 64 bits of each id: texts of a million rows would take hundreds of megabytes.
    key: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: 64 bits of each input, where ``known``; else the number of the row. And those of what the model is asked.
    input: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    asked: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    known: Truths = field(default_factory=lambda: np.empty(0, dtype=bool))
    ok: Truths = field(default_factory=lambda: np.empty(0, dtype=bool))
    latency_s: Floats = field(default_factory=lambda: np.empty(0))
    ttft_s: Floats = field(default_factory=lambda: np.empty(0))
    tpot_s: Floats = field(default_factory=lambda: np.empty(0))
    scores: dict[str, ScoredRows] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key)


def read_rows(db: Connection, job_id: str, score_run: str | None = None) -> JobRows:
    """A job's results with what scores say of each row: its task's, or those of a stored score run."""
    each = results.c
    query = (
        sa.select(
            each.row, requests.c.custom_id, OWN_INPUT, INPUT_KEY, DIGESTED, each.state,
            each.admitted_at, each.first_token_at, each.finished_at, each.output_tokens,
        )
        .join(requests, sa.and_(requests.c.job_id == each.job_id, requests.c.row == each.row))
        .where(each.job_id == job_id)
        .order_by(each.row)
    )  # fmt: skip
    parts = [
        _columns(list(zip(*page, strict=True)))
        for page in db.execute(query, execution_options={"yield_per": FETCH_ROWS}).partitions()
    ]
    if not parts:
        return JobRows()
    row, key, inputs, asked, known, ok, admitted, first, finished, tokens = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    gaps = np.where(ok & (tokens >= 2), tokens - 1, np.nan)
    return JobRows(
        row=row,
        key=_told_apart(key),
        input=inputs,
        asked=asked,
        known=known,
        ok=ok,
        latency_s=np.where(ok, finished - admitted, np.nan),
        ttft_s=np.where(ok, first - admitted, np.nan),
        tpot_s=(finished - first) / gaps,
        scores=read_scores(db, job_id, score_run, row),
    )


def _columns(page: list[tuple[Any, ...]]) -> list[NDArray[Any]]:
    """Some rows as numbers."""
    rows, names, inputs, asked, known, states, *stamps = page
    return [
        np.array(rows, dtype=np.int64),
        # Python's hash of a text has 64 bits and is the same all through this process.
        np.fromiter(map(hash, names), np.int64, len(names)),
        np.array(inputs, dtype=np.int64),
        np.array(asked, dtype=np.int64),
        np.array(known, dtype=bool),
        np.array([state == "ok" for state in states]),
        *(np.array(column, dtype=np.float64) for column in stamps),
    ]


def _told_apart(key: Ints) -> Ints:
    """Ids that occur twice are told apart by how often they occurred before."""
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    begins = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    places = np.arange(len(key))
    before = np.empty(len(key), dtype=np.uint64)
    before[order] = (places - np.maximum.accumulate(np.where(begins, places, 0))).astype(np.uint64)
    return (key.view(np.uint64) ^ (before * np.uint64(AGAIN))).view(np.int64)


# --- scores ----------------------------------------------------------------------------------------------------------


def read_scores(db: Connection, job_id: str, score_run: str | None, rows: Ints) -> dict[str, ScoredRows]:
    """The scores of ``rows``: of a run, else of the run that speaks for the job, else of its task, judged now."""
    job = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    run_id = score_run or run_of(db, job)
    if run_id is not None:
        return _stored(db, job, run_id, rows)
    judge = None if job.store in WITHOUT_TEXTS else judge_of(job)
    if judge is None:
        return {}
    definitions = _definitions(job.task_text, job.task_name)
    makers = {name: _Maker(definitions[name], rows) for name in judge.scorers}
    query = answers_query(job_id, whole=judge.needs_item).order_by(results.c.row)
    known: dict[Answer, tuple[Judgement | None, ...]] = {}
    for place, row in enumerate(db.execute(query, execution_options={"yield_per": FETCH_ROWS})):
        answer = Answer(*row)
        if answer not in known:
            known[answer] = judge(answer)
        for maker, found in zip(makers.values(), known[answer], strict=True):
            if found is not None:
                maker.put(place, found.value, found.is_right, found.expected, found.predicted, found.confidence,
                          found.outcome)  # fmt: skip
    return {name: maker.made for name, maker in makers.items()}


def _stored(db: Connection, job: sa.Row[Any], run_id: str, rows: Ints) -> dict[str, ScoredRows]:
    """What a score run holds of the rows, in the order of its scores."""
    run = db.execute(sa.select(score_runs).where(score_runs.c.id == run_id)).one()
    definitions = _definitions(run.task_text or job.task_text, job.task_name, run.scorer_sha256)
    # Runs of early versions have no figures.
    makers = {name: _Maker(definitions.get(name), rows) for name in json.loads(run.figures or "{}")}
    places = {int(row): place for place, row in enumerate(rows)}
    each = scores.c
    query = sa.select(
        each.row, each.metric, each.value, each.is_right, each.expected, each.predicted, each.confidence, each.outcome
    ).where(each.score_run_id == run_id)
    for row, name, *found in db.execute(query, execution_options={"yield_per": FETCH_ROWS}):
        if row in places:
            if name not in makers:
                makers[name] = _Maker(definitions.get(name), rows)
            makers[name].put(places[row], *found)
    return {name: maker.made for name, maker in makers.items()}


@dataclass(frozen=True, slots=True)
class _Definition:
    text: str
    kind: str | None
    metric: str


def _definitions(task_text: str | None, task_name: str | None, code: str | None = None) -> dict[str, _Definition]:
    """Score -> what it is. ``code``: SHA-256 of the files of scorers that are the user's own."""
    if task_text is None:
        return {}
    from promptmill.tasks.scores import class_of, entry_kind, names_of
    from promptmill.tasks.task_file import parse_task

    task = parse_task(task_text, task_name or "task")
    entries, output = task.scores, task.output
    found = {}
    for name, entry in zip(names_of(entries), entries, strict=True):
        scorer = class_of(entry_kind(entry))
        own = {key: value for key, value in entry.items() if key != "as"}
        if scorer.needs_item:
            own["sha256"] = code
        field = str(entry[entry_kind(entry)])
        for how, read in (("aliases", output.aliases), ("normalise", output.normalise)):
            if field in read:
                own[how] = read[field]
        found[name] = _Definition(json.dumps(own, sort_keys=True, ensure_ascii=False), scorer.labels, scorer.figures[0])
    return found


class _Maker:
    """Fills the columns of one score."""

    def __init__(self, definition: _Definition | None, rows: Ints) -> None:
        nothing, none = np.full(len(rows), np.nan), np.full(len(rows), -1, dtype=np.int64)
        known = definition or _Definition("", None, "accuracy")
        self.made = ScoredRows(
            known.text, known.kind, known.metric, nothing, nothing.copy(), none, none.copy(), nothing.copy(), {"": 0}
        )

    def put(
        self, place: int, value: float | None, is_right: bool | None, expected: str | None, predicted: str | None,
        confidence: float | None, outcome: str,
    ) -> None:  # fmt: skip
        if value is None or outcome in UNCOUNTED:
            return
        made, labels = self.made, self.made.labels
        made.worth[place] = value
        if is_right is not None:
            made.right[place] = is_right
        if confidence is not None:
            made.confidence[place] = confidence
        if expected is not None:
            made.wanted[place] = labels.setdefault(expected, len(labels))
            made.given[place] = labels.setdefault(predicted or "", len(labels))


def ids_of(db: Connection, job_id: str, rows: Ints) -> tuple[str, ...]:
    """The ids of some rows, in their order."""
    query = sa.select(requests.c.custom_id).where(requests.c.job_id == job_id, requests.c.row.in_(rows.tolist()))
    return tuple(db.execute(query.order_by(requests.c.row)).scalars())


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pairing:
    """Places of the common rows in the one and in the other; ``others``: rows of one id and different inputs."""

    before: Ints
    after: Ints
    others: int


def pair(before: JobRows, after: JobRows) -> Pairing:
    """The rows that both jobs have, by id and input or prompt, in the order of the first one."""
    _, own, other = np.intersect1d(before.key, after.key, assume_unique=True, return_indices=True)
    order = np.argsort(own)
    own, other = own[order], other[order]
    # What an older version stored has no digest: there the id alone tells.
    same = (before.input[own] == after.input[other]) | (before.asked[own] == after.asked[other])
    same |= ~before.known[own] | ~after.known[other]
    return Pairing(own[same], other[same], int((~same).sum()))
