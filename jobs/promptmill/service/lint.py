"""A dataset before a device is used: what would spoil its scores, and its lines as the model will see them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from promptmill.core.settings import Settings, load_settings
from promptmill.errors import PromptmillError
from promptmill.service.job_options import JobOptions
from promptmill.service.labels import Labels, properties
from promptmill.service.prepare import Prepared, check_scorers, find_model, open_with
from promptmill.service.rows import Rows
from promptmill.service.selection import Selection
from promptmill.tasks.sampling import resolve_sampling
from promptmill.tasks.task_file import Task, load_task
from promptmill.tasks.templates import payload, to_request
from promptmill.types import Request

if TYPE_CHECKING:
    from promptmill_workers.engines.contract import TokenCounter

#: Labels listed of each field; a field with more different values is a number or a text, not a class.
MOST_LABELS = 50

#: Rows from which on a label is a class: an open answer seldom comes twice.
ROWS_PER_LABEL = 2

#: Ids listed of each finding.
SHOWN = 10

#: A line whose id was used before got ``#2``, ``#3`` behind it.
_NUMBERED = re.compile(r"#\d+$")


def validate_dataset(
    path: str, task_path: str | None, format_: str | None, model: str | None = None, settings: Settings | None = None
) -> dict[str, Any]:
    """Read every line as a job would, and look for what would spoil its scores.

    With ``model``, prompts are measured with its tokeniser. Raises BadLines and its kin for what a job would refuse.
    """
    task = load_task(task_path) if task_path else None
    check_scorers(task)
    gauge = find_model(model, None, settings or load_settings(), must_be_here=True)[1] if model is not None else None
    with open_with(path, format_, task) as dataset:
        prepared = Prepared(JobOptions(dataset=path), "embedded", dataset, task, model or "none", gauge=gauge)
        lint = Lint(task, resolve_sampling(prepared.sampling, {}).max_tokens, gauge.tokens_of if gauge else None)
        rows = Rows(prepared)
        for row in rows:
            lint.add(row.custom_id, row.input, row.expected)
        rows.refuse_bad(submitting=False)
        return {
            "name": dataset.name, "format": dataset.format, "sha256": dataset.sha256, "rows": len(rows.costs),
            **lint.findings(), "tokens": gauge.findings().to_json() if gauge else None,
        }  # fmt: skip


@dataclass(slots=True)
class Finding:
    """One kind of trouble: how many rows have it, and the ids of the first."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, custom_id: str) -> None:
        self.count += 1
        if len(self.ids) < SHOWN:
            self.ids.append(custom_id)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "ids": self.ids}


#: Shortest expected text that is looked for in prompts: one letter is in all of them.
SHORTEST_MENTION = 2

#: Tokens of a text, as the model counts them.
CountTokens = Callable[[str], int]


class Lint:
    """Looks at stored rows one after another. Memory grows by a hash for each row."""

    def __init__(self, task: Task | None, max_tokens: int = 0, count: CountTokens | None = None) -> None:
        """``count`` measures expected answers, which must fit into ``max_tokens``; without it none is measured."""
        self._task = task
        self._max_tokens, self._count = max_tokens, count
        self._answer_tokens: dict[str, int] = {}
        self._mentions, self._too_long = Finding(), Finding()
        self._numbers = task is not None and task.model.duplicate_ids == "number"
        self._inputs: dict[bytes, bytes] = {}
        self._histograms: dict[str, Counter[str]] = {name: Counter() for name in (task.expected if task else ())}
        self._labelled = 0
        self._labels = Labels(task) if task is not None else None
        self._duplicate_ids, self._duplicates, self._contradictions = Finding(), Finding(), Finding()
        self._missing = {name: Finding() for name in self._histograms}

    def add(self, custom_id: str, body: str | None, expected: str | None) -> None:
        """One row as it would be stored: its id, and its input and expected values as JSON."""
        self._labelled += expected is not None
        if self._numbers and _NUMBERED.search(custom_id):
            self._duplicate_ids.add(custom_id)
        self._compare(custom_id, body or "", expected or "")
        values = json.loads(expected) if expected else {}
        self._measure(custom_id, values, expected)
        self._look_for_mentions(custom_id, body or "", values)
        if not isinstance(values, dict):
            return
        if self._labels is not None:
            self._labels.add(values)
        for name in self._missing.keys() - values.keys():
            self._missing[name].add(custom_id)
        for name, value in values.items():
            self._histograms.setdefault(name, Counter())[_label(value)] += 1

    def _measure(self, custom_id: str, values: Any, expected: str | None) -> None:
        """Whether the expected answer, written as the object that the task asks for, fits into ``max_tokens``."""
        if self._count is None or not expected:
            return
        if expected not in self._answer_tokens:
            text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
            self._answer_tokens[expected] = self._count(text)
        if self._answer_tokens[expected] > self._max_tokens:
            self._too_long.add(custom_id)

    def _look_for_mentions(self, custom_id: str, body: str, values: Any) -> None:
        """Whether the row's own input holds what is expected of it: then the model need not know anything."""
        given = values.values() if isinstance(values, dict) else [values]
        texts = [value for value in given if isinstance(value, str) and len(value) >= SHORTEST_MENTION]
        if any(json.dumps(text, ensure_ascii=False)[1:-1] in body for text in texts):
            self._mentions.add(custom_id)

    def _compare(self, custom_id: str, body: str, expected: str) -> None:
        key, answer = _digest(body), _digest(expected)
        first = self._inputs.setdefault(key, answer)
        if first is not answer:
            (self._duplicates if first == answer else self._contradictions).add(custom_id)

    def findings(self) -> dict[str, Any]:
        """Everything that was found, as JSON values."""
        return {
            "labelled": self._labelled,
            "duplicate_ids": self._duplicate_ids.to_json(),
            "duplicate_inputs": self._duplicates.to_json(),
            "contradictions": self._contradictions.to_json(),
            "mentions": self._mentions.to_json(),
            "answers_too_long": self._too_long.to_json(),
            "missing_labels": {name: found.to_json() for name, found in self._missing.items() if found.count},
            "labels": {
                name: dict(counts.most_common()) for name, counts in self._histograms.items()
                if len(counts) <= MOST_LABELS
            },
            "problems": list(self._label_problems()),
        }  # fmt: skip

    def _label_problems(self) -> list[str]:
        if self._task is None or self._labels is None:
            return []
        problems = self._labels.problems()
        for name, counts in self._histograms.items():
            if not any(each.startswith(f"{name}: ") for each in problems):
                problems += self._unnamed(name, counts)
        return problems

    def _unnamed(self, name: str, counts: Mapping[str, int]) -> list[str]:
        """Expected labels that the prompt never names, of fields whose answers are not listed anywhere."""
        assert self._task is not None
        model = self._task.model
        rules = properties(model.output.schema_).get(name, {})
        if "enum" in rules or model.generate.get("choices") or not self._are_classes(name, counts):
            return []
        prompt = f"{model.prompt.system or ''}\n{model.prompt.user}"
        meant = (self._task.meant(name, json.loads(text)) for text in counts)
        bad = [label for label in meant if isinstance(label, str) and label not in prompt]
        return [f"{name}: expected labels that the prompt never names: {', '.join(bad)[:300]}"] if bad else []

    def _is_compared(self, name: str) -> bool:
        """Whether labels of the field are compared as they are; of a field without scores that is taken for granted."""
        assert self._task is not None
        kinds = {kind for entry in self._task.scores for kind in list(entry)[:1] if entry[kind] == name}
        return not kinds or not kinds.isdisjoint(("exact", "choice_probability"))

    def _are_classes(self, name: str, counts: Mapping[str, int]) -> bool:
        """Whether the field holds one of a few labels, and no open answer, which no prompt could name."""
        few = len(counts) <= MOST_LABELS and sum(counts.values()) >= ROWS_PER_LABEL * len(counts)
        return few and self._is_compared(name)


def _label(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Preview:
    """One line. ``prompt``: with the model's chat template if a model was named, else its messages one by one."""

    line: int
    id: str | None
    prompt: str | None
    tokens: int | None
    expected: Any
    error: str | None = None


def preview(
    path: str, task_path: str | None, format_: str | None, model: str | None, selection: Selection
) -> list[Preview]:
    """Render the chosen lines. Raises PromptmillError for a file, a task or a model that cannot be used."""
    task = load_task(task_path) if task_path else None
    counter = _counter(model) if model else None
    found = []
    with open_with(path, format_, task) as dataset:
        for line in selection.apply(dataset.checked()):
            if line.error:
                found.append(Preview(line.line, line.custom_id, None, None, None, line.error))
                continue
            try:
                sampling = resolve_sampling(dict(task.generate) if task else {}, line.sampling)
                request = to_request(
                    0, line.custom_id or "", payload(line), line.meta, sampling, task.template if task else None
                )
                prompt, tokens = _rendered(request, counter)
            except PromptmillError as problem:
                found.append(Preview(line.line, line.custom_id, None, None, line.expected, problem.message))
            else:
                found.append(Preview(line.line, line.custom_id, prompt, tokens, line.expected))
    return found


def _counter(model: str) -> TokenCounter:
    from promptmill_workers.checkpoints import locate
    from promptmill_workers.limited_counter import token_counter

    return token_counter(locate(model))


def _rendered(request: Request, counter: TokenCounter | None) -> tuple[str, int | None]:
    if counter is None:
        turns = request.messages or ()
        return request.prompt or "\n".join(f"[{each.role}]\n{each.content}" for each in turns), None
    from promptmill_workers.engines.contract import EngineRequest

    asked = EngineRequest.of(request)
    return counter.render(asked), counter.count(asked)
