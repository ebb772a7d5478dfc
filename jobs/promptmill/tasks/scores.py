"""What a task file may say under ``scores``: the kinds, their options, and the figures each of them gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from promptmill.core.registry import suggestion

#: Where in the file, and what is wrong there.
Mistake = tuple[tuple[Any, ...], str]

#: Name of the group under which other packages offer scorers.
ENTRY_POINTS = "promptmill.scorers"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a kind: what it must be, in words and as a test."""

    must_be: str
    fits: Callable[[Any], bool]
    required: bool = False


@dataclass(frozen=True, slots=True)
class ScoreKind:
    """A kind of score: its options and the figures that gates and reports can name."""

    figures: tuple[str, ...]
    options: Mapping[str, Option]
    #: At least one of these must be there.
    one_of: tuple[str, ...] = ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


_POSITIVE = Option("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = Option("a number from 0", lambda value: _is_number(value) and value >= 0)
_NUMBER = Option("a number", _is_number)
_LABEL = Option("a text or a number", lambda value: isinstance(value, str) or _is_number(value))
_TRUTH = Option("true or false", lambda value: isinstance(value, bool))
_PATTERN = Option("a regular expression of Python", _is_pattern)
_FIELD = Option("a field of the answer", lambda value: isinstance(value, str) and bool(value))

#: Names of scores: what a gate can name.
_NAME = re.compile(r"[\w./-]+")
TAKEN = ("parsed", "latency")

#: Figures of labels: one of a few classes was expected and one was given.
CLASSES = (
    "accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall", "kappa", "quadratic_kappa",
)  # fmt: skip

#: Figures of yes or no.
BINARY = ("accuracy", "precision", "recall", "f1", "auc", "average_precision", "brier", "ece")

KINDS: dict[str, ScoreKind] = {
    "exact": ScoreKind(CLASSES, {}),
    "closeness": ScoreKind(("closeness",), {"span": Option(_POSITIVE.must_be, _POSITIVE.fits, required=True)}),
    "within": ScoreKind(("accuracy",), {"tolerance": Option(_POSITIVE.must_be, _POSITIVE.fits, required=True)}),
    "abs_error": ScoreKind(("abs_error",), {"worst": _POSITIVE}),
    "numeric": ScoreKind(
        ("accuracy",), {"tolerance": _NOT_NEGATIVE, "relative": _NOT_NEGATIVE}, ("tolerance", "relative")
    ),
    "binary": ScoreKind(BINARY, {"threshold": _NUMBER, "positive": _LABEL}, ("threshold", "positive")),
    "contains": ScoreKind(("accuracy",), {"ignore_case": _TRUTH}),
    "regex": ScoreKind(("accuracy",), {"pattern": _PATTERN}),
    "json_match": ScoreKind(("accuracy",), {}),
    "set_f1": ScoreKind(("set_f1",), {}),
    "choice_probability": ScoreKind(("choice_probability", "brier", "ece"), {}),
    "python": ScoreKind(("mean", *dict.fromkeys((*CLASSES, *BINARY))), {"field": _FIELD}),
}


def entry_kind(entry: Mapping[str, Any]) -> str:
    """The kind of an entry: its first key."""
    return str(next(iter(entry), ""))


def figures_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    kind = KINDS.get(entry_kind(entry))
    return kind.figures if kind else KINDS["python"].figures


def names_of(entries: Collection[Mapping[str, Any]]) -> list[str]:
    """What the score of each entry is called: its ``as``; else its field, with its kind behind it where an earlier
    entry has the name already.
    """
    taken: list[str] = []
    for entry in entries:
        kind = entry_kind(entry)
        name = str(entry.get("as") or _default_name(kind, str(entry.get(kind, ""))))
        if name in taken and "as" not in entry:
            name = f"{name}.{kind}"
        taken.append(name)
    return taken


def _default_name(kind: str, target: str) -> str:
    return target.rpartition(":")[2] if kind == "python" else target


def mistakes(entries: Collection[Mapping[str, Any]], expected: Collection[str]) -> Iterator[Mistake]:
    """What is wrong with each entry of ``scores``. ``expected``: the names of the expected values, if any are named."""
    for index, entry in enumerate(entries):
        yield from _mistakes(index, entry, expected)
    names = names_of(entries)
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ("scores", index), f"two scores are called '{name}': give one of them another name with 'as'"


def _mistakes(index: int, entry: Mapping[str, Any], expected: Collection[str]) -> Iterator[Mistake]:
    name = entry_kind(entry)
    place = ("scores", index, name)
    target = entry.get(name)
    if not name:
        yield ("scores", index), "a score begins with its name and one field, such as exact: is_ad"
        return
    if name not in KINDS:
        if name not in offered():
            yield place, f"unknown score '{name}'. {suggestion(name, [*KINDS, *offered()])}"
        return
    if not isinstance(target, str) or not target:
        yield ("scores", index), "a score begins with its name and one field, such as exact: is_ad"
        return
    kind = KINDS[name]
    if kind.one_of and not any(option in entry for option in kind.one_of):
        yield place, f"{name} needs {' or '.join(repr(option) for option in kind.one_of)}"
    for option, rule in kind.options.items():
        if option not in entry and rule.required:
            yield place, f"{name} needs '{option}', {rule.must_be}"
        elif option in entry and not rule.fits(entry[option]):
            yield ("scores", index, option), f"'{option}' must be {rule.must_be}"
    for option in entry.keys() - {name, "as", *kind.options}:
        yield ("scores", index, option), f"{name} has no option '{option}'"
    given = entry.get("as", "a")
    if not isinstance(given, str) or not _NAME.fullmatch(given) or given in TAKEN:
        yield ("scores", index, "as"), f"'as' must be a name without spaces, and none of {', '.join(TAKEN)}"
    if "threshold" in entry and "positive" in entry:
        yield place, "give 'threshold' or 'positive', not both"
    if name == "python":
        if ":" not in target:
            yield place, "python needs a file and a function, such as scorers.py:has_contact"
    elif expected and target not in expected and not (name == "regex" and "pattern" in entry):
        yield place, f"'{target}' is not among the expected values. {suggestion(target, expected)}"


def offered() -> dict[str, Any]:
    """Scorers that installed packages offer, by their names."""
    from importlib.metadata import entry_points

    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}
