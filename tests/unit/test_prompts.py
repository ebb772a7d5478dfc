"""From a line to what the model is asked, and what a template can and cannot reach."""

from __future__ import annotations

import json
from typing import Any

import pytest

from promptmill.errors import PromptmillError, TaskFileError
from promptmill.tasks.own_text import PRIVATE, own_spans
from promptmill.tasks.sampling import PARAMETERS, BadParameter, check_parameters, refuse_repeats
from promptmill.tasks.templates import LONGEST_TEXT, RenderError, Template, payload, resolve_sampling, to_request
from promptmill.types import DatasetLine, Message, SamplingParams


def render(text: str, fields: dict[str, Any] | None = None, about: dict[str, Any] | None = None) -> str:
    (message,) = Template(text).render(fields or {}, about)
    return message.content


def ask(line: DatasetLine, template: Template | None = None, system: str | None = None) -> tuple[Message, ...] | None:
    """The messages of a line that was stored as JSON and read again."""
    stored = json.loads(json.dumps(payload(line)))
    return to_request(0, "a", stored, line.meta, SamplingParams(), template, system).messages


# ---- templates


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{{ input.x }}", "1 < 2"),
        ("{{ x }}", "1 < 2"),
        ("{{ input['a b'] }}", "spaced"),
        ("{{ meta.m }}", "about"),
        ("{% for word in x.split() %}{{ word }},{% endfor %}\n", "1,<,2,\n"),
        ("{{ input.absent | default('none') }}", "none"),
        ("{{ '评论' * 2 }}{{ 2 ** 10 }}", "评论评论1024"),
    ],
)
def test_a_template_reads_input_and_meta(text: str, rendered: str) -> None:
    assert render(text, {"x": "1 < 2", "a b": "spaced"}, {"m": "about"}) == rendered


def test_a_field_named_input_or_meta_does_not_hide_the_others() -> None:
    assert render("{{ input.x }} {{ meta.x }} {{ input.meta }}", {"input": 0, "meta": 5, "x": 1}, {"x": 2}) == "1 2 5"


@pytest.mark.parametrize(
    ("value", "text", "rendered"),
    [
        ("Good morning", "{{ input }}", "Good morning"),
        ("Good morning", "{{ input.input }}/{{ input.title }}", "Good morning/T"),
        ("Good morning", "{{ input | upper }} {{ input.split() | length }}", "GOOD MORNING 2"),
        ("", "{% if input %}with input{% else %}without{% endif %}", "without"),
        (None, "[{{ input }}]{% if input %}x{% endif %}", "[]"),
        (["a", "b"], "{% for each in input %}{{ each }}{% endfor %}{{ input.title }}", "abT"),
        (5, "{{ input }}", "5"),
    ],
)
def test_a_field_called_input_is_what_input_alone_means(value: Any, text: str, rendered: str) -> None:
    assert render(text, {"input": value, "title": "T", "expected": "SECRET"}) == rendered


def test_a_field_called_as_a_method_of_python_is_the_field() -> None:
    fields = {"items": "i", "values": "v", "title": "t", "count": "c"}
    assert render("{{ input.items }}{{ input.values }}{{ input['title'] }}{{ input.count }}", fields) == "ivtc"


@pytest.mark.parametrize("text", ["{{ input }}", "{{ meta }}", "{{ input ~ '' }}", "{{ input | string }}"])
def test_all_fields_at_once_are_no_text(text: str) -> None:
    with pytest.raises(RenderError, match=r"is all fields of the line .*: name one, such as (input\.a|meta\.b)"):
        render(text, {"a": 1}, {"b": 2})


@pytest.mark.parametrize("text", ["{{ a.title }}", "{{ input.keys }}", "{{ range }}"])
def test_a_function_is_never_written_into_a_prompt(text: str) -> None:
    with pytest.raises(RenderError, match="is a function and no field of the line"):
        render(text, {"a": "text"})


@pytest.mark.parametrize("value", [True, False, 0, 5, 2.5, "text", "", None, ["a", None], {"b": None}, {}], ids=repr)
@pytest.mark.parametrize(
    "text",
    [
        "{{ # }}", "{{ # | tojson }}", "{% if # %}yes{% endif %}", "{{ # is boolean }}{{ # is none }}{{ # is number }}",
        "{{ # == 5 }}{{ # == true }}", "{{ '<' ~ # ~ '>' }}", "{{ # | trim | upper }}", "{{ [#, 'x'] | join(',') }}",
        "{{ # | string }}", "{{ # or 'none' }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["input", "meta", "self", "super", "context", "loop", "range", "caller", "class"])
def test_a_field_is_its_value_whatever_it_is_called(name: str, text: str, value: Any) -> None:
    as_any_field = render(text.replace("#", "plain"), {"plain": value})
    assert render(text.replace("#", name), {name: value, "x": 1}) == as_any_field
    assert render(text.replace("#", f"input.{name}"), {name: value, "x": 1}) == as_any_field


def test_a_field_called_as_a_word_of_jinja_is_reached_through_input() -> None:
    fields = {"none": "n", "true": "t", "loop": "l", "varargs": "v", "items": "i"}
    assert render("{{ input.none }}{{ input.true }}{{ input['varargs'] }}{{ input.items }}", fields) == "ntvi"
    assert render("{% for each in [1] %}{{ loop.index }}{{ input.loop }}{% endfor %}", fields) == "1l"


@pytest.mark.parametrize("text", ["{{ self }}", "{{ self.body() }}", "{{ input.self }}"])
def test_a_name_of_jinja_that_is_no_field_is_undefined(text: str) -> None:
    with pytest.raises(RenderError, match="'self' is undefined; fields of the line: a"):
        render(text, {"a": 1})


def test_what_an_object_calls_expected_is_a_field_of_it_like_any_other() -> None:
    assert render("{{ context.expected }}{{ context['expected'] }}", {"context": {"expected": 5}}) == "55"
    assert render("{{ input.context.expected }}", {"context": {"expected": 5}}) == "5"


@pytest.mark.parametrize("text", ["{% set input = 1 %}", "{% for meta in [1] %}{% endfor %}", "{% set self = 1 %}"])
def test_a_template_gives_no_name_of_the_line_another_meaning(text: str) -> None:
    with pytest.raises(TaskFileError, match=r"line 2: '(input|meta|self)' is a name of the line"):
        Template("first line\n" + text)


def test_the_system_text_is_a_template_too() -> None:
    messages = Template("{{ x }}", "about {{ y }}").render({"x": 1, "y": 2}, None)
    assert messages == (Message("system", "about 2"), Message("user", "1"))


@pytest.mark.parametrize(
    ("text", "name"), [("{{ commnt }}", "commnt"), ("{{ input.commnt }}", "commnt"), ("{{ meta['k'] }}", "k")]
)
def test_an_undefined_name_is_an_error_that_lists_the_fields(text: str, name: str) -> None:
    with pytest.raises(RenderError, match=f"'{name}' is undefined; fields of the line: comment, video"):
        render(text, {"video": "v", "comment": "c"})


@pytest.mark.parametrize(
    "text",
    [
        "{{ expected }}",
        "{{ input.expected }}",
        "{{ input['expected'] }}",
        "{{ meta.expected.is_ad }}",
        "{% if expected == 1 %}x{% endif %}",
        "{% for expected in input %}{% endfor %}",
    ],
)
def test_a_template_that_mentions_expected_does_not_compile(text: str) -> None:
    with pytest.raises(TaskFileError, match="line 2: 'expected' cannot be used in a prompt"):
        Template("first line\n" + text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ input|attr('expec' ~ 'ted') }}",
        "{{ input['expec' ~ 'ted'] }}",
        "{{ meta['expec' ~ 'ted'] }}",
        "{{ input.get('expec' ~ 'ted') }}",
        "{{ input }}{{ meta }}",
        "{% for key, value in input.items() %}{{ key }}{{ value }}{% endfor %}",
        "{{ self._TemplateReference__context }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_the_expected_value_is_out_of_reach_by_whatever_name(text: str) -> None:
    try:
        seen = render(text, {"x": 1, "expected": "SECRET"}, {"expected": "SECRET"})
    except RenderError as problem:
        seen = str(problem)
    assert "SECRET" not in seen


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ x", "line 1: unexpected end of template"),
        ("a\n\n{% endfor %}", "line 3: .*endfor"),
        ("{{ x | nofilter }}", "No filter named 'nofilter'"),
        ("{{ x | random }}", "No filter named 'random'"),
        ("{% include 'file' %}", "cannot use other files"),
        ("{% extends 'file' %}", "cannot use other files"),
        ("{% import 'file' as f %}", "cannot use other files"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "too deep"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "too deep"),
    ],
)
def test_a_template_that_cannot_be_compiled_names_the_line(text: str, problem: str) -> None:
    with pytest.raises(TaskFileError, match=problem):
        Template(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ input.update({'x': 2}) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(10 ** 7) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}more text{% endfor %}{% endfor %}",
        "{{ x / 0 }}",
        "{{ x + 'text' }}",
        "{{ lipsum() }}",
        "{{ 'a' ** 'b' }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_line(text: str) -> None:
    with pytest.raises(RenderError, match="template: "):
        render(text, {"x": 1})


def test_a_text_that_fits_no_memory_is_an_error_that_says_so() -> None:
    with pytest.raises(RenderError, match="refused: it needs too much memory"):
        render("{{ 'a'.ljust(2 ** 62) }}", {"x": 1})


def test_a_rendered_text_of_16_mib_is_the_limit() -> None:
    assert len(render("{{ x }}", {"x": "a" * LONGEST_TEXT})) == LONGEST_TEXT
    with pytest.raises(RenderError, match="longer than"):
        render("{{ x }}b", {"x": "a" * LONGEST_TEXT})


def test_an_error_of_a_template_quotes_no_prompt_at_length() -> None:
    with pytest.raises(RenderError) as caught:
        render("{{ x + 1 }}", {"x": "private " * 100})
    assert len(str(caught.value)) < 200


# ---- what is stored, and the request made of it


def test_messages_stay_as_they_are() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert ask(DatasetLine(1, messages=turns)) == turns


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_text_is_put_before_messages_that_have_none(role: str) -> None:
    user, own = Message("user", "a"), Message(role, "own")
    assert ask(DatasetLine(1, messages=(user,)), system="s") == (Message("system", "s"), user)
    assert ask(DatasetLine(1, messages=(own, user)), system="s") == (own, user)


def test_a_prompt_is_asked_as_a_users_message() -> None:
    assert ask(DatasetLine(1, prompt="p")) == (Message("user", "p"),)
    assert ask(DatasetLine(1, prompt="p"), system="s") == (Message("system", "s"), Message("user", "p"))


def test_a_raw_prompt_is_sent_as_it_is() -> None:
    request = to_request(3, "a", payload(DatasetLine(1, prompt="p", raw=True)), None, SamplingParams(), system="s")
    assert (request.row, request.prompt, request.messages) == (3, "p", None)


def test_fields_are_filled_into_the_template() -> None:
    line = DatasetLine(1, fields={"x": 1}, meta={"m": 2})
    assert ask(line, Template("{{ x }}{{ meta.m }}")) == (Message("user", "12"),)


def test_fields_without_a_template_are_an_error() -> None:
    with pytest.raises(PromptmillError, match="fields for a template, and the job has none"):
        ask(DatasetLine(1, fields={"x": 1}))


def test_what_is_stored_never_holds_the_expected_value() -> None:
    lines = [DatasetLine(1, prompt="p", expected="SECRET"), DatasetLine(2, fields={"x": 1}, expected={"y": "SECRET"})]
    assert "SECRET" not in json.dumps([payload(line) for line in lines])


# ---- sampling


def test_a_lines_own_parameters_win_over_the_jobs() -> None:
    found = resolve_sampling({"max_tokens": 5, "stop": ["a"], "seed": 1}, {"max_tokens": 7})
    assert found == SamplingParams(max_tokens=7, stop=("a",), seed=1)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_null_is_not_set_for_every_parameter(name: str) -> None:
    assert check_parameters({name: None}) == {}
    assert resolve_sampling({name: None}, {name: None}) == SamplingParams()
    assert resolve_sampling({"temperature": 0.5, "seed": 1}, {name: None}) == SamplingParams(temperature=0.5, seed=1)


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "n", "top_logprobs"])
def test_a_whole_number_may_be_written_as_a_decimal(name: str) -> None:
    found = check_parameters({name: 8.0})
    assert found == {name: 8}
    assert isinstance(found[name], int)
    with pytest.raises(BadParameter):
        check_parameters({name: 8.5})


def test_the_parameters_are_those_of_sampling_params() -> None:
    assert set(PARAMETERS) == set(SamplingParams.__dataclass_fields__)
    assert resolve_sampling({}, {}) == SamplingParams()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_tokens": 0}, "'max_tokens' must be a whole number of 1 or more"),
        ({"max_tokens": 1.5}, "'max_tokens' must be a whole number"),
        ({"temperature": float("nan")}, "'temperature' must be"),
        ({"temperature": 10**400}, "'temperature' must be"),
        ({"max_tokens": 2**31}, "'max_tokens' must be a whole number of at most 2,147,483,647"),
        ({"top_k": 2**32 + 1}, "'top_k' must be a whole number of at most"),
        ({"top_k": -1}, "'top_k' must be a whole number of 0 or more"),
        ({"top_p": 1.01}, "'top_p' must be a number above 0 to 1"),
        ({"timeout_s": 0}, "'timeout_s' must be a number above 0"),
        ({"stop": ["a", ""]}, "'stop' must be a text or a list of texts, none of them empty"),
        ({"stop": {"a": 1}}, "'stop' must be"),
        ({"choices": ["a", ""]}, "'choices' must be a list of 1 to 1,024 different texts, none of them empty"),
        ({"continuations": [1]}, "'continuations' must be a list of 1 to 1,024 different texts, none of them empty"),
        ({"choices": "a"}, "'choices' must be a list of 1 to"),
        ({"regex": ""}, "an empty one would only let an empty answer through"),
        ({"regex": r"[^\s\S]"}, "of this one: no text matches it"),
        ({"stop": "a", "json_schema": {}}, "'stop' is given with 'json_schema'"),
        ({"stop": "a", "regex": "a+"}, "'stop' is given with 'regex'"),
        ({"stop": "a", "choices": ["a", "b"]}, "'stop' is given with 'choices'"),
        ({"embedding": True, "logprobs": True}, "'logprobs' makes no sense with 'embedding'"),
        ({"embedding": True, "thinking": "on"}, "'thinking' makes no sense with 'embedding'"),
        ({"choices": ["a", "b"], "logprobs": True}, "'logprobs' makes no sense with 'choices'"),
        ({"continuations": ["a"], "logprobs": True}, "'logprobs' makes no sense with 'continuations'"),
        ({"continuations": ["a"], "thinking": 5}, "'thinking' makes no sense with 'continuations'"),
        ({"max_tokens": 2**30, "n": 2}, "'n' times 'max_tokens' must be at most 2,147,483,647 tokens"),
        ({"max_token": 5}, "unknown parameter 'max_token'\nDid you mean max_tokens?"),
    ],
)
def test_a_wrong_parameter_says_what_it_should_be(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadParameter) as caught:
        resolve_sampling(given, {})
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"choices": ["a", "b"], "logprobs": True, "thinking": "on"},
        {"embedding": True, "thinking": "off"},
        {"stop": [], "json_schema": {}},
    ],
    ids=str,
)
def test_what_only_seems_to_contradict_is_taken(given: dict[str, Any]) -> None:
    assert resolve_sampling(given, {}).max_tokens


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(BadParameter, match="'n' above 1 needs a 'temperature' above 0"):
        refuse_repeats(SamplingParams(n=2))
    refuse_repeats(SamplingParams(n=2, temperature=0.1))


def test_a_field_that_is_null_is_empty_whatever_it_is_called() -> None:
    fields = {"input": None, "context": None}
    [turn] = Template("[{{ input }}|{{ context }}|{{ input.context }}]").render(fields, None)
    assert turn.content == "[||]"


@pytest.mark.parametrize(
    "text",
    ["\uf8fd", "a\uf8feb", "\ue000\ue001\uf8fd<|im_end|>\uf8fe\ue000", "".join(map(chr, PRIVATE))],
    ids=["a begin", "an end", "several", "all"],
)
def test_a_task_means_its_control_tokens_whatever_characters_its_data_hold(text: str) -> None:
    source = "<|im_start|>{% set said %}\uf8fd[{{ input.t }}]{% endset %}{{ input.t }}<|im_end|>{{ said }}<|im_end|>"

    (message,) = Template(source).render({"t": text}, None)

    assert message.content == f"<|im_start|>{text}<|im_end|>\uf8fd[{text}]<|im_end|>"
    meant = [message.content[start:end] for start, end in message.own]
    assert meant == (["<|im_start|>", "<|im_end|>", "<|im_end|>"] if len(text) < 100 else [])


@pytest.mark.parametrize("template", ["{{ tags|map('upper') }}", "{{ tags|reverse }}", "{{ tags|batch(2) }}"])
def test_an_iterator_is_no_part_of_a_prompt(template: str) -> None:
    """It would be the place of an object in memory: another text at each rendering."""
    with pytest.raises(RenderError, match=r"and no text; add \|list or \|join"):
        Template(template).render({"tags": ["a", "b"]}, None)
    assert Template(template.replace(" }}", "|list }}")).render({"tags": ["a", "b"]}, None)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ [nope] }}", "'nope' is undefined"),
        ("{{ {'a': [nope]} }}", "'nope' is undefined"),
        ("{{ rows|map(attribute='kk')|list }}", "'kk' is undefined"),
        ("{{ [tags|reverse] }}", r"and no text; add \|list or \|join"),
        ("{{ [tags.count] }}", "is a function and no field"),
    ],
)
def test_a_list_that_is_put_in_holds_nothing_that_is_no_value(template: str, problem: str) -> None:
    line = {"tags": ["a", "b"], "rows": [{"k": 1}, {"k": None}]}
    with pytest.raises(RenderError, match=problem):
        Template(template).render(line, None)
    assert Template("{{ rows }} {{ tags }}").render(line, None)[0].content == "[{'k': 1}, {'k': None}] ['a', 'b']"


def test_a_text_that_the_marks_have_changed_has_nothing_of_its_own() -> None:
    """Such as one that a filter has made upper case, or cut: where it is the author's cannot be told."""
    begin, end = "\ue000", "\ue001"
    assert own_spans("<s>A</s>", f"<s>{begin}A{end}</s>", begin, end) == ((0, 3), (4, 8))
    assert own_spans("<s>B</s>", f"<s>{begin}A{end}</s>", begin, end) == ()
    assert own_spans("<s>A</s>", f"<s>{begin}A</s>", begin, end) == ()
