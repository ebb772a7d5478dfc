"""Scores beyond equality, and the gates that judge them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from promptmill.errors import TaskFileError
from promptmill.scoring.gates import judge
from promptmill.scoring.scorers.scoring import Answer, Judge, build
from promptmill.scoring.scorers.scoring import score_rows as score_answers
from promptmill.scoring.scorers.tally import Score
from promptmill.tasks.schema import GateDemand
from promptmill.tasks.task_file import parse_task


def row(answer: Any, expected: Any, state: str = "ok") -> Answer:
    text = json.dumps({"x": answer}) if answer is not None else "no idea"
    return Answer(state, text, "stop", json.dumps({"x": expected}))


def score_rows(rows: list[Answer], entries: list[dict[str, Any]], aliases: Any = None) -> dict[str, Score]:
    said = {"task": "t", "prompt": {"user": "hi"}, "scores": entries, "output": {"aliases": aliases or {}}}
    return score_answers(rows, Judge(parse_task(json.dumps(said), "t")))


def test_closeness_is_one_less_the_distance_over_the_span() -> None:
    """Answers off by 0, 1, 9 and one that is unparsed, with a span of 5: 1, 0.8, 0 and 0."""
    rows = [row(5, 5), row(4, 5), row(-4, 5), row(None, 5), row(5, 5, state="error")]
    score = score_rows(rows, [{"closeness": "x", "span": 5}])["x"]
    assert (score.n, score.correct, score.unparsed, score.infra_error) == (4, 1, 1, 1)
    assert score.value == pytest.approx(0.45)
    assert score.confusion == {}
    low, high = score.ci95 or (0.0, 0.0)
    assert 0.0 < low < 0.15
    assert 0.8 < high < 1.0


def test_the_interval_of_many_values_between_0_and_1_is_students() -> None:
    from scipy.stats import t

    rows = [row(off, 0) for off in (0, 1, 2, 3, 4, 2, 2, 1, 3, 2) * 30]
    score = score_rows(rows, [{"closeness": "x", "span": 10}])["x"]
    values = [1 - off / 10 for off in (0, 1, 2, 3, 4, 2, 2, 1, 3, 2) * 30]
    mean = sum(values) / 300
    error = (sum((value - mean) ** 2 for value in values) / 299 / 300) ** 0.5
    assert score.ci95 == pytest.approx(t.interval(0.95, 299, loc=mean, scale=error), abs=0.002)


@pytest.mark.parametrize(("answer", "right"), [(4, 1), ("4.5", 1), (3, 0), ("four", 0), (True, 0), (None, 0)])
def test_within_takes_numbers_and_nothing_else(answer: Any, right: int) -> None:
    assert score_rows([row(answer, 5)], [{"within": "x", "tolerance": 1}])["x"].correct == right


def test_f17_an_unparsed_answer_is_wrong_in_every_figure() -> None:
    rows = [row("a", "a"), row("a", "a"), row("b", "b"), row("a", "b"), row(None, "b")]
    score = score_rows(rows, [{"exact": "x"}])["x"]
    assert (score.value, score.n) == (3 / 5, 5)
    # a: 2 TP, 1 FP, 0 FN: 4/5. b: 1 TP, 0 FP, 2 FN: 2/4.
    assert score.figures.values["macro_f1"] == pytest.approx((0.8 + 0.5) / 2)
    assert score.confusion == {'"a"': {'"a"': 2}, '"b"': {"": 1, '"a"': 1, '"b"': 1}}


def test_aliases_count_for_answers_and_for_labels() -> None:
    rows = [row("contact", "QQ"), row("QQ", "contact"), row("spam", "QQ")]
    score = score_rows(rows, [{"exact": "x"}], {"x": {"QQ": "contact"}})["x"]
    assert (score.correct, score.n, dict(score.classes)) == (2, 3, {'"contact"': 3})


def test_two_kinds_of_score_may_look_at_one_field() -> None:
    assert list(build([{"exact": "x"}, {"closeness": "x", "span": 5}])) == ["x", "x.closeness"]


#: What a report says of a job whose every row was answered.
ANSWERED = {"success_rate": 1.0, "success_ci95": [0.9, 1.0], "ok": 40, "errors": 0}


def summary() -> dict[str, Any]:
    rows = [row(5, 5), row(4, 5), row(None, 5)]
    scores = score_rows(rows, [{"exact": "x"}, {"closeness": "x", "span": 5}])
    latency = {"p50": 0.5, "p95": 2.0, "n": 3}
    return ANSWERED | {"scores": {name: each.to_json() for name, each in scores.items()}, "latency_s": latency}


@pytest.mark.parametrize(
    ("name", "demand", "passed"),
    [
        ("x.accuracy", ">=0.33", True), ("x.accuracy", ">0.34", False), ("x.closeness", ">=0.6", True),
        ("x.closeness", "<0.6", False), ("parsed", ">=0.67", False), ("parsed", ">=0.66", True),
        ("latency.p95", "<1.5", False), ("latency.p95", "<=2", True), ("x.macro_f1", ">=0", True),
        ("y.accuracy", ">=0", False),
    ],
)  # fmt: skip
def test_a_gate_is_judged_by_its_figure(name: str, demand: str, passed: bool) -> None:
    verdict = judge({name: demand}, summary())[0]
    assert verdict.passed is passed


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("gates: {y.accuracy: '>=1'}", "a.yaml:4:9: there is no figure 'y.accuracy' to judge"),
        ("gates: {x.accuracy: much}", "a.yaml:4:9: 'much' is no demand"),
        ("scores: [{closeness: x}]", "closeness needs 'span', a number above 0"),
        ("scores: [{within: x, tolerance: -1}]", "'tolerance' must be a number above 0"),
        ("scores: [{exact: x, span: 5}]", "exact has no option 'span'"),
    ],
)
def test_a_wrong_gate_or_option_is_one_clear_error(lines: str, problem: str) -> None:
    scores = "" if lines.startswith("scores") else "scores: [{exact: x}]"
    with pytest.raises(TaskFileError) as caught:
        parse_task(f"task: a\nprompt: {{user: hi}}\n{scores}\n{lines}\n", "a.yaml")
    assert problem in str(caught.value)


def test_two_rows_do_not_pass_a_gate_by_luck() -> None:
    """Two of two right: 100 %, and an interval that begins at 34 %."""
    task = parse_task(
        "task: a\nprompt: {user: hi}\nexpected: {x: x}\nscores: [{exact: x}]\n"
        "gates: {x.accuracy: {demand: '>=0.85', ci: lower}}\n",
        "a.yaml",
    )
    scores = {"x": score_rows([row("a", "a")] * 2, [{"exact": "x"}])["x"].to_json()}
    many = {"x": score_rows([row("a", "a")] * 200, [{"exact": "x"}])["x"].to_json()}

    few_verdict, _ = judge(task.model.gates, ANSWERED | {"scores": scores})
    many_verdict, _ = judge(task.model.gates, ANSWERED | {"scores": many})

    assert not few_verdict.passed
    assert few_verdict.judged == pytest.approx(0.3424, abs=1e-4)
    assert str(few_verdict) == ("gate x.accuracy >=0.85: 1, 95 % CI [0.3424, 1], n 2, judged by 0.3424, FAILED")
    assert many_verdict.passed


@pytest.mark.parametrize(
    ("name", "demand", "entry"),
    [("x.macro_f1", ">=0.9", {"exact": "x"}), ("x.kappa", ">=0.8", {"exact": "x"}),
     ("x.f1", ">=0.9", {"binary": "x", "positive": "a"}), ("x.closeness", ">=0.9", {"closeness": "x", "span": 5})],
)  # fmt: skip
def test_a_perfect_run_has_an_interval_for_every_gate(name: str, demand: str, entry: dict[str, Any]) -> None:
    pairs = [(5, 5), (3, 3)] if "closeness" in entry else [("a", "a"), ("b", "b")]
    scores = score_rows([row(*each) for each in pairs] * 150, [entry])["x"].to_json()
    verdict = judge({name: GateDemand(demand=demand, ci=True)}, ANSWERED | {"scores": {"x": scores}})[0]
    assert verdict.passed
    assert verdict.figure.value == 1.0
    assert verdict.judged is not None
    assert 0.9 < verdict.judged < 1.0


def test_the_interval_is_judged_at_its_unfavourable_end() -> None:
    """Errors of 0 to 3: the mean may be above the demand, and the lower end would let it pass."""
    scores = score_rows([row(5 + off, 5) for off in (0, 0, 1, 3) * 2], [{"abs_error": "x"}])["x"].to_json()
    summary = ANSWERED | {"scores": {"x": scores}}
    verdict = judge({"x.abs_error": GateDemand(demand="<=1.2", ci=True)}, summary)[0]
    assert verdict.figure.value == 1.0
    assert not verdict.passed
    assert verdict.figure.interval is not None
    assert verdict.judged == verdict.figure.interval[1]


def test_rows_without_an_answer_fail_a_job_with_gates() -> None:
    scores = {"x": score_rows([row("a", "a")] * 100, [{"exact": "x"}])["x"].to_json()}
    half = {"success_rate": 0.5, "success_ci95": [0.43, 0.57], "ok": 100, "errors": 100, "scores": scores}
    right, answered = judge({"x.accuracy": ">=0.9"}, half)
    assert (right.passed, answered.passed) == (True, False)
    assert str(answered) == "gate success_rate >=0.99: 0.5, 95 % CI [0.43, 0.57], n 200, FAILED"
    assert all(each.passed for each in judge({"x.accuracy": ">=0.9", "success_rate": ">=0.4"}, half))


@pytest.mark.parametrize(
    ("gate", "problem"),
    [
        ("x.accuracy: {demand: '<=0.5', ci: lower}", "the lower end favours '<=0.5'; write ci: true"),
        ("latency.p95: {demand: '<=2', ci: true}", "'latency.p95' has no interval to judge it by"),
    ],
)
def test_an_interval_that_would_favour_its_gate_is_refused(gate: str, problem: str) -> None:
    with pytest.raises(TaskFileError) as caught:
        parse_task(f"task: a\nprompt: {{user: hi}}\nscores: [{{exact: x}}]\ngates: {{{gate}}}\n", "a.yaml")
    assert problem in str(caught.value)
