"""The roles of messages as chat templates of several families write them: nothing that is said is dropped unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill.errors import RequestError
from promptmill.types import Message, SamplingParams
from promptmill_workers.engines.chat_template import ChatTemplate
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.prompt_pieces import Controls, pieces_of, text_of
from tests.unit.tiny_mlx import write_tiny_mlx

#: Writes the roles that it knows and passes over others, as Llama 2's does.
PASSES_OVER = (
    "{% for message in messages %}{% if message.role in ('system', 'user', 'assistant') %}"
    "<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}"
)
#: Takes a system message at the start only, and refuses what it does not know.
FIRST_ONLY = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first or message.role == 'developer' %}"
    "{{ raise_exception('no such message') }}{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)
#: Knows the developer at the start, and drops it elsewhere, as gpt-oss' does.
KNOWS = (
    "{% if messages[0].role in ('developer', 'system') %}<told>{{ messages[0].content }}{% endif %}"
    "{% for message in messages %}{% if message.role in ('user', 'assistant') %}<{{ message.role }}>"
    "{{ message.content }}{% endif %}{% endfor %}"
)


def rendered_by(source: str, messages: tuple[Message, ...]) -> str:
    template, request = ChatTemplate(source, "", ""), EngineRequest(0, SamplingParams(), messages)
    return text_of(pieces_of(request, Controls([]), lambda _: template)[0])


USER = Message("user", "Hi")
DEVELOPER, SYSTEM = Message("developer", "Be brief."), Message("system", "You are kind.")


@pytest.mark.parametrize(
    ("source", "rendered"),
    [(PASSES_OVER, "<system>Be brief.<user>Hi"), (FIRST_ONLY, "<system>Be brief.<user>Hi"),
     (KNOWS, "<told>Be brief.<user>Hi")],
    ids=["passes over", "first only", "knows"],
)  # fmt: skip
def test_a_developer_is_heard_by_every_template(tmp_path: Path, source: str, rendered: str) -> None:
    from promptmill_workers.engines.mlx_lm.text import MlxTokenizer

    assert rendered_by(source, (DEVELOPER, USER)) == rendered
    words = MlxTokenizer(write_tiny_mlx(tmp_path / "tiny", chat_template=source))
    assert words.render(EngineRequest(0, SamplingParams(), (DEVELOPER, USER), None)) == rendered


@pytest.mark.parametrize("source", [FIRST_ONLY, KNOWS], ids=["first only", "knows"])
def test_a_developer_beside_a_system_is_one_message_with_it(source: str) -> None:
    assert "You are kind.\n\nBe brief.<user>Hi" in rendered_by(source, (SYSTEM, DEVELOPER, USER))


@pytest.mark.parametrize("told", [DEVELOPER, SYSTEM], ids=["developer", "system"])
def test_what_a_template_drops_is_an_error(told: Message) -> None:
    with pytest.raises(RequestError, match=f"leaves out a message of the role '{told.role}'"):
        rendered_by(KNOWS, (USER, told, USER))


def test_a_template_that_knows_no_system_says_so() -> None:
    source = "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    with pytest.raises(RequestError, match="leaves out a message of the role 'developer'"):
        rendered_by(source, (DEVELOPER, USER))
