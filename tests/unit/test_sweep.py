"""Sweeps and trends: which setting is named, what is interleaved, and where a history changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from promptmill.core.settings import Settings
from promptmill.database.revision import open_database
from promptmill.errors import PromptmillError, UnknownName
from promptmill.experiments.sweep import Plan, axis, sweep
from promptmill.reports.compare.sweep import Setting, Sweep, recommended, text, verdict
from promptmill.reports.compare.trend import change_points, trends
from promptmill.reports.compare.trend import text as trend_text
from promptmill.reports.figures.summary import summarise
from promptmill.service.job_options import JobOptions
from promptmill.service.selection import Selection
from promptmill.store.tags import add_tags, remove_tags, tagged, tags_of
from tests.unit.test_reports import START, answer, db, store

__all__ = ["db"]


def job(db: sa.Engine, job_id: str, seconds: float, **values: Any) -> None:
    rows = [answer(row, finished_at=START + 1.5 + seconds * (row + 1) / 20) for row in range(20)]
    store(db, rows, job_id=job_id, name=job_id, **values)


def swept(db: sa.Engine) -> Sweep:
    """16 slots are fastest, 4 almost, 1 is slow; each three times."""
    settings = []
    for slots, seconds in ((1, 40.0), (4, 10.2), (16, 10.0)):
        names = [f"01S{slots:02}{run}" for run in range(3)]
        for run, name in enumerate(names):
            job(db, name, seconds * (1 + 0.002 * run))
        settings.append(Setting({"slots": slots, "n": 1}, tuple(summarise(db, name) for name in names)))
    return Sweep("night", tuple(settings))


def test_f14_capacity_is_what_a_sweep_measured_at_its_knee(db: sa.Engine) -> None:
    found = swept(db)
    assert found.best(found.settings[0]) is found.settings[2]
    (knee,) = found.knees()
    assert knee is found.settings[1]
    assert verdict(found).startswith("smallest within 5 % of the best: slots=4: ")
    assert recommended(knee) == "JOBS_SLOTS=4\n# --param n=1"
    change = found.against_best(found.settings[0])
    assert change is not None
    interval = change.interval()
    assert interval is not None
    assert interval[1] < -0.5
    assert "not tested" not in verdict(found)
    single = Sweep("night", tuple(replace(each, runs=each.runs[:1]) for each in found.settings))
    assert verdict(single).endswith("; with 1 of each the runs are not tested")


def test_settings_of_other_work_have_a_knee_and_a_best_of_their_own(db: sa.Engine) -> None:
    """Ten tokens an answer are more tokens a second than five at any number of slots."""
    settings = []
    for most, seconds in ((5, {1: 40.0, 4: 20.0}), (10, {1: 10.0, 4: 9.9})):
        for slots, took in seconds.items():
            name = f"01W{most:02}{slots}"
            job(db, name, took)
            settings.append(Setting({"slots": slots, "max_tokens": most}, (summarise(db, name),)))
    found = Sweep("work", tuple(settings))
    assert [dict(each.values) for each in found.knees()] == [
        {"slots": 4, "max_tokens": 5}, {"slots": 1, "max_tokens": 10}
    ]  # fmt: skip
    assert [each["best"] for each in found.to_json()["settings"]] == [False, True, False, True]
    change = found.against_best(settings[0])
    assert change is not None
    assert -0.55 < change.value < -0.45
    assert verdict(found).count(" of the best") == 3


@pytest.mark.parametrize("form", ["md", "json", "csv", "html"])
def test_each_form_of_a_sweep_has_every_setting(db: sa.Engine, form: str) -> None:
    found = text(swept(db), form)
    for slots in (1, 4, 16):
        assert (f'"slots": {slots}' if form == "json" else f"slots={slots}") in found.replace("\\", "")
    assert "knee" in found


def test_settings_are_run_in_turns_there_and_back() -> None:
    plan = Plan(JobOptions(dataset="d.jsonl"), {"slots": [1, 2], "kv_type": ["f16", "q8_0"]}, 2, "t")
    assert [each["slots"] for each in plan.combinations()] == [1, 1, 2, 2]
    assert [place for _, place in plan.order()] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_settings_go_by_their_other_names_and_unknown_ones_are_refused() -> None:
    assert axis("n_batch=256,512") == ("batch_tokens", [256, 512])
    assert axis("kv_type=f16,q8_0") == ("kv_type", ["f16", "q8_0"])
    with pytest.raises(PromptmillError, match="no setting 'nbatch'"):
        axis("nbatch=1")
    with pytest.raises(PromptmillError, match="not NAME=VALUE"):
        axis("n_batch=")


def test_a_step_in_a_noisy_history_is_a_change_and_noise_is_none() -> None:
    generator = np.random.default_rng(1)
    noise = generator.normal(100, 1, 30)
    assert change_points(noise) == []
    stepped = np.concatenate([noise[:18], noise[18:] * 0.9])
    assert change_points(stepped) == [(18, 0, 30)]


def test_a_trend_marks_the_job_from_which_on_it_is_slower(db: sa.Engine) -> None:
    for number in range(12):
        name = f"01T{number:02}"
        job(db, name, 10.0 if number < 6 else 12.0, submitted_at=START + number)
        add_tags(db, name, ["nightly"])
    (found,) = trends(db, "nightly", ["output_tps"])
    marked = [each for each in found.points if each.change is not None]
    assert [each.job_id for each in marked] == ["01T06"]
    assert marked[0].word == "worse"
    for form in ("md", "csv", "json"):
        assert "01T06" in trend_text([found], form)
    assert json.loads(trend_text([found], "json"))[0]["figure"] == "output_tps"
    with pytest.raises(PromptmillError, match="no figure 'outputtps'"):
        trends(db, "nightly", ["outputtps"])


def test_tags_are_kept_once_and_go_with_remove(db: sa.Engine) -> None:
    job(db, "01A", 1.0)
    add_tags(db, "01A", ["b", "a"])
    add_tags(db, "01A", ["a"])
    assert tags_of(db, "01A") == ["a", "b"]
    remove_tags(db, "01A", ["b"])
    assert [each.id for each in tagged(db, "a")] == ["01A"]
    with pytest.raises(UnknownName, match="no job has the tag 'b'"):
        tagged(db, "b")
    with pytest.raises(PromptmillError, match="cannot be a tag"):
        add_tags(db, "01A", [" x"])


def test_the_table_of_a_sweep_breaks_no_word_at_100_columns(
    db: sa.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from promptmill.cli.measure import sweep as command

    found = swept(db)
    wide = [Setting({"slots": each.values["slots"], "batch_tokens": 128}, each.runs) for each in found.settings]
    slow = Setting({"slots": 1, "batch_tokens": 64}, found.settings[0].runs, ("the model's file cannot be read",))
    monkeypatch.setattr(Setting, "scores", lambda self: {"is_advertisement.accuracy": 0.5})
    monkeypatch.setattr(Setting, "mean", _with_a_score(Setting.mean))
    command._print(Sweep("night", (*wide, slow)))
    table = capsys.readouterr().out.split("output tok/s\n")[0]
    for word in ("batch_tokens=128", "is_advertisement", "requests/s", "best", "knee", "failed:"):
        assert word in table
    assert max(map(len, table.splitlines())) <= 100


def _with_a_score(mean: Callable[[Setting, str], float | None]) -> Callable[[Setting, str], float | None]:
    return lambda self, name: 0.5 if name.endswith(".accuracy") else mean(self, name)


@pytest.fixture
def file_db(tmp_path: Path) -> Iterator[sa.Engine]:
    """A database that threads of a worker may share."""
    engine = open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield engine
    engine.dispose()


def test_a_tag_of_other_work_is_refused_before_anything_runs(file_db: sa.Engine, tmp_path: Path) -> None:
    for name in ("two", "other"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {row}"}}\n' for row in range(3)))
    options = JobOptions(dataset=str(tmp_path / "two.jsonl"), model="echo", sampling={"temperature": 0.0})
    plan = Plan(options, {"slots": [1, 2], "max_tokens": [5, 10]}, 1, "swp")
    settings = Settings(runtime_dir=str(tmp_path / "run"))
    first, _ = sweep(plan, settings, file_db)
    again, _ = sweep(plan, settings, file_db)
    jobs = [[run.job_id for run in each.runs] for each in first.settings]
    assert [[run.job_id for run in each.runs] for each in again.settings] == jobs
    for change, what in (
        ({"dataset": str(tmp_path / "other.jsonl")}, "dataset_sha256"),
        ({"selection": Selection(limit=2)}, "selection"),
        ({"template": "{{ prompt }}!"}, "task_sha256"),
        ({"sampling": {"temperature": 1.0}}, "sampling"),
    ):
        with pytest.raises(PromptmillError, match=rf"tag 'swp' holds runs of other work \(job .*: {what} differs\)"):
            sweep(replace(plan, options=options.changed(**change)), settings, file_db)
    assert [each.id for each in tagged(file_db, "swp")] == [each[0] for each in jobs]
