"""Datasets of other shapes: where id, input and expected values come from, and what validation says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from promptmill.cli import main
from promptmill.errors import BadLines, DatasetError, TaskFileError
from promptmill.readers import checked, open_dataset
from promptmill.service.lint import validate_dataset
from promptmill.tasks.task_file import parse_task
from promptmill.types import DatasetLine
from tests.conftest import ROOT

TASK = """\
task: t
id: 编号
input: {text: 评论, title: context.title}
expected: {label: 标签}
prompt: {user: "广告 or 正常? {{ input.text }} ({{ input.title }})"}
"""


def lines_of(path: Path, task: str = TASK) -> list[DatasetLine]:
    with open_dataset(path, has_template=True, **parse_task(task, "t").mapping) as dataset:
        return list(checked(dataset.lines(), dataset.number_duplicates))


def records(*labels: str) -> list[dict[str, Any]]:
    return [
        {"编号": f"c{n}", "评论": f"hello {n}", "标签": label, "context": {"title": "T"}}
        for n, label in enumerate(labels)
    ]


def test_a_json_file_with_one_list_is_read_through_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"info": {"n": 2}, "rows": records("广告", "正常")}, indent=1), encoding="utf-8")
    first, second = lines_of(path)
    assert (first.custom_id, first.fields, first.expected) == (
        "c0",
        {"text": "hello 0", "title": "T"},
        {"label": "广告"},
    )
    assert second.line == 2


def test_a_csv_with_chinese_headers_is_read_through_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("编号,评论,标签,作者,日期\n7,你好,正常,a,b\n", encoding="utf-8")
    (line,) = lines_of(path, TASK.replace(", title: context.title", "").replace(" ({{ input.title }})", ""))
    assert (line.custom_id, line.fields, line.expected) == ("7", {"text": "你好"}, {"label": "正常"})


def test_a_field_that_is_not_there_is_an_error_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"编号": "x", "评论": "hi"}]', encoding="utf-8")
    assert "no field 'context.title'" in (lines_of(path)[0].error or "")


@pytest.mark.parametrize("text", ["{}", '{"a": [{}], "b": [{}]}', "3", "[]", "[1", '[{"a": NaN}]'])
def test_json_without_one_list_of_records_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=r"a\.json"):
        lines_of(path)


@pytest.mark.parametrize(
    "ids", [(None, None, "row-1"), ("row-1", None), ("row-2", "x", None)], ids=["after", "before", "far"]
)
def test_a_generated_id_never_equals_a_given_one(ids: tuple[str | None, ...]) -> None:
    found = list(checked(DatasetLine(number, name, prompt="p") for number, name in enumerate(ids, 1)))
    good = [line.custom_id for line in found if line.error is None]
    assert len(good) == len(set(good)) == len(ids) - 1


def test_numbered_duplicates_never_meet_a_given_id() -> None:
    lines = [DatasetLine(number, name, prompt="p") for number, name in enumerate(("a", "a#2", "a", "a"), 1)]
    assert [line.custom_id for line in checked(lines, True)] == ["a", "a#2", "a#3", "a#4"]


def test_f18_an_expected_value_cannot_be_mapped_into_the_prompt() -> None:
    with pytest.raises(TaskFileError, match=r"t:3:\d+: the field '标签' is an expected value"):
        parse_task(TASK.replace("text: 评论", "text: 标签"), "t")


def test_validation_tells_duplicates_and_contradictions(tmp_path: Path) -> None:
    rows = records("广告", "正常", "正常")
    rows[1]["评论"] = rows[2]["评论"] = "hello 0"
    path, task = tmp_path / "a.json", tmp_path / "t.yaml"
    path.write_text(json.dumps(rows), encoding="utf-8")
    task.write_text(TASK, encoding="utf-8")
    found = validate_dataset(str(path), str(task), None)
    assert (found["contradictions"]["ids"], found["labels"]["label"]) == (["c1", "c2"], {'"正常"': 2, '"广告"': 1})
    assert found["problems"] == []


def test_f9_labels_that_the_prompt_or_the_schema_does_not_know_are_problems(shared: Path, tmp_path: Path) -> None:
    """The original wording asked for other labels than the dataset holds: no answer could ever be right."""
    data = shared / "data" / "manga_comment_ad_detection.json"
    bundled = ROOT / "datasets" / "manga_ads.yaml"
    good = validate_dataset(str(data), str(bundled), None)
    assert (good["rows"], good["problems"], good["duplicate_ids"]["ids"]) == (52, [], ["manga_000#2"])
    text = bundled.read_text(encoding="utf-8")
    worded = text.replace("QQ/微信联系广告", "联系方式").replace("诈骗类广告", "诈骗广告")
    for wording, problem in ((worded, "no answer can be"), (worded.partition("output:")[0], "prompt never names")):
        task = tmp_path / "t.yaml"
        task.write_text(wording, encoding="utf-8")
        (found,) = [each for each in validate_dataset(str(data), str(task), None)["problems"] if problem in each]
        assert "QQ/微信联系广告" in found
        assert "诈骗类广告" in found


def test_validation_never_speaks_of_enqueuing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(BadLines) as caught:
        validate_dataset(str(path), None, None)
    assert "enqueue" not in str(caught.value)
    assert "--skip-invalid" not in str(caught.value)


def test_errors_have_a_json_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ""}\n')
    monkeypatch.setattr("sys.argv", ["promptmill", "datasets", "validate", str(path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == said["exit_code"] == 2
    assert said["lines"] == [{"line": 1, "problem": "the prompt is empty"}]


def test_any_first_rows_of_the_bundled_dataset_hold_both_classes() -> None:
    lines = (ROOT / "datasets" / "ad_comments.jsonl").read_text(encoding="utf-8").splitlines()
    assert 8 <= sum(json.loads(line)["is_ad"] for line in lines[:20]) <= 12
    assert len({json.loads(line)["id"] for line in lines}) == 260


SCALE = """\
task: t
input: {text: 评论}
expected: {stars: 星级}
prompt: {user: "{{ input.text }}"}
output: {mode: constrain, schema: {type: object, required: [stars], properties: {stars: {type: integer, maximum: 5}}}}
scores: [{exact: stars}]
"""


def validated(tmp_path: Path, data: str, task: str, name: str = "a.csv") -> dict[str, Any]:
    (tmp_path / name).write_text(data, encoding="utf-8")
    (tmp_path / "t.yaml").write_text(task, encoding="utf-8")
    return validate_dataset(str(tmp_path / name), str(tmp_path / "t.yaml"), None)


def test_f9_values_that_the_schema_can_never_produce_are_problems(tmp_path: Path) -> None:
    good = validated(tmp_path, "评论,星级\n好,5\n坏,1\n", SCALE)
    # A table holds texts only; the schema says that the field is a number.
    assert good["problems"] == []
    bad = validated(tmp_path, "评论,星级\n好,7\n坏,many\n", SCALE)
    assert bad["problems"] == ["stars: expected labels that the schema does not allow: 7, many"]


def test_open_answers_are_no_classes_that_a_prompt_must_name(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"q": f"{n} + {n}", "a": str(2 * n)}) + "\n" for n in range(30))
    task = (
        "task: t\nexpected: {a: a}\nprompt: {user: '{{ input.q }}'}\noutput: {extract: {a: last_line}}\nscores: [%s]\n"
    )
    for score in ("{exact: a}", "{numeric: a, tolerance: 0.1}", "{contains: a}"):
        assert validated(tmp_path, lines, task % score, "a.jsonl")["problems"] == []


def test_labels_that_are_not_among_the_choices_are_problems(tmp_path: Path) -> None:
    task = (
        "task: t\nexpected: {a: a}\nprompt: {user: 'ad or not? {{ input.q }}'}\n"
        "generate: {choices: [ad, fine]}\nscores: [{exact: a}]\n"
    )
    found = validated(tmp_path, '{"q": "x", "a": "ad"}\n{"q": "y", "a": "not"}\n', task, "a.jsonl")
    assert found["problems"] == ["a: expected labels that no answer can be: not; answers are ad, fine"]
