"""From a dataset line to what a model is asked: templates, messages, and the form they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptmill.errors import RequestError, TaskFileError
from promptmill.sampling import resolve_sampling
from promptmill.types import DatasetLine, Message, Request, SamplingParams

#: Longest rendered text, in characters: as long as the longest line of a dataset.
LONGEST_TEXT = 16 * 1024 * 1024

#: Names that a template may use besides the fields of its line.
NAMESPACES = ("input", "meta")

#: The answer key. No template reaches it, by whatever name.
HIDDEN = "expected"


class RenderError(RequestError):
    """A template cannot be filled with a line."""


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


class Template:
    """A system and a user text with ``{{ input.field }}``, ``{{ meta.field }}``, or ``{{ field }}`` for short.

    Sandboxed; an undefined name is an error; the expected answer is not among the names.
    """

    def __init__(self, user: str, system: str | None = None) -> None:
        """Raises :class:`TaskFileError` for a template that cannot be compiled, with its line."""
        self.user, self.system = user, system
        self._user = _compile("user", user)
        self._system = _compile("system", system) if system is not None else None

    def render(self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> tuple[Message, ...]:
        """The messages of one line. Raises :class:`RenderError`."""
        names = {name: value for name, value in fields.items() if name not in (*NAMESPACES, HIDDEN)}
        names |= {"input": dict(fields), "meta": dict(line_meta or {})}
        user = Message("user", _fill(self._user, names, fields))
        if self._system is None:
            return (user,)
        return Message("system", _fill(self._system, names, fields)), user


def _compile(part: str, text: str) -> Any:
    environment = _environment()
    try:
        tree = environment.parse(text)
        _refuse_hidden(part, tree)
        return environment.from_string(text)
    except TemplateSyntaxError as problem:
        raise TaskFileError(f"{part} template, line {problem.lineno}: {problem.message}") from None


def _refuse_hidden(part: str, tree: nodes.Template) -> None:
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    keys = {node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)}
    if HIDDEN in meta.find_undeclared_variables(tree) | attributes | keys:
        raise TaskFileError(
            f"{part} template: '{HIDDEN}' cannot be used in a prompt",
            hint="The expected answer is for scoring; a model that saw it would prove nothing.",
        )


def _fill(template: Any, names: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    try:
        text = str(template.render(names))
    except UndefinedError as problem:
        here = ", ".join(sorted(map(str, fields))) or "none"
        raise RenderError(f"template: {problem.message}; fields of the line: {here[:200]}") from None
    except (SecurityError, OverflowError, MemoryError) as problem:
        raise RenderError(f"template: refused: {problem}") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as problem:
        raise RenderError(f"template: {type(problem).__name__}: {str(problem)[:120]}") from None
    if len(text) > LONGEST_TEXT:
        raise RenderError(f"template: the rendered text is longer than {LONGEST_TEXT:,} characters")
    return text


def payload(line: DatasetLine) -> dict[str, Any]:
    """What is stored of a valid line's question, as JSON: ``prompt`` (and ``raw``), ``messages`` or ``fields``."""
    if line.messages is not None:
        return {"messages": [{"role": each.role, "content": each.content} for each in line.messages]}
    if line.fields is not None:
        return {"fields": dict(line.fields)}
    return {"prompt": line.prompt, "raw": True} if line.raw else {"prompt": line.prompt}


def to_request(
    row: int,
    custom_id: str,
    body: Mapping[str, Any],
    line_meta: Mapping[str, Any] | None,
    sampling: SamplingParams,
    template: Template | None = None,
    system: str | None = None,
) -> Request:
    """The request of a stored line. ``system`` is put before messages that have no system message of their own.

    Raises :class:`RenderError` when the template cannot be filled.
    """
    if "fields" in body:
        if template is None:
            raise RenderError("the line has fields for a template, and the job has none")
        return Request(row, custom_id, sampling, messages=template.render(body["fields"], line_meta))
    if body.get("raw"):
        return Request(row, custom_id, sampling, prompt=body["prompt"])
    if "messages" in body:
        turns = tuple(Message(each["role"], each["content"]) for each in body["messages"])
    else:
        turns = (Message("user", body["prompt"]),)
    if system and not any(turn.role == "system" for turn in turns):
        turns = (Message("system", system), *turns)
    return Request(row, custom_id, sampling, messages=turns)


__all__ = ["RenderError", "Template", "payload", "resolve_sampling", "to_request"]
