"""A prompt as the pieces that it is tokenised in: control tokens that a text only spells are kept apart.

A chat template writes control tokens as text (``<|im_end|>``), and knows no escape for messages that spell one. So the
spelled ones are marked before the template sees them, and tokenised as plain text where it has put them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from promptmill.errors import RequestError
from promptmill.tasks.own_text import unused_marks
from promptmill.tasks.templates import turn_of
from promptmill.types import Message, SamplingParams, Span
from promptmill_workers.engines.answer import END_OF_THINK, THINK, opened
from promptmill_workers.engines.chat_template import tools_for, written
from promptmill_workers.engines.contract import EngineRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt. ``plain``: what it spells is text and no control token."""

    text: str
    plain: bool = False


class MarkedTemplate(Protocol):
    """A chat template with its library around it."""

    @property
    def source(self) -> str:
        """The template that is used where there are tools, or none."""
        ...

    def write(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, sampling: SamplingParams, ask: bool
    ) -> str:
        """``ask``: up to where the model's next answer begins. Raises RequestError."""
        ...


#: What marks turns where it is no control token: ``<|USER_TOKEN|>`` of Command R, ``<|User|>``.
TURN_MARK = re.compile(r"<\|[^\s|]+\|>|<｜[^\s｜]+｜>|</?s>")


def _any_of(texts: Iterable[str]) -> str:
    known = sorted({each for each in texts if each}, key=lambda each: (-len(each), each))
    return "|".join(map(re.escape, known)) or "(?!)"


class Controls:
    """The texts that a vocabulary reads as control tokens."""

    def __init__(self, texts: Iterable[str], user_defined: Iterable[str] = ()) -> None:
        """``user_defined``: tokens that tokenizers take out of any text. Only marks of turns among them count: what
        tools and reasoning are marked with may be in a text, as in every server of the field.
        """
        stubborn = {each for each in user_defined if TURN_MARK.fullmatch(each)}
        self.pattern = _any_of({*texts, *stubborn})
        self._find = re.compile(self.pattern)
        self._stubborn = re.compile(_any_of(stubborn))

    def apart(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces as they are tokenised: what no tokenizer would leave a plain text comes character by character."""
        for piece in pieces:
            at = 0
            for found in self._stubborn.finditer(piece.text) if piece.plain else ():
                if at < found.start():
                    yield Piece(piece.text[at : found.start()], plain=True)
                yield from (Piece(character, plain=True) for character in found[0])
                at = found.end()
            if at < len(piece.text) or not piece.text:
                yield Piece(piece.text[at:], piece.plain)

    def spelled(self, text: str, own: Sequence[Span] = ()) -> Iterator[re.Match[str]]:
        """Where ``text`` spells one, but for the spans in which it is meant."""
        for found in self._find.finditer(text):
            if not any(start <= found.start() and found.end() <= end for start, end in own):
                yield found

    def replaced(self, text: str, replace: Callable[[str], str], own: Sequence[Span] = ()) -> str:
        """``text`` with what replaces each that it spells."""
        parts, at = [], 0
        for found in self.spelled(text, own):
            parts += [text[at : found.start()], replace(found[0])]
            at = found.end()
        return "".join([*parts, text[at:]])

    def parts(self, pieces: Iterable[Piece]) -> list[tuple[str, str]]:
        """The text in parts: ``control`` tokens, those that are only ``spelled``, and ``text`` between them."""
        found: list[tuple[str, str]] = []
        for piece in pieces:
            at = 0
            for each in self._find.finditer(piece.text):
                found.append((piece.text[at : each.start()], "text"))
                found.append((each[0], "spelled" if piece.plain else "control"))
                at = each.end()
            found.append((piece.text[at:], "text"))
        return [each for each in found if each[0]]


def pieces_of(
    request: EngineRequest, controls: Controls, template: Callable[[SamplingParams], MarkedTemplate]
) -> tuple[list[Piece], bool]:
    """The prompt, and whether the model begins with its reasoning after it. Raises RequestError."""
    sampling = request.sampling
    if request.messages is None:
        pieces = _raw(request, controls)
    else:
        pieces = _Chat(template(sampling), controls, request.messages, sampling).pieces()
        if sampling.continue_final_message:
            said = request.messages[-1].content
            thinks = said.rfind(THINK) > said.rfind(END_OF_THINK)
            if thinks and request.is_scored:
                raise RequestError(
                    f"the last message leaves its reasoning open, and what is scored after it would be a part of that: "
                    f"end it with {END_OF_THINK}"
                )
            return pieces, thinks
    ends_in_data = _ends_in_data(request, text_of(pieces).rstrip())
    tail = pieces.pop().text if pieces and not pieces[-1].plain else ""
    is_scored = request.messages is not None and request.is_scored
    tail, thinks = opened(tail, sampling, scored=is_scored, ends_in_data=ends_in_data)
    return joined([*pieces, Piece(tail)]), thinks


def _ends_in_data(request: EngineRequest, rendered: str) -> bool:
    """Whether the mark of a reasoning at the end of a prompt is a message's, or that of a field in a template."""
    if not rendered.endswith(THINK):
        return False
    if request.messages is None:
        at = len(rendered) - len(THINK)
        return request.own is not None and not any(start <= at and at < end for start, end in request.own)
    said = [each.content for each in request.messages]
    # Where the template opens one behind such a message, there are more marks than the messages have.
    return rendered.endswith(said[-1].rstrip()) and rendered.count(THINK) <= sum(each.count(THINK) for each in said)


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same text in as few pieces as can be."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].plain == piece.plain:
            found[-1] = Piece(found[-1].text + piece.text, piece.plain)
        elif piece.text:
            found.append(piece)
    return found


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(each.text for each in pieces)


def begins_twice(pieces: Sequence[Piece], bos: str) -> bool:
    """Whether a prompt begins with BOS twice. One that it spells itself is the one that the tokenizer would add."""
    return bool(bos and pieces and not pieces[0].plain and pieces[0].text.startswith(bos * 2))


def _raw(request: EngineRequest, controls: Controls) -> list[Piece]:
    """A prompt as it is: its control tokens are meant, but for those in the data of a template."""
    text, means = request.prompt or "", request.sampling.parse_special
    if means is False:
        return [Piece(text, plain=True)]
    if means or request.own is None:
        return [Piece(text)]
    pieces, at = [], 0
    for found in controls.spelled(text, request.own):
        pieces += [Piece(text[at : found.start()]), Piece(found[0], plain=True)]
        at = found.end()
    return joined([*pieces, Piece(text[at:])])


class _Chat:
    """Messages on their way through a chat template."""

    def __init__(
        self, template: MarkedTemplate, controls: Controls, messages: Sequence[Message], sampling: SamplingParams
    ) -> None:
        """Raises RequestError for tools that the template does not know."""
        self._template, self._controls, self._sampling = template, controls, sampling
        self._messages = messages
        self._tools = tools_for(template.source, messages, sampling)
        self._unused = self._marks()
        #: Ends the last message, where the model is to go on with it.
        self._end = next(self._unused) if sampling.continue_final_message else ""

    def _marks(self) -> Iterator[str]:
        """Characters that are in none of the texts."""
        texts = [[turn_of(each) for each in self._messages], self._tools, self._template.source]
        yield from unused_marks(json.dumps(texts, ensure_ascii=False))
        raise RequestError("the messages hold each of the characters that Unicode gives no meaning")

    def pieces(self) -> list[Piece]:
        """Raises RequestError."""
        spelled: dict[str, str] = {}
        plain = self._written(lambda control: spelled.setdefault(control, control))
        if not spelled or self._sampling.parse_special:
            return [Piece(plain)]
        pieces = self._marked(next(self._unused))
        # A template that looks into texts, cuts or measures them is shown other ones, of the same lengths.
        return pieces if text_of(pieces) == plain else self._hidden({next(self._unused): each for each in spelled})

    def _marked(self, mark: str) -> list[Piece]:
        """A mark before each control token that a text spells."""
        text = _unescaped(self._written(lambda control: mark + control), [mark])
        pieces, at = [], 0
        for found in re.finditer(f"{mark}({self._controls.pattern})?", text):
            pieces += [Piece(text[at : found.start()]), Piece(found[1] or "", plain=True)]
            at = found.end()
        return joined([*pieces, Piece(text[at:])])

    def _hidden(self, spelled: dict[str, str]) -> list[Piece]:
        """A mark in the place of each character of a control token that a text spells."""
        marks = {control: mark for mark, control in spelled.items()}
        text = _unescaped(self._written(lambda control: marks[control] * len(control)), spelled)
        pieces, at = [], 0
        for found in re.finditer("|".join(f"{mark}+" for mark in spelled), text):
            control, size = spelled[found[0][0]], len(found[0])
            whole = control * (-(-size // len(control)))
            pieces += [Piece(text[at : found.start()]), Piece(whole[:size], plain=True)]
            at = found.end()
        return joined([*pieces, Piece(text[at:])])

    def _written(self, replace: Callable[[str], str]) -> str:
        """What the template makes of the messages, with what replaces each control token that they spell."""
        turns = [self._turn(each, replace) for each in self._messages]
        tools = None if self._tools is None else _replaced(self._tools, self._controls, replace)
        ask = self._sampling.add_generation_prompt is not False and not self._end

        def write(shown: list[dict[str, Any]]) -> str:
            return self._template.write(shown, tools, self._sampling, ask)

        if not self._end:
            return written(self._template.source, turns, write)
        turns[-1]["content"] += self._end
        text, found, _ = written(self._template.source, turns, write).rpartition(self._end)
        if not found:
            raise RequestError("the model's chat template does not write the last message as it is: not continued")
        return text.replace(self._end, "")

    def _turn(self, message: Message, replace: Callable[[str], str]) -> dict[str, Any]:
        turn = turn_of(message)
        more = {name: value for name, value in turn.items() if name not in ("role", "content")}
        content = self._controls.replaced(message.content, replace, message.own)
        more = _replaced(more, self._controls, replace)
        return {"role": message.role, "content": content, **more}


def _replaced(value: Any, controls: Controls, replace: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts replaced."""
    if isinstance(value, str):
        return controls.replaced(value, replace)
    if isinstance(value, list):
        return [_replaced(each, controls, replace) for each in value]
    if isinstance(value, dict):
        return {controls.replaced(name, replace): _replaced(each, controls, replace) for name, each in value.items()}
    return value


def _unescaped(text: str, marks: Iterable[str]) -> str:
    """``text`` with the marks that a template wrote as escapes of JSON."""
    for mark in marks:
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text
