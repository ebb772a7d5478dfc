"""What commands conclude from figures: wrong rows, pairs, gates and speeds, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Command

ERRORS = """task: err
prompt: {user: "{{ input.answer }}", form: plain}
expected: {n: n}
scores: [{abs_error: n}]
"""


def rows(folder: Path, name: str, lines: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return name


def ran(command: Command, data: str, task: str, *more: str, code: int = 0) -> dict[str, Any]:
    done = command("run", data, "--task", task, "--model", "echo", "--json", *more)
    assert done.code == code, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def numbers(folder: Path, name: str, off: int) -> str:
    return rows(folder, name, [{"id": f"r{row}", "answer": json.dumps({"n": row + off}), "n": row} for row in range(9)])


def test_rows_are_wrong_by_what_their_score_calls_wrong(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(ERRORS, encoding="utf-8")
    ran(command, numbers(tmp_path, "right.jsonl", 0), "t.yaml", "--name", "right")
    ran(command, numbers(tmp_path, "wrong.jsonl", 1), "t.yaml", "--name", "wrong")

    assert command("show", "right", "--wrong").out.strip() == "no such row"
    assert command("show", "wrong", "--wrong").out.count("row ") == 9
    listed = command("query", "SELECT id FROM v_scores WHERE NOT is_right", "--format", "csv").out.split()
    assert listed == ["id", *(f"r{row}" for row in range(9))]


def test_a_score_by_which_nothing_is_right_has_no_wrong_rows(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(ERRORS.replace("abs_error: n", "python: s.py:far"), encoding="utf-8")
    (tmp_path / "s.py").write_text("def far(output, expected, item):\n    return output['n'] / 7\n", encoding="utf-8")
    ran(command, numbers(tmp_path, "a.jsonl", 0), "t.yaml", "--name", "a")

    done = command("show", "a", "--wrong", "--score", "far")
    assert done.code == 2
    assert "by the score 'far' of a nothing is right or wrong" in done.err


def test_rows_of_unrelated_files_are_no_pairs(command: Command, tmp_path: Path) -> None:
    """Rows without ids are called row-0, row-1 in any file."""
    (tmp_path / "t.yaml").write_text(ERRORS.replace("abs_error", "exact"), encoding="utf-8")
    for name, start, wrong in (("one", 0, 0), ("two", 100, 30)):
        lines = [
            {"answer": json.dumps({"n": row + (row < start + wrong)}), "n": row} for row in range(start, start + 60)
        ]
        ran(command, rows(tmp_path, f"{name}.jsonl", lines), "t.yaml", "--name", name)

    found = json.loads(command("compare", "one", "two", "--json").out)
    line = next(each for each in found["figures"] if each["name"] == "n.accuracy")
    assert (found["common_rows"], line["note"], line["word"]) == (0, "not the same rows: not paired", "worse")
    assert found["warnings"][0] == "60 rows have the same id and another input: they are not the same rows"


def copied(folder: Path, name: str, wrong: int, copies: int = 8, **more: str) -> str:
    """40 questions, each so many times, told apart by a field that the prompt does not show."""
    lines = [
        {
            "id": f"r{row}",
            "answer": json.dumps({"n": row % 40 + 100 * (row % 40 < wrong)}),
            "n": row % 40,
            "at": row,
            **more,
        }
        for row in range(40 * copies)
    ]
    return rows(folder, name, lines)


def test_a_field_that_no_prompt_shows_makes_no_new_observation(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(ERRORS.replace("abs_error", "exact"), encoding="utf-8")
    once = ran(command, copied(tmp_path, "once.jsonl", 4, copies=1), "t.yaml", "--name", "once")["scores"]["n"]
    often = ran(command, copied(tmp_path, "often.jsonl", 4), "t.yaml", "--name", "often")["scores"]["n"]
    assert (once["n"], often["n"], often["n_effective"]) == (40, 320, pytest.approx(40, abs=2))
    assert often["ci95"] == pytest.approx(once["ci95"], abs=0.01)

    ran(command, copied(tmp_path, "better.jsonl", 1), "t.yaml", "--name", "better")
    found = compared(command, "often", "better")
    [line] = [each for each in found["figures"] if each["name"] == "n.accuracy"]
    assert line["word"] != "better", "3 of 40 questions are no difference, however often they are asked"
    [flips] = [each for each in found["flips"] if each["name"] == "n"]
    assert flips["p"] == line["p_holm"], "one verdict, corrected once"


def test_one_line_is_a_pair_whatever_the_prompts_or_other_columns_are(command: Command, tmp_path: Path) -> None:
    for name in ("t", "u"):
        text = ERRORS.replace("abs_error", "exact").replace(
            "{{ input.answer }}", "{{ input.answer }}" + " " * (name == "u")
        )
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    data = copied(tmp_path, "a.jsonl", 4, copies=1)
    ran(command, data, "t.yaml", "--name", "first")
    ran(command, data, "u.yaml", "--name", "other-prompt")
    ran(command, copied(tmp_path, "b.jsonl", 4, copies=1, source="new"), "t.yaml", "--name", "other-column")
    for name in ("other-prompt", "other-column"):
        assert compared(command, "first", name)["common_rows"] == 40


def test_a_line_that_lacks_its_input_keeps_what_it_expects(command: Command, tmp_path: Path) -> None:
    text = ERRORS.replace("abs_error: n", "exact: n, unanswered: wrong").replace(
        "expected:", "input: {answer: answer}\nexpected:"
    )
    (tmp_path / "t.yaml").write_text(text, encoding="utf-8")
    whole = [{"id": f"r{row}", "answer": json.dumps({"n": row}), "n": row} for row in range(8)]
    lacking = [{"id": f"bad{row}", "n": row} for row in range(8)]
    data = rows(tmp_path, "a.jsonl", whole + lacking)
    done = command("run", data, "--task", "t.yaml", "--model", "echo", "--json", "--skip-invalid")
    score = json.loads(done.out)["scores"]["n"]
    assert (score["n"], score["correct"], score["value"]) == (16, 8, 0.5)


def test_rows_that_expect_another_answer_are_not_set_against_each_other(command: Command, tmp_path: Path) -> None:
    """Not one answer has changed; labels, and how they are read, have."""
    exact = ERRORS.replace("abs_error", "exact")
    (tmp_path / "t.yaml").write_text(exact, encoding="utf-8")
    (tmp_path / "u.yaml").write_text(exact + "output: {aliases: {n: {'x': 'y'}}}\n", encoding="utf-8")
    lines: list[dict[str, Any]] = [
        {"id": f"r{row}", "answer": json.dumps({"n": row}), "n": row + (row < 3)} for row in range(40)
    ]
    ran(command, rows(tmp_path, "a.jsonl", lines), "t.yaml", "--name", "first")
    ran(command, "a.jsonl", "u.yaml", "--name", "read-otherwise")
    relabelled = [line | {"n": int(line["id"][1:]) + (int(line["id"][1:]) < 20)} for line in lines]
    ran(command, rows(tmp_path, "b.jsonl", relabelled), "t.yaml", "--name", "relabelled")

    found = compared(command, "first", "read-otherwise")
    assert next(each for each in found["figures"] if each["name"].startswith("n."))["note"].startswith("not comparable")
    found = compared(command, "first", "relabelled")
    assert "17 rows expect another answer in the other job: no score compares them" in found["warnings"]
    assert next(each for each in found["figures"] if each["name"] == "n.accuracy")["change"] == 0.0
    done = command("show", "--flipped", "first", "relabelled")
    assert "no row is right in the one and wrong in the other" in done.out
    assert "17 rows of one id ask something else, or another answer is expected: they are left out" in done.out


def compared(command: Command, before: str, after: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command("compare", before, after, "--json").out)
    return found


def test_scores_of_one_name_and_two_kinds_are_not_compared(command: Command, tmp_path: Path) -> None:
    (tmp_path / "exact.yaml").write_text(ERRORS.replace("abs_error", "exact"), encoding="utf-8")
    (tmp_path / "close.yaml").write_text(ERRORS.replace("abs_error: n", "closeness: n, span: 5"), encoding="utf-8")
    data = numbers(tmp_path, "a.jsonl", 1)
    for name in ("exact", "close"):
        ran(command, data, f"{name}.yaml", "--name", name)

    found = json.loads(command("compare", "exact", "close", "--json").out)
    line = next(each for each in found["figures"] if each["name"].startswith("n."))
    assert line["word"] == ""
    assert line["note"].startswith("not comparable ({")
    assert "closeness" in line["note"]


def test_repeated_runs_tell_a_slower_setting_from_a_mood(command: Command, tmp_path: Path) -> None:
    data = rows(tmp_path, "a.jsonl", [{"id": f"r{row}", "prompt": f"some words to say {row}"} for row in range(24)])
    for name, token_s in (("fast", 0.002), ("slow", 0.006)):
        done = command("run", data, "--model", f"echo:token_s={token_s}", "--slots", "4", "--name", name,
                       "--repeat-runs", "3", "--json")  # fmt: skip
        assert done.code == 0, done.err
    listed = json.loads(command("list", "--json").out)
    assert len(listed) == 6

    fast, slow = (next(each["job_id"] for each in listed if each["name"] == name) for name in ("fast", "slow"))
    found = json.loads(command("compare", fast, slow, "--json", "--force").out)
    line = next(each for each in found["figures"] if each["name"] == "latency_s.mean")
    assert (found["runs"], line["word"], line["note"]) == ([3, 3], "worse", "3 and 3 runs")

    (tmp_path / "once.jsonl").write_text((tmp_path / "a.jsonl").read_text(encoding="utf-8").replace("say", "write"))
    ids = [json.loads(command("run", "once.jsonl", "--model", model, "--json").out)["job_id"]
           for model in ("echo:token_s=0.001", "echo:token_s=0.004")]  # fmt: skip
    found = json.loads(command("compare", *ids, "--json", "--force").out)
    line = next(each for each in found["figures"] if each["name"] == "latency_s.mean")
    assert (line["word"], line["note"]) == ("", "one run each: not tested")


@pytest.mark.parametrize("option", [("--if-exists", "attach"), ("--cache",)])
def test_repeated_runs_that_would_be_no_runs_are_refused(command: Command, tmp_path: Path, option: list[str]) -> None:
    data = rows(tmp_path, "a.jsonl", [{"prompt": "hi"}])
    done = command("run", data, "--model", "echo", "--repeat-runs", "2", *option)
    assert done.code == 2
    assert "--repeat-runs" in done.err


def test_labels_that_no_answer_can_be_stop_a_job_before_it_runs(command: Command, tmp_path: Path) -> None:
    task = ERRORS.replace("scores:", "output: {schema: {type: object, properties: {n: {type: boolean}}}}\nscores:")
    (tmp_path / "t.yaml").write_text(task.replace("abs_error", "exact"), encoding="utf-8")
    data = rows(tmp_path, "a.jsonl", [{"answer": '{"n": true}', "n": 1}, {"answer": '{"n": false}', "n": 0}])
    done = command("run", data, "--task", "t.yaml", "--model", "echo")
    assert done.code == 2
    assert "n: expected labels that no answer can be: 1, 0; answers are true, false" in done.err
    assert command("list", "--json").out.strip() == "[]"


def test_a_failed_job_leaves_no_old_gates(command: Command, tmp_path: Path) -> None:
    task = ERRORS + "gates: {n.abs_error: {demand: '<=0.5', ci: true}}\n"
    (tmp_path / "t.yaml").write_text(task, encoding="utf-8")
    gates = tmp_path / "gates.xml"
    good = rows(
        tmp_path, "a.jsonl", [{"id": f"r{row}", "answer": json.dumps({"n": row}), "n": row} for row in range(9)]
    )
    # Nine errors of 0: there is no telling how far off the next one may be.
    done = command("run", good, "--task", "t.yaml", "--model", "echo", "--junit", str(gates))
    assert done.code == 3
    assert "gate n.abs_error <=0.5: 0 has no interval: equal values, FAILED" in done.err
    assert gates.exists()

    done = command("run", good, "--task", "t.yaml", "--model", "echo:error_on=n", "--junit", str(gates), "--force")
    assert done.code not in (0, 2)
    assert not gates.exists()


def test_a_scorer_that_changed_is_told_and_the_stored_run_speaks(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(ERRORS.replace("abs_error: n", "python: s.py:right"), encoding="utf-8")
    scorer = tmp_path / "s.py"
    scorer.write_text("def right(output, expected, item):\n    return output['n'] == expected['n']\n", encoding="utf-8")
    ran(command, numbers(tmp_path, "a.jsonl", 0), "t.yaml")
    assert "has changed" not in command("report", "@last").out
    scorer.write_text("def right(output, expected, item):\n    return False\n", encoding="utf-8")
    for told in ("the scorer's file has changed since", "the scorer file s.py is gone since"):
        report = command("report", "@last")
        assert report.code == 0
        assert "100.0" in report.out
        assert told in " ".join(report.out.split())
        scorer.unlink(missing_ok=True)


def test_a_condition_says_whether_it_was_tested(command: Command, tmp_path: Path) -> None:
    lines = [{"id": f"r{row}", "a": json.dumps({"n": row}), "b": json.dumps({"n": row + (row < 2)}), "n": row}
             for row in range(40)]  # fmt: skip
    data = rows(tmp_path, "data.jsonl", lines)
    for name, answer in (("one", "a"), ("two", "b")):
        task = ERRORS.replace("abs_error", "exact").replace("input.answer", f"input.{answer}")
        (tmp_path / "t.yaml").write_text(task, encoding="utf-8")
        ran(command, data, "t.yaml", "--name", name)
    done = command("compare", "one", "two", "--fail-if", "n.accuracy<-2pp", "--fail-if", "output_tps>-100%", "--force")
    assert done.code == 3
    assert "failed: n.accuracy<-2pp holds for" in done.err
    assert "may be chance" in done.err
    assert "(a point, not tested: one run each: not tested)" in done.err


def test_the_first_task_file_has_precision_and_one_edit_has_auc(command: Command, tmp_path: Path) -> None:
    """What a new user does: init, run; then choices instead of a written answer."""
    assert command("init", "ad-detection", "-o", "ads.yaml").code == 0
    data = str(ROOT / "datasets" / "ad_comments.jsonl")
    report = json.loads(command("run", data, "--task", "ads.yaml", "--model", "demo", "--limit", "24", "--json").out)
    assert {"precision", "recall", "f1"} <= report["scores"]["ad"]["figures"].keys()

    text = (tmp_path / "ads.yaml").read_text(encoding="utf-8")
    head, _, tail = text.partition("generate:")
    scores = tail[tail.index("scores:") : tail.index("# Judged")]
    chosen = f'{head}generate: {{choices: ["true", "false"]}}\n{scores}'
    (tmp_path / "choices.yaml").write_text(chosen, encoding="utf-8")
    report = json.loads(
        command("run", data, "--task", "choices.yaml", "--model", "demo", "--limit", "24", "--json").out
    )
    assert report["scores"]["ad"]["figures"]["auc"] is not None
