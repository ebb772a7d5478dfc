"""What a worker and its engine host tell each other arrives as it was sent, whatever fields it has."""

from __future__ import annotations

import pickle
from dataclasses import MISSING, fields
from typing import Any

import pytest

from promptmill.types import (
    ErrorClass,
    Extras,
    Failed,
    FinishReason,
    Message,
    Ok,
    Request,
    Result,
    SamplingParams,
    Sharing,
    Timing,
    Usage,
)
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.host.wire import pack_request, pack_result, request_of, result_of

USAGE, TIMING = Usage(9, 4, 3, 1), Timing(1.0, 2.0, 3.0, 4.0)
TURNS = (Message("system", "be brief"), Message("user", "hi", '{"tool_call_id": "1"}', own=((0, 2),)))
FULL = Request(7, "c7", SamplingParams(max_tokens=5, seed=2), TURNS, "a", True, ((0, 1),), Sharing("o", "j"))
OK = Ok(7, "text", FinishReason.LENGTH, USAGE, TIMING, Extras(reasoning="why", deduplicated=True))
FAILED = Failed(7, ErrorClass.TIMEOUT, "late", USAGE, TIMING)


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    "request_sent", [FULL, Request(0, "c0", SamplingParams(), prompt="x"), Request(1, "c1", SamplingParams(), TURNS)]
)
def test_a_request_arrives_as_the_engine_is_to_see_it(request_sent: Request) -> None:
    packed = sent(pack_request(request_sent))
    assert packed[0] == request_sent.row
    found = request_of(packed, 3, urgent=True)
    common = {each.name for each in fields(Request)} & {each.name for each in fields(EngineRequest)}
    assert found == EngineRequest(key=3, urgent=True, **{name: getattr(request_sent, name) for name in common})


@pytest.mark.parametrize(
    "result", [OK, FAILED, Ok(0, "", FinishReason.STOP, USAGE, None), Failed(1, ErrorClass.GRAMMAR, "no", None, None)]
)
def test_a_result_arrives_as_it_was_sent(result: Result) -> None:
    assert result_of(sent(pack_result(result))) == result


@pytest.mark.parametrize("value", [FULL, TURNS[1], OK, FAILED, USAGE], ids=lambda value: type(value).__name__)
def test_what_is_sent_here_has_a_value_of_its_own_in_every_field(value: Any) -> None:
    """A field that is added to one of these classes is to be added above: it has to travel too."""
    for each in fields(value):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        assert getattr(value, each.name) != default, each.name
