"""The task file: prompts, sampling, expected values, output and scores of a job, in YAML."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from promptmill.errors import PromptmillError, TaskFileError
from promptmill.prompts import Template
from promptmill.registry import suggestion
from promptmill.sampling import BadParameter, check_parameter

#: Scores that a task may ask for. Names are those of promptmill.scorers.SCORERS.
SCORES = ("exact",)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptPart(_Part):
    """``prompt:`` of a task file."""

    user: str
    system: str | None = None


class OutputPart(_Part):
    """``output:`` of a task file: the JSON Schema that answers are read by."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TaskModel(_Part):
    """A task file as it is written."""

    task: str = Field(min_length=1)
    prompt: PromptPart
    generate: dict[str, Any] = Field(default_factory=dict)
    expected: dict[str, str] = Field(default_factory=dict)
    output: OutputPart = Field(default_factory=lambda: OutputPart(schema=None))
    scores: list[dict[str, str]] = Field(default_factory=list)

    @field_validator("generate")
    @classmethod
    def _known_parameters(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            return {name: check_parameter(name, value) for name, value in values.items()}
        except BadParameter as problem:
            raise ValueError(f"{problem.message}. {problem.hint or ''}".rstrip(". ")) from None

    @field_validator("scores")
    @classmethod
    def _known_scores(cls, scores: list[dict[str, str]]) -> list[dict[str, str]]:
        for score in scores:
            if len(score) != 1:
                raise ValueError("a score is one name and one field, such as exact: is_ad")
            name = next(iter(score))
            if name not in SCORES:
                raise ValueError(f"unknown score '{name}'. {suggestion(name, SCORES)}")
        return scores


@dataclass(frozen=True)
class Task:
    """A task and the text it came from. The text is what is stored: a worker parses it again."""

    text: str
    model: TaskModel
    template: Template = field(repr=False)

    @property
    def name(self) -> str:
        return self.model.task

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def generate(self) -> Mapping[str, Any]:
        return self.model.generate

    @property
    def expected(self) -> Mapping[str, str]:
        return self.model.expected

    @property
    def scores(self) -> list[dict[str, str]]:
        return self.model.scores

    @property
    def output(self) -> OutputPart:
        return self.model.output

    @classmethod
    def from_template(cls, template: str, system: str | None = None) -> Task:
        """The task that ``--template`` and ``--system`` amount to."""
        prompt = {"user": template} | ({"system": system} if system else {})
        return parse_task(yaml.safe_dump({"task": "template", "prompt": prompt}, allow_unicode=True), "--template")


def load_task(path: str | Path) -> Task:
    """Raises :class:`TaskFileError` with file, line and column of what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TaskFileError(f"there is no task file {path}", hint="Check the path.") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskFileError(f"cannot read the task file {path}: {problem}") from None
    return parse_task(text, str(path))


def parse_task(text: str, name: str) -> Task:
    """The task in ``text``; ``name`` stands for it in messages. Raises :class:`TaskFileError`."""
    tree = _compose(text, name)
    try:
        model = TaskModel.model_validate(yaml.safe_load(text))
    except ValidationError as problem:
        raise TaskFileError("\n".join(_message(name, tree, each) for each in problem.errors())) from None
    try:
        return Task(text, model, Template(model.prompt.user, model.prompt.system))
    except PromptmillError as problem:
        line, column = _position(tree, ("prompt",))
        raise TaskFileError(f"{name}:{line}:{column}: {problem.message}", hint=problem.hint) from None


def _compose(text: str, name: str) -> yaml.Node:
    """The YAML tree, with its positions. Raises TaskFileError for what is no YAML, or repeats a key."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise TaskFileError(f"{place}: not YAML: {problem.problem}") from None
    except yaml.YAMLError as problem:
        raise TaskFileError(f"{name}: not YAML: {problem}") from None
    if not isinstance(tree, yaml.MappingNode):
        raise TaskFileError(
            f"{name}: a task file has keys: task, prompt, ...", hint="See datasets/ad_comments.task.yaml."
        )
    _refuse_repeated_keys(tree, name)
    return tree


def _refuse_repeated_keys(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _refuse_repeated_keys(each, name)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                mark = key.start_mark
                raise TaskFileError(f"{name}:{mark.line + 1}:{mark.column + 1}: the key '{key.value}' is there twice")
            seen.add(key.value)
            _refuse_repeated_keys(value, name)


def _message(name: str, tree: yaml.Node, problem: Any) -> str:
    place = tuple(problem["loc"])
    line, column = _position(tree, place)
    key = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        return f"{name}:{line}:{column}: unknown key '{key}'. {suggestion(str(place[-1]), _siblings(place))}"
    if problem["type"] == "missing":
        return f"{name}:{line}:{column}: the key '{key}' is missing"
    return f"{name}:{line}:{column}: {key}: {problem['msg'].removeprefix('Value error, ')}"


def _siblings(place: tuple[Any, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"prompt": PromptPart, "output": OutputPart}
    model = parts.get(str(place[0]), TaskModel) if len(place) > 1 else TaskModel
    return [each.alias or name for name, each in model.model_fields.items()]


def _position(tree: yaml.Node, place: tuple[Any, ...]) -> tuple[int, int]:
    """Line and column of the deepest part of ``place`` that is in the file; both count from 1."""
    node, mark = tree, tree.start_mark
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            mark, node = found[0][0].start_mark, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
    return mark.line + 1, mark.column + 1
