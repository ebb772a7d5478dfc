"""Expected labels against the answers that there can be: a row that no answer can get right is found before it runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from promptmill.tasks import json_schemas
from promptmill.tasks.scores import entry_kind
from promptmill.types import JsonValue

if TYPE_CHECKING:
    from promptmill.scoring.scorers.scorer import Scorer
    from promptmill.tasks.task_file import Task

#: Scores that set a label against an answer's.
KINDS = ("exact", "binary", "choice_probability")

#: Most different labels of a field that are kept; a field with more is a number or a text.
MOST = 1_000

#: Why a label is a truth value that was not meant.
BARE = "YAML reads a bare yes, no, on or off as true or false: put it in quotes"

#: Characters of a list of labels in a message.
LONGEST = 300


class Labels:
    """The expected values of a task's scored fields, and what is wrong with them."""

    def __init__(self, task: Task) -> None:
        """Raises :class:`promptmill.errors.TaskFileError` for scores that cannot be built."""
        from promptmill.scoring.scorers.scoring import Judge, build

        self._task = task
        # Without scores every expected field is taken to be compared as it is.
        asked = task.scores or [{"exact": name} for name in task.expected]
        entries = [entry for entry in asked if entry_kind(entry) in KINDS]
        self._scorers = build(entries, task.folder, task.said)
        self._judge = Judge(task, self._scorers)
        self._seen: dict[str, Counter[str]] = {
            str(scorer.field): Counter() for scorer in self._scorers.values() if scorer.field
        }

    def add(self, expected: JsonValue) -> None:
        """One row's expected values; a row without the field has no label."""
        if not isinstance(expected, dict):
            return
        for name, seen in self._seen.items():
            if name in expected and len(seen) <= MOST:
                seen[json.dumps(expected[name], ensure_ascii=False, sort_keys=True)] += 1

    def problems(self) -> list[str]:
        """A sentence for each field, or score, whose labels cannot be right."""
        return list(dict.fromkeys(self._problems()))

    def _problems(self) -> Iterator[str]:
        from promptmill.scoring.scorers.binary import Binary

        for name, scorer in self._scorers.items():
            field = str(scorer.field)
            seen = self._seen[field]
            if not seen or len(seen) > MOST:
                continue
            labels = [(value, self._task.meant(field, value)) for value in map(json.loads, seen)]
            answers = self._answers(field)
            if answers is None:
                yield from self._refused_by_schema(field, labels)
            elif silent := [text for text, said in answers if field not in said]:
                yield f"{field}: choices that mean no label: {_listed(silent)}"
                continue
            elif bare := _bare_truths(field, labels, answers):
                yield f"{field}: choices that mean no label: {_listed(bare)} ({BARE})"
                continue
            else:
                yield from _unreachable(field, scorer, labels, answers)
            if isinstance(scorer, Binary):
                yield from _one_sided(name, scorer, [label for _, label in labels], answers)

    def _answers(self, field: str) -> list[tuple[str, Mapping[str, Any]]] | None:
        """Every answer that there can be, as a text and as what it says; None where they cannot be listed."""
        choices = self._task.generate.get("choices")
        if choices:
            return [(str(each), self._judge.said(str(each), {})) for each in choices]
        rules = properties(self._task.output.schema_).get(field)
        values = _listed_by(rules) if rules is not None else None
        if values is None:
            return None
        return [(json.dumps(each, ensure_ascii=False), {field: self._task.said(field, each)}) for each in values]

    def _refused_by_schema(self, field: str, labels: list[tuple[JsonValue, JsonValue]]) -> Iterator[str]:
        rules = properties(self._task.output.schema_).get(field)
        if rules is None:
            return
        bad = [value for value, label in labels if not json_schemas.is_valid(rules, label)]
        if bad:
            yield f"{field}: expected labels that the schema does not allow: {_listed(bad)}"


def _bare_truths(
    field: str, labels: list[tuple[JsonValue, JsonValue]], answers: list[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """Choices that mean true or false by an alias, where no label is a truth value."""
    from promptmill.scoring.scorers.binary import label_text

    if {"true", "false"} & {label_text(label) for _, label in labels}:
        return []
    meant = [(text, said[field]) for text, said in answers if isinstance(said[field], bool)]
    return [f"{text} means {json.dumps(value)}" for text, value in meant if text != json.dumps(value)]


def _unreachable(
    field: str, scorer: Scorer, labels: list[tuple[JsonValue, JsonValue]], answers: list[tuple[str, Mapping[str, Any]]]
) -> Iterator[str]:
    from promptmill.scoring.scorers.binary import Binary, label_text
    from promptmill.scoring.scorers.exact import same
    from promptmill.scoring.scorers.scoring import like

    def fits(label: JsonValue, answer: JsonValue) -> bool:
        answer = like(answer, label)
        if isinstance(scorer, Binary):
            return scorer.means_yes(label) is not None and scorer.means_yes(label) is scorer.means_yes(answer)
        return same(answer, label) if not scorer.needs_choices else label_text(answer) == label_text(label)

    bad = [value for value, label in labels if not any(fits(label, said[field]) for _, said in answers)]
    if bad:
        can_be = _listed([text for text, _ in answers])
        yield f"{field}: expected labels that no answer can be: {_listed(bad)}; answers are {can_be}"


def _one_sided(
    name: str, scorer: Any, labels: list[JsonValue], answers: list[tuple[str, Mapping[str, Any]]] | None
) -> Iterator[str]:
    """A score of yes or no needs both among what is expected, or among what can be answered."""
    from promptmill.scoring.scorers.binary import label_text

    sides = {scorer.means_yes(label) for label in labels}
    sides |= {scorer.means_yes(said.get(scorer.field)) for _, said in answers or ()}
    # One label alone may be a sample; several that all mean yes are no sample of yes and no.
    is_known = answers is not None or len({label_text(label) for label in labels}) > 1
    lacks_yes, lacks_no = True not in sides, False not in sides and is_known
    if lacks_yes or lacks_no:
        what = "yes" if lacks_yes else "no"
        by = f"positive: {scorer.positive!r}" if scorer.positive is not None else f"threshold: {scorer.threshold}"
        quoted = f" ({BARE})" if isinstance(scorer.positive, bool) else ""
        yield f"{name}: no expected label and no possible answer means {what} by {by}{quoted}: {_listed(labels)}"


def _listed_by(rules: Mapping[str, Any]) -> list[JsonValue] | None:
    """The values that a schema lists, or None for one that does not."""
    if "enum" in rules:
        return list(rules["enum"])
    if "const" in rules:
        return [rules["const"]]
    return [True, False] if rules.get("type") == "boolean" else None


def properties(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (schema or {}).get("properties", {})
    return found if isinstance(found, dict) else {}


def _listed(values: Iterable[JsonValue]) -> str:
    return ", ".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)[
        :LONGEST
    ]
