"""From a dataset line to what a model is asked: templates, messages, and the form they are stored in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

from jinja2 import (
    Environment,
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    nodes,
    pass_environment,
)
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptmill.errors import TaskFileError
from promptmill.tasks.own_text import CONTROL, moved, own_spans, unused_marks
from promptmill.tasks.sampling import refuse_unfinished, resolve_sampling
from promptmill.tasks.template_names import HIDDEN, SPACES, Fields, Names, RenderError, assigned, names_of
from promptmill.types import COMMON, DatasetLine, Message, Request, SamplingParams, Sharing, Span

#: Longest rendered text, in characters: as long as the longest line of a dataset.
LONGEST_TEXT = 16 * 1024 * 1024


class TemplateMistake(TaskFileError):
    """A template cannot be used: which ``part`` of the prompt, and the line in it, from 1."""

    def __init__(self, part: str, line: int, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{part} template, line {line}: {problem}", hint=hint)
        self.part, self.line = part, line


#: A width in a text that ``%`` fills.
_WIDE = re.compile(r"\d{7}|\*")

#: Filters that work on a text.
TEXT_FILTERS = (
    "capitalize", "center", "indent", "lower", "replace", "string", "striptags", "title", "trim", "truncate", "upper",
    "wordcount", "wordwrap",
)  # fmt: skip

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


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, to which null is an empty text."""
    # Jinja hands some filters its environment before the value.
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def filtered(*args: Any, **more: Any) -> Any:
        return function(*args[:at], "" if args[at] is None else args[at], *args[at + 1 :], **more)

    return filtered


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, to which null is an empty text."""
    each = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return str(d).join("" if one is None else str(one) for one in each)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which limits ``range``, with limits on the operators that can fill the memory.

    What draws random values is taken out: a prompt must come out the same in the worker as at submission.
    """

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _NothingComputed

    def __init__(self, finalize: Callable[[Any], Any]) -> None:
        super().__init__(
            undefined=_Missing, keep_trailing_newline=True, autoescape=False, optimized=False, finalize=finalize
        )
        del self.globals["lipsum"], self.filters["random"]
        self.filters |= {name: _of_text(self.filters[name]) for name in TEXT_FILTERS}
        self.filters["join"] = _join

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._field(obj, attribute, super().getattr)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._field(obj, argument, super().getitem)

    def _field(self, obj: Any, name: Any, otherwise: Callable[[Any, Any], Any]) -> Any:
        """A field goes before whatever Python's own values have under that name, such as ``items`` or ``title``."""
        if isinstance(obj, Fields) and name in obj:
            return obj[name]
        return otherwise(obj, name)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > LARGEST_POWER or abs(right) > LARGEST_POWER):
            raise SecurityError(f"powers end at {LARGEST_POWER}")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a width of more than six digits")
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > LONGEST_TEXT:
                raise SecurityError(f"a text of more than {LONGEST_TEXT:,} characters")
        return super().call_binop(context, operator, left, right)


def _no_function(value: Any) -> Any:
    """Null is empty. A method or a class, such as Python's own ``title`` of a text, is nothing for a prompt."""
    if value is None:
        return ""
    if callable(value) and not isinstance(value, Undefined):
        name = getattr(value, "__name__", "this")
        raise RenderError(f"template: '{name}' is a function and no field of the line")
    if not isinstance(value, str | int | float | list | tuple | dict | Undefined):
        # An iterator would be written as the place of an object in memory, another one at each rendering.
        raise RenderError(f"template: what is put in is a {type(value).__name__} and no text; add |list or |join")
    if isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, Undefined):
                # Python would write it in a list as if it were a value; made a text, it names what is missing.
                str(each)
            _no_function(each)
    return value


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    return _Sandbox(_no_function)


@lru_cache(maxsize=4)
def _marking_environment(begin: str, end: str) -> _Sandbox:
    """Each value that a template writes is between the two characters."""
    return _Sandbox(lambda value: f"{begin}{_no_function(value)}{end}")


@lru_cache(maxsize=128)
def _marking(source: str, begin: str, end: str) -> Any:
    return _compile("prompt", source, _marking_environment(begin, end))


class _Text:
    """A template of one text, which knows what of it is its author's."""

    def __init__(self, part: str, source: str) -> None:
        """Raises :class:`TaskFileError`."""
        self._template = _compile(part, source, _environment())
        # Control tokens that the author wrote are meant; those in a line's fields are not.
        self._source = source if CONTROL.search(source) else None

    def message(self, role: str, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> Message:
        """Raises :class:`RenderError`."""
        text = _fill(self._template, fields, line_meta)
        return Message(role, text, own=() if self._source is None else self._own(self._source, text, fields, line_meta))

    def _own(
        self, source: str, text: str, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None
    ) -> tuple[Span, ...]:
        marks = tuple(islice(unused_marks(source + text), 2))
        if len(marks) < 2:
            return ()
        return own_spans(text, _fill(_marking(source, *marks), fields, line_meta), *marks)


class Template:
    """A system and a user text with ``{{ input.field }}``, ``{{ meta.field }}``, or ``{{ field }}`` for short.

    ``{{ input }}`` alone is the field that is called input.

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
        self._user = _Text("user", user)
        self._system = _Text("system", system) if system is not None else None
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
        return self._system.message("system", fields, line_meta), *turns

    def render_plain(
        self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The messages of one line as one text, a blank line between two; and what of it the template's author wrote.

        Raises :class:`RenderError`.
        """
        text, own = "", tuple[Span, ...]()
        for number, turn in enumerate(self.render(fields, line_meta)):
            text += "\n\n" if number else ""
            own += moved(turn.own, len(text))
            text += turn.content
        return text, own

    def _question(self, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> Message:
        return self._user.message("user", fields, line_meta)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _compile(part: str, text: str, environment: _Sandbox) -> Any:
    try:
        tree = environment.parse(text)
        _refuse_hidden(part, tree)
        _refuse_other_files(part, tree)
        if found := assigned(tree):
            raise TemplateMistake(part, found[1], f"'{found[0]}' is a name of the line: call your own value otherwise")
        template = environment.from_string(Names().visit(tree))
    except TemplateSyntaxError as problem:
        raise TemplateMistake(part, problem.lineno, problem.message or "cannot be read") from None
    except (SyntaxError, RecursionError, ValueError, MemoryError) as problem:
        # Python's own compiler, which Jinja hands its code to, has its limits too.
        raise TemplateMistake(part, 1, f"too deep: {str(problem)[:80]}") from None
    # Jinja copies them for each line, and its chain of two mappings takes ten times as long as a dict.
    template.globals = dict(template.globals)
    return template


def _refuse_hidden(part: str, tree: nodes.Template) -> None:
    """What is called ``expected`` at the top of the line, of ``input`` or of ``meta`` was taken out of it."""
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Getitem)):
        if _named(node) == HIDDEN:
            raise TemplateMistake(
                part,
                node.lineno,
                f"'{HIDDEN}' cannot be used in a prompt",
                hint="The expected answer is for scoring; a model that saw it would prove nothing.",
            )


def _named(node: Any) -> Any:
    """The name at the top of the line that a node of a template names; None for anything else."""
    if isinstance(node, nodes.Name):
        return node.name
    if not isinstance(node.node, nodes.Name) or node.node.name not in SPACES:
        return None
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _refuse_other_files(part: str, tree: nodes.Template) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateMistake(part, node.lineno, "a template cannot use other files")


def _fill(template: Any, fields: Mapping[str, Any], line_meta: Mapping[str, Any] | None) -> str:
    pieces, size = [], 0
    names = names_of(fields, line_meta)
    try:
        # Piece by piece, so that an endless loop ends when it has written too much.
        for piece in template.generate(names):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST_TEXT:
                raise RenderError(f"template: the rendered text is longer than {LONGEST_TEXT:,} characters")
    except UndefinedError as problem:
        here = ", ".join(sorted(str(name) for name in fields if name != HIDDEN)) or "none"
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
    sharing: Sharing = COMMON,
) -> Request:
    """The request of a stored line. ``system`` is put before messages that have no system message of their own.

    Raises :class:`RenderError` when the template cannot be filled, BadParameter when there is nothing to go on with.
    """
    messages, prompt, own = None, None, None
    if "fields" not in body:
        messages, prompt = _asked(body, system)
    elif template is None:
        raise RenderError("the line has fields for a template, and the job has none")
    elif template.plain:
        prompt, own = template.render_plain(body["fields"], line_meta)
    else:
        messages = template.render(body["fields"], line_meta)
    refuse_unfinished(sampling.continue_final_message, messages[-1].role if messages else None)
    return Request(row, custom_id, sampling, messages, prompt, own=own, sharing=sharing)


def _asked(body: Mapping[str, Any], system: str | None) -> tuple[tuple[Message, ...] | None, str | None]:
    """The messages, or the raw prompt, of a line that no template fills."""
    if body.get("raw"):
        return None, body["prompt"]
    if "messages" in body:
        turns = tuple(Message(each["role"], each["content"], _extra(each)) for each in body["messages"])
    else:
        turns = (Message("user", body["prompt"]),)
    if system and not any(turn.role in SYSTEM_ROLES for turn in turns):
        turns = (Message("system", system), *turns)
    return turns, None


__all__ = ["RenderError", "Template", "payload", "resolve_sampling", "to_request", "turn_of"]
