"""Task files: what is read from them, and where each mistake is said to be."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from promptmill.cli.admin import init
from promptmill.cli.admin.init import KINDS
from promptmill.errors import TaskFileError
from promptmill.tasks.task_file import Task, load_task, parse_task
from promptmill.types import Message

WHOLE = """\
task: ads
prompt:
  system: Be brief.
  user: "Comment: {{ input.comment }}"
generate: {max_tokens: 32, temperature: 0, top_k: 5, top_p: 0.9, min_p: 0.1, seed: 7, stop: [END],
           timeout_s: 3, ignore_eos: false}
expected: {is_ad: label}
output:
  mode: free
  schema: {type: object, required: [is_ad]}
scores:
  - exact: is_ad
"""


def problem_of(text: str) -> str:
    with pytest.raises(TaskFileError) as caught:
        parse_task(text, "a.yaml")
    return str(caught.value)


def test_a_task_says_all_that_a_job_needs() -> None:
    task = parse_task(WHOLE, "a.yaml")
    assert (task.name, task.expected, task.scores) == ("ads", {"is_ad": "label"}, [{"exact": "is_ad"}])
    assert task.generate == {
        "max_tokens": 32, "temperature": 0.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ("END",),
        "timeout_s": 3.0, "ignore_eos": False,
    }  # fmt: skip
    assert task.output.schema_ == {"type": "object", "required": ["is_ad"]}
    assert task.template.render({"comment": "c"}, None) == (
        Message("system", "Be brief."),
        Message("user", "Comment: c"),
    )


def test_the_least_a_task_can_say() -> None:
    task = parse_task("task: a\nprompt: {user: hi}", "a.yaml")
    assert (task.generate, task.expected, task.scores, task.output.schema_) == ({}, {}, [], None)


def test_a_task_comes_back_from_its_stored_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(WHOLE)
    task = load_task(path)
    again = parse_task(task.text, "stored")
    assert (again.model, again.sha256) == (task.model, task.sha256)
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "template", ["{{ x }}", "a: b # c\n  'd'\n", "评论：\t{{ x }}\r\n", '- \\ "', "|\n", "\x85\u2028x"]
)
@pytest.mark.parametrize("system", [None, "s: {{ x }}"])
def test_a_template_of_the_command_line_is_a_task_that_comes_back(template: str, system: str | None) -> None:
    task = Task.from_template(template, system)
    again = parse_task(task.text, "stored")
    assert (again.template.user, again.template.system) == (template, system)


def test_a_wrong_template_of_the_command_line_names_no_file() -> None:
    with pytest.raises(TaskFileError, match=r"^user template, line 1: "):
        Task.from_template("{{ x")


def test_the_bundled_task_is_valid() -> None:
    task = load_task(Path(__file__).parents[2] / "datasets" / "ad_comments.task.yaml")
    assert task.expected == {"is_ad": "is_ad"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a.yaml: a task file has keys"),
        ("- a\n", "a.yaml: a task file has keys"),
        ("task: [a\n", "a.yaml:2:1: not YAML: "),
        ("task: a\n---\ntask: b\n", "a.yaml:3:1: a task file is one YAML document"),
        ("task: !!python/object:os.system {}\nprompt: {user: hi}", "a.yaml:1:7: not YAML: "),
        ("task: 2024-99-99\nprompt: {user: hi}", "a.yaml: not YAML: "),
        ("task: a\nprompt: {user: hi}\ntask: b\n", "a.yaml:3:1: the key 'task' is there twice"),
        ("task: a\nprompt: {user: hi, user: ho}\n", "a.yaml:2:20: the key 'user' is there twice"),
        ("task: a\n? [b]\n: c\nprompt: {user: hi}\n", "a.yaml"),
        ("task: a\n", "a.yaml:1:1: the key 'prompt' is missing"),
        ("task: a\nprompt: {system: s}\n", "a.yaml:2:1: the key 'prompt.user' is missing"),
        ("task: a\nprompt: {user: hi}\ntsk: b\n", "a.yaml:3:1: unknown key 'tsk'. Did you mean task?"),
        ("task: a\nprompt:\n  user: hi\n  sytem: s\n", "a.yaml:4:3: unknown key 'prompt.sytem'. Did you mean system?"),
        ("task: a\nprompt:\n  user: 5\n", "a.yaml:3:3: prompt.user: Input should be a valid string"),
        ("task: ''\nprompt: {user: hi}\n", "a.yaml:1:1: task: String should have at least 1 character"),
        (
            "task: a\nprompt: {user: hi}\ngenerate:\n  max_token: 5\n",
            "a.yaml:4:3: unknown parameter 'max_token'. Did you mean max_tokens?",
        ),
        (
            "task: a\nprompt: {user: hi}\ngenerate:\n  seed: 1\n  top_p: 7\n",
            "a.yaml:5:3: 'top_p' must be a number above 0 to 1",
        ),
        (
            "task: a\nprompt: {user: hi}\nscores:\n  - exakt: b\n",
            "a.yaml:4:5: unknown score 'exakt'. Did you mean exact? Known: abs_error,",
        ),
        ("task: a\nprompt: {user: hi}\nscores:\n  - {}\n", "a.yaml:4:5: a score begins with its name and one field"),
        (
            "task: a\nprompt: {user: hi}\nexpected: {is_ad: label}\nscores:\n  - exact: label\n",
            "a.yaml:5:5: 'label' is not among the expected values. Known: is_ad.",
        ),
        ("task: a\nprompt: {user: hi}\nexpected: {is_ad: 5}\n", "a.yaml:3:12: expected.is_ad: Input should be a valid"),
        (
            "task: a\nprompt: {user: hi}\noutput: {mode: strict}\n",
            "a.yaml:3:10: output.mode: Input should be 'constrain', 'validate' or 'free'",
        ),
        ("task: a\nprompt: {user: hi}\noutput: {mode: constrain}\n", "a.yaml:3:10: 'constrain' needs a schema"),
        (
            "task: a\nprompt: {user: hi}\noutput:\n  mode: constrain\n  schema: {type: objct}\n",
            "a.yaml:5:3: 'json_schema' must be a JSON schema that can be enforced; of this one: Invalid type: objct",
        ),
        ("task: a\nprompt:\n  user: '{{ x'\n", "a.yaml:3:3: user template, line 1: unexpected end"),
        ("task: a\nprompt:\n  user: |\n    hi\n\n    {{ expected }}\n", "a.yaml:6: user template, line 3: 'expected'"),
    ],
)
def test_each_mistake_is_said_with_its_place(text: str, problem: str) -> None:
    assert problem_of(text).startswith(problem)


def test_a_constrained_output_binds_what_is_generated() -> None:
    schema = "{type: object, properties: {b: {}, a: {}}}"
    task = parse_task(f"task: a\nprompt: {{user: hi}}\noutput:\n  mode: constrain\n  schema: {schema}\n", "a")

    assert task.generate["json_schema"] == '{"type": "object", "properties": {"b": {}, "a": {}}}'


def test_all_mistakes_are_said_at_once() -> None:
    text = "task: a\nprompt: {user: hi}\ngenerate: {top_p: 7, seed: x}\nscores: [{exakt: a}]\n"
    assert len(problem_of(text).splitlines()) == 3


@pytest.mark.parametrize("place", ["output:\n schema:\n", "generate:\n json_schema:\n", "prompt:\n x:\n"])
def test_aliases_that_stand_for_millions_of_values_are_refused_before_they_are_written_out(place: str) -> None:
    levels = "".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    head = "task: a\n" if place.startswith("prompt") else "task: a\nprompt: {user: hi}\n"
    started = time.process_time()
    # Only the text: pytest would write the tree out, with all its aliases.
    problem = problem_of(f"{head}{place}  l0: &l0 [x]\n{levels}")
    assert "more than 100,000 values, with aliases written out" in problem
    assert time.process_time() - started < 5


def test_a_list_within_itself_does_not_hang() -> None:
    assert problem_of("task: a\nprompt: {user: hi}\nexpected: &x {a: *x}\n").startswith("a.yaml")


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_task_file_from_windows_is_read(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(change(WHOLE).encode())
    task = load_task(path)
    assert task.model == parse_task(WHOLE, "a.yaml").model
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_task_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="there is no task file"):
        load_task(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"task: \xff", None])
def test_a_task_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(TaskFileError, match="cannot read the task file"):
        load_task(path)


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_to_begin_with_can_be_used(kind: str) -> None:
    path = Path(init.__file__).with_name("task_templates") / f"{kind}.yaml"
    task = parse_task(path.read_text(encoding="utf-8"), path.name)
    assert task.name == kind
