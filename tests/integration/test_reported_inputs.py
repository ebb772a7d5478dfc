"""The numbered inputs that were reported, each with its command and what must happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from promptmill.cli import cli
from promptmill.database.engine import reading
from promptmill.database.revision import open_database
from promptmill.database.tables import requests
from promptmill.errors import PromptmillError


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it stored."""

    code: int
    out: str
    error: str
    #: Results as they were written, and requests as they were stored.
    rows: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]

    @property
    def problems(self) -> list[str | None]:
        """The error of each row, None for one that has an answer."""
        return [row["error"]["message"] if row["state"] == "error" else None for row in self.rows]


Check = Callable[[Ended], None]


def answers(*texts: str) -> Check:
    """The echo of each prompt."""

    def check(ended: Ended) -> None:
        assert (ended.code, ended.texts) == (0, list(texts))

    return check


def refused(*words: str) -> Check:
    """Nothing is done, and one error says all of ``words``."""

    def check(ended: Ended) -> None:
        assert (ended.code, ended.asked) == (2, [])
        assert [word for word in words if word not in ended.error] == []

    return check


def first_line_is_an_error(ended: Ended) -> None:
    assert ended.code == 0
    assert [row["state"] for row in ended.rows] == ["error", "ok"]
    assert "broken JSON" in str(ended.problems[0])
    assert ended.rows[1]["id"] == "b"


def what_is_ok_is_json(ended: Ended) -> None:
    assert {row["error"]["class"] for row in ended.rows if row["state"] == "error"} == {"grammar"}
    finished = [row["text"] for row in ended.rows if row["state"] == "ok" and row["finish_reason"] == "stop"]
    assert finished
    assert all(isinstance(json.loads(text), dict) for text in finished)


def null_is_not_set(ended: Ended) -> None:
    assert ended.code == 0
    assert [row["id"] for row in ended.rows] == ["1", "2"]
    assert [each["sampling"] for each in ended.asked] == [{"max_tokens": 8}, {"temperature": 0.5, "stop": ["x"]}]


def four_seeds(ended: Ended) -> None:
    assert [(each["sampling"] or {}).get("seed", 5) for each in ended.asked] == [5, 6, 7, 8]
    assert len(set(ended.texts)) == 4


def parts_on_lines(ended: Ended) -> None:
    assert "[user]\nFirst sentence.\nSecond sentence.\n" in ended.out


def thought_is_kept(ended: Ended) -> None:
    assert ended.code == 0
    assert ended.asked[0]["input"]["messages"][1] == {
        "role": "assistant", "content": "Hello", "reasoning_content": "greet back",
    }  # fmt: skip


def history_is_kept(ended: Ended) -> None:
    assert ended.code == 0
    assert [turn["content"] for turn in ended.asked[0]["input"]["messages"]] == ["Hi", "Hello", "Again"]
    assert ended.asked[0]["input"]["messages"][1] == {"role": "assistant", "content": "Hello"}


def bound_by_the_schema(ended: Ended) -> None:
    assert ended.code == 0
    assert [sorted(json.loads(text)) for text in ended.texts] == [["a"], ["a"]]


def developer_is_heard(ended: Ended) -> None:
    assert ended.code == 0
    assert "system\nBe brief." in ended.out
    assert "developer" not in ended.out


def a_quote_spoils_its_own_record(ended: Ended) -> None:
    assert ended.code == 0
    assert [(row["id"], row["text"]) for row in ended.rows if row["state"] == "ok"] == [
        ("1", '{"a": "b"}'), ("3", "third"), ("4", "fourth"),
    ]  # fmt: skip
    assert ended.problems[1] == "broken CSV: the quote that opens in line 3 is not closed where its field ends"


#: Two records, without a byte order mark and with one on each line.
FLAT, MARKED = "05-flat-jsonl-with-input-text.jsonl", "12-bom-in-the-middle.jsonl"
ALPACA = ("--template", "{{ instruction }} / {{ input }}", "--expected", "output")
ALPACA_ASKED = answers("Translate to French. / Good morning", "Name a colour. / ")

MISSPELLED = refused("in the field 'ouptut' that --expected names; fields: instruction, input, output")

#: Number, file, arguments of ``run`` behind it (or of another command that they begin with), and what must happen.
#: A ``{}`` in an argument is the folder of the files. In the order of the numbers.
REPORTED: list[tuple[str, str, tuple[str, ...], Check]] = [
    ("01", "01-csv-column-named-input.csv", ALPACA[:2], ALPACA_ASKED),
    ("01", "01-csv-column-named-input.csv", ALPACA, ALPACA_ASKED),
    ("01", "01-csv-column-named-input.csv", (*ALPACA[2:], "--template", "{{ output }}"), refused("'output' is undef")),
    ("03", "03-schema-dead-end-ends-ok.jsonl", ("-m", "demo"), what_is_ok_is_json),
    ("05", FLAT, ("--template", "{{ instruction }}", "--expected", "ouptut"), MISSPELLED),
    ("05", FLAT, ALPACA[:2], ALPACA_ASKED),
    ("05", FLAT, ALPACA, ALPACA_ASKED),
    ("05", "05-flat-parquet-with-input-text.parquet", ALPACA, answers("a / b")),
    ("05", "05-flat-jsonl-input-target.jsonl", ("--template", "{{ input }} ({{ metadata.level }})"),
     answers("What is 2+2? (1)")),
    ("05", "05-flat-jsonl-input-target.jsonl", (), refused("neither 'prompt' nor 'messages'", "--template")),
    ("06", "06-batch-file-first-line-broken.jsonl", ("--skip-invalid",), first_line_is_an_error),
    ("06", "06-batch-file-first-line-broken.jsonl", (), refused(":1:", "broken JSON")),
    ("07", "07-optional-parameters-null.jsonl", (), null_is_not_set),
    ("07", "07-optional-parameters-null.parquet", (), null_is_not_set),
    ("08", "08-repeat-with-seed.jsonl",
     ("-m", "demo", "--repeat", "4", "--seed", "5", "--temperature", "3", "--max-tokens", "8"), four_seeds),
    ("09", "09-text-parts-glued.jsonl", ("datasets", "show"), parts_on_lines),
    ("10", "10-history-with-own-reasoning_content.jsonl", (), thought_is_kept),
    ("10", "10-history-from-sdk-annotations.jsonl", (), history_is_kept),
    ("12", MARKED, ("--template", "@{}/12-template-with-bom.txt"), refused("'text' is undefined")),
    ("12", MARKED, ("--template", "@{}/12-bom-in-the-middle.txt"), answers("one\ntwo\n", "one\ntwo\n")),
    ("12", MARKED, (), answers("one", "two")),
    ("12", "12-bom-in-the-middle.txt", (), answers("one", "two")),
    ("12", MARKED, ("-m", "demo", "--schema", "{}/12-schema-with-bom.json"), bound_by_the_schema),
    ("13", "13-developer-role.jsonl", ("datasets", "show", "-m", "demo"), developer_is_heard),
    ("14", "14-jsonl-named-json.json", (), answers("one", "two")),
    ("14", "14-array-named-jsonl.jsonl", ("--skip-invalid", "--max-errors", "100%"), answers("one", "two")),
    ("15", "15-unclosed-quote-swallows-rows.csv", ("--skip-invalid",), a_quote_spoils_its_own_record),
    ("15", "15-unclosed-quote-swallows-rows.csv", (), refused(":3:", "quote that opens in line 3")),
    ("16", "16-column-named-like-a-parameter.csv", (), refused("the column 'choices'", "parameter")),
    ("16", "16-column-named-like-a-parameter.csv", ("--template", "{{ prompt }} {{ choices }} {{ n }}"),
     answers('Which is a fruit? ["apple","stone"] 1')),
    ("17", "17-cr-only-lines.csv", (), answers("one", "two")),
]  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "arguments", "check"),
    [pytest.param(*case[1:], id=f"{case[0]}-{place}") for place, case in enumerate(REPORTED)],
)
def test_a_reported_input_has_the_outcome_that_is_right(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, arguments: tuple[str, ...], check: Check
) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    monkeypatch.setenv("JOBS_DATABASE_URL", url)
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / "run"))
    folder = shared / "cases" / "files"
    given = [each.replace("{}", str(folder)) for each in arguments]
    check(run_datasets(folder / file, given) if given[:1] == ["datasets"] else run(folder / file, given, tmp_path, url))


def run(path: Path, arguments: list[str], folder: Path, url: str) -> Ended:
    """``promptmill run`` with the echo engine, unless the arguments name a model."""
    written = folder / "results.jsonl"
    model = [] if "-m" in arguments else ["-m", "echo"]
    ended = command(["run", str(path), *model, *arguments, "-o", str(written)])
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()] if written.exists() else []
    return Ended(ended.code, ended.out, ended.error, rows, stored(url))


def run_datasets(path: Path, arguments: list[str]) -> Ended:
    return command([*arguments[:2], str(path), *arguments[2:]])


def command(arguments: list[str]) -> Ended:
    """A command in this process, with the exit code that the program would have."""
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    problem = done.exception
    if problem is not None and not isinstance(problem, PromptmillError):
        raise problem
    code = problem.exit_code if problem is not None else getattr(done.return_value, "exit_code", done.exit_code)
    return Ended(code, done.output, str(problem or ""))


def stored(url: str) -> list[dict[str, Any]]:
    """The requests that were stored, of the last command."""
    db = open_database(url)
    with reading(db) as connection:
        found = connection.execute(sa.select(requests.c.input, requests.c.sampling).order_by(requests.c.row)).all()
    db.dispose()
    return [{name: json.loads(value) if value else None for name, value in row._asdict().items()} for row in found]
