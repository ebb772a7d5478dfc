"""Which lines of a dataset become rows of a job, and in which order: chosen once, the same way every time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

from promptmill.errors import DatasetError
from promptmill.types import DatasetLine


@dataclass(frozen=True, slots=True)
class Selection:
    """In this order: ``where``, ``sample``, ``shuffle``, ``limit``, ``repeat``. ``seed`` draws what is random."""

    #: Pairs of field and text; a line is taken when each field has that value.
    where: tuple[tuple[str, str], ...] = ()
    shuffle: bool = False
    #: So many lines, drawn without putting any back, in the order of the dataset unless shuffled.
    sample: int | None = None
    #: The first so many lines.
    limit: int | None = None
    #: Times that each line is asked.
    repeat: int = 1
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """What differs from taking every line once."""
        usual = Selection()
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        asked = {name: value for name, value in found.items() if value != getattr(usual, name)}
        if not (self.shuffle or self.sample is not None):
            asked.pop("seed", None)
        return asked

    def apply(self, lines: Iterator[DatasetLine]) -> Iterator[DatasetLine]:
        """The chosen lines. A line that cannot be used stays among them, so that it is told.

        Raises :class:`DatasetError` for a field that no line has. Shuffling holds every chosen line in memory,
        sampling as many as are drawn.
        """
        if self.where:
            lines = self._matching(lines)
        rng = random.Random(self.seed)  # noqa: S311 - no secret
        if self.sample is not None:
            lines = iter(_reservoir(lines, self.sample, rng))
        if self.shuffle:
            held = list(lines)
            rng.shuffle(held)
            lines = iter(held)
        lines = islice(lines, self.limit)
        return lines if self.repeat == 1 else _repeated(lines, self.repeat)

    def _matching(self, lines: Iterator[DatasetLine]) -> Iterator[DatasetLine]:
        seen: set[str] = set()
        for line in lines:
            values = _values(line)
            seen.update(values)
            if line.error or all(name in values and _text(values[name]) == value for name, value in self.where):
                yield line
        for name, _ in self.where:
            if seen and name not in seen:
                raise DatasetError(
                    f"--where {name}=...: no line has a field '{name}'",
                    hint=f"Fields: {', '.join(sorted(seen))[:200]}.",
                )


def parse_where(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """``field=value`` pairs. Raises :class:`DatasetError`."""
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DatasetError(f"--where {text}: not FIELD=VALUE", hint="For instance --where category=ad.")
        found.append((name, value))
    return tuple(found)


def _values(line: DatasetLine) -> dict[str, Any]:
    """Every field of a line by its name: what is asked, what is expected, and what is told about it."""
    values: dict[str, Any] = {"id": line.custom_id}
    for part in (line.fields, line.meta, line.expected):
        if isinstance(part, Mapping):
            values |= {str(name): value for name, value in part.items()}
    if line.expected is not None and not isinstance(line.expected, Mapping):
        values["expected"] = line.expected
    return values


def _text(value: Any) -> str:
    """A value as a person writes it on a command line: JSON's words for what is no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _reservoir(lines: Iterator[DatasetLine], count: int, rng: random.Random) -> list[DatasetLine]:
    """``count`` of the lines, each as likely as any other, in their order (Vitter 1985, algorithm R)."""
    kept: list[tuple[int, DatasetLine]] = []
    for index, line in enumerate(lines):
        if len(kept) < count:
            kept.append((index, line))
        elif (place := rng.randint(0, index)) < count:
            kept[place] = (index, line)
    return [line for _, line in sorted(kept, key=lambda pair: pair[0])]


def _repeated(lines: Iterator[DatasetLine], times: int) -> Iterator[DatasetLine]:
    """Each line so often; the second time its id is ``id~2``."""
    for number, line in enumerate(lines):
        name = line.custom_id if line.custom_id is not None else f"row-{number}"
        for time in range(1, times + 1):
            yield replace(line, custom_id=name if time == 1 else f"{name}~{time}", repetition=time - 1)
