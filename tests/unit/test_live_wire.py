"""How requests of waiting clients travel through Redis."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.queue.heartbeats import heartbeat_of
from promptmill.queue.interactive_wire import LiveRequest

PROMPT = LiveRequest("2", "server", "echo", {}, prompt="Once", stream=True)


#: Every field by its type: one that is added travels, or this fails.
REQUESTS = st.builds(
    LiveRequest,
    **{each.name: ... for each in fields(LiveRequest) if each.name != "sampling"},
    sampling=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())),
)


@given(REQUESTS)
def test_a_request_arrives_with_all_of_its_fields(request_: LiveRequest) -> None:
    assert LiveRequest.decode(request_.encode()) == request_


def test_a_request_of_another_version_is_refused() -> None:
    newer = json.dumps(json.loads(PROMPT.encode()) | {"haste": 3}).encode()
    with pytest.raises(ValueError, match="no request of a server of ours"):
        LiveRequest.decode(newer)


def test_a_sign_of_life_that_is_something_else_is_none() -> None:
    assert [heartbeat_of(data) for data in (None, b"{", b"7", b'{"state": 1}', b"\xff")] == [None] * 5


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b"7", b'{"id": 5}', PROMPT.encode()[:-1]])
def test_what_no_server_has_sent_is_refused_without_a_quotation(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^no request of a server of ours$"):
        LiveRequest.decode(data)
