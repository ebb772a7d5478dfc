"""Jobs from Python, and the real lm-evaluation-harness over them with its own task definitions on local files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import promptmill
from promptmill.errors import JobError, PromptmillError

TASK = """task: ads
prompt: {user: "{{ input.answer }}"}
expected: {label: label}
scores: [{exact: label}]
"""

LINES = [
    {"id": "a", "answer": '{"label": "ad"}', "label": "ad"},
    {"id": "b", "answer": '{"label": "ad"}', "label": "normal"},
    {"id": "c", "answer": "no idea", "label": "normal"},
]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / "run"))
    return f"sqlite:///{tmp_path / 'jobs.db'}"


def test_a_job_from_lines_in_memory_to_data_frames_and_scores(url: str, tmp_path: Path) -> None:
    task = tmp_path / "t.yaml"
    task.write_text(TASK, encoding="utf-8")
    job = promptmill.run(LINES, model="echo", task=task, database_url=url, name="evening")
    assert job.state.value == "completed"
    assert [line["text"] for line in job.results()] == [line["answer"] for line in LINES]
    assert job.scores()["label"].value == pytest.approx(1 / 3)
    frame = job.to_pandas(prompts=True)
    assert list(frame["id"]) == ["a", "b", "c"]
    assert [json.loads(each)["label"] for each in frame["expected"]] == ["ad", "normal", "normal"]
    assert job.to_polars()["output_tokens"].sum() == frame["output_tokens"].sum()
    run = job.score()
    # The first one was kept when the job ended.
    assert (run.number, run.scores["label"].correct) == (2, 1)
    assert promptmill.job("evening", url).report()["ok"] == 3
    assert job.wait(1).cancel() is False
    with pytest.raises(PromptmillError, match="there is no job 'other'"):
        promptmill.job("other", url)


def test_a_submitted_job_is_waited_for_no_longer_than_is_said(
    url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBS_REDIS_URL", redis_url)
    job = promptmill.submit(LINES, model="echo", template="{{ input.answer }}", database_url=url)
    with pytest.raises(TimeoutError, match=r"queued after 0\.1 s"):
        job.wait(0.1)
    assert job.cancel() is True
    assert job.wait(5).state.value == "cancelled"


# --- the harness -----------------------------------------------------------------------------------------------------


def bundled(name: str, tmp_path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A task as the harness ships it, its data taken from a local file instead of the hub."""
    import lm_eval.tasks

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / name).read_text(encoding="utf-8"))
    splits = {config.get(key) or "test" for key in ("training_split", "validation_split", "test_split")}
    files = {split: str(tmp_path / "data.jsonl") for split in splits if split}
    found = config | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    found.pop("dataset_name", None)
    return found


QUESTIONS: list[dict[str, Any]] = [
    {"id": "1", "question": "Which is a fruit?", "answerKey": "B",
     "choices": {"text": ["a stone", "an apple", "a car"], "label": ["A", "B", "C"]}},
    {"id": "2", "question": "What do cows give?", "answerKey": "A",
     "choices": {"text": ["milk", "oil"], "label": ["A", "B"]}},
]  # fmt: skip


def evaluated(lm: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    import warnings

    import lm_eval

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        # The harness's own libraries warn of each other.
        warnings.simplefilter("ignore")
        return dict(lm_eval.simple_evaluate(model=lm, tasks=[config], num_fewshot=0, bootstrap_iters=0))


def test_a_multiple_choice_task_of_the_harness_runs_as_a_job(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from promptmill.experiments.lm_eval import PromptmillLM

    lm = PromptmillLM("demo", database_url=url)
    found = evaluated(lm, bundled("arc/arc_easy.yaml", tmp_path, QUESTIONS), monkeypatch, tmp_path)
    (figures,) = found["results"].values()
    (line,) = {len(each["resps"]) for each in next(iter(found["samples"].values()))} - {2} or {3}
    # The figure of the harness is the one that the rows give: the likeliest continuation of each line.
    rows = list(promptmill.job(lm.jobs[0], url).results())
    best = [max(row["continuations"], key=lambda each: each["logprob"])["text"] for row in rows]
    right = [QUESTIONS[n]["choices"]["text"]["ABC".index(QUESTIONS[n]["answerKey"])] for n in range(2)]
    assert figures["acc,none"] == sum(one == f" {other}" for one, other in zip(best, right, strict=True)) / 2
    assert (line, len(rows)) == (3, 2)


def test_a_generating_task_of_the_harness_runs_as_a_job(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from promptmill.experiments.lm_eval import PromptmillLM

    records = [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}]
    lm = PromptmillLM("demo", database_url=url)
    config = bundled("gsm8k/gsm8k.yaml", tmp_path, records)
    found = evaluated(lm, config, monkeypatch, tmp_path)
    (figures,) = found["results"].values()
    (row,) = promptmill.job(lm.jobs[0], url).results()
    # The figure of the harness is the one that the row gives: its last number after the four signs.
    said = re.findall(r"#### (-?[0-9.,]+)", row["text"])
    assert figures["exact_match,strict-match"] == float(said[:1] == ["2"])
    assert "Question:" not in row["text"]


def test_texts_are_scored_from_their_start_and_alike_on_both_engines(url: str) -> None:
    """A longer text is less likely than its beginning; llama.cpp and MLX give the same log-probability."""
    from lm_eval.api.instance import Instance

    from promptmill.experiments.lm_eval import PromptmillLM

    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("hello", "hello world")]
    first, whole = PromptmillLM("demo", database_url=url).loglikelihood_rolling(asked)
    assert whole < first < 0.0
    assert PromptmillLM("demo:mlx", database_url=url).loglikelihood_rolling(asked) == pytest.approx(
        [first, whole], abs=0.05
    )


def test_what_no_job_can_obey_is_refused(url: str) -> None:
    from lm_eval.api.instance import Instance

    from promptmill.experiments.lm_eval import PromptmillLM

    with pytest.raises(JobError, match="num_beams"):
        PromptmillLM("demo", database_url=url).generate_until(
            [Instance("generate_until", {}, ("hi", {"num_beams": 4}), 0)]
        )
