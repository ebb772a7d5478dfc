"""promptmill: batch inference for local language models.

``run``, ``submit`` and ``job`` give a :class:`~promptmill.service.python_api.Job`; see docs/evaluation.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptmill.errors import PromptmillError
    from promptmill.service.job_options import JobOptions
    from promptmill.service.python_api import Job, job, run, submit
    from promptmill.service.selection import Selection

__all__ = ["Job", "JobOptions", "PromptmillError", "Selection", "job", "run", "submit"]

_HOME = {
    "JobOptions": "promptmill.service.job_options", "PromptmillError": "promptmill.errors",
    "Selection": "promptmill.service.selection",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported on use: `promptmill --help` must not pay for the database.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(_HOME.get(name, "promptmill.service.python_api")), name)
    raise AttributeError(f"module 'promptmill' has no attribute '{name}'")
