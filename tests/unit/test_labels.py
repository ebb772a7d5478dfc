"""Labels that no answer can equal are found before a job runs, and booleans work as they are written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from promptmill.scoring.scorers.scoring import Answer, Judge, score_rows
from promptmill.service.labels import Labels
from promptmill.tasks.task_file import Task, parse_task


def task_of(scores: list[dict[str, Any]], **parts: Any) -> Task:
    said = {"task": "t", "prompt": {"user": "hi"}, "expected": {"is_ad": "is_ad"}, "scores": scores} | parts
    return parse_task(json.dumps(said), "t")


def problems(task: Task, *labels: Any) -> list[str]:
    found = Labels(task)
    for label in labels:
        found.add({"is_ad": label})
    return found.problems()


BOOLEAN = {"schema": {"type": "object", "required": ["is_ad"], "properties": {"is_ad": {"type": "boolean"}}}}


def test_numbers_against_a_boolean_are_refused() -> None:
    assert problems(task_of([{"exact": "is_ad"}], output=BOOLEAN), 1, 0) == [
        "is_ad: expected labels that no answer can be: 1, 0; answers are true, false"
    ]
    assert problems(task_of([{"exact": "is_ad"}], output=BOOLEAN), True, "false") == []


@pytest.mark.parametrize("positive", [True, "true", "True", " TRUE "])
@pytest.mark.parametrize("labels", [(True, False), ("true", "false"), ("True", "False")])
def test_a_positive_truth_is_meant_however_it_is_written(positive: Any, labels: tuple[Any, Any]) -> None:
    task = task_of([{"binary": "is_ad", "positive": positive}], output=BOOLEAN)
    assert problems(task, *labels) == []
    rows = [
        Answer("ok", json.dumps({"is_ad": given}), "stop", json.dumps({"is_ad": want}))
        for given, want in ((True, labels[0]), (True, labels[1]), (False, labels[1]))
    ]
    found = score_rows(rows, Judge(task))["is_ad"]
    assert (found.value, found.all_figures["precision"], found.all_figures["recall"]) == (2 / 3, 0.5, 1.0)


def test_a_threshold_takes_truths_for_1_and_0() -> None:
    task = task_of([{"binary": "is_ad", "threshold": 0.5}], output=BOOLEAN)
    rows = [Answer("ok", '{"is_ad": true}', "stop", '{"is_ad": true}')] * 3
    assert score_rows(rows, Judge(task))["is_ad"].n == 3


def test_a_score_of_yes_or_no_that_nothing_can_be_yes_to_is_refused() -> None:
    task = task_of([{"binary": "is_ad", "positive": "spam"}], output=BOOLEAN)
    assert problems(task, True, False) == [
        "is_ad: no expected label and no possible answer means yes by positive: 'spam': true, false"
    ]
    free = task_of([{"binary": "is_ad", "positive": "ture"}])
    assert "means yes by positive: 'ture'" in problems(free, "true", "false")[0]


@pytest.mark.parametrize(
    ("choices", "aliases"),
    [(["yes", "no"], {"is_ad": {"yes": True, "no": False}}), (["true", "false"], {}), ([" true", " false"], {}),
     (['{"is_ad": true}', '{"is_ad": false}'], {})],
)  # fmt: skip
def test_probabilities_are_read_as_answers_are(choices: list[str], aliases: dict[str, Any]) -> None:
    """AUC and the probability of the expected choice are those of the labels that the choices mean."""
    scores: list[dict[str, Any]] = [
        {"exact": "is_ad"}, {"binary": "is_ad", "positive": True, "as": "ad"},
        {"choice_probability": "is_ad", "as": "p"},
    ]  # fmt: skip
    task = task_of(scores, generate={"choices": choices}, output={"aliases": aliases})
    assert problems(task, True, False) == []
    yes, no = choices
    rows = [
        Answer("ok", yes if sure >= 0.5 else no, "stop", json.dumps({"is_ad": truth}),
               json.dumps({yes: sure, no: 1 - sure}))
        for sure, truth in ((0.9, True), (0.8, False), (0.3, True), (0.2, False))
    ]  # fmt: skip
    found = score_rows(rows, Judge(task))
    assert found["is_ad"].value == 0.5
    assert found["ad"].all_figures["auc"] == pytest.approx(0.75)
    assert found["p"].value == pytest.approx((0.9 + 0.2 + 0.3 + 0.8) / 4)


def test_a_choice_that_means_no_label_is_refused() -> None:
    task = task_of([{"exact": "is_ad"}], generate={"choices": ['{"is_ad": true}', '{"ad": false}']})
    assert problems(task, True, False) == ['is_ad: choices that mean no label: {"ad": false}']
    plain = task_of([{"choice_probability": "is_ad"}], generate={"choices": ["yes", "no"]})
    assert problems(plain, True, False) == [
        "is_ad: expected labels that no answer can be: true, false; answers are yes, no"
    ]


def test_labels_of_one_spelling_are_one_label() -> None:
    """Capitals, full-width letters and spaces: the same label where the task says so, and told where it does not."""
    rows = [Answer("ok", json.dumps({"is_ad": given}), "stop", json.dumps({"is_ad": "ad"}))
            for given in ("ad", "Ad", " ad ", "\uff21\uff24", "no")]  # fmt: skip
    plain = score_rows(rows, Judge(task_of([{"exact": "is_ad"}])))["is_ad"]
    assert plain.value == 0.2
    assert plain.note is not None
    assert plain.note.startswith("3 wrong answers would be right with normalise: [nfkc, casefold, strip]")
    steps = {"normalise": {"is_ad": ["nfkc", "casefold", "strip"]}}
    folded = score_rows(rows, Judge(task_of([{"exact": "is_ad"}], output=steps)))["is_ad"]
    assert (folded.value, folded.note) == (0.8, None)
