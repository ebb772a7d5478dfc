"""What binds an answer: JSON schema, regular expression or list of choices, as a grammar of llguidance."""

from __future__ import annotations

import json
from functools import lru_cache

from promptmill.types import SamplingParams

#: Longest schema or regular expression, in characters.
LONGEST_GRAMMAR = 256 * 1024


def grammar_of(sampling: SamplingParams) -> str | None:
    """The grammar that the answer keeps to; None when it is free. Cheap: nothing is compiled."""
    if sampling.json_schema is not None:
        return json_grammar(sampling.json_schema)
    if sampling.regex is not None:
        return regex_grammar(sampling.regex)
    if sampling.choices:
        return choices_grammar(sampling.choices)
    return None


def json_grammar(schema: str) -> str:
    """``schema`` is JSON text."""
    from llguidance import LLMatcher

    # White space that a schema leaves open is fixed, or a model may fill its budget with blanks.
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))


def regex_grammar(pattern: str) -> str:
    """The whole answer matches ``pattern``; Rust's syntax, which has no look-around and no back-references."""
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(pattern))


def choices_grammar(choices: tuple[str, ...]) -> str:
    from llguidance import LLMatcher

    alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return str(LLMatcher.grammar_from_lark(f"start: {alternatives}"))


@lru_cache(maxsize=1024)
def grammar_problem(kind: str, source: str) -> str | None:
    """Why a grammar cannot be used, in one line; None when it can. ``kind``: ``json_schema`` or ``regex``.

    Remembered, because the lines of a dataset mostly carry the same.
    """
    from llguidance import LLMatcher, LLTokenizer

    if len(source) > LONGEST_GRAMMAR:
        return f"{len(source):,} characters, more than {LONGEST_GRAMMAR:,}"
    try:
        grammar = json_grammar(source) if kind == "json_schema" else regex_grammar(source)
    except ValueError as unreadable:
        return " ".join(str(unreadable).split())[:200]
    # A first step over bytes: what explodes does it here and not on a device.
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _reason(matcher.get_error()) if matcher.is_error() else None


def _reason(error: str) -> str:
    """The sentence of an error, without the state of the parser that llguidance appends to it."""
    text = " ".join(error.split())
    if text.startswith("NoExtensionBias"):
        return "no text matches it"
    return text.partition(" <state>")[0][:200]
