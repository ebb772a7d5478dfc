"""The chat template that a model brings, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptmill.errors import RequestError
from promptmill.prompts import turn_of
from promptmill.types import Message, SamplingParams

#: A conversation that ends with an answer, which shows what a template writes after one.
ANSWERED = (Message("user", "Why?"), Message("assistant", "Because7"))

#: Nothing special is asked for.
PLAIN = SamplingParams()

EXTENSIONS = (loopcontrols,)

#: What compiling a template may end with: Python's own compiler, which Jinja hands its code to, has its limits too.
COMPILING = (TemplateError, SyntaxError, RecursionError, ValueError, MemoryError)


class ChatTemplate:
    """Messages to the text that the model was trained on, up to where its answer begins.

    A user's text that spells a special token (``<|im_end|>``) is that token to the model: templates know no escape.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        """Raises RequestError for a template that cannot be compiled."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[*EXTENSIONS])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = _tojson
        self._names: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
        self._source = source
        try:
            self._template = environment.from_string(source)
        except COMPILING as problem:
            raise RequestError(f"the model's chat template cannot be used: {str(problem)[:120]}") from None

    def render(self, messages: Sequence[Message], sampling: SamplingParams = PLAIN, *, ask: bool = True) -> str:
        """Raises RequestError for messages that the template refuses, and for tools that it does not know.

        ``sampling`` says whether to reason and what tools there are; ``ask``: up to where the model's next answer
        begins.
        """
        turns = [turn_of(each) for each in messages]
        names = self._names | {"add_generation_prompt": ask} | thinking_names(sampling.thinking)
        names |= {"tools": tools_for(self._source, messages, sampling)}
        try:
            return str(self._template.render(messages=turns, **names))
        except Exception as problem:
            # Whatever a model's template does wrong concerns this request only.
            # MemoryError has no text of its own.
            why = str(problem)[:120] or "it needs too much memory"
            raise RequestError(f"the model's chat template refuses the messages: {why}") from None


def tools_for(source: str, messages: Sequence[Message], sampling: SamplingParams) -> list[Any] | None:
    """The tools that a template is given. Raises RequestError where it would pass them, or past calls, over."""
    if sampling.tools is None and not any(each.extra for each in messages):
        return None
    if any("tool_calls" in (each.extra or "") for each in messages) and "tool_calls" not in source:
        raise RequestError("'messages' hold tool calls, and the chat template of this model knows no tools")
    if sampling.tools is None:
        return None
    if not knows_tools(source):
        raise RequestError("'tools' are not supported: the chat template of this model knows no tools")
    found: list[Any] = json.loads(sampling.tools)
    return found


@lru_cache(maxsize=32)
def knows_tools(source: str) -> bool:
    """Whether a template writes the tools that it is given."""
    try:
        environment = ImmutableSandboxedEnvironment(extensions=[*EXTENSIONS])
        return "tools" in meta.find_undeclared_variables(environment.parse(source))
    except COMPILING:
        # Tags of extensions that only some libraries have.
        return "tools" in source


def after_answer(rendered: str) -> str:
    """What a template wrote after the answer of :data:`ANSWERED`."""
    return rendered.rpartition(ANSWERED[-1].content)[2]


def thinking_names(thinking: str | None) -> dict[str, bool]:
    """What templates call the switch: Qwen's and GLM's the first, DeepSeek's the second."""
    is_on = thinking not in ("off", "0")
    return {} if thinking is None else {"enable_thinking": is_on, "thinking": is_on}


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
