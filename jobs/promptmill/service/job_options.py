"""What is asked of a job: one value, made alike by the command line, Python, the REST API, sweeps and benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from promptmill.core.registry import suggestion
from promptmill.core.spans import Moment, moment, span_s
from promptmill.errors import BadOption
from promptmill.service.selection import Selection
from promptmill.tasks.sampling import BadParameter, as_whole, check_parameters, resolve_sampling
from promptmill.tasks.task_file import Task

Whole = Annotated[int, BeforeValidator(as_whole)]


class JobOptions(BaseModel):
    """A job as its user asks for it. Raises :class:`BadOption` for what no job can be; files are not looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: A path, ``-`` for standard input, or what else :func:`promptmill.readers.open_dataset` takes.
    dataset: str | None = None
    #: One prompt instead of a dataset.
    prompt: str | None = None
    model: str | None = None
    #: Path of a task file, or a task.
    task: str | Path | InstanceOf[Task] | None = None
    #: Text of a template, or ``@FILE``.
    template: str | None = None
    system: str | None = None
    #: Fields of the dataset that hold the answers, beside ``template``: no prompt may see them.
    expected: Annotated[tuple[str, ...], Strict(False)] = ()
    #: Sampling parameters by the names of SamplingParams.
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    selection: InstanceOf[Selection] = Selection()
    format: str | None = None
    name: str | None = None
    #: 0 is the most urgent.
    priority: Whole = Field(5, ge=0, le=9)
    slots: Whole | None = Field(None, ge=1)
    context_tokens: Whole | None = Field(None, ge=16)
    device: str = "auto"
    #: A count, or a share such as 5%.
    max_errors: str | None = None
    #: What stays of prompts and answers once the job has ended.
    store: Literal["full", "hash", "none"] = "full"
    skip_invalid: bool = False
    #: The end of everything, and the last moment to begin: a span such as 2h30m, or a time such as 2026-12-24T18:00.
    deadline: str | InstanceOf[Moment] | None = None
    expires: str | InstanceOf[Moment] | None = None
    #: A span: the job may run so long.
    time_limit: str | None = None
    #: For a job that asks the same as an earlier one.
    if_exists: Literal["new", "attach", "fail"] = "new"
    #: Take greedy answers that other jobs had, and keep those of this one.
    use_cache: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, given: Any, check: ValidatorFunctionWrapHandler) -> JobOptions:
        try:
            options: JobOptions = check(given)
        except ValidationError as problem:
            raise _refusal(problem) from None
        options._refuse_contradictions()
        return options

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> JobOptions:
        """Options by their names; one that is None is not given."""
        return cls.model_validate({name: value for name, value in given.items() if value is not None})

    def changed(self, **changes: Any) -> JobOptions:
        """The same with other values, checked as the first ones were."""
        return JobOptions.model_validate(dict(self) | changes)

    def _refuse_contradictions(self) -> None:
        if (self.dataset is None) == (self.prompt is None):
            raise BadOption("give 'dataset' or 'prompt', and only one of them", option="dataset")
        if self.task is not None and (self.template or self.system):
            raise BadOption(
                "'task' and 'template' or 'system' exclude each other", option="task",
                hint="A task file holds its prompts.",
            )  # fmt: skip
        if self.expected and self.template is None:
            raise BadOption(
                "'expected' needs 'template'", option="expected", hint="A task file says itself what is expected."
            )
        if self.use_cache and self.store != "full":
            raise BadOption(
                "'use_cache' keeps answers", option="use_cache", hint=f"Leave it out with 'store' {self.store}."
            )

    @field_validator("sampling")
    @classmethod
    def _sampling(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = check_parameters(given)
            resolve_sampling(found, {})
        except BadParameter as problem:
            raise BadOption(problem.message, option="sampling", hint=problem.hint) from None
        return found

    @field_validator("name")
    @classmethod
    def _name(cls, name: str | None) -> str | None:
        """A name must never be taken for an id or for a reference such as @last. Two jobs may share one."""
        if name is None:
            return None
        is_id = re.fullmatch(r"[0-9A-Za-z]{26}", name)
        if is_id or name.startswith("@") or name != name.strip() or not name.isprintable() or not 0 < len(name) <= 100:
            raise BadOption(
                f"'name' {json.dumps(name[:100])} cannot name a job", option="name",
                hint="Up to 100 printable characters, not beginning with @, and not of the form of a job's id.",
            )  # fmt: skip
        return name

    @field_validator("max_errors")
    @classmethod
    def _max_errors(cls, spec: str | None) -> str | None:
        is_good = spec is None or re.fullmatch(r"\d+|\d+(\.\d+)?%", spec)
        if spec is not None and (not is_good or (spec.endswith("%") and float(spec[:-1]) > 100)):
            raise BadOption(
                f"'max_errors' {spec} is neither a number nor a share", option="max_errors", hint="Examples: 10, 2.5%."
            )
        return spec

    @field_validator("deadline", "expires")
    @classmethod
    def _moment(cls, given: str | Moment | None, field: ValidationInfo) -> Moment | None:
        return moment(given, str(field.field_name)) if isinstance(given, str) else given

    @field_validator("time_limit")
    @classmethod
    def _time_limit(cls, given: str | None) -> str | None:
        span_s(given, "time_limit")
        return given


def _refusal(problem: ValidationError) -> BadOption:
    """The first thing that is wrong with the types of what was given."""
    first = problem.errors(include_url=False)[0]
    option = str(first["loc"][0]) if first["loc"] else "dataset"
    if first["type"] == "extra_forbidden":
        return BadOption(
            f"unknown option '{option[:40]}'", option=option, hint=suggestion(option, list(JobOptions.model_fields))
        )
    what = first["msg"][0].lower() + first["msg"][1:]
    return BadOption(f"'{option}' cannot be used: {what}", option=option)
