"""Copies of a row are one observation: intervals, tests and effective numbers do not grow by repeating rows."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from promptmill.errors import TaskFileError
from promptmill.scoring.scorers.scoring import Answer, Judge, score_keyed
from promptmill.scoring.scorers.tally import Score
from promptmill.scoring.statistics import calibration, paired
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.scoring.statistics.means import share_interval
from promptmill.service.labels import Labels
from promptmill.tasks.task_file import parse_task


def scored(entry: dict[str, Any], rows: list[tuple[Any, Any, int]], state: str = "ok") -> Score:
    """Rows of what was answered, what was expected, and the number of the input."""
    task = parse_task(json.dumps({"task": "t", "prompt": {"user": "hi"}, "scores": [entry]}), "t")
    answers = [
        (
            Answer(state if given is not None else "error", json.dumps({"x": given}), "stop", json.dumps({"x": want})),
            key,
        )
        for given, want, key in rows
    ]
    (found,) = score_keyed(answers, Judge(task)).values()
    return found


def labelled(copies: int) -> list[tuple[Any, Any, int]]:
    """40 inputs, of which 35 are right, each so many times."""
    return [
        ("a" if row < 35 else "b", "ab"[row % 2] if row >= 35 else "a", row) for row in range(40) for _ in range(copies)
    ]


@pytest.mark.parametrize("entry", [{"exact": "x"}, {"binary": "x", "positive": "a"}])
def test_repeating_every_row_narrows_no_interval(entry: dict[str, Any]) -> None:
    once, often = (scored(entry, labelled(copies)) for copies in (1, 8))
    assert (often.n, once.n_effective) == (320, 40)
    assert often.n_effective == pytest.approx(40, abs=1)
    assert once.ci95 is not None
    assert often.ci95 is not None
    assert often.ci95[0] <= once.ci95[0] + 0.005
    assert often.ci95[1] >= once.ci95[1] - 0.005
    for name, (low, high) in once.figures.intervals.items():
        wide = often.figures.intervals[name]
        assert wide[1] - wide[0] >= 0.9 * (high - low), name


def test_a_difference_in_four_rows_is_none_however_often_they_are_repeated() -> None:
    before = np.arange(40) < 35
    after = before.copy()
    after[:3], after[36] = False, True
    for copies in (1, 2, 4, 8):
        index = np.repeat(np.arange(40), copies)
        change = paired.rates(before[index], after[index], Clusters(index, 40))
        assert change.value == pytest.approx(-0.05)
        assert change.p == pytest.approx(0.625)


@pytest.mark.parametrize("copies", [1, 2, 4, 8])
def test_intervals_of_repeated_rows_cover(copies: int) -> None:
    """60 inputs with a rate of 0.8, the same answer to each copy: 2,000 draws, 93 to 97 % covered."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        index = np.repeat(np.arange(60), copies)
        low, high = share_interval((rng.random(60) < 0.8).astype(float)[index], Clusters(index, 60)) or (0, 0)
        covered += low <= 0.8 <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_the_chance_that_one_or_all_of_k_answers_are_right_is_unbiased() -> None:
    """Equal to the share of all choices of 2 of the 5 answers to each input."""
    rights = [(1, 0, 0, 0, 1), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (1, 1, 1, 0, 1)]
    rows = [("a" if right else "b", "a", key) for key, each in enumerate(rights) for right in each]
    pairs = [list(combinations(each, 2)) for each in rights]
    one = scored({"exact": "x", "repeats": "pass@2"}, rows)
    both = scored({"exact": "x", "repeats": "pass^2"}, rows)
    assert (one.metric, both.metric, one.n) == ("pass_at_k", "pass_all_k", 4)
    assert one.value == pytest.approx(np.mean([np.mean([any(pair) for pair in each]) for each in pairs]))
    assert both.value == pytest.approx(np.mean([np.mean([all(pair) for pair in each]) for each in pairs]))
    vote = scored({"exact": "x", "repeats": "majority"}, rows)
    assert (vote.value, vote.all_figures) == (0.5, {"majority_vote": 0.5})
    few = scored({"exact": "x", "repeats": "pass@6"}, rows)
    assert (few.value, few.n, few.left_out) == (None, 0, 4)


def test_a_wrong_way_to_reduce_repetitions_is_told() -> None:
    with pytest.raises(TaskFileError, match="'repeats' must be mean, majority, pass@K or pass"):
        scored({"exact": "x", "repeats": "best"}, [])


def test_rows_without_an_answer_count_as_the_score_says() -> None:
    rows = [("a", "a", 0), (None, "a", 1)]
    left = scored({"exact": "x"}, rows)
    assert (left.value, left.n, left.infra_error) == (1.0, 1, 1)
    wrong = scored({"exact": "x", "unanswered": "wrong"}, rows)
    assert (wrong.value, wrong.n, wrong.infra_error) == (0.5, 2, 1)


def test_answers_that_were_cut_off_are_told_apart() -> None:
    task = parse_task(json.dumps({"task": "t", "prompt": {"user": "hi"}, "scores": [{"exact": "x"}]}), "t")
    answers = [(Answer("ok", '{"x": "a"}', "stop", '{"x": "a"}'), row) for row in range(9)]
    answers += [(Answer("ok", "Let me think", "length", '{"x": "a"}'), 9)]
    (found,) = score_keyed(answers, Judge(task)).values()
    assert (found.value, found.all_figures["accuracy_uncut"]) == (0.9, 1.0)
    assert found.note == "1 of 10 answers were cut off at max_tokens: raise it"


def test_answers_that_are_all_wrong_have_an_interval_too() -> None:
    """Three classes and no answer right: up to about 1 in 20 of 60 rows might be."""
    wrong = [("abc"[row % 3], "bca"[row % 3], row) for row in range(60)]
    for entry in ({"exact": "x"}, {"binary": "x", "positive": "a"}):
        found = scored(entry, wrong if "exact" in entry else [("ab"[row % 2], "ba"[row % 2], row) for row in range(60)])
        assert found.value == 0.0
        for name in {"macro_f1", "f1"} & found.figures.values.keys():
            low, high = found.figures.intervals[name]
            assert (low, found.figures.values[name]) == (0.0, 0.0)
            assert 0.01 < high < 0.25, name


def test_sure_and_right_probabilities_may_hide_a_small_error() -> None:
    truth = np.arange(80) < 30
    found = calibration.bins(np.where(truth, 0.9998, 0.0002), truth, Clusters.alone(80))
    low, high = calibration.error_interval(found)
    assert low == 0.0
    assert calibration.error(found) == pytest.approx(0.0, abs=1e-6)
    # Of 80 rows that show nothing: 1 - 0.025^(1/80).
    assert high == pytest.approx(0.0451, abs=0.001)


def problems(task: str, expected: list[Any]) -> list[str]:
    """What is wrong with these labels of the field ``lab``."""
    labels = Labels(parse_task("task: t\nprompt: {user: hi}\nexpected: {lab: lab}\n" + task, "t"))
    for each in expected:
        labels.add({"lab": each})
    return labels.problems()


def test_the_positive_label_is_read_as_answers_are() -> None:
    task = """output: {normalise: {lab: [casefold, strip]}}
generate: {choices: ["YES", "NO"]}
scores: [{binary: lab, positive: "Yes "}]
"""
    assert problems(task, ["yes", "No"]) == []


def test_a_threshold_under_which_nothing_lies_is_refused() -> None:
    [problem] = problems("scores: [{binary: lab, threshold: 0}]\n", [True, False])
    assert problem.startswith("lab: no expected label and no possible answer means no by threshold: 0")
    assert problems("scores: [{binary: lab, threshold: 0.5}]\n", [0.7, 0.7]) == [], "a sample of one label"


def test_an_expected_null_against_a_schema_without_null_is_refused() -> None:
    task = "output: {schema: {type: object, properties: {lab: {type: %s}}}}\nscores: [{exact: lab}]\n"
    [problem] = problems(task % "boolean", [True, False, None])
    assert problem.startswith("lab: expected labels that no answer can be: null")
    assert problems(task % "[integer, 'null']", [1, None]) == []


def test_a_choice_that_means_a_bare_yes_of_yaml_is_refused() -> None:
    task = 'generate: {choices: ["yes", "yep", "no"]}\noutput: {aliases: {lab: {yep: %s}}}\nscores: [{exact: lab}]\n'
    assert problems(task % "'yes'", ["yes", "no"]) == []
    [problem] = problems(task % "yes", ["yes", "no"])
    assert problem.startswith("lab: choices that mean no label: yep means true (YAML reads a bare yes")


@pytest.mark.parametrize(("positive", "yes", "no"), [("true", 1, 0), ("1", True, False), ("true", "True", "False")])
def test_truth_values_are_read_however_they_are_written(positive: str, yes: Any, no: Any) -> None:
    given: list[Any] = [True, False, True] if not isinstance(yes, bool) else [1, 0, 1]
    rows = [(answer, label, row) for row, (answer, label) in enumerate(zip(given, [yes, no, no], strict=True))]
    found = scored({"binary": "x", "positive": json.loads(positive)}, rows)
    assert found.value == pytest.approx(2 / 3)
    assert found.figures.values["recall"] == 1.0
    if isinstance(yes, str):
        assert scored({"exact": "x"}, rows).value == pytest.approx(2 / 3)
