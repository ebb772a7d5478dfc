"""Comparing two jobs: intervals that hold what they promise, pairs, guards and conditions."""

from __future__ import annotations

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.errors import JobError, PromptmillError
from promptmill.reports import comparison_forms
from promptmill.reports.compare import compare, service_change
from promptmill.reports.conditions import parse
from promptmill.reports.statistics import ALPHA, holm, paired_rates
from tests.unit.test_reports import START, TASK, answer, counters, db, store

__all__ = ["db"]

ROWS, BATCH = 512, 16


def simulated(generator: np.random.Generator, slowdown: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Latencies of one dataset run twice: rows differ, batches differ from run to run, and each run has its noise."""
    work = np.exp(generator.normal(0, 0.5, ROWS))
    batches = np.arange(ROWS) // BATCH
    runs = []
    for factor in (1.0, 1.0 + slowdown):
        shared = np.exp(generator.normal(0, 0.05, ROWS // BATCH))[batches]
        runs.append(factor * work * shared * np.exp(generator.normal(0, 0.05, ROWS)))
    return runs[0], runs[1], batches


def found_differences(slowdown: float) -> int:
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(200):
        one, two, batches = simulated(generator, slowdown)
        p = service_change(one, two, batches, batches, True).p
        found += p is not None and p < ALPHA
    return found


def test_200_pairs_of_identical_jobs_show_no_difference_in_95_percent() -> None:
    assert found_differences(0.0) <= 10


def test_a_true_slowdown_of_5_percent_is_found_in_95_percent() -> None:
    assert found_differences(0.05) >= 190


def test_holm_corrects_for_the_family() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]


def test_mcnemar_of_5_against_15_flips() -> None:
    before = np.array([True] * 5 + [False] * 15 + [True] * 80)
    after = np.array([False] * 5 + [True] * 15 + [True] * 80)
    change, lost, won = paired_rates(before, after)
    assert (lost, won) == (5, 15)
    assert change.p == pytest.approx(0.0414, abs=1e-4)
    assert change.value == pytest.approx(0.10)


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


def test_a_slower_job_is_called_worse_and_by_how_much(db: sa.Engine) -> None:
    two_jobs(db, 1.2)
    found = compare(db, "01A", "01B")
    line = next(each for each in found.lines if each.name == "latency_s.mean")
    assert line.word == "worse"
    assert line.ci95 is not None
    assert line.ci95[0] < 0.2 < line.ci95[1]
    assert "latency_s.mean +19.9 % (worse)" in found.verdict


def test_a_job_against_its_twin_shows_no_detectable_difference(db: sa.Engine) -> None:
    two_jobs(db)
    found = compare(db, "01A", "01B")
    assert found.verdict.startswith("no detectable difference (latency_s.mean within [-0.")
    assert next(line for line in found.lines if line.name == "success_rate").word == "="


def test_where_nothing_could_be_tested_nothing_is_said_of_a_difference(db: sa.Engine) -> None:
    for job_id in ("01A", "01B"):
        store(db, [answer(row) for row in range(3)], job_id=job_id, rows=3, sampling='{"seed": "%s"}' % job_id)
    one, two = compare(db, "01A", "01B"), compare(db, "01A", "01B")
    assert [line.word for line in one.lines if line.name == "latency_s.mean"] == [""]
    assert "too few rows to tell" in next(line.note for line in two.lines if line.name == "latency_s.mean")


def test_one_run_of_each_gives_no_verdict_on_throughput(db: sa.Engine) -> None:
    two_jobs(db, 1.2)
    line = next(each for each in compare(db, "01A", "01B").lines if each.name == "output_tps")
    assert line.ci95 is not None
    assert (line.word, line.p) == ("", None)
    assert "one run of each" in line.note


def test_f12_other_limits_are_other_work(db: sa.Engine) -> None:
    two_jobs(db, 1.2, sampling='{"max_tokens": 9}')
    found = compare(db, "01A", "01B")
    line = next(each for each in found.lines if each.name == "latency_s.mean")
    assert line.note == "not comparable (max_tokens differs)"
    assert line.word == ""
    assert ("max_tokens", None, 9) in found.differences
    assert compare(db, "01A", "01B", force=True).lines[0].word == "worse"


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
    assert parse("success_rate<0.9").holds(found) is False


def test_jobs_without_common_rows_are_refused(db: sa.Engine) -> None:
    store(db, [answer(0)], job_id="01A")
    store(db, [], rows=0, job_id="01B")
    with pytest.raises(JobError, match="no common rows"):
        compare(db, "01A", "01B")


def test_a_condition_that_is_none_and_a_figure_that_is_none(db: sa.Engine) -> None:
    two_jobs(db)
    with pytest.raises(PromptmillError, match="is no condition"):
        parse("tps is low")
    with pytest.raises(PromptmillError, match="no figure 'outputtps'"):
        parse("outputtps<-5%").holds(compare(db, "01A", "01B"))


@pytest.mark.parametrize("form", ["md", "json", "csv"])
def test_each_form_holds_the_verdict_of_each_figure(db: sa.Engine, form: str) -> None:
    two_jobs(db, 1.2)
    text = comparison_forms.text(compare(db, "01A", "01B"), form)
    assert "latency_s.mean" in text.replace("\\", "")
    assert "worse" in text
