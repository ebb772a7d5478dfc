"""The object an answer holds. What cannot be read is unparsed: nothing is guessed from words in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from promptmill.scoring.scorers import JsonObject, ScoreOutcome
from promptmill.tasks import json_schemas, patterns
from promptmill.types import FinishReason, JsonValue

if TYPE_CHECKING:
    from promptmill.tasks.schema import OutputPart

#: Different answers whose objects are remembered: classifiers give the same few answers over and over.
REMEMBERED = 4096

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Extractor:
    """Reads answers as a task's ``output`` says: by its pipelines, else the JSON object with the keys ``required``."""

    required: tuple[str, ...]
    #: Field -> the steps that may give it; the first that finds something does.
    pipelines: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    is_valid: Callable[[JsonValue], bool] | None = None
    _known: dict[str, JsonObject | None] = field(default_factory=dict)

    @classmethod
    def of(cls, output: OutputPart, required: tuple[str, ...], generate: Mapping[str, Any]) -> Extractor:
        """Without schema and pipelines, an answer out of ``choices`` is the field itself."""
        pipelines = {name: tuple(_step(each) for each in steps) for name, steps in output.pipelines.items()}
        if not pipelines and output.schema_ is None and generate.get("choices") and not _are_objects(generate):
            pipelines = dict.fromkeys(required, (_whole,))
        is_valid = None
        if output.mode == "validate":
            is_valid = partial(json_schemas.is_valid, output.schema_ or {})
        return cls(required, pipelines, is_valid)

    def __call__(self, text: str | None, finish_reason: str | None) -> tuple[ScoreOutcome, JsonObject]:
        """What became of the answer ``text``, and the object it holds (empty unless scored)."""
        found = self._read(text or "")
        if found is not None:
            return ScoreOutcome.SCORED, found
        return (ScoreOutcome.TRUNCATED if finish_reason == FinishReason.LENGTH else ScoreOutcome.UNPARSED), {}

    def _read(self, text: str) -> JsonObject | None:
        if text not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[text] = self._fresh(text)
        return self._known[text]

    def _fresh(self, text: str) -> JsonObject | None:
        found = self._by_pipelines(without_thinking(text)) if self.pipelines else extract(text, self.required)
        if found is None or (self.is_valid is not None and not self.is_valid(found)):
            return None
        return found

    def _by_pipelines(self, answer: str) -> JsonObject | None:
        found = {}
        for name, steps in self.pipelines.items():
            value = next((each for step in steps if (each := step(answer)) is not None), None)
            if value is not None:
                found[name] = value
        return found or None


#: Takes an answer without its thinking; gives the field's value, or None where it finds none.
Step = Callable[[str], JsonValue]


def _step(entry: str | Mapping[str, Any]) -> Step:
    """A step as a task file writes it: a name, or a name with its argument."""
    if isinstance(entry, str):
        return PLAIN_STEPS[entry]
    ((name, argument),) = entry.items()
    if name == "regex":
        return _by_regex(argument)
    return _by_key(argument) if name == "json" else _by_choice(argument)


def _by_regex(pattern: str) -> Step:
    compiled, time = patterns.compiled(pattern), patterns.SearchTime()

    def step(answer: str) -> JsonValue:
        try:
            found = time.search(compiled, answer)
        except TimeoutError:
            # Found nothing in its time, as in an answer that holds nothing.
            return None
        if found is None:
            return None
        return ((found[1] if compiled.groups else found[0]) or "").strip()

    return step


def _by_key(key: str) -> Step:
    def step(answer: str) -> JsonValue:
        found = extract(answer, (key,))
        return None if found is None else found[key]

    return step


def _by_choice(labels: Sequence[str]) -> Step:
    """The answer is one of the labels, but for quotes and a full stop around it. A label inside a text is none."""
    known = {str(label).casefold(): label for label in labels}

    def step(answer: str) -> JsonValue:
        return known.get(answer.strip(_AROUND).casefold())

    return step


#: What may stand around a label that is the whole answer.
_AROUND = " \t\r\n\"'`*.。．“”‘’「」"


def _whole(answer: str) -> JsonValue:
    return answer or None


def _first_line(answer: str) -> JsonValue:
    return next((line.strip() for line in answer.splitlines() if line.strip()), None)


def _last_line(answer: str) -> JsonValue:
    return next((line.strip() for line in reversed(answer.splitlines()) if line.strip()), None)


#: Steps without an argument; the others are ``regex``, ``json`` and ``choice``.
PLAIN_STEPS: dict[str, Step] = {"whole": _whole, "first_line": _first_line, "last_line": _last_line}


def _are_objects(generate: Mapping[str, Any]) -> bool:
    return all(_object(str(each), ()) is not None for each in generate["choices"])


@lru_cache(maxsize=REMEMBERED)
def extract(text: str, required: tuple[str, ...]) -> JsonObject | None:
    """The object with the keys ``required`` that ``text`` holds, or None.

    Looked for in this order: the whole text, the text without what was thought, fenced blocks (the last that fits),
    the last complete object anywhere.
    """
    answer = without_thinking(text)
    for candidate in (text, answer, *reversed(_FENCE.findall(answer))):
        found = _object(candidate, required)
        if found is not None:
            return found
    return _last(answer, required)


def without_thinking(text: str) -> str:
    """``text`` without its ``<think>`` parts. One that is never closed takes everything after it along."""
    shown = _THINKING.sub("", text)
    # Some chat templates open the thinking in the prompt: then the answer holds only its end.
    _, _, shown = shown.rpartition("</think>")
    return shown.partition("<think>")[0].strip()


def _object(text: str, required: tuple[str, ...]) -> JsonObject | None:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if _fits(value, required) else None


def _last(text: str, required: tuple[str, ...]) -> JsonObject | None:
    last = None
    for last in _objects(text, required):  # noqa: B007 - the last one is what is wanted
        pass
    return last


def _objects(text: str, required: tuple[str, ...]) -> Iterator[JsonObject]:
    """Complete objects with the keys, left to right, none inside another one of them."""
    start = text.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, after = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
        else:
            if _fits(value, required):
                yield value
                end = after
        start = text.find("{", end)


def _fits(value: Any, required: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(key in value for key in required)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


#: Python reads NaN and Infinity, which no JSON has.
_DECODER = json.JSONDecoder(parse_constant=_refuse)
