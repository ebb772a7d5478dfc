"""Comparing two jobs: intervals that hold what they promise, pairs, guards and conditions."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from rich.console import Console

from promptmill.database.tables import requests, score_runs, scores
from promptmill.errors import JobError, PromptmillError, UnknownName
from promptmill.reports.compare.compare import Side, compare, compare_all, settings_of
from promptmill.reports.compare.comparison import Comparison, Line
from promptmill.reports.compare.conditions import parse
from promptmill.reports.render import comparison_forms, comparison_page
from promptmill.scoring.statistics import paired, unpaired
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.scoring.statistics.families import ALPHA, holm
from promptmill.scoring.statistics.paired import Change
from promptmill.store.catalog import find_scored
from tests.unit.test_reports import JOB, START, TASK, answer, counters, db, failure, store

__all__ = ["db"]


def found_changes(slowdown: float, spread: float, runs: int = 5) -> int:
    """Of 1,000 pairs of five runs, with so much noise from run to run, those that are called a change."""
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(1000):
        before, after = np.exp(generator.normal(0, spread, (2, runs)))
        p = unpaired.runs(before.tolist(), (after * (1 + slowdown)).tolist()).p
        found += p is not None and p < ALPHA
    return found


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.02, 0.05])
def test_the_mood_of_a_machine_is_no_change_in_94_of_100_pairs(spread: float) -> None:
    assert found_changes(0.0, spread) <= 60


def test_a_true_slowdown_of_5_percent_is_found_in_95_percent() -> None:
    assert found_changes(0.05, 0.01) >= 950


LLAMA = {"name": "llamacpp", "version": "0.3.36", "kv_type": "f16"}


def test_a_comparison_names_what_answered_differently(db: sa.Engine) -> None:
    newer = json.dumps(LLAMA | {"version": "0.3.37"})
    store(db, [answer(0)], tried=[counters(environment=json.dumps(LLAMA))])
    both = [counters(environment=newer), counters(number=0, attempt=2, environment=json.dumps(LLAMA))]
    store(db, [answer(0)], tried=[counters(environment=newer)], job_id="NEW")
    store(db, [answer(0)], tried=both, job_id="MIXED")
    store(db, [answer(0)], tried=[counters()], job_id="OLD")

    found = compare(db, JOB, "NEW")
    assert ("engine.version", "0.3.36", "0.3.37") in found.differences
    assert not any(name == "engine.kv_type" for name, _, _ in found.differences)
    assert "job MIXED was answered in more than one environment: engine.version 0.3.36, 0.3.37" in (
        compare(db, JOB, "MIXED").warnings
    )
    # A job from before attempts told it.
    assert not any(name.startswith("engine.") for name, _, _ in compare(db, JOB, "OLD").differences)


def test_holm_corrects_for_the_family() -> None:
    found = holm([Change(0.1, p) for p in (0.01, None, 0.04, 0.03)])
    assert [each.p for each in found] == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert [each.is_change for each in found] == [True, False, False, False]


def test_an_interval_tells_the_same_as_its_test() -> None:
    """Rows that change at random, tested in families of four: no interval without zero beside an undecided test."""
    generator = np.random.default_rng(5)
    decided = 0
    for _ in range(300):
        before = generator.random((4, 60)) < 0.7
        after = np.where(generator.random((4, 60)) < 0.3, generator.random((4, 60)) < 0.85, before)
        changes = [paired.rates(*each, Clusters.alone(60)) for each in zip(before, after, strict=True)]
        for change, verdict in zip(changes, holm(changes), strict=True):
            if verdict.ci is None or change.p is None:
                continue
            assert verdict.is_change == (not verdict.ci[0] <= 0 <= verdict.ci[1])
            decided += verdict.is_change
    assert decided > 20


def test_mcnemar_of_5_against_15_flips() -> None:
    before = np.array([1.0] * 5 + [0.0] * 15 + [1.0] * 80 + [np.nan, 1.0])
    after = np.array([0.0] * 5 + [1.0] * 15 + [1.0] * 80 + [1.0, np.nan])
    lost, won = paired.flips(before, after)
    assert (lost.tolist(), won.tolist()) == ([*range(5)], [*range(5, 20)])
    change = paired.rates(before[:100] == 1, after[:100] == 1, Clusters.alone(100))
    assert change.p == pytest.approx(0.0414, abs=1e-4)
    assert change.value == pytest.approx(0.10)


def test_f7_nine_of_ten_against_ten_of_ten_is_newcombes_interval() -> None:
    def rates(before: np.ndarray, after: np.ndarray) -> Change:
        one, two = before.astype(float), after.astype(float)
        return unpaired.shares(one, two, Clusters.alone(len(one)), Clusters.alone(len(two)))

    found = rates(np.array([True] * 9 + [False]), np.ones(10, dtype=bool))
    assert found.value == pytest.approx(0.10)
    assert found.interval() == pytest.approx((-0.19, 0.40), abs=0.005)
    assert found.p == pytest.approx(1.0)
    # Newcombe (1998), table II: 56/70 less 48/80.
    found = rates(np.arange(80) < 48, np.arange(70) < 56)
    assert found.interval() == pytest.approx((0.0524, 0.3339), abs=5e-5)
    back = rates(np.arange(70) < 56, np.arange(80) < 48)
    assert back.interval() == pytest.approx((-0.3339, -0.0524), abs=5e-5)
    assert rates(np.ones(0, dtype=bool), np.ones(3, dtype=bool)).interval() is None


def test_rates_of_different_rows_are_compared_without_pairs(db: sa.Engine) -> None:
    for job_id, rows, wrong in (("01A", range(60), 0), ("01B", range(60, 120), 30)):
        stored = [failure(row) if row % 60 < wrong else answer(row) for row in rows]
        store(db, stored, tried=[counters()], job_id=job_id)
        with db.begin() as connection:
            unasked = requests.c.row.not_in(rows)
            connection.execute(sa.delete(requests).where(requests.c.job_id == job_id, unasked))
    for before, after, word in (("01A", "01B", "worse"), ("01B", "01A", "better")):
        [line] = [each for each in compare(db, before, after).lines if each.name == "success_rate"]
        assert line.word == word
        assert abs(line.change or 0) == pytest.approx(0.5)
        assert line.note == "not the same rows: not paired"


def test_scores_that_are_no_rates_are_compared_by_their_mean(db: sa.Engine) -> None:
    kinds = "closeness: n, span: 5}\n  - {abs_error: n, as: far"
    task = TASK.replace("exact: is_ad", kinds).replace("is_ad: {type: boolean}", "n: {type: integer}")
    labels = {row: {"n": 3} for row in range(60)}
    for job_id, shift in (("01A", 1), ("01B", 0)):
        texts = [f'{{"n": {3 + shift + row % 2}}}' for row in range(60)]
        rows = [answer(row, text=text) for row, text in enumerate(texts)]
        store(db, rows, job_id=job_id, expected=labels, task_text=task.replace("[is_ad]", "[n]"), task_name="n")
    for before, after, word in (("01A", "01B", "better"), ("01B", "01A", "worse")):
        found = compare(db, before, after)
        lines = {line.name: line for line in found.lines}
        assert abs(lines["n.closeness"].change or 0) == pytest.approx(0.2)
        assert lines["n.closeness"].change_unit == "points"
        assert abs(lines["far.abs_error"].change or 0) == pytest.approx(2 / 3 if word == "better" else 2)
        assert lines["far.abs_error"].word == word
        assert found.flips == ()
        stream = io.StringIO()
        comparison_forms.render(found, Console(file=stream, width=100))
        assert {"n.closeness", "far.abs_error"} <= set(stream.getvalue().split())


def test_the_interval_of_a_difference_of_means_covers_it() -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        before = generator.beta(2, 2, 60)
        after = np.clip(before + generator.normal(0.05, 0.1, 60), -1, 2)
        low, high = paired.means(before, after, Clusters.alone(60)).interval() or (0, 0)
        covered += low <= 0.05 <= high
    assert covered >= 0.93 * 400
    assert paired.means(np.ones(9), np.ones(9), Clusters.alone(9)).interval() == (0.0, 0.0)
    assert paired.means(np.ones(3), np.zeros(3), Clusters.alone(3)).p is None


def two_jobs(db: sa.Engine, factor: float = 1.0, **other: object) -> None:
    """Two jobs of 200 rows; the second takes ``factor`` as long for each."""
    generator = np.random.default_rng(3)
    for job_id, name, scale in (("01A", "a", 1.0), ("01B", "b", factor)):
        rows = []
        for row in range(200):
            begin = START + row // 4
            spent = scale * (2 + row % 5) * float(np.exp(generator.normal(0, 0.02)))
            rows.append(answer(row, admitted_at=begin, first_token_at=begin + 0.5, finished_at=begin + spent))
        store(db, rows, tried=[counters()], job_id=job_id, name=name, **(other if name == "b" else {}))  # type: ignore[arg-type]


def five_runs(db: sa.Engine, name: str, factor: float, seed: int) -> list[str]:
    """Five runs of 40 rows of one setting, with 1 % of noise between them."""
    generator = np.random.default_rng(seed)
    names = [f"01{name}{run}" for run in range(5)]
    for job_id in names:
        scale = factor * float(np.exp(generator.normal(0, 0.01)))
        rows = [answer(row, finished_at=START + 3 + row * scale) for row in range(40)]
        store(db, rows, tried=[counters()], job_id=job_id, name=job_id, key_sha256=name)
    return names


def line_of(found: Comparison, name: str) -> Line:
    return next(each for each in found.lines if each.name == name)


def test_f6_a_slower_setting_is_called_worse_with_a_signed_change(db: sa.Engine) -> None:
    before, after = five_runs(db, "A", 1.0, 1), five_runs(db, "B", 1.2, 2)
    # Earlier jobs that asked the same on the same device are runs as well.
    found = compare(db, before[-1], after[-1])
    line = line_of(found, "latency_s.mean")
    assert (found.runs, line.word, line.note) == ((5, 5), "worse", "5 and 5 runs")
    assert line.ci is not None
    assert 0 < line.ci[0] < (line.change or 0) < line.ci[1]
    assert "latency_s.mean +" in found.verdict
    assert line_of(compare(db, before[-1], before[0]), "latency_s.mean").word == "≈"


def test_two_runs_of_one_setting_are_told_apart_by_the_noise_of_earlier_ones(db: sa.Engine) -> None:
    """What asks the same is pooled into neither side: a driver may have changed between the two."""
    names = five_runs(db, "A", 1.0, 1)
    rows = [answer(row, finished_at=START + 3 + row * 1.2) for row in range(40)]
    store(db, rows, tried=[counters()], job_id="01Z", key_sha256="A")
    found = compare(db, names[0], "01Z")
    line = line_of(found, "latency_s.mean")
    assert (found.runs, line.word, line.note) == ((1, 1), "worse", "1 and 1 runs, 4 earlier ones tell the noise")
    quiet = line_of(compare(db, names[0], names[1]), "latency_s.mean")
    assert quiet.note == "1 and 1 runs, 4 earlier ones tell the noise"


def test_one_run_of_each_gives_no_verdict_on_a_time(db: sa.Engine) -> None:
    two_jobs(db, 1.2)
    line = line_of(compare(db, "01A", "01B"), "latency_s.mean")
    assert (line.word, line.p, line.ci, line.note) == ("", None, None, "one run each: not tested")
    assert line.change == pytest.approx(0.2, abs=0.01)


def test_a_job_against_its_twin_shows_no_detectable_difference(db: sa.Engine) -> None:
    two_jobs(db)
    found = compare(db, "01A", "01B")
    assert found.verdict.startswith("nothing could be tested: one run each: not tested: latency_s")
    assert line_of(found, "success_rate").word == "="


def test_a_change_of_a_time_below_its_clock_is_no_change(db: sa.Engine) -> None:
    rows = [answer(row, first_token_at=START + row + 1.1, finished_at=START + row + 1.5) for row in range(200)]
    store(db, rows, job_id="01A", name="a")
    nudged = [each | {"finished_at": each["finished_at"] + 2.4e-7} for each in rows]
    store(db, nudged, job_id="01B", name="b")
    found = compare(db, "01A", "01B")
    line = next(each for each in found.lines if each.name == "latency_s.mean")
    assert (line.change or 0) > 0
    for name in ("latency_s.p50", "latency_s.p95", "latency_s.mean", "wall_s"):
        assert parse(f"{name}>0%").holds(found) is False


def test_a_verdict_names_what_no_test_was_made_of(db: sa.Engine) -> None:
    """Every row took as long, and the second job had half the rows in its slots at one time."""
    for job_id, pace in (("01A", 0.25), ("01B", 0.5)):
        rows = []
        for row in range(200):
            begin = START + row * pace
            rows.append(answer(row, admitted_at=begin, first_token_at=begin + 0.5, finished_at=begin + 2 + row % 5))
        store(db, rows, job_id=job_id)
    found = compare(db, "01A", "01B")
    assert "one run each: not tested: wall_s +" in found.verdict
    assert "output_tps -" in found.verdict
    assert found.to_json()["verdict"] == found.verdict


def test_a_time_that_both_jobs_have_none_of_is_not_named(db: sa.Engine) -> None:
    for job_id in ("01A", "01B"):
        rows = [answer(row, first_token_at=START + 1 + row, finished_at=START + 1 + row) for row in range(8)]
        store(db, rows, job_id=job_id)
    verdict = compare(db, "01A", "01B").verdict
    assert "latency_s" not in verdict
    assert "()" not in verdict


def test_score_runs_that_are_equal_row_by_row_show_no_difference(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(8)], job_id="01A")
    store_score_runs(db, 8, {"R1": 3, "R2": 3})
    assert compare(db, Side("01A", "R1"), Side("01A", "R2")).verdict == (
        "no difference: the same in every row: is_ad.accuracy"
    )


def test_where_nothing_could_be_tested_nothing_is_said_of_a_difference(db: sa.Engine) -> None:
    for job_id in ("01A", "01B"):
        store(db, [answer(row) for row in range(3)], job_id=job_id, rows=3, max_errors="1")
    found = compare(db, "01A", "01B")
    assert line_of(found, "latency_s.mean").note == "one run each: not tested"
    assert found.verdict.startswith("nothing could be tested: one run each: not tested")
    assert found.verdict.endswith("the same in every row: success_rate")


def test_runs_of_a_setting_tell_the_noise_between_runs(db: sa.Engine) -> None:
    names = []
    for slots, scale in ((4, 1.0), (8, 1.3)):
        for run in range(3):
            names.append(f"01{slots}{run}")
            rows = [answer(row, finished_at=START + 3 + row * scale * (1 + 0.01 * run)) for row in range(40)]
            store(db, rows, job_id=names[-1], name=names[-1], slots=slots)
    groups = settings_of(db, [Side(name) for name in names], "slots")
    assert [len(each) for each in groups] == [3, 3]
    (found,) = compare_all(db, groups[0], groups[1:])
    line = next(each for each in found.lines if each.name == "output_tps")
    assert (found.runs, line.word) == ((3, 3), "worse")
    (few,) = compare_all(db, groups[0][:2], [groups[1]])
    line = next(each for each in few.lines if each.name == "output_tps")
    assert (line.word, line.note) == ("", "2 and 3 runs: 3 of each tell the noise between runs")
    with pytest.raises(PromptmillError, match="no such setting"):
        settings_of(db, [Side(names[0])], "slotz")


def store_score_runs(db: sa.Engine, rows: int, right: dict[str, int]) -> None:
    """Score runs of the job 01A, each with so many of its rows right."""
    with db.begin() as connection:
        for number, (run, count) in enumerate(right.items(), start=1):
            values = {"id": run, "job_id": "01A", "task_sha256": "x", "created_at": START, "number": number,
                      "figures": "{}"}  # fmt: skip
            connection.execute(sa.insert(score_runs).values(values))
            connection.execute(sa.insert(scores), [
                {"score_run_id": run, "row": row, "metric": "is_ad", "value": float(row < count), "outcome": "scored",
                 "is_right": row < count}
                for row in range(rows)
            ])  # fmt: skip


def test_score_runs_of_one_job_differ_in_scores_only(db: sa.Engine) -> None:
    store(db, [answer(row) for row in range(30)], job_id="01A")
    store_score_runs(db, 30, {"R1": 10, "R2": 22})
    assert find_scored(db, "01A@s2")[1] == "R2"
    with pytest.raises(UnknownName, match="no score run @s3"):
        find_scored(db, "01A@s3")
    found = compare(db, Side("01A", "R1"), Side("01A", "R2"))
    assert [(line.name, line.word) for line in found.lines] == [("is_ad.accuracy", "better")]
    assert (found.flips[0].won, found.flips[0].won_keys[0]) == (12, "row-10")
    assert found.flips[0].p == pytest.approx(2**-11)


def test_the_page_of_a_comparison_escapes_names(db: sa.Engine) -> None:
    two_jobs(db, 1.2, model="<b>x</b>")
    text = comparison_page.text([compare(db, "01A", "01B")])
    assert "<b>x" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<svg" in text


def test_f12_other_limits_are_other_work(db: sa.Engine) -> None:
    two_jobs(db, 1.2, sampling='{"max_tokens": 9}')
    found = compare(db, "01A", "01B")
    line = next(each for each in found.lines if each.name == "latency_s.mean")
    assert line.note == "not comparable (max_tokens differs)"
    assert line.word == ""
    assert ("max_tokens", None, 9) in found.differences
    assert compare(db, "01A", "01B", force=True).lines[0].note == "one run each: not tested"


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop": ["x"]}, {"n": 2}, {"json_schema": "{}"}, {"regex": "a+"}, {"choices": ["a", "b"]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"ignore_eos": True}, {"thinking": "on"},
        {"logit_bias": {"1": 5}}, {"continuations": ["a"]}, {"embedding": True}, {"temperature": 0.5}, {"seed": 3},
    ],
    ids=lambda sampling: next(iter(sampling)),
)  # fmt: skip
def test_f12_other_sampling_is_other_work(db: sa.Engine, sampling: dict[str, Any]) -> None:
    two_jobs(db, 1.2, sampling=json.dumps(sampling))
    line = next(each for each in compare(db, "01A", "01B").lines if each.name == "latency_s.mean")
    assert line.note == f"not comparable ({next(iter(sampling))} differs)"


@pytest.mark.parametrize("sampling", [{"max_tokens": 256}, {"temperature": 0}, {"timeout_s": 9}, {"logprobs": True}])
def test_sampling_that_generates_the_same_is_the_same_work(db: sa.Engine, sampling: dict[str, Any]) -> None:
    two_jobs(db, 1.2, sampling=json.dumps(sampling))
    assert line_of(compare(db, "01A", "01B"), "latency_s.mean").note == "one run each: not tested"


def test_f7_rates_change_in_points_and_flips_are_named(db: sa.Engine) -> None:
    labels = {row: {"is_ad": True} for row in range(40)}
    wrong = '{"is_ad": false}'
    for job_id, text in (("01A", '{"is_ad": true}'), ("01B", wrong)):
        rows = [answer(row, text=text if row < 20 else '{"is_ad": true}') for row in range(40)]
        store(db, rows, expected=labels, job_id=job_id, task_text=TASK, task_name="ads")
    found = compare(db, "01A", "01B")
    line = next(each for each in found.lines if each.name == "is_ad.accuracy")
    assert (line.change, line.word) == (-0.5, "worse")
    assert "is_ad.accuracy -50.0 pp (worse)" in found.verdict
    assert (found.flips[0].lost, found.flips[0].won) == (20, 0)
    assert found.flips[0].lost_keys[0] == "row-0"
    assert parse("is_ad.accuracy<-2pp").holds(found) is True
    markdown = comparison_forms.text(found, "md")
    assert "- A only: row-0, row-1, row-2" in markdown
    assert "B only: " not in markdown
    assert parse("success_rate<0.9").holds(found) is False


def test_a_job_without_results_is_refused(db: sa.Engine) -> None:
    store(db, [answer(0)], job_id="01A")
    store(db, [], rows=0, job_id="01B")
    with pytest.raises(JobError, match="job 01B has no results to compare"):
        compare(db, "01A", "01B")


def test_a_condition_that_is_none_and_a_figure_that_is_none(db: sa.Engine) -> None:
    two_jobs(db)
    with pytest.raises(PromptmillError, match="is no condition"):
        parse("tps is low")
    with pytest.raises(PromptmillError, match="no figure 'outputtps'"):
        parse("outputtps<-5%").holds(compare(db, "01A", "01B"))


@pytest.mark.parametrize(
    ("text", "right"),
    [("wall_s>1pp", "wall_s>1%"), ("success_rate<-5%", "success_rate<-5pp"), ("is_ad.accuracy<-1%", "-1pp")],
)
def test_a_condition_in_a_unit_that_its_figure_does_not_change_in(db: sa.Engine, text: str, right: str) -> None:
    labels = {row: {"is_ad": True} for row in range(8)}
    for job_id in ("01A", "01B"):
        rows = [answer(row) for row in range(8)]
        store(db, rows, expected=labels, job_id=job_id, task_text=TASK, task_name="ads")
    found = compare(db, "01A", "01B")
    with pytest.raises(PromptmillError, match="its change is not told in") as problem:
        parse(text).check(found)
    assert right in (problem.value.hint or "")
    for good in ("wall_s>1%", "success_rate<-5pp", "is_ad.accuracy<-1pp", "success_rate<0.9", "wall_s>100"):
        parse(good).check(found)


@pytest.mark.parametrize("form", ["md", "json", "csv"])
def test_each_form_holds_the_verdict_of_each_figure(db: sa.Engine, form: str) -> None:
    found = compare(db, five_runs(db, "A", 1.0, 1)[-1], five_runs(db, "B", 1.2, 2)[-1])
    text = comparison_forms.text(found, form)
    assert "latency_s.mean" in text.replace("\\", "")
    assert "worse" in text
