"""The task file: prompts, sampling, expected values, output and scores of a job, in YAML."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptmill.errors import TaskFileError
from promptmill.prompts import Template, TemplateMistake
from promptmill.registry import suggestion
from promptmill.sampling import BadParameter, check_parameter

#: Scores that a task may ask for. Names are those of promptmill.scorers.SCORERS.
#: Each with its options: those it needs are numbers above 0.
SCORES = {"exact": (), "closeness": ("span",), "within": ("tolerance",)}

#: What a gate may demand of a score, of the answers that could be read, and of the latency.
GATE = re.compile(r"\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)\s*")
SCORE_FIGURES = ("accuracy", "closeness", "macro_f1")
OTHER_FIGURES = ("parsed", "latency.p50", "latency.p95", "latency.p99")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptPart(_Part):
    """``prompt:`` of a task file."""

    user: str
    system: str | None = None


class OutputPart(_Part):
    """``output:`` of a task file: the JSON Schema that answers are read by.

    ``constrain``: no answer can leave it; ``free``: nothing makes them obey it.
    """

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    mode: Literal["constrain", "free"] = "free"
    #: Field -> {label as the dataset or an answer writes it: label of the schema}.
    aliases: dict[str, dict[str, Any]] = Field(default_factory=dict)


class GateDemand(_Part):
    """A gate that is judged by the lower end of the figure's 95 % interval: few rows must not pass by luck."""

    demand: str
    ci: Literal["lower"]


class TaskModel(_Part):
    """A task file as it is written."""

    task: str = Field(min_length=1)
    prompt: PromptPart
    generate: dict[str, Any] = Field(default_factory=dict)
    #: Field of the line that names it.
    id: str | None = None
    #: Name in the template -> field of the line; without it the template sees every field that is not expected.
    input: dict[str, str] = Field(default_factory=dict)
    expected: dict[str, str] = Field(default_factory=dict)
    meta: dict[str, str] = Field(default_factory=dict)
    #: What happens to a second line with the same id: it is an error, or it is called ``id#2``.
    duplicate_ids: Literal["refuse", "number"] = "refuse"
    output: OutputPart = Field(default_factory=lambda: OutputPart(schema=None))
    scores: list[dict[str, Any]] = Field(default_factory=list)
    #: Figure -> what it must reach, such as ``category.accuracy: ">=0.85"``.
    gates: dict[str, str | GateDemand] = Field(default_factory=dict)


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

    @cached_property
    def generate(self) -> Mapping[str, Any]:
        """Sampling parameters of every line that sets none of its own."""
        found = {name: check_parameter(name, value) for name, value in self.model.generate.items()}
        if self.output.mode == "constrain":
            found["json_schema"] = check_parameter("json_schema", self.output.schema_)
        return found

    @property
    def expected(self) -> Mapping[str, str]:
        return self.model.expected

    @property
    def mapping(self) -> dict[str, Any]:
        """Where id, input, expected values and meta come from: arguments of ``readers.open_dataset``."""
        model = self.model
        return {
            "expected": model.expected, "id": model.id, "input": model.input, "meta": model.meta,
            "number_duplicates": model.duplicate_ids == "number",
        }  # fmt: skip

    @property
    def scores(self) -> list[dict[str, Any]]:
        return self.model.scores

    @property
    def output(self) -> OutputPart:
        return self.model.output

    @classmethod
    def from_template(cls, template: str, system: str | None = None) -> Task:
        """The task that ``--template`` and ``--system`` amount to. Raises :class:`TaskFileError`."""
        # First by itself: a mistake in it has no place in a file.
        Template(template, system)
        prompt = {"user": template} | ({"system": system} if system else {})
        # In double quotes, the only style of YAML that keeps every character.
        said = {"task": "template", "prompt": prompt}
        return parse_task(yaml.safe_dump(said, allow_unicode=True, default_style='"', width=2**30), "--template")


def load_task(path: str | Path) -> Task:
    """Raises :class:`TaskFileError` with file, line and column of what is wrong."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TaskFileError(f"there is no task file {path}", hint="Check the path.") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskFileError(f"cannot read the task file {path}: {problem}") from None
    return parse_task(text, str(path))


def parse_task(text: str, name: str) -> Task:
    """The task in ``text``; ``name`` stands for it in messages. Raises :class:`TaskFileError`."""
    tree, content = _loaded(text, name)
    try:
        model = TaskModel.model_validate(content)
    except ValidationError as problem:
        raise TaskFileError("\n".join(_message(name, tree, each) for each in problem.errors())) from None
    problems = [f"{_at(name, tree, place)}: {what}" for place, what in _mistakes(model)]
    if problems:
        raise TaskFileError("\n".join(problems))
    try:
        return Task(text, model, Template(model.prompt.user, model.prompt.system))
    except TemplateMistake as problem:
        place = _at(name, tree, ("prompt", problem.part), inside=problem.line)
        raise TaskFileError(f"{place}: {problem.message}", hint=problem.hint) from None


def _mistakes(model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What types cannot say: where, and what is wrong."""
    for parameter in model.generate:
        try:
            check_parameter(parameter, model.generate[parameter])
        except BadParameter as problem:
            yield ("generate", parameter), f"{problem.message}. {problem.hint or ''}".rstrip(". ")
    if model.output.mode == "constrain":
        if model.output.schema_ is None:
            yield ("output", "mode"), "'constrain' needs a schema"
        else:
            try:
                check_parameter("json_schema", model.output.schema_)
            except BadParameter as problem:
                yield ("output", "schema"), problem.message
    for part in ("input", "meta"):
        for name, path in getattr(model, part).items():
            if path in model.expected.values():
                yield (part, name), f"the field '{path}' is an expected value: no prompt may see it"
    for index, score in enumerate(model.scores):
        yield from _score_mistakes(index, score, model)
    yield from _gate_mistakes(model)


def _score_mistakes(index: int, score: Mapping[str, Any], model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    kinds = [key for key in score if key not in ("as", *_OPTIONS)]
    if len(kinds) != 1 or next(iter(score)) != kinds[0] or not isinstance(score[kinds[0]], str):
        yield ("scores", index), "a score is one name and one field, such as exact: is_ad"
        return
    scorer, field_ = kinds[0], score[kinds[0]]
    place = ("scores", index, scorer)
    if scorer not in SCORES:
        yield place, f"unknown score '{scorer}'. {suggestion(scorer, SCORES)}"
        return
    for option in SCORES[scorer]:
        value = score.get(option)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield place, f"{scorer} needs '{option}', a number above 0"
    for option in score.keys() - {scorer, "as", *SCORES[scorer]}:
        yield ("scores", index, option), f"{scorer} has no option '{option}'"
    if model.expected and field_ not in model.expected:
        yield place, f"'{field_}' is not among the expected values. {suggestion(field_, model.expected)}"


#: Options of all scores.
_OPTIONS = tuple(option for options in SCORES.values() for option in options)


def _gate_mistakes(model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    names = {str(score.get("as", next(iter(score.values()), ""))) for score in model.scores}
    figures = [*OTHER_FIGURES, *(f"{name}.{figure}" for name in sorted(names) for figure in SCORE_FIGURES)]
    for name, asked in model.gates.items():
        demand = asked if isinstance(asked, str) else asked.demand
        if name not in figures:
            yield ("gates", name), f"there is no figure '{name}' to judge. {suggestion(name, figures)}"
        elif not GATE.fullmatch(demand):
            yield ("gates", name), f"'{demand[:40]}' is no demand; write >=0.85, or <, <=, > and a number"


def _loaded(text: str, name: str) -> tuple[yaml.Node, Any]:
    """The YAML tree, with its positions, and what it says. Raises TaskFileError for what is no YAML."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(tree, yaml.MappingNode):
            raise TaskFileError(
                f"{name}: a task file has keys: task, prompt, ...", hint="See datasets/ad_comments.task.yaml."
            )
        _refuse_repeated_keys(tree, name)
        return tree, yaml.safe_load(text)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise TaskFileError(f"{place}: not YAML: {problem.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise TaskFileError(f"{name}: not YAML: {str(problem)[:200]}") from None


def _refuse_repeated_keys(tree: yaml.Node, name: str) -> None:
    """PyYAML takes the last of them and says nothing. An alias's node is looked at once, however often it is used."""
    waiting, known = [tree], {id(tree)}
    while waiting:
        node = waiting.pop()
        seen: set[str] = set()
        for key in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key[0], yaml.ScalarNode) and key[0].value in seen:
                mark = key[0].start_mark
                place = f"{name}:{mark.line + 1}:{mark.column + 1}"
                raise TaskFileError(f"{place}: the key '{key[0].value}' is there twice")
            seen.add(str(key[0].value))
        below = [part for part in _below(node) if id(part) not in known]
        known.update(map(id, below))
        waiting += below


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _message(name: str, tree: yaml.Node, problem: Any) -> str:
    place = tuple(problem["loc"])
    where = _at(name, tree, place)
    key = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'. {suggestion(str(place[-1]), _siblings(place))}"
    if problem["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    return f"{where}: {key}: {problem['msg']}"


def _siblings(place: tuple[Any, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"prompt": PromptPart, "output": OutputPart}
    model = parts.get(str(place[0]), TaskModel) if len(place) > 1 else TaskModel
    return [each.alias or name for name, each in model.model_fields.items()]


def _at(name: str, tree: yaml.Node, place: tuple[Any, ...], inside: int = 1) -> str:
    """``name:line:column`` of the deepest part of ``place`` that is in the file, counted from 1.

    ``inside``: the line within that part's text, for a text that is written line by line behind a ``|``.
    """
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
    if isinstance(node, yaml.ScalarNode) and node.style == "|":
        return f"{name}:{node.start_mark.line + 1 + inside}"
    return f"{name}:{mark.line + 1}:{mark.column + 1}"
