"""Scores as a user asks for them: runs, groups, lists of rows, functions of one's own. The engine echoes prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from promptmill.scoring import runs
from tests.conftest import Command

TASK = """task: ads
prompt: {user: "{{ input.answer }}"}
expected: {label: label}
meta: {group: group}
scores: [{exact: label}]
"""

LINES: list[dict[str, Any]] = [
    {"id": "a", "answer": '{"label": "ad"}', "label": "ad", "group": "paid"},
    {"id": "b", "answer": '{"label": "ad"}', "label": "normal", "group": "paid"},
    {"id": "c", "answer": "no idea", "label": "normal", "group": "free"},
    {"id": "d", "answer": '{"label": "normal"}', "label": "normal", "group": None},
]


def ran(command: Command, folder: Path, lines: list[dict[str, Any]] = LINES, task: str = TASK) -> str:
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "t.yaml").write_text(task, encoding="utf-8")
    done = command("run", "data.jsonl", "--task", "t.yaml", "--model", "echo", "--json")
    assert done.code == 0, done.err
    return str(json.loads(done.out)["job_id"])


def test_scores_of_each_group_and_numbered_runs_that_stay(command: Command, tmp_path: Path) -> None:
    ran(command, tmp_path)
    first = json.loads(command("score", "@last", "--by", "meta.group", "--json").out)
    assert first["score_run"] == 2
    assert first["scores"]["label"]["value"] == 0.5
    assert {name: found["label"]["n"] for name, found in first["groups"].items()} == {"(none)": 1, "free": 1, "paid": 2}
    lenient = TASK.replace("scores:", 'output: {extract: {label: [{json: label}, whole]}, aliases: '
                           '{label: {no idea: normal}}}\nscores:')  # fmt: skip
    (tmp_path / "lenient.yaml").write_text(lenient, encoding="utf-8")
    second = json.loads(command("score", "@last", "--task", "lenient.yaml", "--json").out)
    assert (second["score_run"], second["scores"]["label"]["value"]) == (3, 0.75)

    flipped = command("show", "--flipped", "@last@s1", "@last@s3")
    assert (
        "label: 0 right in @last@s1 and wrong in @last@s3, 1 the other way; "
        "McNemar's exact test over inputs, 1 of them: p = 1" in flipped.out
    )
    assert 'won: c: label: expected "normal", unparsed -> "normal"' in flipped.out
    runs = command("query", "SELECT DISTINCT score_run FROM v_scores ORDER BY 1", "--format", "csv").out
    assert runs.split() == ["score_run", "1", "2", "3"]


def test_a_scored_job_keeps_a_score_run_when_it_ends_and_one_only(command: Command, tmp_path: Path) -> None:
    job_id = ran(command, tmp_path)
    sql = f"SELECT AVG(value) AS v FROM v_scores WHERE job_id = '{job_id}' AND metric = 'label' AND score_run = 1"
    assert command("query", sql, "--format", "csv").out.split() == ["v", "0.5"]
    seen = [json.loads(line) for line in command("query", "confusion", "--json").out.splitlines()]
    assert {(each["expected"], each["predicted"]): each["rows"] for each in seen} == {
        ('"ad"', '"ad"'): 1, ('"normal"', '"ad"'): 1, ('"normal"', '"normal"'): 1, ('"normal"', None): 1
    }  # fmt: skip
    assert command("watch", "@last", "--json").code == 0
    assert command("query", "SELECT COUNT(*) AS n FROM score_runs", "--format", "csv").out.split() == ["n", "1"]


def test_rows_are_listed_by_what_their_scores_say(command: Command, tmp_path: Path) -> None:
    ran(command, tmp_path)
    wrong = json.loads(command("show", "@last", "--wrong", "--json").out)
    assert [each["id"] for each in wrong] == ["b", "c"]
    unread = command("show", "@last", "--unparsed")
    assert unread.out == 'row 2, c: label: expected "normal", unparsed\n    no idea\n'
    assert "... and more" in command("show", "@last", "--wrong", "--limit", "1").out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["show", "@last"], "give a row, --wrong, --unparsed or --flipped A B"),
        (["show", "@last", "--wrong", "--score", "labl"], "there is no score 'labl'"),
        (["show", "@last@s7", "--wrong"], "has no score run @s7"),
        (["score", "@last", "--by", "group"], "cannot group by 'group'"),
        (["score", "@last", "--by", "meta.grup"], "no row has a field 'meta.grup'"),
    ],
)
def test_a_wrong_wish_is_one_clear_sentence(
    command: Command, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    ran(command, tmp_path)
    done = command(*arguments)
    assert (done.code, problem in done.err) == (2, True), done.err
    # Nothing half-done is left of a run that failed: the one there is was kept when the job ended.
    assert command("query", "SELECT COUNT(*) AS n FROM score_runs", "--format", "csv").out.split() == ["n", "1"]


def test_a_scorer_of_ones_own_sees_the_row_and_its_errors_are_counted(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(output, expected, item):\n"
        "    if item['id'] == 'c':\n        raise KeyError('no such sign')\n"
        "    return len(item['input']['fields']['answer']) < 16\n",
        encoding="utf-8",
    )
    task = TASK.replace("scores: [", "output: {extract: {label: whole}}\nscores: [{python: mine.py:short}, ")
    ran(command, tmp_path, task=task)
    found = json.loads(command("score", "@last", "--json").out)["scores"]["short"]
    assert (found["n"], found["correct"], found["scorer_errors"]) == (4, 2, 1)
    assert found["scorer_error"] == "KeyError: 'no such sign'"
    listed = command("show", "@last@s1", "--wrong", "--score", "short").out
    assert "scorer_error (KeyError: 'no such sign')" in listed
    (tmp_path / "mine.py").unlink()
    gone = command("score", "@last")
    assert (gone.code, "mine.py cannot be read" in gone.err) == (2, True)


#: Says which process asks, and waits until there are two of them.
TOGETHER = """
import os, pathlib, time
folder = pathlib.Path({folder!r})
def it(output, expected, item):
    (folder / str(os.getpid())).touch()
    give_up = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    return {{'value': item['row'] % 2, 'predicted': os.getpid()}}
"""


def test_many_rows_of_a_scorer_of_ones_own_are_scored_in_several_processes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "POOL_ROWS", 100)
    monkeypatch.setattr(runs, "PAGE_ROWS", 50)
    (tmp_path / "processes").mkdir()
    (tmp_path / "mine.py").write_text(TOGETHER.format(folder=str(tmp_path / "processes")), encoding="utf-8")
    lines = [{"id": f"r{row}", "answer": f'{{"label": {row}}}', "label": row} for row in range(130)]
    task = TASK.replace("meta: {group: group}\n", "").replace("exact: label", "python: mine.py:it")
    ran(command, tmp_path, lines, task)
    for mark in (tmp_path / "processes").iterdir():
        mark.unlink()
    found = json.loads(command("score", "@last", "--json").out)["scores"]["it"]
    # A number is neither right nor wrong.
    assert (found["n"], found["value"], found["correct"]) == (130, 0.5, None)
    query = "SELECT COUNT(DISTINCT predicted) AS n FROM v_scores"
    assert int(command("query", query, "--format", "csv").out.split()[1]) > 1


def test_examples_from_a_file_are_shown_to_the_model_and_stored_with_the_job(command: Command, tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text(
        '{"input": {"answer": "buy now"}, "output": {"label": "ad"}}\n'
        '{"input": {"answer": "hello"}, "output": "normal"}\n', encoding="utf-8",
    )  # fmt: skip
    task = TASK.replace('}}}"}', '}}}", examples: shots.jsonl, system: Judge., form: plain}')
    task = task.replace('prompt: {user: "{{ input.answer }}"}', 'prompt: {user: "{{ input.answer }}", '
                        'examples: shots.jsonl, system: Judge., form: plain}')  # fmt: skip
    ran(command, tmp_path, LINES[:1], task)
    (tmp_path / "shots.jsonl").unlink()
    shown = json.loads(command("show", "@last", "0", "--json").out)
    wanted = 'Judge.\n\nbuy now\n\n{"label": "ad"}\n\nhello\n\nnormal\n\n{"label": "ad"}'
    assert shown["prompt"] == wanted
    assert shown["result"]["text"] == wanted


def test_accuracy_f1_and_percentiles_are_those_that_pandas_gets_from_the_exported_rows(
    command: Command, tmp_path: Path
) -> None:
    import random

    import pandas as pd

    rng = random.Random(4)
    labels = ["ad", "normal", "spam"]
    lines = []
    for row in range(400):
        label, given = rng.choice(labels), rng.choice([*labels, None])
        text = "no idea" if given is None else json.dumps({"label": rng.choice([label, given])})
        lines.append({"id": f"r{row}", "answer": text, "label": label, "group": "g"})
    ran(command, tmp_path, lines)
    report = json.loads(command("report", "@last", "--format", "json").out)
    assert command("results", "@last", "-o", "rows.parquet", "--prompts").code == 0

    frame = pd.read_parquet(tmp_path / "rows.parquet")
    wanted = frame["expected"].map(lambda text: json.loads(text)["label"])
    given = frame["text"].map(lambda text: json.loads(text)["label"] if text.startswith("{") else "")
    right = wanted == given
    assert report["scores"]["label"]["value"] == right.mean()
    f1 = [2 * (right & (wanted == each)).sum() / ((wanted == each).sum() + (given == each).sum()) for each in labels]
    assert report["scores"]["label"]["macro_f1"] == pytest.approx(sum(f1) / 3, rel=1e-12)
    latency = frame["finished_at"] - frame["admitted_at"]
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert report["latency_s"][name] == pytest.approx(latency.quantile(share), rel=1e-9)


def test_a_table_of_five_columns_with_chinese_headers_needs_no_code(command: Command, tmp_path: Path) -> None:
    (tmp_path / "评论.csv").write_text(
        "编号,评论,标签,作者,日期\n7,加微信领红包,广告,甲,周一\n8,今天更新真快,正常,乙,周一\n9,画得好,正常,丙,周二\n",
        encoding="utf-8",
    )
    (tmp_path / "任务.yaml").write_text(
        "task: 广告\nid: 编号\ninput: {text: 评论}\nexpected: {label: 标签}\nmeta: {day: 日期}\n"
        'prompt: {system: "判断评论是广告还是正常。", user: "{{ input.text }}"}\n'
        "generate: {choices: [广告, 正常], max_tokens: 8}\n"
        "scores: [{exact: label}, {binary: label, positive: 广告, as: 是广告}, {choice_probability: label, as: p}]\n"
        'gates: {label.accuracy: ">=0", parsed: ">=1"}\n',
        encoding="utf-8",
    )
    checked = json.loads(
        command("datasets", "validate", "评论.csv", "--task", "任务.yaml", "--model", "demo", "--json").out
    )
    assert (checked["rows"], checked["labels"], checked["problems"]) == (3, {"label": {'"正常"': 2, '"广告"': 1}}, [])
    done = command("run", "评论.csv", "--task", "任务.yaml", "--model", "demo", "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out)["scores"]
    assert {name: (each["n"], each["unparsed"]) for name, each in scores.items()} == {
        "label": (3, 0), "是广告": (3, 0), "p": (3, 0)
    }  # fmt: skip
    assert {"auc", "brier", "ece", "precision", "recall"} <= scores["是广告"]["figures"].keys()
    assert 0.0 < scores["p"]["value"] < 1.0
    groups = json.loads(command("score", "@last", "--by", "meta.day", "--json").out)["groups"]
    assert {name: each["label"]["n"] for name, each in groups.items()} == {"周一": 2, "周二": 1}


def test_f3_a_job_whose_gate_failed_never_says_passed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    (tmp_path / "t.yaml").write_text(TASK + "gates: {label.accuracy: '>=0.9'}\n", encoding="utf-8")
    done = command("run", "data.jsonl", "--task", "t.yaml", "--model", "echo", "--json")
    assert done.code == 3
    report = json.loads(done.out)
    assert report["verdict"] == "completed, but gates failed: label.accuracy"
    assert [(each["value"], each["passed"]) for each in report["gates"]] == [(0.5, False), (1.0, True)]
    page = command("report", "@last").out
    assert page.rstrip().endswith("completed, but gates failed: label.accuracy")
    assert "gate label.accuracy >=0.9: 0.5, 95 % CI [" in page
