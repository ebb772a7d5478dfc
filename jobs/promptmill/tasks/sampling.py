"""Sampling parameters: their ranges, and how those of a job and of a line come together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from promptmill.core.registry import suggestion
from promptmill.errors import RequestError
from promptmill.tasks import json_schemas
from promptmill.tasks.grammars import grammar_problem
from promptmill.tasks.tools import checked_tools
from promptmill.types import ErrorClass, SamplingParams


class BadParameter(RequestError, ValueError):
    """A sampling parameter has a wrong type or value."""


#: Largest whole number that databases and engines take, but for seeds. An engine would silently cut off a larger one.
LARGEST_WHOLE = 2**31 - 1


#: Most answers to one prompt, and most alternatives whose log-probabilities are reported, as in OpenAI's API.
MOST_ANSWERS = 128
MOST_TOP_LOGPROBS = 20

#: Most choices or continuations of a line: each is computed.
MOST_TEXTS = 1024

#: Most stop texts and characters of one: each is looked for at each token. OpenAI's API takes 4.
MOST_STOPS, LONGEST_STOP = 64, 1_000

#: Most tokens with a bias.
MOST_BIASES = 10_000


#: Whole numbers below this are the same as decimals and back.
LARGEST_EXACT = 2**53


def as_whole(value: Any) -> Any:
    """8 for 8.0: table libraries make decimals of whole numbers where a value is missing. Anything else as it is."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_EXACT
    return int(value) if is_whole else value


def is_empty(value: Any) -> bool:
    """Null, or a text, a list or an object with nothing in it: what clients and table libraries write for "not set"."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def is_unset(name: str, value: Any) -> bool:
    """Whether a parameter is not set by this value. What binds an answer is set by an empty one too: ``{}`` is a schema
    of any JSON, and no choices or an empty expression are a mistake that may not let an answer go free."""
    return value is None or (name not in CONSTRAINTS and is_empty(value))


def _whole(least: int, most: int = LARGEST_WHOLE) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        value = as_whole(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"a whole number of {least} or more")
        if value > most:
            raise ValueError(f"a whole number of at most {most:,}")
        return value

    return check


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):
            raise ValueError(f"a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)

    return check


def _seed(value: Any) -> int:
    value = as_whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of 64 bits")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text or a list of texts, none of them empty")
    if len(texts) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in texts):
        raise ValueError(f"at most {MOST_STOPS} texts of at most {LONGEST_STOP:,} characters each")
    return texts


def _different_texts(value: Any) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list | tuple) else ()
    is_good = 0 < len(texts) <= MOST_TEXTS and all(isinstance(text, str) and text for text in texts)
    if not is_good or len(set(texts)) < len(texts):
        raise ValueError(f"a list of 1 to {MOST_TEXTS:,} different texts, none of them empty")
    return texts


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """An object of token id -> number, or the pairs that this function made of one."""
    if isinstance(value, Mapping | list | tuple) and len(value) > MOST_BIASES:
        raise ValueError(f"an object of at most {MOST_BIASES:,} token ids")
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    bad = ValueError("an object of token ids, each with a number from -100 to 100")
    if not isinstance(pairs, list | tuple):
        raise bad
    found = {}
    for pair in pairs:
        try:
            token, amount = pair
            found[int(token)] = _number(-100, 100)(amount)
        except (TypeError, ValueError):
            raise bad from None
    if any(not 0 <= token <= LARGEST_WHOLE for token in found):
        raise bad
    return tuple(sorted(found.items()))


def _schema(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("a JSON schema; this text is not JSON") from None
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise ValueError("a JSON schema: an object")
    if problem := json_schemas.problem_of(value):
        raise ValueError(f"a JSON schema that can be enforced; of this one: {problem}")
    # The order of properties is the order in which they are written: keys are not sorted.
    text = json.dumps(value, ensure_ascii=False)
    if problem := grammar_problem("json_schema", text):
        raise ValueError(f"a JSON schema that can be enforced; of this one: {problem}")
    return text


def _regex(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a regular expression, as a text")
    if not value:
        raise ValueError("a regular expression; an empty one would only let an empty answer through")
    if problem := grammar_problem("regex", value):
        raise ValueError(f"a regular expression that can be enforced; of this one: {problem}")
    return value


def _thinking(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    value = as_whole(value)
    if isinstance(value, int) and 0 <= value <= LARGEST_WHOLE:
        return str(value)
    if isinstance(value, str) and (value in ("on", "off") or (value.isdecimal() and len(value) < 10)):
        return value
    raise ValueError("on, off, or a budget in tokens")


#: Name -> a function that returns the value or raises ValueError with what it should be.
PARAMETERS: Mapping[str, Callable[[Any], Any]] = {
    "max_tokens": _whole(1),
    "temperature": _number(0, 100),
    "top_k": _whole(0),
    "top_p": _number(0, 1, above=True),
    "min_p": _number(0, 1),
    "seed": _seed,
    "stop": _stops,
    "timeout_s": _number(0, 1e9, above=True),
    "ignore_eos": _flag,
    "typical_p": _number(0, 1, above=True),
    "repetition_penalty": _number(0, 10, above=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _bias,
    "n": _whole(1, MOST_ANSWERS),
    "logprobs": _flag,
    "top_logprobs": _whole(0, MOST_TOP_LOGPROBS),
    "json_schema": _schema,
    "regex": _regex,
    "choices": _different_texts,
    "thinking": _thinking,
    "continuations": _different_texts,
    "embedding": _flag,
    "tools": checked_tools,
    "parallel_tool_calls": _flag,
    "parse_special": _flag,
    "continue_final_message": _flag,
    "add_generation_prompt": _flag,
}

#: At most one of these.
CONSTRAINTS = ("json_schema", "regex", "choices", "continuations", "embedding")

#: Another name that servers use for ``max_tokens``.
ALIASES = {"max_completion_tokens": "max_tokens"}


def check_parameter(name: str, value: Any) -> Any:
    """``value`` in the type that SamplingParams wants; None where it is not set. Raises BadParameter."""
    if name not in PARAMETERS:
        raise BadParameter(f"unknown parameter '{name}'", hint=suggestion(name, PARAMETERS))
    if is_unset(name, value):
        return None
    try:
        return PARAMETERS[name](value)
    except ValueError as wanted:
        raise BadParameter(f"'{name}' must be {wanted}") from None


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of a line under its own name, without those that are not set.

    Raises :class:`BadParameter`, also for a value given twice.
    """
    found: dict[str, Any] = {}
    for given_as, asked in given.items():
        name = ALIASES.get(given_as, given_as)
        value = check_parameter(name, asked)
        if value is not None and found.setdefault(name, value) != value:
            alias = next(each for each, meant in ALIASES.items() if meant == name)
            raise BadParameter(f"'{alias}' and '{name}' differ")
    return found


def resolve_sampling(job: Mapping[str, Any], line: Mapping[str, Any]) -> SamplingParams:
    """What a line is sampled with: its own parameters before the job's, those that are set in either.

    Raises :class:`BadParameter`.
    """
    asked = {
        name: check_parameter(name, value)
        for each in (job, line)
        for name, value in each.items()
        if not is_unset(name, value) or name not in PARAMETERS
    }
    found = SamplingParams(**asked)
    given = [name for name in CONSTRAINTS if getattr(found, name) not in (None, (), False)]
    if len(given) > 1:
        raise BadParameter(f"both '{given[0]}' and '{given[1]}' are given: an answer is bound by one of them")
    if problem := _contradiction(found, given):
        raise BadParameter(problem)
    return found


def _contradiction(found: SamplingParams, given: list[str]) -> str | None:
    """What was asked for and would be ignored, or spoil something else; ``given``: what the answer is bound by."""
    bound = given[0] if given else ""
    thinks = found.thinking not in (None, "off")
    is_computed = bool(found.continuations or found.embedding)
    is_scored = is_computed or found.scores_choices
    rules = (
        (found.top_logprobs and not found.logprobs,
         """'top_logprobs' is given without 'logprobs': add "logprobs": true"""),
        (found.n > 1 and (found.choices or is_computed), f"'n' above 1 makes no sense with '{bound}'"),
        (found.n * found.max_tokens > LARGEST_WHOLE,
         f"'n' times 'max_tokens' must be at most {LARGEST_WHOLE:,} tokens"),
        (found.logprobs and is_scored, f"'logprobs' makes no sense with '{bound}': no token is drawn"),
        (thinks and is_computed, f"'thinking' makes no sense with '{bound}': nothing is generated"),
        (found.tools and (found.choices or is_computed), f"'tools' make no sense with '{bound}'"),
        (found.continue_final_message and found.add_generation_prompt,
         "'continue_final_message' and 'add_generation_prompt' cannot both be true: the last message is left open"),
        (found.continue_final_message and (found.json_schema is not None or found.regex is not None),
         f"'continue_final_message' is given with '{bound}', which binds an answer from its first character"),
        (found.stop and found.is_constrained,
         f"'stop' is given with '{bound}': it would cut an answer that is bound, so give one of them"),
    )  # fmt: skip
    return next((problem for is_broken, problem in rules if is_broken), None)


def refuse_unfinished(continues: bool, last_role: str | None) -> None:
    """Raises :class:`BadParameter` where the model is to go on with a message that is not its own.

    ``last_role``: of the last message; None for a prompt that is sent as it is.
    """
    if continues and last_role != "assistant":
        raise BadParameter("'continue_final_message' is given, and the last message is not the assistant's")


def repeated(sampling: SamplingParams, repetition: int) -> SamplingParams:
    """The same with the seed of a repetition, counted from 0: ``n`` answers take n seeds, and the next one goes on.

    Without a seed each draws its own. Greedy answers do not depend on it, and stay known as the same question.
    """
    if sampling.seed is None or sampling.is_greedy or not repetition:
        return sampling
    seed = sampling.seed + repetition * sampling.n
    # Seeds have 64 bits: behind the largest comes the smallest.
    return replace(sampling, seed=(seed + 2**63) % 2**64 - 2**63)


def refuse_repeats(sampling: SamplingParams) -> None:
    """Raises :class:`BadParameter` for several answers that would all be the same."""
    if sampling.n > 1 and sampling.is_greedy:
        raise BadParameter("'n' above 1 needs a 'temperature' above 0: greedy answers are all the same")


class PromptTooLong(RequestError):
    """A prompt leaves no room for an answer."""

    error_class = ErrorClass.CONTEXT_OVERFLOW


def refuse_unknown_tokens(sampling: SamplingParams, vocabulary: int) -> None:
    """Raises :class:`BadParameter` for a bias on a token that a model of so many tokens does not have."""
    if sampling.logit_bias and (token := sampling.logit_bias[-1][0]) >= vocabulary:
        raise BadParameter(f"'logit_bias' names token {token:,}: the model's tokens are 0 to {vocabulary - 1:,}")
