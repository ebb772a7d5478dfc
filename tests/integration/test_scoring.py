"""Scores as a user asks for them: runs, groups, lists of rows, functions of one's own. The engine echoes prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

TASK = """task: ads
prompt: {user: "{{ input.answer }}"}
expected: {label: label}
meta: {group: group}
scores: [{exact: label}]
"""

LINES = [
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
    assert first["score_run"] == 1
    assert first["scores"]["label"]["value"] == 0.5
    assert {name: found["label"]["n"] for name, found in first["groups"].items()} == {"(none)": 1, "free": 1, "paid": 2}
    lenient = TASK.replace("scores:", 'output: {extract: {label: [{json: label}, whole]}, aliases: '
                           '{label: {no idea: normal}}}\nscores:')  # fmt: skip
    (tmp_path / "lenient.yaml").write_text(lenient, encoding="utf-8")
    second = json.loads(command("score", "@last", "--task", "lenient.yaml", "--json").out)
    assert (second["score_run"], second["scores"]["label"]["value"]) == (2, 0.75)

    flipped = command("show", "--flipped", "@last@s1", "@last@s2")
    assert (
        "label: 0 right in @last@s1 and wrong in @last@s2, 1 the other way; McNemar's exact test p = 1" in flipped.out
    )
    assert 'won: c: label: expected "normal", unparsed -> "normal"' in flipped.out
    runs = command("query", "SELECT DISTINCT score_run FROM v_scores ORDER BY 1", "--format", "csv").out
    assert runs.split() == ["score_run", "1", "2"]


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
    # Nothing half-done is left of a run that failed.
    assert command("query", "SELECT COUNT(*) AS n FROM score_runs", "--format", "csv").out.split() == ["n", "0"]


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


def test_many_rows_of_a_scorer_of_ones_own_are_scored_in_several_processes(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\ndef it(output, expected, item):\n    return {'value': item['row'] % 2, 'predicted': os.getpid()}\n",
        encoding="utf-8",
    )
    lines = [{"id": f"r{row}", "answer": f'{{"label": {row}}}', "label": row} for row in range(20_500)]
    task = TASK.replace("meta: {group: group}\n", "").replace("exact: label", "python: mine.py:it")
    ran(command, tmp_path, lines, task)
    found = json.loads(command("score", "@last", "--json").out)["scores"]["it"]
    assert (found["n"], found["correct"]) == (20_500, 10_250)
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
