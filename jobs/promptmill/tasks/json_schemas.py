"""JSON schemas that others wrote: bounded before anything works on them, and validated in a bounded number of steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any

from promptmill.tasks import patterns

#: Most values, levels and patterns of a schema, and most characters of a pattern.
MOST_VALUES = 50_000
DEEPEST = 100
MOST_PATTERNS = 1_000
LONGEST_PATTERN = 4_096

#: Keywords tried in one validation: about a second of work. A call of a tool needs some hundreds.
MOST_STEPS = 100_000

#: The same for a schema that is itself looked at, each keyword of which takes several: some seconds.
MOST_CHECKS = 500_000

#: Members of an object or a list that are walked through, and characters of a message, in the time of a step.
MEMBERS, CHARACTERS = 10, 200

#: Keywords whose value is compared whole.
COMPARED = ("const", "enum")

#: Keywords that refer to schemas, and those that hold data, in which nothing refers to anything.
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
DATA = ("const", "default", "enum", "examples")


class TooManySteps(Exception):
    """A validation that may never end."""


def problem_of(schema: Any) -> str | None:
    """Why a schema is not taken from anybody, before it is compiled or checked; None when it may be."""
    values = found = 0
    level: list[tuple[Any, bool]] = [(schema, False)]
    for _ in range(DEEPEST + 1):
        below: list[tuple[Any, bool]] = []
        for value, is_data in level:
            inner = _inner(value, is_data)
            values += len(inner)
            if values > MOST_VALUES:
                return f"more than {MOST_VALUES:,} values"
            below += inner
            if isinstance(value, dict) and not is_data:
                found += isinstance(value.get("pattern"), str) + _count(value.get("patternProperties"))
                if problem := _own_problem(value):
                    return problem
        if found > MOST_PATTERNS:
            return f"more than {MOST_PATTERNS:,} patterns"
        if not below:
            return None
        level = below
    return f"nested more than {DEEPEST} levels deep"


def _count(value: Any) -> int:
    return len(value) if isinstance(value, dict) else 0


def _inner(value: Any, is_data: bool) -> list[tuple[Any, bool]]:
    if isinstance(value, dict):
        return [(each, is_data or name in DATA) for name, each in value.items()]
    return [(each, is_data) for each in value] if isinstance(value, list | tuple) else []


def _own_problem(value: dict[Any, Any]) -> str | None:
    for name in REFERENCES:
        target = value.get(name)
        if isinstance(target, str) and not target.startswith("#"):
            return f"'{name}' leads out of the schema: only references within it, such as #/$defs/name, are followed"
    written = value.get("patternProperties")
    texts = [*(written if isinstance(written, dict) else ()), value.get("pattern")]
    if any(isinstance(each, str) and len(each) > LONGEST_PATTERN for each in texts):
        return f"a pattern of more than {LONGEST_PATTERN:,} characters"
    if "unevaluatedProperties" in value and written:
        return "'unevaluatedProperties' beside 'patternProperties' is not supported"
    return None


class BadSchema(ValueError):
    """What is wrong with a JSON schema, and the ``place`` in it."""

    def __init__(self, message: str, place: Iterable[str | int] = ()) -> None:
        super().__init__(message)
        self.place = tuple(place)


#: Digests of schemas that were checked: a chat sends its tools again with each turn.
_good: set[bytes] = set()
MOST_GOOD = 4_096


def check(schema: Any) -> None:
    """Raises BadSchema for what is no JSON schema, or is none that is taken from anybody."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        raise BadSchema("it is no object")
    if problem := problem_of(schema):
        raise BadSchema(problem)
    digest = sha256(repr(schema).encode(errors="surrogatepass")).digest()
    if digest in _good:
        return
    kind = validator_for(schema, default=Draft202012Validator)
    _steps.left = MOST_CHECKS
    try:
        rules = _bounded(kind)(kind.META_SCHEMA, format_checker=kind.FORMAT_CHECKER)
        mistake = next(rules.iter_errors(schema), None)
    except (RecursionError, TooManySteps) as problem:
        why = "it is nested too deeply" if isinstance(problem, RecursionError) else "it takes too long to check"
        raise BadSchema(why) from None
    if mistake is not None:
        raise BadSchema(mistake.message[:200], mistake.absolute_path)
    if len(_good) >= MOST_GOOD:
        _good.clear()
    _good.add(digest)


def is_valid(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value keeps to the schema; one that cannot be tried in a bounded number of steps does not."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    _steps.left = MOST_STEPS
    try:
        # A registry of its own: the usual one fetches what a reference names.
        return bool(_bounded(validator_for(schema))(schema, registry=Registry()).is_valid(value))
    except Exception:
        # A reference that leads nowhere or in a circle, a pattern that is none, too many steps.
        return False


_steps = threading.local()


def _take(count: int = 1) -> None:
    _steps.left -= count
    if _steps.left < 0:
        raise TooManySteps


@lru_cache(maxsize=32)
def _bounded(kind: Any) -> Any:
    """A class of validators of the same draft: keywords are counted, patterns are searched without backtracking."""
    from attrs import fields
    from jsonschema.validators import extend, validator_for

    ours: dict[str, Any] = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique_items}
    ours["additionalProperties"] = _additional_properties
    ours = {name: each for name, each in ours.items() if name in kind.VALIDATORS}
    make: Any = extend
    made = make(kind, {name: _counted(name, each) for name, each in (dict(kind.VALIDATORS) | ours).items()})
    parts = [(each.name, each.alias) for each in fields(made) if each.init]

    def evolve(self: Any, **changes: Any) -> Any:
        # Theirs takes a class that counts nothing where a part of the schema names its draft.
        schema = changes.setdefault("schema", self.schema)
        kept = {alias: getattr(self, name) for name, alias in parts}
        named = validator_for(schema, default=made)
        return (made if named is made else _bounded(named))(**(kept | changes))

    made.evolve = evolve
    return made


def _counted(name: str, keyword: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _take(1 + (_size(value) if name in COMPARED else _length(value) // MEMBERS) + _length(instance) // MEMBERS)
        for mistake in keyword(validator, value, instance, schema) or ():
            # It quotes the value and what it should be.
            _take(len(mistake.message) // CHARACTERS)
            yield mistake

    return counted


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _size(value: Any) -> int:
    """Values within a value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, inner))


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """Told by their text: each compared with each takes minutes for some thousands."""
    if wanted and isinstance(instance, list):
        _take(_size(instance) // MEMBERS)
        if len({json.dumps(_comparable(each), sort_keys=True) for each in instance}) < len(instance):
            yield _mistake("it has items that are equal")


def _comparable(value: Any) -> Any:
    """1.0 as 1: to a schema they are equal."""
    if isinstance(value, dict):
        return {name: _comparable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_comparable(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "string") and not patterns.is_found(pattern, instance):
        yield _mistake("it does not match the pattern")


def _pattern_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in value.items():
        for name, each in instance.items():
            _take()
            if patterns.is_found(pattern, name):
                yield from validator.descend(each, subschema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    known, named = schema.get("properties", {}), schema.get("patternProperties", {})
    extras = [
        name for name in instance
        if name not in known and not any(patterns.is_found(pattern, name) for pattern in named)
    ]  # fmt: skip
    if validator.is_type(value, "object"):
        for name in extras:
            yield from validator.descend(instance[name], value, path=name)
    elif not value and extras:
        yield _mistake("there are other properties")


def _mistake(message: str) -> Exception:
    from jsonschema.exceptions import ValidationError

    return ValidationError(message)
