"""A model's tokeniser in a child with limits: its chat template is a program of the file's author."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promptmill.core.child_processes import Child, ChildLimits, OverLimit
from promptmill.errors import ModelError
from promptmill.types import Message, SamplingParams
from promptmill_workers.checkpoints import Checkpoint, counter_here, require_mlx
from promptmill_workers.engines.contract import EngineRequest, TokenCounter

#: Loading a vocabulary, from a slow disk too, and one prompt. MLX' tokenisers come with large libraries.
LOAD = ChildLimits(300.0, 4_096)
PROMPT = ChildLimits(10.0, 4_096)


def token_counter(checkpoint: Checkpoint) -> TokenCounter:
    """The model's tokeniser without its weights. Raises ModelError."""
    require_mlx(checkpoint)
    if checkpoint.path is None:
        return counter_here(checkpoint.engine, None)
    return LimitedCounter(checkpoint.name, checkpoint.engine, checkpoint.path)


class LimitedCounter:
    """A TokenCounter of the engines' contract, whose child is started once and used for all rows."""

    def __init__(self, name: str, engine: str, path: Path) -> None:
        """Raises ModelError."""
        self._name, self._engine, self._path = name, engine, path
        self._child = Child()
        self._problem: ModelError | None = None
        self._sampling: SamplingParams | None = None
        self.context_tokens, self.vocabulary = self._call(LOAD, "sizes")

    def count(self, request: EngineRequest) -> int:
        """Raises RequestError, and ModelError for a template that goes beyond its limits."""
        return int(self._call(PROMPT, "count", self._packed(request)))

    def render(self, request: EngineRequest) -> str:
        """Raises as :meth:`count` does."""
        return str(self._call(PROMPT, "render", self._packed(request)))

    def _packed(self, request: EngineRequest) -> tuple[Any, ...]:
        """The request in plain tuples, which are pickled in a tenth of the time; parameters only where they changed."""
        sampling = None if request.sampling is self._sampling else request.sampling
        self._sampling = request.sampling
        turns = request.messages
        messages = None if turns is None else [(each.role, each.content, each.extra, each.own) for each in turns]
        return request.key, sampling, messages, request.prompt, request.own

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        """Raises as :meth:`count` does."""
        found: list[tuple[str, str]] = self._call(PROMPT, "parts", self._packed(request))
        return found

    def has_two_starts(self, request: EngineRequest) -> bool:
        """Raises as :meth:`count` does."""
        return bool(self._call(PROMPT, "has_two_starts", self._packed(request)))

    def _call(self, limits: ChildLimits, name: str, argument: object = None) -> Any:
        if self._problem is not None:
            raise self._problem
        try:
            raised, value = self._child.call(limits, _in_child, (self._engine, self._path, name, argument))
        except OverLimit as problem:
            self._child.end()
            self._problem = ModelError(
                f"{self._name} cannot be used to count tokens: {problem.message}",
                hint="Its chat template may be endless, or its vocabulary damaged. Use another file of the model.",
            )
            raise self._problem from None
        except BaseException:
            self._child.end()
            raise
        if raised:
            raise value
        return value


_last_sampling = SamplingParams()


def _in_child(engine: str, path: Path, name: str, packed: tuple[Any, ...] | None) -> object:
    global _last_sampling
    counter = counter_here(engine, path)
    if packed is None:
        return counter.context_tokens, counter.vocabulary
    key, sampling, turns, prompt, own = packed
    _last_sampling = sampling or _last_sampling
    messages = None if turns is None else tuple(Message(*each[:3], own=each[3]) for each in turns)
    return getattr(counter, name)(EngineRequest(key, _last_sampling, messages, prompt, own=own))
