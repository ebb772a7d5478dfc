"""Answers against expectations: what is read from a text, and what the rates rest on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from promptmill.errors import TaskFileError
from promptmill.scoring.scorers import ScoreOutcome
from promptmill.scoring.scorers.exact import Exact, same
from promptmill.scoring.scorers.extraction import Extractor, extract, without_thinking
from promptmill.scoring.scorers.scorer import FieldScorer, Scorer
from promptmill.scoring.scorers.scoring import Answer, Judge, build, required_keys, score_rows
from promptmill.scoring.scorers.tally import Score
from promptmill.scoring.statistics.means import wilson
from promptmill.tasks.scores import SCORERS, class_of
from promptmill.tasks.task_file import parse_task

REQUIRED = ("is_ad",)

TASK = 'task: t\nprompt: {user: "{{ input.comment }}"}\nscores: [{exact: is_ad}]\n'


def row(answer: str | None, expected: Any = True, finish_reason: str | None = "stop", state: str = "ok") -> Answer:
    return Answer(state, answer, finish_reason, json.dumps({"is_ad": expected}))


def score(*rows: Answer, task: str = TASK) -> Score:
    return score_rows(rows, Judge(parse_task(task, "t")))["is_ad"]


def classify(text: str | None, finish_reason: str, required: tuple[str, ...]) -> tuple[ScoreOutcome, Any]:
    return Extractor(required)(text, finish_reason)


YES, NO = '{"is_ad": true}', '{"is_ad": false}'


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"is_ad": true, "score": 5}',
        '  {"is_ad": true}\n',
        '<think>It says "subscribe". {"is_ad": false}</think>{"is_ad": true}',
        '<think>a</think> <think>{"is_ad": false}</think> The answer: {"is_ad": true}',
        'It was opened in the prompt: {"is_ad": false}</think>\n{"is_ad": true}',
        'Here it is:\n```json\n{"is_ad": true}\n```\nWas {"is_ad": false} not an option?',
        '```\n{"is_ad": false}\n```\nor rather\n```JSON\r\n{"is_ad": true}\n```',
        '```json\n{"label": "ad"}\n```\n{"is_ad": true}',
        'First {"is_ad": false}, no: {"is_ad": true}. And {"score": 5}, {broken',
        'wrapped {"answer": {"is_ad": true}}',
        '{"is_ad": true, "why": {"is_ad": false}} as said',
        'a brace in a string {"is_ad": true, "why": "} {"}',
        '答案是：{"is_ad": true}。',
    ],
)
def test_the_object_is_found(text: str) -> None:
    found = extract(text, REQUIRED)
    assert found is not None
    assert found["is_ad"] is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes, this is_ad: true",
        '{"is_ad": tru',
        '["is_ad"]',
        "true",
        '{"score": 5}',
        '{"is_ad": NaN}',
        '<think>so {"is_ad": true}',
        '{"is_ad" true}',
        "{" * 5_000,
        '{"a":' * 5_000,
    ],
)
def test_f17_nothing_is_guessed_from_words_in_the_text(text: str) -> None:
    assert extract(text, REQUIRED) is None


def test_thinking_that_is_never_closed_takes_everything_along() -> None:
    assert without_thinking("a <think>b</think> c <think>d") == "a  c"


def test_an_object_must_have_every_required_key() -> None:
    assert extract('{"is_ad": true}', ("is_ad", "score")) is None
    assert extract('{"is_ad": true, "score": 5}', ("is_ad", "score")) is not None


def test_an_answer_cut_off_before_its_object_ends_is_truncated_and_not_merely_unparsed() -> None:
    assert classify('{"is_ad": tr', "length", REQUIRED)[0] is ScoreOutcome.TRUNCATED
    assert classify('{"is_ad": tr', "stop", REQUIRED)[0] is ScoreOutcome.UNPARSED
    assert classify(f"{YES} and so on", "length", REQUIRED)[0] is ScoreOutcome.SCORED
    assert classify(None, "stop", REQUIRED)[0] is ScoreOutcome.UNPARSED


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (True, True, True), (True, 1, False), (0, False, False), (5, 5.0, True), ("a", "a", True), ("a", "A", False),
        (None, None, True), (None, False, False), ([1, True], [1, 1], False), ({"a": [1]}, {"a": [1.0]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False), ("1", 1, False),
    ],
)  # fmt: skip
def test_values_are_compared_as_json_has_them(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other) is equal


# --- rates -----------------------------------------------------------------------------------------------------------


def test_f17_an_unparsed_answer_stays_in_the_denominator() -> None:
    result = score(row(YES), row(NO), row("an advertisement, surely"), row('{"is_ad": t', finish_reason="length"))
    assert (result.n, result.correct, result.unparsed, result.truncated) == (4, 1, 1, 1)
    assert result.value == 0.25


def test_a_request_without_an_answer_is_not_a_wrong_answer() -> None:
    result = score(row(YES), row(None, finish_reason=None, state="error"))
    assert (result.n, result.infra_error, result.value) == (1, 1, 1.0)


def test_rows_that_expect_nothing_are_counted_apart() -> None:
    result = score(row(YES), *(Answer("ok", YES, "stop", each) for each in (None, "7", '{"score": 1}')))
    assert (result.n, result.unlabelled) == (1, 3)


def test_f9_a_rate_comes_with_its_interval_and_what_the_commonest_label_would_reach() -> None:
    result = score(row(NO), row(NO))
    assert result.value == 0.0
    assert result.ci95 == pytest.approx((0.0, 0.6576), abs=1e-4)
    mixed = score(row(YES), row(YES, False), row(NO, False))
    assert mixed.majority_baseline == pytest.approx(2 / 3)
    assert mixed.classes == {"false": 2, "true": 1}


def test_an_answer_without_the_scored_field_is_unparsed() -> None:
    result = score(row('{"score": 5}'), task=TASK + "output: {schema: {required: [score]}}\n")
    assert (result.n, result.unparsed) == (1, 1)


def test_too_many_different_labels_are_not_listed_as_classes() -> None:
    result = score(*(row(YES, f"label {number}") for number in range(300)))
    assert (result.classes, result.confusion, result.figures.values.get("macro_f1")) == ({}, {}, None)
    assert result.n == 300
    assert "more than 200 different labels" in str(result.note)


def test_labels_that_are_too_many_for_a_table_still_have_their_figures() -> None:
    result = score(*(row(YES, f"label {number}") for number in range(30)))
    assert result.confusion == {}
    assert (result.figures.values.get("macro_f1"), len(result.classes)) == (0.0, 30)


def test_a_score_of_no_row_is_no_number() -> None:
    result = score()
    assert (result.value, result.ci95, result.majority_baseline, result.n) == (None, None, None, 0)


def test_the_order_of_rows_changes_nothing() -> None:
    rows = [row(YES), row(NO), row("?"), row(YES, False), row(None, state="error")]
    assert score(*rows) == score(*reversed(rows))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(0, 2, 0.0, 0.658), (10, 10, 0.722, 1.0), (96, 100, 0.902, 0.984)]
)
def test_intervals_are_those_of_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-4)
    assert wilson(0, 0) is None


# --- task entries ----------------------------------------------------------------------------------------------------


def test_an_entry_names_its_scorer_and_its_field_and_may_name_its_figure() -> None:
    built = build([{"exact": "is_ad"}, {"exact": "score", "as": "stars"}])
    assert built == {"is_ad": Exact(field="is_ad"), "stars": Exact(field="score")}


def test_a_task_file_may_ask_for_every_scorer_and_for_no_other() -> None:
    listed = {class_of(kind) for kind in SCORERS}
    written = {*Scorer.__subclasses__(), *FieldScorer.__subclasses__()} - {FieldScorer}
    assert listed == written
    assert len(listed) == len(SCORERS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{closeness: is_ad}", "t:3:11: closeness needs 'span', a number above 0"),
        ("{closeness: is_ad, span: 0}", "t:3:29: 'span' must be a number above 0"),
        ("{closeness: is_ad, span: true}", "t:3:29: 'span' must be a number above 0"),
        ("{closeness: is_ad, span: .inf}", "t:3:29: 'span' must be a number above 0"),
        ("{exact: is_ad, field: x}", "t:3:25: exact has no option 'field'"),
        ("{numeric: is_ad}", "t:3:11: numeric needs 'tolerance' or 'relative'"),
        ("{binary: is_ad}", "t:3:11: binary needs 'threshold' or 'positive'"),
        ("{binary: is_ad, threshold: 1, positive: a}", "t:3:11: give 'threshold' or 'positive', not both"),
        ("{binary: is_ad, positive: [a]}", "t:3:26: 'positive' must be a text, a number, true or false"),
        ("{regex: is_ad, pattern: '('}", "t:3:25: 'pattern' must be a regular expression of Python"),
        ("{contains: is_ad, ignore_case: 1}", "t:3:28: 'ignore_case' must be true or false"),
        ("{python: scorers.py}", "t:3:11: python needs a file and a function, such as scorers.py:has_contact"),
        ("{python: 's.py:f', field: ''}", "t:3:29: 'field' must be a field of the answer"),
    ],
)
def test_a_mistake_in_an_option_is_told_with_its_place_and_what_to_write(entry: str, message: str) -> None:
    with pytest.raises(TaskFileError) as caught:
        parse_task(f'task: t\nprompt: {{user: "{{{{ input.comment }}}}"}}\nscores: [{entry}]\n', "t")
    assert str(caught.value) == message


def test_an_answer_must_have_the_keys_that_the_schema_requires_or_else_the_scored_fields() -> None:
    task = 'task: t\nprompt: {user: "{{ input.comment }}"}\nscores: [{exact: b}, {exact: a}]\n'
    scorers = {"b": Exact(field="b"), "a": Exact(field="a")}
    assert required_keys(parse_task(task, "t"), scorers) == ("a", "b")
    with_schema = task + "output: {schema: {type: object, required: [b]}}\n"
    assert required_keys(parse_task(with_schema, "t"), scorers) == ("b",)


@pytest.mark.parametrize("kind", sorted(SCORERS.keys() - {"python"}))
def test_every_scorer_says_its_field_and_its_figure(kind: str) -> None:
    from promptmill.reports.figures.metrics import METRICS

    required = {
        "closeness": {"span": 1}, "within": {"tolerance": 1}, "numeric": {"tolerance": 1}, "binary": {"threshold": 1},
    }  # fmt: skip
    (scorer,) = build([{kind: "label"} | required.get(kind, {})]).values()
    assert scorer.field == "label"
    assert scorer.metric in METRICS
    assert class_of(kind).figures[0] == scorer.metric
    assert set(class_of(kind).figures) <= METRICS.keys()
