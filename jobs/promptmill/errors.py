"""Every error a user can meet: what is wrong, where, and what to do. Anything else is a bug."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Exit codes of the command line. 130 is what shells give a program ended by Ctrl-C.
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130
#: What shells give a program whose reader has gone, as 'head' does when it has seen enough (SIGPIPE).
EXIT_PIPE = 141


class PromptmillError(Exception):
    """Something a person can put right. ``hint`` says how."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints of it."""
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint, "exit_code": self.exit_code}


class BadOption(PromptmillError):
    """An option of a job cannot be used. Its message quotes options by their fields, such as 'max_errors'."""

    def __init__(self, message: str, *, option: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option

    def spelled(self, options: Mapping[str, str]) -> BadOption:
        """The same for a caller who knows the fields by other names."""

        def said(text: str) -> str:
            return re.sub(r"'(\w+)'", lambda quoted: options.get(quoted[1], quoted[0]), text)

        return BadOption(said(self.message), option=self.option, hint=said(self.hint) if self.hint else None)


class SettingsError(PromptmillError):
    """A setting is unknown or has a wrong value."""


class DatasetError(PromptmillError):
    """The dataset cannot be read, or has lines that cannot be used."""


class BadLines(DatasetError):
    """Lines of a dataset that cannot be used: the first few, and how many there are."""

    #: Lines listed in the message.
    SHOWN = 20

    def __init__(
        self,
        name: str,
        shown: Sequence[tuple[int, str]],
        total: int,
        *,
        submitting: bool = True,
        place: Callable[[int], str] | None = None,
    ) -> None:
        """``submitting``: the lines were to become a job, and not only to be looked at. ``place``: where a line is."""
        lines = [f"{place(line) if place else f'{name}:{line}'}: {problem}" for line, problem in shown]
        if total > len(shown):
            how = "--skip-invalid records each with its reason" if submitting else "shown when these are mended"
            lines.append(f"... and {total - len(shown)} more; {how}")
        self.total = total
        self.shown = list(shown)
        plural = "line" if total == 1 else "lines"
        super().__init__(
            "\n".join([*lines, f"{total} bad {plural} in {name}{': nothing was enqueued' if submitting else ''}"]),
            hint="Mend them, or give --skip-invalid to record them as errors ('promptmill results --failed') and run "
            "the rest."
            if submitting
            else "Mend them; a job would refuse them.",
        )

    def to_json(self) -> dict[str, Any]:
        listed = [{"line": line, "problem": problem} for line, problem in self.shown]
        return super().to_json() | {"bad_lines": self.total, "lines": listed}


class TaskFileError(PromptmillError):
    """The task file or a template is wrong."""


class UnknownName(PromptmillError):
    """A name that is not in a registry, or a job that does not exist."""


class JobError(PromptmillError):
    """A job cannot do what was asked of it in its state."""


class JobExists(JobError):
    """A job that asks the same is there: completed, or on its way."""

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(
            f"job {job_id} asks the same and is {state}",
            hint="Use its results, give --if-exists attach to follow it, or --if-exists new to run it all again.",
        )
        self.job_id = job_id


class QueueFull(JobError):
    """More requests would wait than are allowed to."""


class OutputFailed(PromptmillError):
    """What was to be written could not be, in the middle of it: a full disk and its like."""

    exit_code = EXIT_FAILED


class DatabaseError(PromptmillError):
    """The database is unreachable or at another revision."""


class BrokerError(PromptmillError):
    """Redis is unreachable."""


class DeviceError(PromptmillError):
    """A device is not here, is taken, or the engine cannot use it."""


class ModelError(PromptmillError):
    """A model cannot be found, fetched or loaded."""


class RequestError(PromptmillError):
    """One request cannot be served; its neighbours are not concerned."""


def first_line(problem: BaseException) -> str:
    """What happened, in one line of at most 200 characters: without a statement and its values."""
    text = str(getattr(problem, "orig", None) or problem).strip()
    return text.splitlines()[0][:200] if text else type(problem).__name__
