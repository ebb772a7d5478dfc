"""A job's answers against what was expected: one pass over its rows, all scorers of the task at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.errors import TaskFileError
from promptmill.registry import resolve
from promptmill.scorers import SCORERS, JsonObject, Outcome, Scorer
from promptmill.scorers.extraction import classify
from promptmill.scorers.intervals import mean_interval, wilson
from promptmill.tables import requests, results

if TYPE_CHECKING:
    from promptmill.task_file import Task

#: Rows fetched and counted at a time.
BATCH_ROWS = 10_000

#: State, text, finish reason and expected object (as JSON) of one result.
AnswerRow = tuple[str, str | None, str | None, str | None]

#: Most different expected labels that are listed: more are not classes.
MOST_CLASSES = 20

#: Different expected objects that are remembered.
REMEMBERED = 4096

#: Outcomes in the denominator: an answer that cannot be read is a wrong answer.
COUNTED = (Outcome.SCORED, Outcome.UNPARSED, Outcome.TRUNCATED)


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of quality. ``n`` = scored + unparsed + truncated; ``value`` = points / n, None of nothing."""

    name: str
    metric: str
    n: int
    correct: int
    unparsed: int
    truncated: int
    abstain: int
    infra_error: int
    #: Rows that expect nothing of this field.
    unlabelled: int
    #: Expected label, as JSON -> rows of ``n``; empty where there are more than MOST_CLASSES.
    classes: Mapping[str, int]
    #: Rows of ``n`` with the commonest expected label.
    majority: int
    ci95: tuple[float, float] | None
    #: Sum of what the rows were worth, from 0 to 1 each: ``correct`` where an answer is right or wrong.
    points: float = 0.0
    #: Expected label, as JSON -> predicted label -> rows; an answer that could not be read was predicted ''.
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        return self.points / self.n if self.n else None

    @property
    def macro_f1(self) -> float | None:
        """The mean over all labels, expected or predicted, of 2 TP / (2 TP + FP + FN)."""
        predicted: Counter[str] = Counter()
        for row in self.confusion.values():
            predicted.update(row)
        labels = (self.confusion.keys() | predicted.keys()) - {""}
        if not self.confusion or not labels:
            return None
        each = [
            2
            * self.confusion.get(label, {}).get(label, 0)
            / (sum(self.confusion.get(label, {}).values()) + predicted[label])
            for label in sorted(labels)
        ]
        return sum(each) / len(each)

    @property
    def majority_baseline(self) -> float | None:
        """What always giving the commonest label would reach."""
        return self.majority / self.n if self.n else None

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "value": self.value, "ci95": list(self.ci95) if self.ci95 else None, "n": self.n,
            "correct": self.correct, "unparsed": self.unparsed, "truncated": self.truncated, "abstain": self.abstain,
            "infra_error": self.infra_error, "unlabelled": self.unlabelled,
            "majority_baseline": self.majority_baseline, "classes": dict(self.classes),
            "macro_f1": self.macro_f1, "confusion": {label: dict(row) for label, row in self.confusion.items()},
        }  # fmt: skip


@dataclass(slots=True)
class Tally:
    """Counts of one scorer over the rows so far."""

    scorer: Scorer
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    correct: int = 0
    points: float = 0.0
    squares: float = 0.0
    unlabelled: int = 0

    def add(self, outcome: Outcome, output: JsonObject, expected: JsonObject, times: int) -> None:
        """Count ``times`` equal rows. ``output`` is read only when ``outcome`` is scored."""
        if self.scorer.field not in expected:
            self.unlabelled += times
            return
        if outcome is Outcome.SCORED and self.scorer.field not in output:
            outcome = Outcome.UNPARSED
        if outcome is Outcome.SCORED:
            right = self.scorer(output, expected)
            outcome = Outcome.ABSTAIN if right is None else outcome
            self.correct += times * (right is True or right == 1.0)
            self.points += times * float(right or 0.0)
            self.squares += times * float(right or 0.0) ** 2
        self.outcomes[outcome] += times
        if outcome in COUNTED:
            label = _label(expected[self.scorer.field])
            self.labels[label] += times
            if len(self.pairs) <= MOST_CLASSES**2:
                given = _label(output[self.scorer.field]) if outcome is Outcome.SCORED else ""
                self.pairs[label, given] += times

    def score(self, name: str) -> Score:
        n = sum(self.outcomes[outcome] for outcome in COUNTED)
        is_rate = self.scorer.metric == "accuracy"
        return Score(
            name=name,
            metric=self.scorer.metric,
            n=n,
            correct=self.correct,
            unparsed=self.outcomes[Outcome.UNPARSED],
            truncated=self.outcomes[Outcome.TRUNCATED],
            abstain=self.outcomes[Outcome.ABSTAIN],
            infra_error=self.outcomes[Outcome.INFRA_ERROR],
            unlabelled=self.unlabelled,
            classes=dict(sorted(self.labels.items())) if len(self.labels) <= MOST_CLASSES else {},
            majority=max(self.labels.values(), default=0),
            ci95=wilson(self.correct, n) if is_rate else mean_interval(self.points, self.squares, n),
            points=self.points,
            confusion=self._confusion() if is_rate else {},
        )

    def _confusion(self) -> dict[str, dict[str, int]]:
        """Empty where the labels are too many to be classes."""
        if len(self.labels) > MOST_CLASSES or len({given for _, given in self.pairs}) > MOST_CLASSES + 1:
            return {}
        found: dict[str, dict[str, int]] = {label: {} for label in sorted(self.labels)}
        for (label, given), times in sorted(self.pairs.items()):
            found[label][given] = times
        return found


def _label(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def build(entries: Sequence[Mapping[str, Any]]) -> dict[str, Scorer]:
    """Scorers by the name their figure gets: the entry's ``as``, else its field.

    ``entries``: ``{scorer: FIELD, option: value, ...}`` each. Raises :class:`TaskFileError`.
    """
    built: dict[str, Scorer] = {}
    for entry in entries:
        kind, target, options = _parts(entry)
        scorer = _make(kind, target, {key: value for key, value in options.items() if key != "as"})
        name = str(options.get("as", target))
        if name in built and "as" not in options and built[name].metric != scorer.metric:
            name = f"{name}.{scorer.metric}"
        if name in built:
            raise TaskFileError(f"two scores are called '{name}'", hint="Give one of them another name with 'as'.")
        built[name] = scorer
    return built


def _parts(entry: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Kind, field and options of an entry. The kind is its first key."""
    (kind, target), *options = entry.items()
    return kind, str(target), dict(options)


def _make(kind: str, target: str, options: dict[str, Any]) -> Scorer:
    make = resolve("scorer", kind, SCORERS)
    try:
        scorer: Scorer = make(target, **options)
    except TypeError as problem:
        raise TaskFileError(f"scorer '{kind}' of '{target}' does not know {', '.join(options)}") from problem
    return scorer


def score_rows(
    rows: Iterable[AnswerRow],
    scorers: Mapping[str, Scorer],
    required: tuple[str, ...],
    aliases: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Score]:
    """Scores of ``rows``, whose answers are objects with the keys ``required``.

    ``aliases``: field -> {label as it is written: label that is meant}, for answers and expected values alike.

    Equal rows among BATCH_ROWS neighbours are looked at once: classifiers have few answers.
    """
    tallies = {name: Tally(scorer) for name, scorer in scorers.items()}
    source = iter(rows)
    while batch := Counter(islice(source, BATCH_ROWS)):
        for (state, text, finish_reason, expected), times in batch.items():
            outcome, output, wanted = read_answer((state, text, finish_reason, expected), required, aliases)
            for tally in tallies.values():
                tally.add(outcome, output, wanted, times)
    return {name: tally.score(name) for name, tally in tallies.items()}


def read_answer(
    row: AnswerRow, required: tuple[str, ...], aliases: Mapping[str, Mapping[str, Any]] | None
) -> tuple[Outcome, JsonObject, JsonObject]:
    """What became of one answer, the object it holds, and the expected one, both in the labels that are meant."""
    state, text, finish_reason, expected = row
    outcome, output = _judged(state, text, finish_reason, required)
    return outcome, _meant(output, aliases), _meant(_expected(expected), aliases)


def _meant(found: JsonObject, aliases: Mapping[str, Mapping[str, Any]] | None) -> JsonObject:
    if not aliases or not found:
        return found
    return {
        name: aliases.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in found.items()
    }


def _judged(
    state: str, text: str | None, finish_reason: str | None, required: tuple[str, ...]
) -> tuple[Outcome, JsonObject]:
    return classify(text, finish_reason, required) if state == "ok" else (Outcome.INFRA_ERROR, {})


@lru_cache(maxsize=REMEMBERED)
def _expected(text: str | None) -> JsonObject:
    """The expected object; of anything else no field can be scored."""
    value = json.loads(text) if text else None
    return value if isinstance(value, dict) else {}


def required_keys(task: Task, scorers: Mapping[str, Scorer]) -> tuple[str, ...]:
    """What an object must have to be the answer: the schema's required keys, else the fields that are scored."""
    by_schema = (task.output.schema_ or {}).get("required", ())
    return tuple(by_schema) or tuple(sorted({scorer.field for scorer in scorers.values()}))


def score_job(db: Connection, job: sa.Row[Any]) -> dict[str, Score]:
    """The scores that the job's task asks for, over the results that are there; none without a task.

    Raises :class:`TaskFileError` for a task whose scores cannot be computed.
    """
    if job.task_text is None:
        return {}
    # Parsing a task needs pydantic and a template engine: jobs without one do not wait for them.
    from promptmill.task_file import parse_task

    task = parse_task(job.task_text, job.task_name or "task")
    scorers = build(task.scores)
    if not scorers:
        return {}
    query = (
        sa.select(results.c.state, results.c.text, results.c.finish_reason, requests.c.expected)
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job.id)
    )
    streamed = db.execute(query, execution_options={"yield_per": BATCH_ROWS})
    return score_rows(streamed, scorers, required_keys(task, scorers), task.output.aliases)
