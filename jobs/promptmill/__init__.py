"""promptmill: batch inference for local language models. ``run`` and ``submit`` are what the command line calls too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptmill.service import Outcome, RunOptions, resume, run, submit

__all__ = ["Outcome", "RunOptions", "resume", "run", "submit"]


def __getattr__(name: str) -> Any:
    # Imported on use: `promptmill --help` must not pay for the database.
    if name in __all__:
        from promptmill import service

        return getattr(service, name)
    raise AttributeError(f"module 'promptmill' has no attribute '{name}'")
