"""The chat template that a model brings, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptmill.errors import RequestError
from promptmill.tasks.templates import SYSTEM_ROLES
from promptmill.types import Message, SamplingParams

#: A conversation that ends with an answer, which shows what a template writes after one.
ANSWERED: list[dict[str, Any]] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because7"}]

#: Nothing special is asked for.
PLAIN = SamplingParams()

EXTENSIONS = (loopcontrols,)

#: What compiling a template may end with: Python's own compiler, which Jinja hands its code to, has its limits too.
COMPILING = (TemplateError, SyntaxError, RecursionError, ValueError, MemoryError)


class ChatTemplate:
    """Messages to the text that the model was trained on, up to where its answer begins.

    Special tokens are texts in it (``<|im_end|>``), whatever wrote them: see ``prompt_pieces``.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        """Raises RequestError for a template that cannot be compiled."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[*EXTENSIONS])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = _tojson
        self._names: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
        self.source = source
        try:
            self._template = environment.from_string(source)
        except COMPILING as problem:
            raise RequestError(f"the model's chat template cannot be used: {str(problem)[:120]}") from None

    def write(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, sampling: SamplingParams, ask: bool
    ) -> str:
        """Raises RequestError for messages that the template refuses.

        ``sampling`` says whether to reason; ``ask``: up to where the model's next answer begins.
        """
        names = self._names | {"add_generation_prompt": ask, "tools": tools} | thinking_names(sampling.thinking)
        try:
            return str(self._template.render(messages=turns, **names))
        except Exception as problem:
            # Whatever a model's template does wrong concerns this request only.
            # MemoryError has no text of its own.
            why = str(problem)[:120] or "it needs too much memory"
            raise RequestError(f"the model's chat template refuses the messages: {why}") from None


def written(source: str, turns: list[dict[str, Any]], write: Callable[[list[dict[str, Any]]], str]) -> str:
    """Messages as ``write`` has them from the template ``source``; the role ``developer`` is ``system`` to one that
    does not know it, or only in some places.

    Raises RequestError for what the template refuses, and where it leaves out what a system or a developer says.
    """
    says = [each for each in turns if each["role"] in SYSTEM_ROLES]
    if any(each["role"] == "developer" for each in says):
        if "developer" in source:
            with suppress(RequestError):
                text = write(turns)
                if _left_out(says, text) is None:
                    return text
        turns = _as_system(turns)
    text = write(turns)
    if (role := _left_out(says, text)) is not None:
        raise RequestError(f"the model's chat template leaves out a message of the role '{role}': say it as the user")
    return text


def _left_out(says: Sequence[dict[str, Any]], text: str) -> str | None:
    """The role of the first message that is not in the text."""
    return next((each["role"] for each in says if each["content"].strip() not in text), None)


def _as_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Templates want one system message, at the start: what a developer says there beside a system is put behind it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        role = "system" if turn["role"] == "developer" else turn["role"]
        if len(found) == 1 and found[0]["role"] == role == "system":
            found[0] = found[0] | {"content": f"{found[0]['content']}\n\n{turn['content']}"}
        else:
            found.append(turn | {"role": role})
    return found


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
    return rendered.rpartition(ANSWERED[-1]["content"])[2]


def thinking_names(thinking: str | None) -> dict[str, bool]:
    """What templates call the switch: Qwen's and GLM's the first, DeepSeek's the second."""
    is_on = thinking not in ("off", "0")
    return {} if thinking is None else {"enable_thinking": is_on, "thinking": is_on}


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
