"""Tools that a model may call: what a request offers, and the calls that an answer holds.

Models write calls as they were trained to: ``<tool_call>{"name", "arguments"}</tool_call>`` (Hermes, Qwen),
``[TOOL_CALLS][{...}]`` (Mistral), or JSON alone with ``parameters`` (Llama 3). All of them are read, whatever the
model: engines drop control tokens, and the marks may be some.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from promptmill.tasks import json_schemas

#: Most functions of a request, and the longest JSON of all of them, in characters.
MOST_TOOLS = 128
LONGEST_TOOLS = 256 * 1024

#: Names of functions, as OpenAI's API has them.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

#: Where a call may begin, and what may stand around JSON alone.
OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = (OPEN, "[TOOL_CALLS]", "<|python_tag|>")
BETWEEN = re.compile(r"[\s;,]*")

#: Characters of a call's id: Mistral's chat templates take ids of nine letters and digits only.
ID_LENGTH = 9
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of a request, as JSON text, and whether an answer may call several."""

    tools: str
    several: bool = True

    @property
    def is_strict(self) -> bool:
        """Whether arguments are validated: by a schema of the client's, in a child then."""
        return any(each.get("strict") and each.get("parameters") for each in _functions(self.tools).values())

    @classmethod
    def of(cls, *samplings: Mapping[str, Any]) -> Offer | None:
        """What sampling parameters offer, those of a line before those of its job; None where they offer nothing."""
        found: dict[str, Any] = {}
        for each in reversed(samplings):
            found |= each
        return cls(found["tools"], found.get("parallel_tool_calls", True)) if found.get("tools") else None


# --- what a request offers -------------------------------------------------------------------------------------------


def checked_tools(value: Any) -> str:
    """The tools of a request as JSON text. Raises ValueError with what they should be."""
    if isinstance(value, str):
        value = _json_of(value)
    if not isinstance(value, list) or not value:
        raise ValueError("a list of tools")
    if len(value) > MOST_TOOLS:
        raise ValueError(f"at most {MOST_TOOLS} tools")
    names = [_function(index, each) for index, each in enumerate(value)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"functions with different names; '{twice}' is there twice")
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_TOOLS:
        raise ValueError(f"at most {LONGEST_TOOLS:,} characters of JSON")
    return text


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a list of tools; this text is not JSON") from None


def _function(index: int, tool: Any) -> str:
    """The function's name. Raises ValueError."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ValueError(f'a list of {{"type": "function", "function": ...}}; number {index} is none')
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"functions with a name of 1 to 64 letters, digits, _ and -; that of number {index} is none")
    if extra := function.keys() - {"name", "description", "parameters", "strict"}:
        raise ValueError(f"functions without '{min(extra)[:40]}'")
    if not isinstance(function.get("description", ""), str | None):
        raise ValueError(f"functions whose description is a text; that of '{name}' is none")
    if not isinstance(function.get("strict"), bool | None):
        raise ValueError(f"functions whose 'strict' is true or false; that of '{name}' is not")
    if function.get("parameters") is not None:
        try:
            json_schemas.check(function["parameters"])
        except ValueError as problem:
            raise ValueError(f"functions whose parameters are a JSON schema; those of '{name}': {problem}") from None
    return name


def schema_of_calls(tools: str, names: Iterable[str]) -> dict[str, Any]:
    """A JSON schema of one call of one of the functions ``names``."""
    functions = _functions(tools)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": functions[name].get("parameters") or ANY_OBJECT},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in names
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


ANY_OBJECT = {"type": "object"}


@lru_cache(maxsize=64)
def _functions(tools: str) -> Mapping[str, dict[str, Any]]:
    """Name -> function, of tools as JSON text."""
    return {each["function"]["name"]: each["function"] for each in json.loads(tools)}


def names_of(tools: str) -> list[str]:
    """The functions of tools, in their order."""
    return list(_functions(tools))


# --- what an answer holds --------------------------------------------------------------------------------------------


def read_calls(text: str, offer: Offer) -> tuple[str, list[ToolCall]]:
    """The text beside the calls, and the calls. What calls no function that is offered is text."""
    functions = _functions(offer.tools)
    content, calls = _tagged(text, functions) if OPEN in text else _bare(text, functions)
    if not calls:
        return text, []
    return content.strip(), calls if offer.several else calls[:1]


def _tagged(text: str, functions: Mapping[str, Any]) -> tuple[str, list[ToolCall]]:
    """Each call between its own marks; the last mark may be missing, where it was a control token."""
    beside, calls, at = [], [], 0
    while (found := text.find(OPEN, at)) >= 0:
        beside.append(text[at:found])
        end = text.find(CLOSE, found)
        after = len(text) if end < 0 else end + len(CLOSE)
        inner = _calls_of(text[found + len(OPEN) : end if end >= 0 else None], functions)
        if inner is None:
            beside.append(text[found:after])
        else:
            calls += inner
        at = after
    beside.append(text[at:])
    return "".join(beside), calls


def _bare(text: str, functions: Mapping[str, Any]) -> tuple[str, list[ToolCall]]:
    """Calls after a mark, or a text that is nothing but calls."""
    for mark in MARKS[1:]:
        before, found, rest = text.partition(mark)
        if found:
            return before, _calls_of(rest, functions) or []
    return "", _calls_of(text, functions) or []


def _calls_of(text: str, functions: Mapping[str, Any]) -> list[ToolCall] | None:
    """The calls of a text that is JSON objects, or lists of them, and nothing else; None for any other text."""
    decode, calls, at = json.JSONDecoder().raw_decode, [], _skip(text, 0)
    while at < len(text):
        if text[at] not in "[{":
            return None
        try:
            value, at = decode(text, at)
        except (ValueError, RecursionError):
            return None
        for each in value if isinstance(value, list) else [value]:
            call = _call(each, functions)
            if call is None:
                return None
            calls.append(call)
        at = _skip(text, at)
    return calls or None


def _skip(text: str, at: int) -> int:
    found = BETWEEN.match(text, at)
    return found.end() if found else at


def _call(value: Any, functions: Mapping[str, Any]) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in functions:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict) or not _keeps_to(functions[value["name"]], arguments):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _keeps_to(function: Mapping[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether arguments are what a function with ``strict`` takes; another one takes any."""
    if not function.get("strict") or not function.get("parameters"):
        return True
    return json_schemas.is_valid(function["parameters"], arguments)


def call_id(answer: str, index: int) -> str:
    """The id of a call: the same whenever the answer with that name is shown."""
    number = int.from_bytes(hashlib.blake2b(f"{answer}/{index}".encode(), digest_size=8).digest())
    letters = []
    for _ in range(ID_LENGTH):
        number, letter = divmod(number, len(LETTERS))
        letters.append(LETTERS[letter])
    return "".join(letters)


def shown_calls(calls: Iterable[ToolCall], answer: str) -> list[dict[str, Any]]:
    """Calls as OpenAI's API shows them; ``answer`` names the answer that they are in."""
    return [
        {"id": call_id(answer, index), "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
        for index, each in enumerate(calls)
    ]


class Withheld:
    """What of a streamed answer is certainly text: the rest may become calls, and is known at the end only."""

    def __init__(self) -> None:
        self._text = ""
        self._shown = 0

    def add(self, text: str) -> str:
        """What may be shown now."""
        self._text += text
        end = self._end()
        fresh, self._shown = self._text[self._shown : end], max(end, self._shown)
        return fresh

    def _end(self) -> int:
        lead = len(self._text) - len(self._text.lstrip())
        if self._text[lead : lead + 1] in ("", "{", "["):
            return 0
        end = len(self._text)
        for mark in MARKS:
            if (found := self._text.find(mark)) >= 0:
                end = min(end, found)
            for size in range(min(len(mark) - 1, len(self._text)), 0, -1):
                if self._text.endswith(mark[:size]):
                    end = min(end, len(self._text) - size)
                    break
        # White space before a call is none of the text.
        return len(self._text[:end].rstrip())


# --- calls and their results as turns of a chat ----------------------------------------------------------------------


def turn_extra(value: Mapping[str, Any]) -> str | None:
    """What a chat template sees of a message beside role and content, as JSON text. Raises ValueError.

    ``tool_calls`` of an assistant have their arguments as objects, which is how templates write them. What it thought
    is ``reasoning_content``, the name that templates know.
    """
    found: dict[str, Any] = {}
    thought = value.get("reasoning_content", value.get("reasoning"))
    if thought is not None:
        if not isinstance(thought, str):
            raise ValueError("'reasoning_content' is a text")
        found["reasoning_content"] = thought
    if value.get("tool_calls") is not None:
        if value["role"] != "assistant":
            raise ValueError("'tool_calls' belong to messages of the assistant")
        found["tool_calls"] = _history(value["tool_calls"])
    if value.get("tool_call_id") is not None:
        if value["role"] != "tool" or not isinstance(value["tool_call_id"], str):
            raise ValueError("'tool_call_id' is a text, and belongs to messages of a tool")
        found["tool_call_id"] = value["tool_call_id"]
    if found.keys() & {"tool_calls", "tool_call_id"} and isinstance(value.get("name"), str):
        found["name"] = value["name"]
    return json.dumps(found, ensure_ascii=False) if found else None


def _history(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("'tool_calls' is not a list with at least one call")
    return [_past_call(each) for each in value]


def _past_call(value: Any) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type", "function") != "function":
        raise ValueError('a call is {"id", "type": "function", "function": {"name", "arguments"}}')
    name, arguments = function.get("name"), function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict) or not isinstance(value.get("id", ""), str | None):
        raise ValueError("a call has the name of a function and 'arguments', the JSON text of an object")
    return {"id": value.get("id") or "", "type": "function", "function": {"name": name, "arguments": arguments}}
