"""Calls of tools: read from what models write, held back from streams, rendered by the templates that know them."""

from __future__ import annotations

import json

import pytest

from promptmill.errors import RequestError
from promptmill.readers.jsonl import messages_of
from promptmill.tasks.openai import CHAT, COMPLETIONS, translate
from promptmill.tasks.sampling import BadParameter
from promptmill.tasks.tools import ID_LENGTH, Offer, Withheld, call_id, checked_tools, read_calls, shown_calls
from promptmill.types import Message, SamplingParams
from promptmill_workers.engines.chat_template import PLAIN, ChatTemplate, knows_tools
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.prompt_pieces import Controls, pieces_of, text_of
from tests.unit.tiny_models import CHATML

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "exact", "parameters": PLACE, "strict": True}},
]
OFFER = Offer(checked_tools(TOOLS))
CALL = '{"name": "weather", "arguments": {"place": "Rome"}}'

#: As templates that know tools write them, in short.
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if message.tool_calls %}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
        (f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.", ["weather"] * 2),
        (f"<tool_call>\n{CALL}", "", ["weather"]),
        ('{"name": "weather", "parameters": {"place": "Rome"}}', "", ["weather"]),
        (f"{CALL}; {CALL}", "", ["weather", "weather"]),
        (f"<|python_tag|>{CALL}", "", ["weather"]),
        (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["weather", "weather"]),
        (f"[{CALL}]", "", ["weather"]),
        ('{"type": "function", "function": {"name": "weather", "arguments": "{}"}}', "", ["weather"]),
        ('{"name": "exact", "arguments": {"place": "Rome"}}', "", ["exact"]),
    ],
)
def test_calls_of_each_family_are_read(text: str, content: str, names: list[str]) -> None:
    found, calls = read_calls(text, OFFER)
    assert (found, [each.name for each in calls]) == (content, names)
    assert all(isinstance(json.loads(each.arguments), dict) for each in calls)


@pytest.mark.parametrize(
    "text",
    [
        "no call", "", "[1, 2]", '{"name": "other", "arguments": {}}', '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "argum', "<tool_call>nothing</tool_call>", f"{CALL} and more", '{"name": ["weather"]}',
        '{"name": "exact", "arguments": {"place": 1}}', '<tool_call>{"name": "other"}</tool_call>', "[" * 5000,
    ],
)  # fmt: skip
def test_what_calls_nothing_that_is_offered_stays_text(text: str) -> None:
    assert read_calls(text, OFFER) == (text, [])


def test_one_call_where_several_are_not_wanted() -> None:
    assert len(read_calls(f"{CALL}{CALL}", Offer(OFFER.tools, several=False))[1]) == 1


def test_ids_are_the_same_again_and_suit_templates_that_count_letters() -> None:
    shown = shown_calls(read_calls(f"{CALL}{CALL}", OFFER)[1], "answer")
    assert [each["id"] for each in shown] == [call_id("answer", 0), call_id("answer", 1)]
    assert all(len(each["id"]) == ID_LENGTH and each["id"].isalnum() for each in shown)
    assert shown[0]["id"] != shown[1]["id"]


@pytest.mark.parametrize(
    "text", [f"Let me see. \n<tool_call>{CALL}</tool_call>", f"[TOOL_CALLS][{CALL}]", CALL, "a <b> {c}"]
)
def test_a_stream_shows_what_no_call_can_be_and_nothing_of_a_call(text: str) -> None:
    for size in (1, 3, 7, len(text)):
        withheld = Withheld()
        shown = "".join(withheld.add(text[at : at + size]) for at in range(0, len(text), size))
        content, calls = read_calls(text, OFFER)
        assert content.startswith(shown)
        assert calls or shown == text
        assert "weather" not in shown


def test_what_a_choice_asks_for_is_bound() -> None:
    def asked(**more: object) -> dict[str, object]:
        return translate({"tools": TOOLS, **more}, CHAT)

    assert "json_schema" not in asked(tool_choice="auto")
    assert asked(tool_choice="none") == {}
    assert translate({"tools": [], "tool_choice": "none"}, CHAT) == {}
    assert len(json.loads(str(asked(tool_choice="required")["json_schema"]))["anyOf"]) == 2
    named = asked(tool_choice={"type": "function", "function": {"name": "exact"}})
    assert json.loads(str(named["json_schema"]))["properties"]["name"] == {"const": "exact"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": "x"}, "'tools' must be"),
        ({"tools": [{"type": "custom"}]}, "number 0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "a name of 1 to 64"),
        ({"tools": [{"type": "function", "function": {"name": "a", "more": 1}}]}, "without 'more'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]}, "JSON schema"),
        ({"tools": TOOLS + TOOLS}, "there twice"),
        ({"tool_choice": "auto"}, "only allowed when 'tools'"),
        ({"tools": TOOLS, "tool_choice": "never"}, "'tool_choice' must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "'response_format'"),
        ({"tools": TOOLS, "tool_choice": "required", "stop": "x"}, "would cut the call"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_used_are_refused(body: dict[str, object], said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        translate(body, CHAT)
    with pytest.raises(BadParameter):
        translate({"tools": TOOLS}, COMPLETIONS)


def history() -> tuple[Message, ...]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    return messages_of([
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    ])  # fmt: skip


def rendered(template: ChatTemplate, messages: tuple[Message, ...], sampling: SamplingParams = PLAIN) -> str:
    request = EngineRequest(0, sampling, messages)
    return text_of(pieces_of(request, Controls([]), lambda _: template)[0])


def test_templates_see_tools_and_earlier_calls() -> None:
    template = ChatTemplate(TOOL_TEMPLATE, "", "")
    text = rendered(template, history(), SamplingParams(tools=OFFER.tools))
    assert text.startswith('<tools>{"type": "function", "function": {"name": "weather"')
    # Arguments are an object, not the text of one.
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>' in text
    assert text.endswith("<tool>sunny")
    assert "<tools>" not in rendered(template, history())


def test_a_template_without_tools_refuses_them() -> None:
    template = ChatTemplate(CHATML, "", "")
    with pytest.raises(RequestError, match="'tools' are not supported"):
        rendered(template, (Message("user", "x"),), SamplingParams(tools=OFFER.tools))
    with pytest.raises(RequestError, match="'messages' hold tool calls"):
        rendered(template, history())


def test_a_template_that_sets_its_tools_itself_where_there_are_none_knows_them() -> None:
    assert knows_tools("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}")
    assert not knows_tools("{% set tools = 1 %}{{ tools }}")
    assert not knows_tools("I am no good with tools")
