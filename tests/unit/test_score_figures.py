"""Figures of classes, of yes or no, and of probabilities: equal to scikit-learn's on the bare labels, and covering."""

from __future__ import annotations

import json
import random
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from promptmill.errors import TaskFileError
from promptmill.scoring.scorers.aggregates import class_figures
from promptmill.scoring.scorers.scoring import Answer, Judge, score_rows
from promptmill.scoring.scorers.tally import Score
from promptmill.scoring.statistics.bootstrap import intervals
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.tasks import patterns
from promptmill.tasks.task_file import load_task, parse_task


def judge_of(scores: list[dict[str, Any]], **parts: Any) -> Judge:
    return Judge(parse_task(json.dumps({"task": "t", "prompt": {"user": "hi"}, "scores": scores} | parts), "t"))


def answer(given: Any, wanted: Any, probs: dict[str, float] | None = None, field: str = "x") -> Answer:
    text = "no idea" if given is None else json.dumps({field: given})
    return Answer("ok", text, "stop", json.dumps({field: wanted}), json.dumps(probs) if probs else None)


def scored(entry: dict[str, Any], rows: Sequence[Answer], **parts: Any) -> Score:
    (found,) = score_rows(rows, judge_of([entry], **parts)).values()
    return found


# --- against scikit-learn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_figures_of_a_thousand_random_label_sets_equal_scikit_learns(block: int) -> None:
    """100 sets in each of ten blocks; of 2 to 7 classes, 2 to 60 rows, with answers that cannot be read."""
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        labels = [f"label {number}" for number in range(rng.randint(2, 7))]
        wanted = [rng.choice(labels) for _ in range(rng.randint(2, 60))]
        given = [rng.choice([*labels, None]) if rng.random() < 0.5 else want for want in wanted]
        found = scored({"exact": "x"}, [answer(give, want) for give, want in zip(given, wanted, strict=True)])
        # Numbers, which scikit-learn checks far faster than texts; -1 is an answer that cannot be read.
        truth = np.array([labels.index(want) for want in wanted])
        said = np.array([labels.index(give) if give else -1 for give in given])
        seen = np.union1d(truth, said[said >= 0])
        macro = sk.precision_recall_fscore_support(truth, said, labels=seen, average="macro", zero_division=0)
        weighted = sk.precision_recall_fscore_support(truth, said, labels=seen, average="weighted", zero_division=0)
        expect: dict[str, Any] = {
            "accuracy": sk.accuracy_score(truth, said), "macro_precision": macro[0], "macro_recall": macro[1],
            "macro_f1": macro[2], "weighted_f1": weighted[2],
        }  # fmt: skip
        if len({*truth, *said}) > 1:
            expect["kappa"] = sk.cohen_kappa_score(truth, said)
        for name, value in expect.items():
            assert found.all_figures[name] == pytest.approx(value, abs=1e-12), (seed, name)


def test_what_intervals_are_made_of_equals_scikit_learns_figures() -> None:
    """The vectorised figures of the bootstrap, on the rows themselves instead of a drawing."""
    rng = np.random.default_rng(1)
    wanted, given = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    pairs, counts = np.unique(np.stack([wanted, given]), axis=1, return_counts=True)
    found = class_figures(counts[None, :].astype(float), pairs[0], pairs[1], 4)
    assert found["macro_f1"][0] == pytest.approx(sk.f1_score(wanted, given, average="macro"))
    assert found["weighted_f1"][0] == pytest.approx(sk.f1_score(wanted, given, average="weighted"))
    assert found["macro_precision"][0] == pytest.approx(sk.precision_score(wanted, given, average="macro"))
    assert found["kappa"][0] == pytest.approx(sk.cohen_kappa_score(wanted, given))


def test_a_scale_of_whole_numbers_has_a_quadratic_kappa() -> None:
    rng = random.Random(3)
    wanted = [rng.randrange(6) for _ in range(200)]
    given = [min(5, max(0, want + rng.choice([-1, 0, 0, 1]))) for want in wanted]
    found = scored({"exact": "x"}, [answer(*pair) for pair in zip(given, wanted, strict=True)])
    expect = sk.cohen_kappa_score(wanted, given, weights="quadratic", labels=range(6))
    assert found.all_figures["quadratic_kappa"] == pytest.approx(expect)
    low, high = found.figures.intervals["quadratic_kappa"]
    assert low < expect < high


def test_an_answer_that_cannot_be_read_is_as_far_off_as_can_be() -> None:
    rows = [answer(0, 0), answer(5, 5), answer(None, 1)]
    found = scored({"exact": "x"}, rows).all_figures["quadratic_kappa"]
    assert found == pytest.approx(sk.cohen_kappa_score([0, 5, 1], [0, 5, 5], weights="quadratic", labels=range(6)))


def test_yes_or_no_by_a_threshold_has_precision_recall_auc_and_average_precision() -> None:
    rng = random.Random(5)
    wanted = [rng.randrange(6) for _ in range(400)]
    given = [min(5, max(0, want + rng.randint(-2, 2))) for want in wanted]
    found = scored({"binary": "x", "threshold": 3}, [answer(*pair) for pair in zip(given, wanted, strict=True)])
    truth, said = [want >= 3 for want in wanted], [give >= 3 for give in given]
    expect = {
        "accuracy": sk.accuracy_score(truth, said),
        "precision": sk.precision_score(truth, said),
        "recall": sk.recall_score(truth, said),
        "f1": sk.f1_score(truth, said),
        "auc": sk.roc_auc_score(truth, given),
        "average_precision": sk.average_precision_score(truth, given),
    }
    for name, value in expect.items():
        assert found.all_figures[name] == pytest.approx(value), name
    assert "brier" not in found.all_figures
    for name in ("precision", "recall", "f1", "auc"):
        low, high = found.figures.intervals[name]
        assert low < expect[name] < high


def test_probabilities_of_choices_give_brier_and_calibration() -> None:
    rng = random.Random(7)
    chances = [rng.random() for _ in range(500)]
    truths = [rng.random() < chance for chance in chances]
    rows = [
        Answer("ok", "ad" if chance >= 0.5 else "no", "stop", json.dumps({"x": "ad" if truth else "no"}),
               json.dumps({"ad": chance, "no": 1 - chance}))
        for chance, truth in zip(chances, truths, strict=True)
    ]  # fmt: skip
    found = scored({"binary": "x", "positive": "ad"}, rows, generate={"choices": ["ad", "no"]})
    assert found.all_figures["auc"] == pytest.approx(sk.roc_auc_score(truths, chances))
    assert found.all_figures["brier"] == pytest.approx(sk.brier_score_loss(truths, chances))
    assert sum(each["n"] for each in found.figures.bins) == 500
    assert found.all_figures["ece"] == pytest.approx(0.0, abs=0.08)
    low, high = found.figures.intervals["auc"]
    assert low < sk.roc_auc_score(truths, chances) < high


def test_an_answer_that_cannot_be_read_counts_as_sure_of_the_wrong_thing() -> None:
    rows = [answer(5, 5), answer(1, 1), answer(None, 4)]
    found = scored({"binary": "x", "threshold": 3}, rows)
    assert found.all_figures["recall"] == 0.5
    assert found.all_figures["auc"] == pytest.approx(sk.roc_auc_score([1, 0, 1], [5, 1, 0]))


@pytest.mark.parametrize(("cost", "figure"), [(None, "f1"), ({"false_yes": 1, "missed": 9}, "cost")])
def test_the_best_threshold_is_measured_where_it_was_not_chosen(cost: dict[str, int] | None, figure: str) -> None:
    """Probabilities that are too low by half: yes is best from about 0.25 on, and earlier where a miss is dear."""
    rng = np.random.default_rng(4)
    chances = rng.random(600)
    rows = [
        Answer("ok", "ad" if chance / 2 >= 0.5 else "no", "stop", json.dumps({"x": "ad" if truth else "no"}),
               json.dumps({"ad": chance / 2, "no": 1 - chance / 2}))
        for chance, truth in zip(chances, rng.random(600) < chances, strict=True)
    ]  # fmt: skip
    entry = {"binary": "x", "positive": "ad"} | ({"cost": cost} if cost else {})
    found = scored(entry, rows, generate={"choices": ["ad", "no"]}).all_figures
    assert found["f1"] == 0.0
    threshold = found["best_threshold"]
    assert threshold is not None
    assert (0.02 < threshold < 0.15) if cost else (0.12 < threshold < 0.3)
    reached = found[f"best_threshold_{figure}"]
    assert reached is not None
    assert reached < 0.7 if cost else reached > 0.6


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intervals_of_macro_f1_cover_the_truth_as_often_as_they_say() -> None:
    """Rows drawn from a known confusion: the 95 % interval holds the true macro F1 in 95 % of 300 draws, give or take
    three standard errors (3.8 points).
    """
    truth = np.array([[0.40, 0.05, 0.05], [0.05, 0.20, 0.05], [0.02, 0.03, 0.15]])
    f1 = 2 * truth.diagonal() / (truth.sum(axis=0) + truth.sum(axis=1))
    rng = np.random.default_rng(11)
    wanted, given = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
    covered = 0
    for _ in range(300):
        cell = rng.choice(9, size=300, p=truth.ravel())
        found = intervals(cell, 9, Clusters.alone(300), lambda drawn: class_figures(drawn, wanted, given, 3))
        low, high = found["macro_f1"]
        covered += low <= f1.mean() <= high
    assert 0.912 <= covered / 300 <= 0.988


def test_an_interval_leaves_out_as_much_below_as_above() -> None:
    seen: list[Any] = []

    def share(counts: Any) -> dict[str, Any]:
        seen.append(counts[:, 0] / counts.sum(axis=1))
        return {"share": seen[-1]}

    found = intervals(np.repeat([0, 1], [40, 60]), 2, Clusters.alone(100), share)
    # The first is the figure of the rows themselves.
    drawn = np.concatenate(seen[1:])
    assert found["share"] == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))))


def test_intervals_of_auc_cover_the_truth_as_often_as_they_say() -> None:
    """Normal scores one standard deviation apart: the true AUC is Phi(1 / sqrt 2) = 0.7602."""
    from promptmill.scoring.scorers.aggregates import of_ranking

    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        truth = np.repeat([True, False], 60)
        confidence = rng.normal(truth.astype(float))
        low, high = of_ranking(confidence, truth, Clusters.alone(120)).intervals["auc"]
        covered += low <= 0.76025 <= high
    assert 0.92 <= covered / 500 <= 0.98


# --- the other scorers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "given", "wanted", "value"),
    [
        ({"contains": "x"}, "加微信领取", "微信", 1), ({"contains": "x"}, "加微信领取", ["微信", "QQ"], 0),
        ({"contains": "x", "ignore_case": True}, "ADD QQ", "qq", 1), ({"contains": "x"}, "ADD QQ", "qq", 0),
        ({"regex": "x", "pattern": r"\d{3}"}, "call 555", "-", 1), ({"regex": "x"}, "call 555", r"^call", 1),
        ({"json_match": "x"}, {"a": 1, "b": 2}, {"a": 1}, 1), ({"json_match": "x"}, {"a": 1}, {"a": 1, "b": 2}, 0),
        ({"numeric": "x", "tolerance": 0.5}, "5.4", 5, 1), ({"numeric": "x", "relative": 0.1}, 89, 100, 0),
        ({"set_f1": "x"}, ["a", "b"], ["b", "c"], 0.5), ({"set_f1": "x"}, [], [], 1.0),
        ({"abs_error": "x"}, 3, 5, 2.0), ({"abs_error": "x", "worst": 5}, "three", 5, 5.0),
    ],
)  # fmt: skip
def test_each_scorer_says_what_an_answer_is_worth(entry: Any, given: Any, wanted: Any, value: float) -> None:
    assert scored(entry, [answer(given, wanted)]).value == pytest.approx(value)


def test_an_absolute_error_without_a_worst_one_leaves_unread_rows_out_and_says_so() -> None:
    found = scored({"abs_error": "x"}, [answer(3, 5), answer(None, 5)])
    assert (found.value, found.n, found.left_out, found.unparsed) == (2.0, 1, 1, 1)
    assert scored({"abs_error": "x", "worst": 4}, [answer(3, 5), answer(None, 5)]).value == 3.0


def test_the_probability_of_the_expected_choice_is_its_score() -> None:
    rows = [
        Answer("ok", "a", "stop", '{"x": "a"}', '{"a": 0.75, "b": 0.25}'),
        Answer("ok", "a", "stop", '{"x": "b"}', '{"a": 0.75, "b": 0.25}'),
    ]
    found = scored({"choice_probability": "x"}, rows, generate={"choices": ["a", "b"]})
    assert found.value == pytest.approx(0.5)
    assert found.all_figures["brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert found.all_figures["ece"] == pytest.approx(0.25)


# --- free text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "text", "found"),
    [
        ({"regex": "类别[::：]\\s*(\\S+)"}, "好的。\n类别：广告\n", "广告"), ("first_line", "\n ad \nbecause", "ad"),
        ("last_line", "because\nad\n", "ad"), ({"json": "x"}, 'so {"x": "ad"} it is', "ad"),
        ({"choice": ["ad", "normal"]}, '"Ad".', "ad"), ({"choice": ["ad", "normal"]}, "this is an ad", None),
        ([{"json": "x"}, "first_line"], "ad", "ad"), ("whole", "<think>hm</think> ad", "ad"),
    ],
)  # fmt: skip
def test_a_pipeline_finds_its_field_or_nothing(steps: Any, text: str, found: str | None) -> None:
    judge = judge_of([{"exact": "x"}], output={"extract": {"x": steps}})
    (judgement,) = judge(Answer("ok", text, "stop", '{"x": "ad"}'))
    assert judgement is not None
    assert judgement.predicted == (None if found is None else json.dumps(found, ensure_ascii=False))
    assert judgement.outcome == ("unparsed" if found is None else "scored")


def test_an_answer_that_leaves_its_schema_is_unparsed_where_the_task_validates() -> None:
    schema = {"type": "object", "required": ["x"], "properties": {"x": {"enum": ["a", "b"]}}}
    rows = [answer("a", "a"), answer("c", "c")]
    assert scored({"exact": "x"}, rows, output={"schema": schema, "mode": "validate"}).correct == 1
    assert scored({"exact": "x"}, rows, output={"schema": schema, "mode": "free"}).correct == 2


# --- functions of the user's -----------------------------------------------------------------------------------------


def python_task(tmp_path: Path, code: str, entry: str = "python: scorers.py:it") -> Judge:
    (tmp_path / "scorers.py").write_text(textwrap.dedent(code), encoding="utf-8")
    (tmp_path / "t.yaml").write_text(
        f"task: t\nprompt: {{user: hi}}\noutput: {{extract: {{x: whole}}}}\nscores: [{{{entry}}}]\n", encoding="utf-8"
    )
    return Judge(load_task(tmp_path / "t.yaml"))


def rows_of(*pairs: tuple[str, Any]) -> list[Answer]:
    return [Answer("ok", text, "stop", json.dumps({"x": want}), None, "a", 0, "{}", None) for text, want in pairs]


@pytest.mark.parametrize(
    ("returned", "metric", "value"),
    [
        ("output['x'] == expected['x']", "accuracy", 0.5), ("len(item['text']) / 10", "mean", 0.15),
        ("output['x']", "accuracy", 0.5), ("None", "mean", None),
        ("{'value': 0.25, 'predicted': output['x'], 'expected': 'a'}", "mean", 0.25),
    ],
)  # fmt: skip
def test_a_function_of_the_users_scores_each_row(tmp_path: Path, returned: str, metric: str, value: Any) -> None:
    judge = python_task(tmp_path, f"def it(output, expected, item):\n    return {returned}\n")
    found = score_rows(rows_of(("a", "a"), ("bb", "c")), judge)["it"]
    assert found.metric == metric
    assert found.value == pytest.approx(value)


def test_an_exception_in_one_row_is_that_rows_outcome_and_counts_as_wrong(tmp_path: Path) -> None:
    judge = python_task(tmp_path, "def it(output, expected, item):\n    return 1 / len(output['x'].strip('b')) > 0\n")
    found = score_rows(rows_of(("a", "a"), ("b", "b"), ("a", "a")), judge)["it"]
    assert (found.n, found.correct, found.scorer_errors) == (3, 2, 1)
    assert found.scorer_error == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("code", "entry", "problem"),
    [
        ("def it(:\n", "python: scorers.py:it", r"scorers.py:1 fails to import: SyntaxError"),
        ("x = 1\nraise ValueError('no')\n", "python: scorers.py:it", r"scorers.py:2 fails to import: ValueError: no"),
        ("x = 1\n", "python: scorers.py:it", "has no function 'it'"),
        ("x = 1\n", "python: other.py:it", "other.py cannot be read"),
    ],
)
def test_a_scorer_file_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, code: str, entry: str, problem: str
) -> None:
    with pytest.raises(TaskFileError, match=problem):
        python_task(tmp_path, code, entry)


def test_a_score_comes_without_a_warning_however_few_the_rows_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in ([], [answer("a", "a")], [answer(None, "a")], [answer(1, 1), answer(2, 2)]):
            for entry in ({"exact": "x"}, {"binary": "x", "threshold": 2}, {"set_f1": "x"}):
                assert scored(entry, rows).n == len(rows) or entry == {"binary": "x", "threshold": 2}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"), ("return float('nan')", "ValueError: the scorer gave nan"),
        ("return float('inf')", "ValueError: the scorer gave inf"), ("raise Odd", "Odd: (its message cannot be read)"),
    ],
)  # fmt: skip
def test_whatever_a_function_does_is_its_rows_outcome(tmp_path: Path, body: str, error: str) -> None:
    code = (
        "class Odd(Exception):\n    def __str__(self): return 1 / 0\n"
        + f"def it(output, expected, item):\n    {body}\n"
    )
    found = score_rows(rows_of(("a", "a")), python_task(tmp_path, code))["it"]
    assert (found.n, found.correct, found.scorer_errors, found.scorer_error) == (1, 0, 1, error)


def test_what_a_function_prints_is_not_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('import')\ndef it(output, expected, item):\n    print('row')\n    return True\n"
    assert score_rows(rows_of(("a", "a")), python_task(tmp_path, code))["it"].correct == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "import\nrow\n")


def test_an_expression_that_takes_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SEARCH_S", 0.2)
    text = "a" * 40 + "!"
    found = scored({"regex": "x", "pattern": "^(a|aa)+$"}, [answer(text, "-")])
    assert (found.n, found.correct, found.scorer_errors) == (1, 0, 1)
    assert str(found.scorer_error).startswith("TimeoutError")
    judge = judge_of([{"exact": "x"}], output={"extract": {"x": {"regex": "^(a|aa)+$"}}})
    (judgement,) = judge(Answer("ok", text, "stop", '{"x": "ad"}'))
    assert judgement is not None
    assert judgement.outcome == "unparsed"


def test_whole_numbers_beyond_what_floats_hold_are_told_apart() -> None:
    found = scored({"numeric": "x", "tolerance": 0.1}, [answer(2**53 + 1, 2**53), answer(str(2**53), 2**53)])
    assert found.correct == 1


def test_the_majority_is_only_told_where_giving_a_label_is_right() -> None:
    rows = [answer(n % 5, 2) for n in range(10)]
    assert scored({"within": "x", "tolerance": 1}, rows).majority_baseline is None
    assert scored({"exact": "x"}, rows).majority_baseline == 1.0


def test_a_task_that_is_no_file_of_this_machine_runs_no_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def it(output, expected, item):\n    return True\n", encoding="utf-8")
    with pytest.raises(TaskFileError, match="only be used by a task file on this machine"):
        judge_of([{"python": f"{tmp_path}/mine.py:it"}])
    with pytest.raises(TaskFileError, match="examples can only be read by a task file"):
        judge_of([], prompt={"user": "hi", "examples": str(tmp_path / "mine.py")})


def test_an_installed_package_may_offer_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offered_scorers.py").write_text(
        "def longer(output, expected, item, than=1):\n    return len(output['x']) > than\n", encoding="utf-8"
    )
    info = tmp_path / "offered_scorers-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered-scorers\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[promptmill.scorers]\nlonger = offered_scorers:longer\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = judge_of([{"longer": "x", "than": 2}])
    found = score_rows([answer("ab", "-"), answer("abc", "-")], judge)["x"]
    assert (found.metric, found.value, judge.sha256) == ("accuracy", 0.5, "offered-scorers 1.2")
