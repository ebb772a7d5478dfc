"""Task files that clients send: they name nothing of this machine."""

from __future__ import annotations

from promptmill.errors import TaskFileError
from promptmill.tasks.scores import entry_kind
from promptmill.tasks.task_file import Task, parse_task


def task_of(text: str, name: str) -> Task:
    """The task in ``text``. Raises TaskFileError also for a score by a function of a file: who sends one over a
    network must not choose what is run here, and a job that could not be scored would have no report.
    """
    task = parse_task(text, name)
    for number, entry in enumerate(task.scores, 1):
        if entry_kind(entry) == "python":
            raise TaskFileError(
                f"{name}: score {number} is a function of a file: that can only be used by a task file on this machine",
                hint="Use the other kinds of scores, or score the job with 'promptmill score JOB --task FILE'.",
            )
    return task


def require_task(text: str, name: str) -> None:
    """Raises as :func:`task_of`, whose task does not leave a child."""
    task_of(text, name)
