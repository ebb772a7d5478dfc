"""Runs of an engine to their end, and what came out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from promptmill.types import FinishReason
from promptmill_workers.engines.contract import Engine, EngineRequest, Event, Finished

#: Steps after which an engine is taken for one that never ends.
MOST_STEPS = 20_000

#: Makes an engine with the options given, and closes it when the test has ended.
Load = Callable[..., Engine]

#: Text, why it ended, and the tokens of prompt and answer.
Answer = tuple[str, FinishReason, int, int]


def run(engine: Engine, requests: Sequence[EngineRequest] = ()) -> dict[int, Event]:
    """Every request's event, each exactly once."""
    engine.add(requests)
    events: list[Event] = []
    for _ in range(MOST_STEPS):
        events.extend(engine.step())
        if not engine.active and not engine.waiting:
            break
    else:
        raise AssertionError(f"after {MOST_STEPS:,} steps {engine.active} requests run and {engine.waiting} wait")
    events.extend(engine.step())
    found = {event.key: event for event in events}
    assert len(events) == len(found)
    assert found.keys() >= {request.key for request in requests}
    return found


def finished(event: Event) -> Finished:
    assert isinstance(event, Finished), event
    return event


def texts(events: dict[int, Event]) -> dict[int, str]:
    return {key: finished(event).text for key, event in sorted(events.items())}


def answers(events: dict[int, Event]) -> dict[int, Answer]:
    """What must not depend on neighbours."""
    found = {key: finished(event) for key, event in sorted(events.items())}
    return {
        key: (each.text, each.finish_reason, each.usage.prompt_tokens, each.usage.output_tokens)
        for key, each in found.items()
    }


def alone(load: Load, requests: Sequence[EngineRequest], **options: int) -> dict[int, Answer]:
    """Each answer by an engine that was made for it: nothing is batched and nothing shared."""
    return {request.key: answers(run(load(slots=1, **options), [request]))[request.key] for request in requests}
