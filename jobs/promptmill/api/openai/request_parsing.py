"""Bodies of chat completions, completions and embeddings as requests of ours; what cannot be obeyed is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from promptmill.api.http.errors import ApiError, bad, missing
from promptmill.api.http.validation import PLAIN, Body
from promptmill.queue.interactive_wire import Turn
from promptmill.readers.fields import BadLine
from promptmill.readers.jsonl import messages_of
from promptmill.tasks.openai import ANSWERED, CHAT, COMPLETIONS, EMBEDDINGS, translate
from promptmill.tasks.sampling import BadParameter, is_empty, refuse_unfinished
from promptmill.tasks.templates import resolve_sampling
from promptmill.tasks.tools import Offer

#: Most tokens of an answer that a client waits for and sets no limit to.
DEFAULT_MAX_TOKENS = 1024

#: Most prompts or texts of one call.
MOST_PROMPTS = 128
MOST_INPUTS = 2048


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AskedBody(Body):
    """What all bodies have. The rest are sampling parameters, which are read as those of a dataset's lines are."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=4_096), PLAIN]


def _unless_empty(given: Any) -> Any:
    return None if is_empty(given) else given


class AskedCompletion(AskedBody):
    """The body of a chat or a completion."""

    stream: bool = False
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_unless_empty)] = None


class AskedEmbedding(AskedBody):
    """The body of embeddings."""

    encoding_format: Literal["float", "base64"] = "float"


@dataclass(frozen=True, slots=True)
class Question:
    """What a body asks. ``texts`` are prompts or inputs; a chat has ``messages`` instead."""

    model: str
    sampling: dict[str, Any]
    messages: list[Turn] | None = None
    texts: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    #: Embeddings as base64 of little-endian float32.
    base64: bool = False
    #: Tools that the answer may call.
    offer: Offer | None = None


def read(body: dict[str, Any], url: str) -> Question:
    """Raises ApiError for a body that cannot be served as it is."""
    asked = AskedEmbedding.of(body) if url == EMBEDDINGS else AskedCompletion.of(body)
    rest = dict(asked.model_extra or {})
    messages = _messages(rest) if url == CHAT else None
    texts = () if url == CHAT else _texts(rest, "prompt" if url == COMPLETIONS else "input", url)
    sampling = _sampling(rest, url, messages[-1][0] if messages else None)
    question = Question(asked.model, sampling, messages, texts, offer=Offer.of(sampling))
    if isinstance(asked, AskedEmbedding):
        return replace(question, base64=asked.encoding_format == "base64")
    return replace(question, stream=asked.stream, include_usage=_includes_usage(asked))


def _includes_usage(asked: AskedCompletion) -> bool:
    options = asked.stream_options
    if options is None or not options.model_fields_set:
        return False
    if not asked.stream:
        raise bad("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    return options.include_usage


def _messages(body: dict[str, Any]) -> list[Turn]:
    value = body.pop("messages", None)
    if value is None:
        raise missing("messages")
    try:
        turns: list[Turn] = [
            (each.role, each.content, each.extra) if each.extra else (each.role, each.content)
            for each in messages_of(value)
        ]
    except BadLine as problem:
        raise _named(str(problem), "messages") from None
    for number, (_, *texts) in enumerate(turns):
        for text in texts:
            _require_text(text, f"messages[{number}].content")
    return turns


def _texts(body: dict[str, Any], name: str, url: str) -> tuple[str, ...]:
    value = body.pop(name, None)
    if value is None:
        raise missing(name)
    texts = [value] if isinstance(value, str) else value
    most = MOST_PROMPTS if url == COMPLETIONS else MOST_INPUTS
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise bad(f"Invalid type for '{name}': expected a string or an array of strings.", name, "invalid_type")
    if len(texts) > most:
        raise bad(f"Invalid '{name}': at most {most:,} texts in one call.", name, "array_above_max_length")
    for text in texts:
        if not text:
            raise bad(f"Invalid '{name}': an empty text.", name, "invalid_value")
        _require_text(text, name)
    return tuple(texts)


def _require_text(text: str, name: str) -> None:
    if "\0" in text:
        raise bad(f"Invalid '{name}': it holds a NUL character.", name, "invalid_value")


def _sampling(body: dict[str, Any], url: str, last_role: str | None) -> dict[str, Any]:
    try:
        found = translate(body, url, ANSWERED)
        if url != EMBEDDINGS:
            found.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        # All of it together, so that a contradiction is told here and not by a worker.
        refuse_unfinished(resolve_sampling({}, found).continue_final_message, last_role)
    except BadParameter as problem:
        raise _named(problem.message, None) from None
    return found


def _named(message: str, param: str | None) -> ApiError:
    """An error with the field that its message begins with."""
    quoted = re.search(r"'(?:body\.)?([\w.\[\]]{1,80})'", message)
    code = "unsupported_parameter" if "unsupported" in message else "invalid_value"
    return bad(f"{message[0].upper()}{message[1:]}.", param or (quoted[1] if quoted else None), code)
