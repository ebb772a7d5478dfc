"""Lines of a dataset as the model will see them, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from promptmill.errors import PromptmillError
from promptmill.service.prepare import open_with
from promptmill.service.selection import Selection
from promptmill.tasks.task_file import load_task
from promptmill.tasks.templates import payload, resolve_sampling, to_request
from promptmill.types import Request

if TYPE_CHECKING:
    from promptmill_workers.engines.contract import TokenCounter


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
