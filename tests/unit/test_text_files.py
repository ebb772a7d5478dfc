"""Byte order marks in every kind of text file that people write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from promptmill.cli import cli
from promptmill.core.settings import load_settings
from promptmill.errors import PromptmillError
from promptmill.tasks.task_file import load_task

TASK = "task: t\nprompt: {user: '{{ x }}', examples: shots.jsonl}\n"
SHOTS = '\ufeff{"input": {"x": "a"}, "output": "b"}\n\ufeff{"input": {"x": "c"}, "output": "d"}\n'
SCHEMA = '\ufeff{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'


def ask(*arguments: str, stdin: str | None = None) -> list[dict[str, Any]]:
    """The result lines of ``promptmill run``."""
    done = CliRunner().invoke(
        cli, ["run", *arguments, "-o", "out.jsonl", "--force"], input=stdin, standalone_mode=False
    )
    if done.exception is not None:
        raise done.exception
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOBS_DATABASE_URL", f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "d.jsonl").write_text('\ufeff{"x": "one"}\n', encoding="utf-8")
    return tmp_path


def test_a_template_from_a_file_begins_with_its_text(folder: Path) -> None:
    (folder / "t.txt").write_bytes("\ufeffQ: {{ x }}\r\n\ufeffA:".encode())
    (row,) = ask("d.jsonl", "-m", "echo", "--template", "@t.txt")
    assert row["text"] == "Q: one\nA:"


@pytest.mark.parametrize("by", ["file", "standard input"])
def test_a_schema_may_begin_with_a_byte_order_mark(folder: Path, by: str) -> None:
    (folder / "s.json").write_text(SCHEMA, encoding="utf-8")
    schema, stdin = ("s.json", None) if by == "file" else ("-", SCHEMA)
    (row,) = ask("d.jsonl", "-m", "demo", "--template", "{{ x }}", "--schema", schema, stdin=stdin)
    assert isinstance(json.loads(row["text"])["a"], bool)


def test_examples_of_a_task_may_begin_with_byte_order_marks(folder: Path) -> None:
    (folder / "shots.jsonl").write_text(SHOTS, encoding="utf-8")
    (folder / "t.yaml").write_text("\ufeff" + TASK, encoding="utf-8")
    turns = load_task(folder / "t.yaml").template.render({"x": "e"}, None)
    assert [turn.content for turn in turns] == ["a", "b", "c", "d", "e"]


def test_the_first_line_of_dotenv_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS_MODEL", raising=False)
    (folder / ".env").write_text("\ufeffJOBS_MODEL=echo\n", encoding="utf-8")
    assert load_settings().model == "echo"


def test_expected_fields_are_named_beside_a_template(folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"input": "2+2?", "target": "4"}\n', encoding="utf-8")
    (row,) = ask("d.jsonl", "-m", "echo", "--template", "{{ input }}", "--expected", "target")
    assert row["text"] == "2+2?"
    for template, problem in (("{{ target }}", "'target' is undefined"), ("{{ meta }}", "is all fields")):
        with pytest.raises(PromptmillError, match=problem):
            ask("d.jsonl", "-m", "echo", "--template", template, "--expected", "target")
    with pytest.raises(PromptmillError, match="--expected needs --template"):
        ask("d.jsonl", "-m", "echo", "--expected", "target")
