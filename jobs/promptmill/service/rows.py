"""Dataset lines become the rows of a job, each checked as far as it can be checked without a device."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from promptmill.errors import BadLines, DatasetError, RequestError
from promptmill.readers.fields import storable
from promptmill.service.labels import Labels
from promptmill.service.prepare import Prepared
from promptmill.tasks.sampling import refuse_repeats, repeated, resolve_sampling
from promptmill.tasks.templates import payload, to_request
from promptmill.types import DatasetLine, ErrorClass, Request, SamplingParams

#: Bytes of text a token stands for, on the safe side, where a chunk's work is estimated.
BYTES_PER_TOKEN = 4

#: Names of fields that are kept for a message.
MOST_NAMES = 100

#: Largest cost of a row that is told from a larger one.
LARGEST_COST = 2**32 - 1

#: ``json.dumps`` with an option makes an encoder for each call; a million lines share this one.
_encode = json.JSONEncoder(ensure_ascii=False).encode
_sorted = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One row ready to be stored. ``error`` is set for an invalid line that is kept by ``--skip-invalid``."""

    custom_id: str
    input: str | None
    expected: str | None
    meta: str | None
    sampling: str | None
    cost: int
    input_digest: int | None = None
    prompt_digest: int | None = None
    error: tuple[ErrorClass, str] | None = None


class Rows:
    """The rows of a job, in order, and what was seen while they were made."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._template = prepared.task.template if prepared.task else None
        self._labels = Labels(prepared.task) if prepared.task and prepared.task.scores else None
        self._sampling = prepared.sampling
        self._defaults = resolve_sampling(self._sampling, {})
        #: The last line that had some: its parameters, the same as text, and resolved.
        self._own: tuple[Mapping[str, Any], str, SamplingParams] | None = None
        #: Bad lines with their problems: the first of them, and how many there are.
        self.bad: list[tuple[int, str]] = []
        self.bad_total = 0
        #: Expected tokens of each row.
        self.costs = array("I")
        #: What each valid row asks the model, as ``digest_of``.
        self._asked = array("q")
        #: Rows of bad lines that are kept as errors.
        self.invalid: list[int] = []
        #: Expected fields named by hand that no line has had yet: who names one does not mean none.
        self._unmet = set(prepared.options.expected)
        #: Fields of the first lines while there were some, for the message.
        self._fields: dict[str, None] = {}

    def __iter__(self) -> Iterator[PreparedRow]:
        """Bad lines are left out, and kept in mind."""
        for line in self._prepared.options.selection.apply(self._prepared.dataset.checked()):
            row = self.row_of(line)
            if row is not None:
                self.costs.append(min(row.cost, LARGEST_COST))
                yield row

    def row_of(self, line: DatasetLine) -> PreparedRow | None:
        """The row, or None for a bad line that stops the submission."""
        problem, error_class = line.error, ErrorClass.INVALID_REQUEST
        if problem is None:
            try:
                return self._valid(line)
            except RequestError as error:
                # Any other error is not this line's: a model whose template never ends counts no line.
                problem, error_class = error.message, getattr(error, "error_class", error_class)
        # It may quote what the line has.
        problem = storable(problem)
        self.bad_total += 1
        if len(self.bad) < BadLines.SHOWN:
            self.bad.append((line.line, problem))
        if not self._prepared.options.skip_invalid:
            return None
        self.invalid.append(len(self.costs))
        # Nothing is known of what it asks: it is like no other.
        self._asked.append(len(self.costs))
        custom_id = line.custom_id or f"row-{len(self.costs)}"
        failure = (error_class, problem)
        return PreparedRow(custom_id, None, _json(line.expected), _json(line.meta), None, 0, error=failure)

    def _valid(self, line: DatasetLine) -> PreparedRow:
        asked, sampling = self._sampling_of(line)
        if self._unmet:
            self._note_names(line)
        body = payload(line)
        row, gauge = len(self.costs), self._prepared.gauge
        custom_id = line.custom_id if line.custom_id is not None else f"row-{row}"
        prompt_digest = None
        if self._template is not None or gauge is not None:
            request = to_request(row, custom_id, body, line.meta, sampling, self._template, self._prepared.system)
            if gauge is not None:
                gauge(request)
            if "fields" in body:
                # A field that the template leaves out makes no other question of it.
                prompt_digest = digest_of(_prompt_of(request))
        text = _encode(body)
        cost = len(text) // BYTES_PER_TOKEN + sampling.max_tokens
        if self._labels is not None:
            self._labels.add(line.expected)
        # A prompt is written in one way only; fields may come in any order.
        digest = digest_of(text if "prompt" in body else _sorted(body))
        self._asked.append(digest if prompt_digest is None else prompt_digest)
        return PreparedRow(custom_id, text, _json(line.expected), _json(line.meta), asked, cost, digest, prompt_digest)

    def _sampling_of(self, line: DatasetLine) -> tuple[str | None, SamplingParams]:
        """The line's parameters as they are stored, and resolved, with the seed of its repetition.

        The seed is stored with the row: a worker that runs the row again draws the same.
        """
        asked, sampling = self._common_sampling_of(line)
        own = repeated(sampling, line.repetition)
        if own is sampling:
            return asked, sampling
        return _encode({**line.sampling, "seed": own.seed}), own

    def _common_sampling_of(self, line: DatasetLine) -> tuple[str | None, SamplingParams]:
        """The same without it, made once where lines ask the same, as in most files."""
        if not line.sampling:
            refuse_repeats(self._defaults)
            return None, self._defaults
        if self._own is None or line.sampling is not self._own[0]:
            asked = _encode(line.sampling)
            if self._own is None or asked != self._own[1]:
                sampling = resolve_sampling(self._sampling, line.sampling)
                refuse_repeats(sampling)
                self._own = (line.sampling, asked, sampling)
        return self._own[1], self._own[2]

    def _note_names(self, line: DatasetLine) -> None:
        """Which fields the line has."""
        answers = line.expected if isinstance(line.expected, dict) else {}
        self._unmet -= answers.keys()
        if len(self._fields) < MOST_NAMES:
            self._fields |= dict.fromkeys([*(line.fields or {}), *(line.meta or {}), *answers])

    @property
    def effective(self) -> float:
        """As many rows, none a copy of another, would tell as much (Kish 1965)."""
        sizes = Counter(self._asked).values()
        return len(self._asked) ** 2 / max(1, sum(size * size for size in sizes))

    def refuse_bad(self, submitting: bool = True) -> None:
        """Raise for bad lines that were not to be skipped, and for a dataset in which nothing is left.

        ``submitting``: the rows were to become a job, and not only to be looked at.
        """
        dataset = self._prepared.dataset
        if self.bad_total and not self._prepared.options.skip_invalid:
            raise BadLines(dataset.name, self.bad, self.bad_total, submitting=submitting, place=dataset.place)
        if not self.costs:
            raise DatasetError(f"{dataset.name} holds no rows", hint="Check --limit, --where and the file.")
        if submitting and self._labels is not None and (problems := self._labels.problems()):
            raise DatasetError(
                f"{dataset.name}: {'; '.join(problems)}",
                hint="Such rows are wrong whatever the model answers. Mend the labels, or map them with "
                "'aliases' or 'normalise' of the task file.",
            )
        if self._unmet:
            here = ", ".join(self._fields)[:200] or "none"
            raise DatasetError(
                f"{dataset.name}: no line has a value in the field '{min(self._unmet)[:40]}' that --expected names; "
                f"fields: {here}",
                hint="A field that is not named is a field of the prompt: the answer would be shown to the model.",
            )


def _prompt_of(request: Request) -> str:
    """What a template has made of a row, as one text."""
    return request.prompt or _encode([(each.role, each.content) for each in request.messages or ()])


def digest_of(text: str) -> int:
    """64 bits, as a signed number, of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _json(value: Any) -> str | None:
    return None if value is None else _encode(value)
