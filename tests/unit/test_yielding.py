"""Urgent requests take the slots of others, within their share, and these run again."""

from __future__ import annotations

from collections import deque

from promptmill.types import SamplingParams
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Finished, enqueue
from promptmill_workers.engines.echo import EchoBackend
from promptmill_workers.engines.scheduler import Scheduler
from promptmill_workers.host.process import wrapped
from tests.conftest import Clock


def request(key: int, *, urgent: bool = False, text: str = "one two") -> EngineRequest:
    return EngineRequest(key, SamplingParams(), prompt=f"{text} {key}", urgent=urgent)


def desk(clock: Clock, slots: int = 4) -> tuple[Engine, Engine]:
    options = EngineOptions(slots=slots, model_options={"token_s": "0.001"})
    engine = Scheduler(EchoBackend("echo", options, clock), clock)
    return wrapped(engine), engine


def test_urgent_ones_go_before_all_that_wait_in_their_own_order() -> None:
    waiting = deque([request(1), request(2)])
    enqueue(waiting, [request(3, urgent=True), request(4)])
    enqueue(waiting, [request(5, urgent=True)])
    assert [each.key for each in waiting] == [3, 5, 1, 2, 4]


def test_an_urgent_request_gets_a_slot_at_the_next_step(clock: Clock) -> None:
    front, engine = desk(clock)
    front.add([request(key) for key in range(10)])
    front.step()
    assert engine.active == 4
    front.add([request(100, urgent=True)])
    front.step()
    assert 100 not in front.waiting_keys()
    assert engine.active == 4


def test_half_of_the_slots_stay_with_the_others(clock: Clock) -> None:
    front, _ = desk(clock)
    front.add([request(key) for key in range(10)])
    front.step()
    front.add([request(key, urgent=True) for key in range(100, 110)])
    front.step()
    running = {*range(10), *range(100, 110)} - set(front.waiting_keys())
    assert len([key for key in running if key >= 100]) == 2
    assert len([key for key in running if key < 100]) == 2


def test_everybody_is_answered_once_in_the_end(clock: Clock) -> None:
    front, engine = desk(clock)
    front.add([request(key, text="a b c d") for key in range(10)])
    finished: list[int] = []
    for turn in range(200):
        if turn % 3 == 0 and turn < 30:
            front.add([request(100 + turn, urgent=True)])
        finished += [each.key for each in front.step() if isinstance(each, Finished)]
        clock.advance(0.001)
    assert sorted(finished) == [*range(10), *range(100, 130, 3)]
    assert engine.active == front.waiting == 0


def test_a_cancelled_urgent_request_takes_no_slot(clock: Clock) -> None:
    front, engine = desk(clock)
    front.add([request(key) for key in range(8)])
    front.step()
    front.add([request(100, urgent=True)])
    front.cancel(100)
    front.step()
    assert engine.counters.wasted_tokens == 0
    assert set(front.waiting_keys()) == {4, 5, 6, 7}
