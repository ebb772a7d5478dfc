"""The task file: prompts, sampling, expected values, output and scores of a job, in YAML."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from promptmill.core.registry import suggestion
from promptmill.core.text_files import read_text
from promptmill.core.yaml_tree import place_in, place_of, refuse_many_values, refuse_repeated_keys
from promptmill.errors import TaskFileError
from promptmill.tasks import json_schemas, scores
from promptmill.tasks.normalising import normalised
from promptmill.tasks.sampling import BadParameter, check_parameter
from promptmill.tasks.schema import (
    GATE,
    MOST_EXAMPLES,
    OTHER_FIGURES,
    PLAIN_STEPS,
    STEPS,
    Example,
    ExtractStep,
    GateDemand,
    OutputPart,
    PromptPart,
    TaskModel,
)
from promptmill.tasks.scores import figures_of
from promptmill.tasks.template_names import HIDDEN
from promptmill.tasks.templates import Template, TemplateMistake


@dataclass(frozen=True)
class Task:
    """A task and the text it came from. The text is what is stored: a worker parses it again."""

    text: str
    model: TaskModel
    template: Template = field(repr=False)
    #: Folder of the task file: where the files that it names are. None for a task without a file.
    folder: str | None = None

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

    def meant(self, name: str, value: Any) -> Any:
        """A value of the field as the schema has it: another label for an alias, a number for a text that spells one.

        Tables hold texts only; where the schema says that the field is a number, its text means that number.
        """
        label = self.said(name, value)
        kind = _properties(self.model.output.schema_).get(name, {}).get("type")
        return _typed(label, kind) if isinstance(label, str) else label

    def said(self, name: str, value: Any) -> Any:
        """A value as an answer has it: another label for an alias, a text normalised as the task says."""
        if not isinstance(value, str):
            return value
        output = self.model.output
        label = output.aliases.get(name, {}).get(value, value)
        if not isinstance(label, str) or name not in output.normalise:
            return label
        steps = output.normalise[name]
        known = {normalised(alias, steps): meant for alias, meant in output.aliases.get(name, {}).items()}
        found = normalised(label, steps)
        meant = known.get(found, found)
        return normalised(meant, steps) if isinstance(meant, str) else meant

    @classmethod
    def from_template(cls, template: str, system: str | None = None, expected: Sequence[str] = ()) -> Task:
        """The task that ``--template``, ``--system`` and ``--expected`` amount to. Raises :class:`TaskFileError`."""
        # First by itself: a mistake in it has no place in a file.
        Template(template, system)
        prompt = {"user": template} | ({"system": system} if system else {})
        # In double quotes, the only style of YAML that keeps every character.
        said: dict[str, Any] = {"task": "template", "prompt": prompt}
        if expected:
            said["expected"] = {name: name for name in expected}
        return parse_task(yaml.safe_dump(said, allow_unicode=True, default_style='"', width=2**30), "--template")


#: Truth values as texts spell them.
TRUTHS = {"true": True, "false": False}


def _typed(text: str, kind: Any) -> Any:
    if kind == "boolean":
        return TRUTHS.get(text.strip().casefold(), text)
    if kind in ("integer", "number"):
        try:
            found = float(text)
        except ValueError:
            return text
        if not math.isfinite(found):
            return text
        return int(found) if found.is_integer() else found
    return text


def load_task(path: str | Path) -> Task:
    """Raises :class:`TaskFileError` with file, line and column of what is wrong.

    Few-shot examples that lie in a file become part of the task's text, so that a worker elsewhere has them too.
    """
    try:
        # As it is: its SHA-256 is that of the file. YAML takes a byte order mark and any line ends.
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TaskFileError(f"there is no task file {path}", hint="Check the path.") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskFileError(f"cannot read the task file {path}: {problem}") from None
    folder = str(Path(path).resolve().parent)
    task = parse_task(text, str(path), folder)
    if not isinstance(task.model.prompt.examples, str):
        return task
    shown = _read_examples(Path(folder) / task.model.prompt.examples)
    behind = yaml.safe_dump({"examples": shown}, allow_unicode=True, default_style='"', width=2**30)
    return parse_task(f"{text.rstrip()}\n{BEHIND}\n{behind}", str(path), folder)


#: Between a task as it was written and the examples that were read from its file.
BEHIND = "---"


def _read_examples(path: Path) -> list[dict[str, Any]]:
    """Raises :class:`TaskFileError` for a file that is missing or has a line that is no example."""
    found = []
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskFileError(
            f"cannot read the examples {path}: {problem}", hint="The path is relative to the task file."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Example.model_validate_json(line).model_dump())
        except ValidationError as problem:
            what = problem.errors()[0]
            place = ".".join(map(str, what["loc"]))
            raise TaskFileError(
                f"{path}:{number}: no example: {place + ': ' if place else ''}{what['msg']}",
                hint='A line is {"input": {...}, "output": ...}.',
            ) from None
    if not 0 < len(found) <= MOST_EXAMPLES:
        raise TaskFileError(f"{path} has {len(found):,} examples; there must be 1 to {MOST_EXAMPLES:,}")
    return found


def parse_task(text: str, name: str, folder: str | None = None) -> Task:
    """The task in ``text``; ``name`` stands for it in messages, ``folder`` is where files it names are.

    Raises :class:`TaskFileError`.
    """
    tree, content = _loaded(text, name)
    try:
        model = TaskModel.model_validate(content)
    except ValidationError as problem:
        raise TaskFileError("\n".join(_message(name, tree, each) for each in problem.errors())) from None
    problems = [f"{place_in(name, tree, place)}: {what}" for place, what in _mistakes(model)]
    if problems:
        raise TaskFileError("\n".join(problems))
    prompt = model.prompt
    if isinstance(prompt.examples, str) and folder is None:
        place = place_in(name, tree, ("prompt", "examples"))
        raise TaskFileError(f"{place}: examples can only be read by a task file on this machine; write them as a list")
    examples = [] if isinstance(prompt.examples, str) else [(each.input, each.output) for each in prompt.examples]
    try:
        return Task(text, model, Template(prompt.user, prompt.system, examples, prompt.form == "plain"), folder)
    except TemplateMistake as problem:
        place = place_in(name, tree, ("prompt", problem.part), inside=problem.line)
        raise TaskFileError(f"{place}: {problem.message}", hint=problem.hint) from None


def _mistakes(model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What types cannot say: where, and what is wrong."""
    for parameter in model.generate:
        try:
            check_parameter(parameter, model.generate[parameter])
        except BadParameter as problem:
            yield ("generate", parameter), f"{problem.message}. {problem.hint or ''}".rstrip(". ")
    if model.output.mode != "free" and model.output.schema_ is None:
        yield ("output", "mode"), f"'{model.output.mode}' needs a schema"
    elif model.output.mode != "free" and model.output.extract:
        yield ("output", "extract"), f"with mode '{model.output.mode}' the answer is the object itself"
    elif model.output.schema_ is not None:
        yield from _schema_mistakes(model.output)
    yield from _extract_mistakes(model.output)
    yield from _alias_mistakes(model)
    for part in ("input", "meta"):
        for name, path in getattr(model, part).items():
            if path in (HIDDEN, *model.expected.values()):
                yield (part, name), f"the field '{path}' is an expected value: no prompt may see it"
    yield from scores.mistakes(model.scores, model.expected)
    yield from _gate_mistakes(model)


def _schema_mistakes(output: OutputPart) -> Iterator[tuple[tuple[Any, ...], str]]:
    if output.mode == "constrain":
        try:
            check_parameter("json_schema", output.schema_)
        except BadParameter as problem:
            yield ("output", "schema"), problem.message
    elif output.mode == "validate":
        try:
            json_schemas.check(output.schema_ or {})
        except json_schemas.BadSchema as mistake:
            yield ("output", "schema", *mistake.place), f"no JSON Schema: {mistake}"
    elif refused := json_schemas.problem_of(output.schema_):
        yield ("output", "schema"), refused


def _extract_mistakes(output: OutputPart) -> Iterator[tuple[tuple[Any, ...], str]]:
    for name, steps in output.pipelines.items():
        for step in steps:
            problem = _step_problem(step)
            if problem:
                yield ("output", "extract", name), problem


def _step_problem(step: ExtractStep) -> str | None:
    if isinstance(step, str):
        return None if step in PLAIN_STEPS else f"unknown step '{step}'. {suggestion(step, STEPS)}"
    if len(step) != 1 or next(iter(step)) not in STEPS[len(PLAIN_STEPS) :]:
        return f"a step is one name and its argument. {suggestion(str(next(iter(step), '')), STEPS)}"
    ((kind, argument),) = step.items()
    if kind == "choice":
        fits = isinstance(argument, list) and bool(argument)
        return None if fits else "choice needs the list of labels"
    if not isinstance(argument, str) or not argument:
        return f"{kind} needs a text"
    try:
        re.compile(argument if kind == "regex" else "")
    except (re.error, RecursionError, OverflowError) as problem:
        return f"no regular expression: {problem}"
    return None


def _gate_mistakes(model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    named = zip(scores.names_of(model.scores), model.scores, strict=True)
    figures = list(OTHER_FIGURES)
    for score, entry in named:
        figures += [f"{score}.{figure}" for figure in figures_of(entry)]
        # The second score of a field may be called after its figure already.
        figures += [score] if score.endswith(f".{figures_of(entry)[0]}") else []
    for name, asked in model.gates.items():
        demand = asked if isinstance(asked, str) else asked.demand
        if name not in figures:
            yield ("gates", name), f"there is no figure '{name}' to judge. {suggestion(name, figures)}"
        elif not GATE.fullmatch(demand):
            yield ("gates", name), f"'{demand[:40]}' is no demand; write >=0.85, or <, <=, > and a number"
        elif not name.startswith("latency.") and not name.endswith(NO_SHARES) and float(_bound(demand)) > 1:
            yield ("gates", name), f"'{demand}' can never be judged: the figure goes from 0 to 1"
        elif not isinstance(asked, str):
            yield from _interval_mistakes(name, asked)


def _interval_mistakes(name: str, asked: GateDemand) -> Iterator[tuple[tuple[Any, ...], str]]:
    if name.startswith("latency."):
        yield ("gates", name), f"'{name}' has no interval to judge it by: one run does not tell the noise between runs"
    elif asked.ci is not True and asked.ci != asked.end:
        yield ("gates", name), f"the {asked.ci} end favours '{asked.demand}'; write ci: true for the {asked.end} one"


#: Figures that are not from 0 to 1.
NO_SHARES = (".abs_error", ".mean", ".best_threshold_cost")


def _bound(demand: str) -> str:
    found = GATE.fullmatch(demand)
    assert found is not None
    return found[2]


def _alias_mistakes(model: TaskModel) -> Iterator[tuple[tuple[Any, ...], str]]:
    known = {*model.expected, *_properties(model.output.schema_), *model.output.extract}
    for part in ("aliases", "normalise"):
        for name in getattr(model.output, part):
            if known and name not in known:
                yield ("output", part, name), f"'{name}' is no field of the answer. {suggestion(name, known)}"


def _properties(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (schema or {}).get("properties", {})
    return found if isinstance(found, dict) else {}


def _loaded(text: str, name: str) -> tuple[yaml.Node, Any]:
    """The YAML tree, with its positions, and what it says. Raises TaskFileError for what is no YAML."""
    try:
        trees = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        tree = trees[0] if trees else None
        if not isinstance(tree, yaml.MappingNode):
            raise TaskFileError(
                f"{name}: a task file has keys: task, prompt, ...", hint="See datasets/ad_comments.task.yaml."
            )
        for each in trees:
            refuse_many_values(each, name)
        refuse_repeated_keys(tree, name)
        content, *behind = yaml.safe_load_all(text)
        if behind:
            _put_examples(content, behind, place_of(name, trees[1].start_mark))
        return tree, content
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = place_of(name, mark) if mark else name
        raise TaskFileError(f"{place}: not YAML: {problem.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise TaskFileError(f"{name}: not YAML: {str(problem)[:200]}") from None


def _put_examples(content: dict[str, Any], behind: list[Any], place: str) -> None:
    """The examples that :func:`load_task` wrote behind the task take the place of their file's name."""
    prompt = content.get("prompt")
    fits = isinstance(prompt, dict) and isinstance(prompt.get("examples"), str)
    if (
        not isinstance(prompt, dict)
        or not fits
        or len(behind) > 1
        or not isinstance(behind[0], dict)
        or behind[0].keys() != {"examples"}
    ):
        raise TaskFileError(
            f"{place}: a task file is one YAML document; a second one begins here", hint="Remove '---'."
        )
    content["prompt"] = prompt | behind[0]


def _message(name: str, tree: yaml.Node, problem: Any) -> str:
    place = tuple(problem["loc"])
    where = place_in(name, tree, place)
    key = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'. {suggestion(str(place[-1]), _siblings(place))}"
    if problem["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    return f"{where}: {_plainly(key, str(problem['msg']))}"


def _plainly(key: str, said: str) -> str:
    """A message of the library that checks types, without the library's own words."""
    said = re.sub(r"valid dictionary or (instance of|object).*", "set of keys", said)
    for kind in (".str", ".GateDemand", ".int", ".float", ".bool", ".list[Example]", ".dict[str,any]"):
        key = key.removesuffix(kind)
    return f"{key}: {said}"


def _siblings(place: tuple[Any, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"prompt": PromptPart, "output": OutputPart}
    model = parts.get(str(place[0]), TaskModel) if len(place) > 1 else TaskModel
    return [each.alias or name for name, each in model.model_fields.items()]
