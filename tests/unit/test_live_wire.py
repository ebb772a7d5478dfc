"""How requests of waiting clients travel through Redis."""

from __future__ import annotations

import pytest

from promptmill.live_wire import LiveRequest

CHAT = LiveRequest(
    "1", "server", "echo", {"max_tokens": 4}, [("user", "Hi"), ("tool", "21", '{"id": "a"}')], owner="key"
)
PROMPT = LiveRequest("2", "server", "echo", {}, prompt="Once", stream=True)


@pytest.mark.parametrize("request_", [CHAT, PROMPT], ids=["chat", "prompt"])
def test_a_request_arrives_as_it_was_sent(request_: LiveRequest) -> None:
    assert LiveRequest.decode(request_.encode()).encode() == request_.encode()
    assert LiveRequest.decode(request_.encode()).owner == request_.owner


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b"7", PROMPT.encode()[:-1] + b', "more"]'])
def test_what_no_server_has_sent_is_refused_without_a_quotation(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^no request of a server of ours$"):
        LiveRequest.decode(data)
