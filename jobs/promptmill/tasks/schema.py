"""The keys of a task file and what each may hold."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from promptmill.tasks.normalising import Step

#: What a gate may demand of a score, of the answers that could be read, and of the latency.
GATE = re.compile(r"\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)\s*")
OTHER_FIGURES = ("success_rate", "parsed", "latency.p50", "latency.p95", "latency.p99")


#: A step of an extraction: its name, or its name and its argument.
ExtractStep = str | dict[str, Any]

#: Steps without an argument, and those with one.
PLAIN_STEPS = ("whole", "first_line", "last_line")
STEPS = (*PLAIN_STEPS, "regex", "json", "choice")

#: Most lines of a file of few-shot examples.
MOST_EXAMPLES = 1_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(_Part):
    """One turn that is shown to the model before the question: the fields of the user's template, and the answer."""

    input: dict[str, Any]
    output: Any


class PromptPart(_Part):
    """``prompt:`` of a task file."""

    user: str
    system: str | None = None
    #: ``chat``: messages, to which the model's chat template applies; ``plain``: one text, sent as it is.
    form: Literal["chat", "plain"] = "chat"
    #: Few-shot examples, or the file that holds them: JSONL with ``input`` and ``output`` in each line.
    examples: str | list[Example] = Field(default_factory=list)


class OutputPart(_Part):
    """``output:`` of a task file: the JSON Schema that answers are read by, or pipelines that find their fields.

    ``constrain``: no answer can leave the schema; ``validate``: one that does counts as unparsed; ``free``: an object
    with the required keys is enough.
    """

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    mode: Literal["constrain", "validate", "free"] = "free"
    #: Field -> where in a free text it is, tried in order: whole, first_line, last_line, regex, json, choice.
    extract: dict[str, ExtractStep | list[ExtractStep]] = Field(default_factory=dict)
    #: Field -> {label as the dataset or an answer writes it: label of the schema}.
    aliases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    #: Field -> steps that make texts of the dataset and of answers one before they are compared.
    normalise: dict[str, list[Step]] = Field(default_factory=dict)

    @property
    def pipelines(self) -> dict[str, list[ExtractStep]]:
        """``extract`` with a list of steps for each field."""
        return {name: steps if isinstance(steps, list) else [steps] for name, steps in self.extract.items()}


class GateDemand(_Part):
    """A gate that is judged by the figure's 95 % interval: few rows must not pass by luck.

    The end that counts is the unfavourable one: the lower one of ``>=``, the upper one of ``<=``.
    """

    demand: str
    #: ``true``; or the name of the end that counts, which must be the unfavourable one.
    ci: Literal[True, "lower", "upper"]

    @property
    def end(self) -> str:
        """The end that the demand makes the unfavourable one."""
        return "upper" if "<" in self.demand else "lower"


class TaskModel(_Part):
    """A task file as it is written."""

    task: str = Field(min_length=1)
    prompt: PromptPart
    generate: dict[str, Any] = Field(default_factory=dict)
    #: Field of the line that names it.
    id: str | None = None
    #: Name in the template -> field of the line; without it the template sees every field that is not expected.
    input: dict[str, str] = Field(default_factory=dict)
    expected: dict[str, str] = Field(default_factory=dict)
    meta: dict[str, str] = Field(default_factory=dict)
    #: What happens to a second line with the same id: it is an error, or it is called ``id#2``.
    duplicate_ids: Literal["refuse", "number"] = "refuse"
    output: OutputPart = Field(default_factory=lambda: OutputPart(schema=None))
    scores: list[dict[str, Any]] = Field(default_factory=list)
    #: Figure -> what it must reach, such as ``category.accuracy: ">=0.85"``.
    gates: dict[str, str | GateDemand] = Field(default_factory=dict)
