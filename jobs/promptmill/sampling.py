"""Sampling parameters: their ranges, and how those of a job and of a line come together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from promptmill.errors import RequestError
from promptmill.registry import suggestion
from promptmill.types import SamplingParams


class BadParameter(RequestError, ValueError):
    """A sampling parameter has a wrong type or value."""


#: Largest whole number that databases and engines take, but for seeds. An engine would silently cut off a larger one.
LARGEST_WHOLE = 2**31 - 1


def _whole(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"a whole number of {least} or more")
        if value > LARGEST_WHOLE:
            raise ValueError(f"a whole number of at most {LARGEST_WHOLE:,}")
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
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of 64 bits")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text or a list of texts, none of them empty")
    return texts


#: Name -> a function that returns the value or raises ValueError with what it should be.
PARAMETERS: Mapping[str, Callable[[Any], Any]] = {
    "max_tokens": _whole(1),
    "temperature": _number(0, 100),
    "top_k": _whole(0),
    "top_p": _number(0, 1, above=True),
    "min_p": _number(0, 1),
    "seed": _seed,
    "stop": _texts,
    "timeout_s": _number(0, 1e9, above=True),
    "ignore_eos": _flag,
}

#: Another name that servers use for ``max_tokens``.
ALIASES = {"max_completion_tokens": "max_tokens"}

#: Parameters for which null means "not set".
NULLABLE = {"seed", "timeout_s"}


def check_parameter(name: str, value: Any) -> Any:
    """``value`` in the type that SamplingParams wants. Raises :class:`BadParameter`."""
    if name not in PARAMETERS:
        raise BadParameter(f"unknown parameter '{name}'", hint=suggestion(name, PARAMETERS))
    if value is None and name in NULLABLE:
        return None
    try:
        return PARAMETERS[name](value)
    except ValueError as wanted:
        raise BadParameter(f"'{name}' must be {wanted}") from None


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of a line under its own name. Raises :class:`BadParameter`, also for a value given twice."""
    found = {name: check_parameter(name, value) for name, value in given.items() if name not in ALIASES}
    for alias in given.keys() & ALIASES.keys():
        name = ALIASES[alias]
        value = check_parameter(name, given[alias])
        if found.setdefault(name, value) != value:
            raise BadParameter(f"'{alias}' and '{name}' differ")
    return found


def resolve_sampling(job: Mapping[str, Any], line: Mapping[str, Any]) -> SamplingParams:
    """What a line is sampled with: its own parameters before the job's. Raises :class:`BadParameter`."""
    return SamplingParams(**{name: check_parameter(name, value) for name, value in {**job, **line}.items()})
