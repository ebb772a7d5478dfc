"""What a task file may say under ``scores``: which scorers there are, and what is wrong with an entry."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from promptmill.core.registry import resolve, suggestion

#: Where in the file, and what is wrong there.
Mistake = tuple[tuple[Any, ...], str]

#: Name in a task file -> its class, which says its options and the figures that gates and reports can name.
SCORERS = {
    "exact": "promptmill.scoring.scorers.exact:Exact",
    "json_match": "promptmill.scoring.scorers.exact:JsonMatch",
    "closeness": "promptmill.scoring.scorers.closeness:Closeness",
    "within": "promptmill.scoring.scorers.closeness:Within",
    "abs_error": "promptmill.scoring.scorers.closeness:AbsError",
    "numeric": "promptmill.scoring.scorers.closeness:Numeric",
    "binary": "promptmill.scoring.scorers.binary:Binary",
    "choice_probability": "promptmill.scoring.scorers.binary:ChoiceProbability",
    "contains": "promptmill.scoring.scorers.texts:Contains",
    "regex": "promptmill.scoring.scorers.texts:Regex",
    "set_f1": "promptmill.scoring.scorers.texts:SetF1",
    "python": "promptmill.scoring.scorers.python_scorer:PythonScorer",
}

#: Name of the group under which other packages offer scorers.
ENTRY_POINTS = "promptmill.scorers"

#: Names of scores: what a gate can name.
_NAME = re.compile(r"[\w./-]+")
TAKEN = ("parsed", "latency")


def class_of(kind: str) -> Any:
    """The class of a scorer (a ``scoring.scorers.scorer.Scorer``); that of functions for one that a package offers."""
    return resolve("scorer", kind if kind in SCORERS else "python", SCORERS)


def made(entry: Mapping[str, Any]) -> Any:
    """The scorer of an entry of a known kind. Raises ``ValidationError``."""
    kind = entry_kind(entry)
    scorer = class_of(kind)
    options = {name: value for name, value in entry.items() if name not in (kind, "as")}
    return scorer.model_validate({scorer.target: entry[kind]} | options)


def entry_kind(entry: Mapping[str, Any]) -> str:
    """The kind of an entry: its first key."""
    return str(next(iter(entry), ""))


def figures_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    scorer = class_of(entry_kind(entry))
    figures: tuple[str, ...] = scorer.figures_by(str(entry.get("repeats", "mean")))
    # Beside an accuracy, that of the answers that were not cut off.
    return (*figures, "accuracy_uncut") if figures[0] == "accuracy" else figures


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
    if name not in SCORERS:
        if name not in offered():
            yield place, f"unknown score '{name}'. {suggestion(name, [*SCORERS, *offered()])}"
        return
    if not isinstance(target, str) or not target:
        yield ("scores", index), "a score begins with its name and one field, such as exact: is_ad"
        return
    yield from _option_mistakes(index, entry)
    given = entry.get("as", "a")
    if not isinstance(given, str) or not _NAME.fullmatch(given) or given in TAKEN:
        yield ("scores", index, "as"), f"'as' must be a name without spaces, and none of {', '.join(TAKEN)}"
    # A scorer that needs no label looks at a field of the answer, which may be none that is expected.
    if expected and target not in expected and name != "python" and not (name == "regex" and "pattern" in entry):
        yield place, f"'{target}' is not among the expected values. {suggestion(target, expected)}"


def _option_mistakes(index: int, entry: Mapping[str, Any]) -> Iterator[Mistake]:
    """What the scorer's class says of the options, in our own words."""
    # Reports of jobs without a task do not wait for its import.
    from pydantic import ValidationError

    name = entry_kind(entry)
    scorer = class_of(name)
    if scorer.target in entry.keys() - {name}:
        yield ("scores", index, scorer.target), f"{name} has no option '{scorer.target}'"
        return
    try:
        made(entry)
    except ValidationError as problem:
        # Where an option may have one of several types, each that was tried is an error of its own.
        yield from dict.fromkeys(_option_mistake(index, name, scorer, each) for each in problem.errors())


def _option_mistake(index: int, name: str, scorer: Any, problem: Any) -> Mistake:
    option = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return ("scores", index, option), f"{name} has no option '{option}'"
    if option in ("", scorer.target):
        return ("scores", index, name), problem["msg"].removeprefix("Value error, ")
    must_be = scorer.model_fields[option].description
    if problem["type"] == "missing":
        return ("scores", index, name), f"{name} needs '{option}', {must_be}"
    return ("scores", index, option), f"'{option}' must be {must_be}"


def offered() -> dict[str, Any]:
    """Scorers that installed packages offer, by their names."""
    from importlib.metadata import entry_points

    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}
