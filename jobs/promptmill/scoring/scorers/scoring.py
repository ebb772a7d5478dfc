"""A job's answers against what was expected: one pass over its rows, all scorers of the task at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import requests, results
from promptmill.scoring.scorers import Item, JsonObject, ScoreOutcome
from promptmill.scoring.scorers.extraction import Extractor
from promptmill.scoring.scorers.tally import Judgement, Score, Tally, judge
from promptmill.tasks.scores import SCORERS, entry_kind, made, names_of, offered
from promptmill.tasks.task_file import TRUTHS
from promptmill.types import JsonValue

if TYPE_CHECKING:
    from promptmill.scoring.scorers.scorer import Scorer
    from promptmill.tasks.task_file import Task

#: Rows fetched at a time.
BATCH_ROWS = 10_000

#: Different expected objects, and different answers, that are remembered.
REMEMBERED = 4096


class Answer(NamedTuple):
    """One result with what its row expects; objects are JSON text. The last four are there for scorers that ask."""

    state: str
    text: str | None
    finish_reason: str | None
    expected: str | None
    choice_probs: str | None = None
    id: str | None = None
    row: int | None = None
    input: str | None = None
    meta: str | None = None


class Judge:
    """The scorers of a task, ready for answers. Equal answers are judged once while they are remembered."""

    def __init__(self, task: Task, scorers: Mapping[str, Scorer] | None = None) -> None:
        """Raises :class:`TaskFileError` for scores that cannot be built."""
        self.scorers = dict(scorers if scorers is not None else build(task.scores, task.folder, task.said))
        self._extract = Extractor.of(task.output, required_keys(task, self.scorers), task.generate)
        self._task = task
        self._expected: dict[str | None, JsonObject] = {}
        #: Whether a scorer looks at more of a row than its answer and what it expects.
        self._needs_choices = any(scorer.needs_choices for scorer in self.scorers.values())
        self.needs_item = any(scorer.needs_item for scorer in self.scorers.values())

    @property
    def sha256(self) -> str | None:
        """The digest of the code of scorers that are not part of promptmill."""
        from promptmill.scoring.scorers.python_scorer import joined

        return joined(each for scorer in self.scorers.values() if (each := scorer.sha256)) or None

    def __call__(self, answer: Answer) -> tuple[Judgement | None, ...]:
        """A judgement by each scorer."""
        outcome, output, expected = self.read(answer)
        item = self._item(answer, expected)
        return tuple(judge(scorer, outcome, output, expected, item) for scorer in self.scorers.values())

    def read(self, answer: Answer) -> tuple[ScoreOutcome, JsonObject, JsonObject]:
        """What became of one answer, the object it holds, and the expected one, both in the labels that are meant."""
        wanted = self._wanted(answer.expected)
        if answer.state != "ok":
            return ScoreOutcome.INFRA_ERROR, {}, wanted
        outcome, output = self._extract(answer.text, answer.finish_reason)
        return outcome, self._meant(output, wanted), wanted

    def said(self, text: str, wanted: JsonObject) -> JsonObject:
        """The object that an answer ``text`` holds, in the labels that are meant; empty where it cannot be read."""
        return self._meant(self._extract(text, "stop")[1], wanted)

    def _meant(self, found: JsonObject, wanted: JsonObject) -> JsonObject:
        return {name: like(self._task.said(name, value), wanted.get(name)) for name, value in found.items()}

    def _wanted(self, text: str | None) -> JsonObject:
        """The expected object as the task means it; few different ones are many rows."""
        found = self._expected.get(text)
        if found is None:
            if len(self._expected) >= REMEMBERED:
                self._expected.clear()
            found = {name: self._task.meant(name, value) for name, value in _object(text).items()}
            self._expected[text] = found
        return found

    def _item(self, answer: Answer, wanted: JsonObject) -> Item:
        probs = _object(answer.choice_probs) if answer.choice_probs else None
        choices: tuple[tuple[JsonObject, float], ...] = ()
        if probs and self._needs_choices:
            choices = tuple((self.said(choice, wanted), share) for choice, share in probs.items())
        if not self.needs_item:
            return Item(answer.text or "", probs, choices)
        parts = (json.loads(each) if each else None for each in (answer.input, answer.meta))
        return Item(answer.text or "", probs, choices, answer.id, answer.row, *parts)


def build(
    entries: Sequence[Mapping[str, Any]],
    folder: str | None = None,
    said: Callable[[str, Any], Any] = lambda field, value: value,
) -> dict[str, Scorer]:
    """Scorers by the names of their figures. ``folder``: where files of ``python`` scorers are looked for.

    ``entries``: ``{scorer: FIELD, option: value, ...}`` each. ``said``: a label as answers of the task have it. Raises
    :class:`TaskFileError`.
    """
    return {name: _make(_read(entry, said), folder) for name, entry in zip(names_of(entries), entries, strict=True)}


def _read(entry: Mapping[str, Any], said: Callable[[str, Any], Any]) -> Mapping[str, Any]:
    """The entry with a ``positive`` label that is read as answers are."""
    if not isinstance(entry.get("positive"), str) or not isinstance(entry[entry_kind(entry)], str):
        return entry
    return {**entry, "positive": said(entry[entry_kind(entry)], entry["positive"])}


def _make(entry: Mapping[str, Any], folder: str | None) -> Scorer:
    kind = entry_kind(entry)
    if kind in SCORERS:
        scorer: Scorer = made(entry).ready(folder)
        return scorer
    from promptmill.scoring.scorers.python_scorer import PythonScorer

    options = {key: value for key, value in entry.items() if key not in (kind, "as")}
    return PythonScorer.offered(offered()[kind], entry[kind], options)


def score_rows(answers: Iterable[Answer], judge_: Judge) -> dict[str, Score]:
    """Scores of ``answers`` whose inputs all differ, whatever their order."""
    return score_keyed(zip(answers, count(), strict=False), judge_)


def score_keyed(answers: Iterable[tuple[Answer, int]], judge_: Judge) -> dict[str, Score]:
    """The same of answers with the keys of their inputs: rows of one key are copies of each other."""
    tallies = {name: Tally(scorer) for name, scorer in judge_.scorers.items()}
    known: dict[Answer, tuple[Judgement | None, ...]] = {}
    for answer, key in answers:
        if len(known) > REMEMBERED:
            known.clear()
        judged = known[answer] if answer in known else known.setdefault(answer, judge_(answer))
        for tally, judgement in zip(tallies.values(), judged, strict=True):
            tally.add(judgement, key)
    return {name: tally.score(name) for name, tally in tallies.items()}


def like(value: JsonValue, wanted: JsonValue) -> JsonValue:
    """A truth value that an answer spells out, where one is expected; and the text, where a table spells it out."""
    if isinstance(wanted, bool) and isinstance(value, str):
        return TRUTHS.get(value.strip().casefold(), value)
    if isinstance(wanted, str) and isinstance(value, bool) and TRUTHS.get(wanted.strip().casefold()) is value:
        return wanted
    return value


@lru_cache(maxsize=REMEMBERED)
def _object(text: str | None) -> JsonObject:
    """The expected object; of anything else no field can be scored."""
    value = json.loads(text) if text else None
    return value if isinstance(value, dict) else {}


def required_keys(task: Task, scorers: Mapping[str, Scorer]) -> tuple[str, ...]:
    """What an object must have to be the answer: the schema's required keys, else the fields that are scored."""
    by_schema = (task.output.schema_ or {}).get("required", ())
    return tuple(by_schema) or tuple(sorted({scorer.field for scorer in scorers.values() if scorer.field}))


#: Equal for rows that ask the same. Rows that were stored before there were digests are each of its own.
INPUT_KEY = sa.func.coalesce(requests.c.prompt_digest, requests.c.input_digest, results.c.row)

#: Equal for one line of a dataset in two jobs, whatever their templates make of it.
OWN_INPUT = sa.func.coalesce(requests.c.input_digest, results.c.row)

#: Rows whose input is known by its digest: not those of older versions, and not those of jobs without their prompts.
DIGESTED = sa.and_(requests.c.input_digest.is_not(None), sa.not_(requests.c.input_digest.between(-(2**31), -1)))


def answers_query(job_id: str, *, whole: bool) -> sa.Select[Any]:
    """The job's results as columns of :class:`Answer`; ``whole``: with input and meta, which can be long."""
    result, request = results.c, requests.c
    columns: list[Any] = [result.state, result.text, result.finish_reason, request.expected, result.choice_probs]
    if whole:
        columns += [request.custom_id.label("id"), result.row, request.input, request.meta]
    joined = sa.and_(request.job_id == result.job_id, request.row == result.row)
    return sa.select(*columns).join_from(results, requests, joined).where(result.job_id == job_id)


def judge_of(job: sa.Row[Any]) -> Judge | None:
    """The judge of the job's own task; None without a task or without scores. Raises :class:`TaskFileError`."""
    if job.task_text is None:
        return None
    # Parsing a task needs pydantic and a template engine: jobs without one do not wait for them.
    from promptmill.tasks.task_file import parse_task

    task = parse_task(job.task_text, job.task_name or "task", job.task_folder)
    return Judge(task) if task.scores else None


def score_job(db: Connection, job: sa.Row[Any]) -> dict[str, Score]:
    """The scores that the job's task asks for, over the results that are there; none without a task.

    Raises :class:`TaskFileError` for a task whose scores cannot be computed.
    """
    judge_ = judge_of(job)
    if judge_ is None:
        return {}
    query = answers_query(job.id, whole=judge_.needs_item).add_columns(INPUT_KEY)
    streamed = db.execute(query, execution_options={"yield_per": BATCH_ROWS})
    return score_keyed(((Answer(*row[:-1]), row[-1]) for row in streamed), judge_)
