"""One value for a job asked for, whoever asks; what is wrong with it is told by the names that they know."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner

import promptmill
from promptmill.api.http import errors as api_errors
from promptmill.cli import cli
from promptmill.cli.job.run import options_of, run
from promptmill.errors import BadOption
from promptmill.service.job_options import JobOptions
from promptmill.service.python_api import JobKeywords

#: What is given by its field, the options of the command line that say the same, and how the error begins there.
MISTAKES: list[tuple[dict[str, Any], list[str], str]] = [
    ({"max_errors": "200%"}, ["--max-errors", "200%"], "--max-errors 200% is neither"),
    ({"name": "@last"}, ["--name", "@last"], '--name "@last" cannot name a job'),
    ({"deadline": "soon"}, ["--deadline", "soon"], '--deadline "soon" is neither a span nor a time'),
    ({"time_limit": "0s"}, ["--time-limit", "0s"], '--time-limit "0s" is no span of time'),
    ({"prompt": "p"}, ["-p", "p"], "give DATASET or --prompt, and only one of them"),
    ({"task": "t.yaml", "system": "s"}, ["--task", "t.yaml", "--system", "s"], "--task and --template or --system exc"),
    ({"expected": ["a"]}, ["--expected", "a"], "--expected needs --template"),
    ({"use_cache": True, "store": "hash"}, ["--cache", "--store", "hash"], "--cache keeps answers"),
    ({"sampling": {"timeout_s": -1}}, ["--timeout", "-1"], "--timeout must be a number above 0"),
    ({"sampling": {"max_tokens": 0}}, ["--param", "max_tokens=0"], "'max_tokens' must be a whole number"),
    ({"sampling": {"stop": ["a"], "regex": "b"}}, ["--stop", "a", "--regex", "b"], "--stop is given with --regex"),
]


@pytest.mark.parametrize(("given", "typed", "told"), MISTAKES)
def test_a_mistake_is_told_on_the_command_line_by_the_option(
    given: dict[str, Any], typed: list[str], told: str
) -> None:
    for command in ("run", "submit"):
        done = CliRunner().invoke(cli, [command, "x.jsonl", "--model", "echo", *typed])
        assert isinstance(done.exception, BadOption)
        assert done.exception.message.startswith(told)


@pytest.mark.parametrize(("given", "typed", "told"), MISTAKES)
def test_the_same_mistake_is_told_in_python_and_by_the_api_by_the_field(
    given: dict[str, Any], typed: list[str], told: str
) -> None:
    with pytest.raises(BadOption) as caught:
        JobOptions.of({"dataset": "x.jsonl", "model": "echo"} | given)
    assert "--" not in str(caught.value)
    answer = api_errors.of(caught.value)
    assert (answer.status, answer.code) == (400, "invalid_value")
    assert answer.param in {"dataset", *given}


def test_python_refuses_an_option_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="unknown option 'temprature'"):
        promptmill.run([{"prompt": "p"}], temprature=1)  # type: ignore[call-arg]
    with pytest.raises(BadOption, match="'priority' cannot be used: input should be less than or equal to 9"):
        promptmill.submit([{"prompt": "p"}], model="echo", priority=12)


def test_the_command_line_and_python_make_the_same_value() -> None:
    typed = ["x.jsonl", "-m", "echo", "--max-tokens", "5", "--choice", "a", "--choice", "b", "--deadline", "2h",
             "--limit", "3", "--cache", "--slots", "2", "--context", "512"]  # fmt: skip
    with run.make_context("run", typed) as context:
        made = options_of(context.params)
    assert made == JobOptions(
        dataset="x.jsonl", model="echo", sampling={"max_tokens": 5, "choices": ["a", "b"]}, deadline="2h",
        selection=promptmill.Selection(limit=3), use_cache=True, slots=2, context_tokens=512,
    )  # fmt: skip


def test_keywords_of_python_are_the_fields() -> None:
    assert get_type_hints(JobKeywords).keys() == JobOptions.model_fields.keys() - {"dataset", "prompt"}


def test_options_cross_a_process_and_cannot_be_changed_unchecked() -> None:
    options = JobOptions(dataset="x.jsonl", deadline="2h", sampling={"max_tokens": 5})
    assert pickle.loads(pickle.dumps(options)) == options
    assert options.changed(if_exists="fail").if_exists == "fail"
    with pytest.raises(BadOption, match="'slots'"):
        options.changed(slots=0)
    with pytest.raises(ValueError, match="frozen"):
        options.slots = 3  # type: ignore[misc]
