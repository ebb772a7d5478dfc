"""From a dataset line to what a model is asked: templates, messages, and the form they are stored in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptmill.errors import RequestError, TaskFileError
from promptmill.sampling import resolve_sampling
from promptmill.types import DatasetLine, Message, Request, SamplingParams

#: Longest rendered text, in characters: as long as the longest line of a dataset.
LONGEST_TEXT = 16 * 1024 * 1024

#: The answer key. No template reaches it, by whatever name.
HIDDEN = "expected"


class RenderError(RequestError):
    """A template cannot be filled with a line."""


class TemplateMistake(TaskFileError):
    """A template cannot be used: which ``part`` of the prompt, and the line in it, from 1."""

    def __init__(self, part: str, line: int, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{part} template, line {line}: {problem}", hint=hint)
        self.part, self.line = part, line


#: A width in a text that ``%`` fills.
_WIDE = re.compile(r"\d{7}|\*")

#: Largest power that a template may raise a number to, and largest base.
LARGEST_POWER = 1_000

#: Roles whose message stands for the system's.
SYSTEM_ROLES = ("system", "developer")


class _Missing(StrictUndefined):
    """Says the name that is missing, not that a dict object lacks an attribute."""

    @property
    def _undefined_message(self) -> str:
        return self._undefined_hint or f"'{self._undefined_name}' is undefined"


class _NothingComputed(CodeGenerator):
    """Code that computes nothing before the template is filled: a constant can be as large as a loop is long."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which limits ``range``, with limits on the operators that can fill the memory.

    What draws random values is taken out: a prompt must come out the same in the worker as at submission.
    """

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _NothingComputed

    def __init__(self) -> None:
        super().__init__(undefined=_Missing, keep_trailing_newline=True, autoescape=False, optimized=False)
        del self.globals["lipsum"], self.filters["random"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > LARGEST_POWER or abs(right) > LARGEST_POWER):
            raise SecurityError(f"powers end at {LARGEST_POWER}")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a width of more than six digits")
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > LONGEST_TEXT:
                raise SecurityError(f"a text of more than {LONGEST_TEXT:,} characters")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    return _Sandbox()


class Template:
    """A system and a user text with ``{{ input.field }}``, ``{{ meta.field }}``, or ``{{ field }}`` for short.

    Sandboxed; an undefined name is an error; the expected answer is not among the names.
    """

    def __init__(
        self,
        user: str,
        system: str | None = None,
        examples: Sequence[tuple[Mapping[str, Any], Any]] = (),
        plain: bool = False,
    ) -> None:
        """``examples``: fields for the user's template and the answer to them, shown before the question.

        ``plain``: the prompt is one text without the model's chat template. Raises :class:`TaskFileError` for a
        template that cannot be compiled, with its line, and for an example that does not fill it.
        """
        self.user, self.system, self.plain = user, system, plain
        self._user = _compile("user", user)
        self._system = _compile("system", system) if system is not None else None
        self._shown: tuple[Message, ...] = ()
        turns: list[Message] = []
        for number, (fields, answer) in enumerate(examples, start=1):
            try:
                asked = self._question(fields, None)
            except RenderError as problem:
                raise TemplateMistake("examples", 1, f"example {number}: {problem.message}") from None
            turns += [asked, Message("assistant", answer if isinstance(answer, str) else _as_json(answer))]
        self._shown = tuple(turns)

    def render(self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> tuple[Message, ...]:
        """The messages of one line. Raises :class:`RenderError`."""
        turns = (*self._shown, self._question(fields, line_meta))
        if self._system is None:
            return turns
        return Message("system", _fill(self._system, *_names(fields, line_meta))), *turns

    def render_plain(self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> str:
        """The messages of one line as one text, a blank line between two. Raises :class:`RenderError`."""
        return "\n\n".join(turn.content for turn in self.render(fields, line_meta))

    def _question(self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> Message:
        return Message("user", _fill(self._user, *_names(fields, line_meta)))


def _names(fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a template can see of a line, and the fields among it."""
    shown = {name: value for name, value in fields.items() if name != HIDDEN}
    about = {name: value for name, value in (line_meta or {}).items() if name != HIDDEN}
    return {**shown, "input": shown, "meta": about}, shown


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _compile(part: str, text: str) -> Any:
    environment = _environment()
    try:
        tree = environment.parse(text)
        _refuse_hidden(part, tree)
        _refuse_other_files(part, tree)
        return environment.from_string(text)
    except TemplateSyntaxError as problem:
        raise TemplateMistake(part, problem.lineno, problem.message or "cannot be read") from None
    except (SyntaxError, RecursionError, ValueError, MemoryError) as problem:
        # Python's own compiler, which Jinja hands its code to, has its limits too.
        raise TemplateMistake(part, 1, f"too deep: {str(problem)[:80]}") from None


def _refuse_hidden(part: str, tree: nodes.Template) -> None:
    names = [(node.name, node.lineno) for node in tree.find_all(nodes.Name)]
    names += [(node.attr, node.lineno) for node in tree.find_all(nodes.Getattr)]
    names += [
        (node.arg.value, node.lineno) for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)
    ]
    for name, line in names:
        if name == HIDDEN:
            raise TemplateMistake(
                part,
                line,
                f"'{HIDDEN}' cannot be used in a prompt",
                hint="The expected answer is for scoring; a model that saw it would prove nothing.",
            )


def _refuse_other_files(part: str, tree: nodes.Template) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateMistake(part, node.lineno, "a template cannot use other files")


def _fill(template: Any, names: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    try:
        # Piece by piece, so that an endless loop ends when it has written too much.
        for piece in template.generate(names):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST_TEXT:
                raise RenderError(f"template: the rendered text is longer than {LONGEST_TEXT:,} characters")
    except UndefinedError as problem:
        here = ", ".join(sorted(map(str, fields))) or "none"
        raise RenderError(f"template: {problem.message}; fields of the line: {here[:200]}") from None
    except (SecurityError, OverflowError, MemoryError, RecursionError) as problem:
        # MemoryError has no text of its own.
        raise RenderError(f"template: refused: {str(problem)[:120] or 'it needs too much memory'}") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as problem:
        raise RenderError(f"template: {type(problem).__name__}: {str(problem)[:120]}") from None
    return "".join(pieces)


def payload(line: DatasetLine) -> dict[str, Any]:
    """What is stored of a valid line's question, as JSON: ``prompt`` (and ``raw``), ``messages`` or ``fields``."""
    if line.messages is not None:
        return {"messages": [turn_of(each) for each in line.messages]}
    if line.fields is not None:
        return {"fields": dict(line.fields)}
    return {"prompt": line.prompt, "raw": True} if line.raw else {"prompt": line.prompt}


def turn_of(message: Message) -> dict[str, Any]:
    """A message as a chat template sees it, and as it is stored."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    return turn if message.extra is None else turn | json.loads(message.extra)


def _extra(turn: Mapping[str, Any]) -> str | None:
    if len(turn) == 2:
        return None
    return _as_json({name: value for name, value in turn.items() if name not in ("role", "content")})


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
        if template.plain:
            return Request(row, custom_id, sampling, prompt=template.render_plain(body["fields"], line_meta))
        return Request(row, custom_id, sampling, messages=template.render(body["fields"], line_meta))
    if body.get("raw"):
        return Request(row, custom_id, sampling, prompt=body["prompt"])
    if "messages" in body:
        turns = tuple(Message(each["role"], each["content"], _extra(each)) for each in body["messages"])
    else:
        turns = (Message("user", body["prompt"]),)
    if system and not any(turn.role in SYSTEM_ROLES for turn in turns):
        turns = (Message("system", system), *turns)
    return Request(row, custom_id, sampling, messages=turns)


__all__ = ["RenderError", "Template", "payload", "resolve_sampling", "to_request", "turn_of"]
