"""What an answer may be asked for beside its text, run against every engine behind its desk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from promptmill.types import ErrorClass, Extras, FinishReason, SamplingParams, Sharing
from promptmill_workers.engines.contract import Engine, EngineRequest, Event, Finished, Rejected, TokenEvent
from promptmill_workers.host.process import wrapped
from tests.engine_runs import Load
from tests.unit.test_engine_contract import Case, case, chat, checkpoint, load, raw

__all__ = ["case", "checkpoint", "load"]

#: The token that ends the answers of the tiny models.
END = 2


@pytest.fixture
def desk(load: Load) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        deduplicate = options.pop("deduplicate", True)
        return wrapped(load(**options), deduplicate=deduplicate)

    return make


def run_all(engine: Engine, requests: Sequence[EngineRequest]) -> list[Event]:
    engine.add(requests)
    events: list[Event] = []
    for _ in range(20_000):
        events.extend(engine.step())
        if not engine.active and not engine.waiting:
            return [*events, *engine.step()]
    raise AssertionError(f"after 20,000 steps {engine.active} requests run and {engine.waiting} wait")


def ends(events: Sequence[Event]) -> dict[int, Finished | Rejected]:
    found = [each for each in events if not isinstance(each, TokenEvent)]
    assert len(found) == len({each.key for each in found})
    return {each.key: each for each in found}


def answers(engine: Engine, requests: Sequence[EngineRequest]) -> dict[int, Finished]:
    found = ends(run_all(engine, requests))
    assert sorted(found) == sorted(each.key for each in requests)
    for each in found.values():
        assert isinstance(each, Finished), each
    return {key: each for key, each in found.items() if isinstance(each, Finished)}


def extras(event: Finished) -> Extras:
    assert event.extras is not None
    return event.extras


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"ad": {"type": "boolean"}}, "required": ["ad"], "additionalProperties": False},
    {"type": "object", "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 100},
     "category": {"enum": ["ad", "not ad", "广告"]}}, "required": ["score", "category"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "maxLength": 6},
    {"enum": ["yes", "no"]},
    {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"],
     "additionalProperties": False}}, "required": ["a"], "additionalProperties": False},
]  # fmt: skip


def test_every_finished_answer_keeps_to_its_schema(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo cannot be bound")
    requests = [
        chat(
            key,
            json_schema=json.dumps(SCHEMAS[key % len(SCHEMAS)]),
            max_tokens=80,
            temperature=0.7 * (key % 2),
            seed=key,
        )
        for key in range(24)
    ]

    found = answers(desk(slots=4), requests)

    finished = [key for key, each in found.items() if each.finish_reason is FinishReason.STOP]
    assert len(finished) >= 20
    for key in finished:
        jsonschema.validate(json.loads(found[key].text), SCHEMAS[key % len(SCHEMAS)])


def test_a_dead_end_of_a_grammar_is_an_error_and_no_answer(desk: Callable[..., Engine], case: Case) -> None:
    """Of these two rules for one key llguidance lets a comma follow the number, and then nothing."""
    schema = {
        "type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"],
        "patternProperties": {"^score$": {"type": "integer"}}, "additionalProperties": False,
    }  # fmt: skip
    requests = [
        chat(key, json_schema=json.dumps(schema), max_tokens=60, temperature=1.5, seed=key,
             text='{"score":1}' if key % 2 and not case.samples else "x")
        for key in range(24)
    ]  # fmt: skip

    found = ends(run_all(desk(slots=4), requests))

    failed = [each for each in found.values() if isinstance(each, Rejected)]
    complete = [each for each in found.values() if isinstance(each, Finished) and each.finish_reason == "stop"]
    assert failed
    assert complete
    assert {each.error_class for each in failed} == {ErrorClass.GRAMMAR}
    for each in complete:
        jsonschema.validate(json.loads(each.text), schema)


def test_neighbours_change_no_bound_answer(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo cannot be bound")
    requests = [
        chat(key, json_schema=json.dumps(SCHEMAS[key % 3]), max_tokens=40) if key % 2 else chat(key)
        for key in range(10)
    ]

    together = answers(desk(slots=4), requests)

    for each in requests:
        assert together[each.key].text == answers(desk(slots=1), [each])[each.key].text


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-f]{2}", "(?:ad|not ad): [1-5]", "广告|正常"])
def test_an_answer_matches_its_expression(desk: Callable[..., Engine], case: Case, pattern: str) -> None:
    if not case.samples:
        pytest.skip("an echo cannot be bound")

    found = answers(desk(slots=2), [chat(key, regex=pattern, max_tokens=40) for key in range(3)])

    assert all(re.fullmatch(pattern, each.text) for each in found.values())


def test_a_choice_has_the_probability_of_each(desk: Callable[..., Engine]) -> None:
    labels = ("not an ad", "an ad", "an advertisement")
    requests = [chat(key, choices=labels, text="is it an ad ?") for key in range(3)]

    found = answers(desk(slots=4, deduplicate=False), requests)

    for each in found.values():
        chances = extras(each).choice_probs
        assert chances is not None
        assert set(chances) == set(labels)
        assert math.isclose(sum(chances.values()), 1.0)
        assert each.text == max(chances, key=chances.__getitem__)
        assert each.usage.output_tokens == 0
    assert len({each.text for each in found.values()}) == 1


def test_choices_are_as_likely_as_their_continuations(desk: Callable[..., Engine], case: Case) -> None:
    labels = ("yes", "no", "perhaps")

    found = answers(desk(slots=4), [chat(0, choices=labels), chat(1, text="yes ", continuations=labels)])
    alone = answers(desk(slots=1), [chat(0, continuations=labels)])

    scores = extras(alone[0]).continuations
    chances = extras(found[0]).choice_probs
    assert scores is not None
    assert chances is not None
    assert [each["text"] for each in scores] == list(labels)
    total = sum(math.exp(each["logprob"]) for each in scores)
    for each in scores:
        assert each["logprob"] <= 0
        assert each["tokens"] >= 1
        assert math.isclose(chances[each["text"]], math.exp(each["logprob"]) / total, rel_tol=1e-3)


def test_a_greedy_continuation_is_what_the_model_would_say(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo is not a model")
    said = answers(desk(slots=1), [raw(0, "free phone for all of you", logprobs=True, max_tokens=6, ignore_eos=True)])[
        0
    ]
    entries = extras(said).logprobs
    assert entries is not None

    bytes_said = b"".join(bytes(each["bytes"]) for each in entries)
    scored = answers(desk(slots=2), [raw(0, "free phone for all of you", continuations=(said.text, "zebra"))])[0]

    assert bytes_said.decode(errors="replace") == said.text
    best, other = extras(scored).continuations or []
    if best["tokens"] == 6 and "\ufffd" not in said.text:  # written with the same tokens
        assert best["greedy"]
        assert math.isclose(best["logprob"], sum(each["logprob"] for each in entries), rel_tol=1e-3, abs_tol=1e-3)
    assert other["logprob"] < 0


def test_long_continuations_are_scored_in_pieces(desk: Callable[..., Engine], case: Case) -> None:
    texts = ("one two three " * 12, "seven eight " * 15)
    request = raw(0, "count with me: ", continuations=texts)

    pieces = answers(desk(slots=2, batch_tokens=24), [request, raw(1, "hello", max_tokens=30, ignore_eos=True)])[0]
    whole = answers(desk(slots=1, batch_tokens=512), [request])[0]

    for a, b in zip(extras(pieces).continuations or [], extras(whole).continuations or [], strict=True):
        assert a["tokens"] == b["tokens"]
        assert math.isclose(a["logprob"], b["logprob"], rel_tol=1e-3)


def test_logprobs_come_with_alternatives(desk: Callable[..., Engine], case: Case) -> None:
    found = answers(desk(slots=2), [chat(0, logprobs=True, top_logprobs=3, max_tokens=8), chat(1, max_tokens=8)])

    entries = extras(found[0]).logprobs
    assert entries
    assert found[1].extras is None
    for each in entries:
        assert each["logprob"] <= 1e-6
        assert each["top_logprobs"][0]["token"] == each["token"]  # greedy
        assert len(each["top_logprobs"]) == (3 if case.samples else 1)


def test_a_bias_forces_and_forbids_tokens(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo draws nothing")
    forced = answers(desk(slots=2), [chat(0, logit_bias=((70, 100.0),), max_tokens=5, ignore_eos=True)])[0]
    piece = answers(desk(slots=1), [chat(0, logprobs=True, logit_bias=((70, 100.0),), max_tokens=1, ignore_eos=True)])[
        0
    ]

    entries = extras(piece).logprobs
    assert entries
    assert forced.text == entries[0]["token"] * 5


def test_penalties_keep_a_model_from_repeating_itself(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo draws nothing")
    # Two tokens far above the others, one a little above the other.
    stuck: dict[str, Any] = {"logit_bias": ((70, 90.0), (71, 89.0)), "max_tokens": 12, "ignore_eos": True}

    found = answers(
        desk(slots=4),
        [chat(0, text="x", **stuck), chat(1, text="x", frequency_penalty=2.0, **stuck),
         chat(2, text="x", presence_penalty=2.0, frequency_penalty=0.01, **stuck)],
    )  # fmt: skip

    used = {key: max(each.text.count(letter) for letter in set(each.text)) for key, each in found.items()}
    assert used[1] < used[0]
    assert used[2] < 12


@pytest.mark.parametrize("how", [{"typical_p": 0.5}, {"top_k": 4, "logprobs": True}, {"min_p": 0.1, "logprobs": True}])
def test_seeds_repeat_on_the_host_too(desk: Callable[..., Engine], how: dict[str, Any]) -> None:
    requests = [chat(key, temperature=1.3, seed=key, max_tokens=10, **how) for key in range(4)]

    together = answers(desk(slots=4), requests)

    for each in requests:
        assert together[each.key].text == answers(desk(slots=1), [each])[each.key].text


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}], ids=str
)
def test_looking_at_log_probabilities_changes_no_draw(desk: Callable[..., Engine], how: dict[str, Any]) -> None:
    plain = [chat(key, temperature=1.5, seed=key, max_tokens=16, **how) for key in range(8)]
    watched = [
        replace(each, key=each.key + 100, sampling=replace(each.sampling, logprobs=True, top_logprobs=2))
        for each in plain
    ]

    found = answers(desk(slots=4), [*plain, *watched])

    assert [found[key].text for key in range(8)] == [found[100 + key].text for key in range(8)]
    assert all(extras(found[100 + key]).logprobs for key in range(8))


def test_several_answers_share_one_prompt(desk: Callable[..., Engine], case: Case) -> None:
    warm: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True, "text": "say something new"}
    engine = desk(slots=4)

    whole = answers(engine, [chat(0, n=3, seed=7, **warm)])[0]
    single = answers(desk(slots=1), [chat(key, seed=7 + key, **warm) for key in range(3)])

    others = extras(whole).choices
    assert others is not None
    assert [whole.text, *(each["text"] for each in others)] == [single[key].text for key in range(3)]
    assert whole.usage.output_tokens == sum(each.usage.output_tokens for each in single.values())
    if case.shares:
        assert engine.counters.prefill_tokens < 2 * whole.usage.prompt_tokens


def test_streamed_pieces_make_the_text(desk: Callable[..., Engine], case: Case) -> None:
    engine = desk(slots=3, model_options=case.slowly)
    requests = [replace(chat(key, stop=("zq",), max_tokens=14), stream=key != 1) for key in range(3)]

    events = run_all(engine, requests)

    found = ends(events)
    for key in (0, 2):
        pieces = [each.text for each in events if isinstance(each, TokenEvent) and each.key == key]
        end = found[key]
        assert isinstance(end, Finished)
        assert end.text.startswith("".join(pieces))
        assert len(end.text) - len("".join(pieces)) <= 2
        assert len(pieces) > 1
    assert not [each for each in events if isinstance(each, TokenEvent) and each.key == 1]


def test_reasoning_ends_within_its_budget_and_binds_nothing(desk: Callable[..., Engine], case: Case) -> None:
    if not case.samples:
        pytest.skip("an echo does not think")
    request = chat(0, thinking="6", regex="(?:yes|no)", max_tokens=60, ignore_eos=False, logit_bias=())

    found = answers(desk(slots=2), [request, chat(1)])[0]

    assert found.text in ("yes", "no")
    assert extras(found).reasoning is not None
    assert 1 <= found.usage.reasoning_tokens <= 6
    assert found.usage.reasoning_tokens < found.usage.output_tokens


@pytest.mark.parametrize("budget", [0, 1, 4])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "seed": 3}, {"logprobs": True}], ids=str)
def test_a_budget_of_reasoning_needs_nothing_else(
    desk: Callable[..., Engine], case: Case, budget: int, how: dict[str, Any]
) -> None:
    if not case.samples:
        pytest.skip("an echo does not think")

    found = answers(desk(slots=2), [chat(0, thinking=str(budget), max_tokens=40, **how), chat(1)])[0]

    assert found.usage.reasoning_tokens <= budget
    assert found.usage.reasoning_tokens == budget or found.usage.output_tokens < 40
    if budget == 0:
        assert found.extras is None or found.extras.reasoning is None
    else:
        assert extras(found).reasoning is not None


@pytest.mark.parametrize(
    "bound", [{"regex": "yes|no"}, {"choices": ("yes", "no")}, {"json_schema": '{"enum": ["yes", "no"]}'}], ids=str
)
def test_a_bound_answer_comes_when_the_model_ends_within_its_reasoning(
    desk: Callable[..., Engine], case: Case, bound: dict[str, Any]
) -> None:
    if not case.samples:
        pytest.skip("an echo does not think")
    ending = chat(0, thinking="on", max_tokens=60, logit_bias=((END, 100.0),), **bound)

    found = answers(desk(slots=2), [ending, chat(1)])[0]

    assert found.text.strip('"') in ("yes", "no")
    assert found.usage.reasoning_tokens == 0


def test_a_vector_has_length_one_and_depends_on_its_text_alone(desk: Callable[..., Engine]) -> None:
    texts = ["a free phone", "加我微信", "a free phone", "what a voice, what a song"]
    requests = [raw(key, text, embedding=True) for key, text in enumerate(texts)]

    found = answers(desk(slots=2, deduplicate=False), [*requests, chat(9)])
    alone = answers(desk(slots=1), [requests[3]])

    vectors = [extras(found[key]).embedding or [] for key in range(4)]
    assert all(math.isclose(sum(x * x for x in vector), 1.0, rel_tol=1e-3) for vector in vectors)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert vectors[3] == pytest.approx(extras(alone[3]).embedding or [], abs=1e-3)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)


def test_identical_greedy_requests_are_computed_once(desk: Callable[..., Engine]) -> None:
    engine = desk(slots=4)
    requests = [chat(key, text="the same", max_tokens=9) for key in range(6)] + [chat(6, text="another", max_tokens=9)]

    found = answers(engine, requests)
    later = answers(engine, [chat(7, text="the same", max_tokens=9)])

    copies = [key for key, each in found.items() if each.extras is not None and each.extras.deduplicated]
    assert copies == [1, 2, 3, 4, 5]
    assert extras(later[7]).deduplicated
    assert len({found[key].text for key in range(6)} | {later[7].text}) == 1
    assert engine.counters.decode_tokens == found[0].usage.output_tokens + found[6].usage.output_tokens


def test_a_job_is_given_no_answer_of_another_one(desk: Callable[..., Engine]) -> None:
    engine = desk(slots=4)
    ours, theirs = Sharing("", "ours"), Sharing("", "theirs")
    first = answers(engine, [replace(chat(0, text="the same", max_tokens=9), sharing=ours)])
    again = [
        replace(chat(key, text="the same", max_tokens=9), sharing=ours if key < 3 else theirs) for key in (1, 2, 3, 4)
    ]

    found = answers(engine, again)

    assert [bool(found[key].extras and extras(found[key]).deduplicated) for key in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        True,
    ]
    assert {each.text for each in found.values()} == {first[0].text}


def test_a_draw_is_never_copied(desk: Callable[..., Engine]) -> None:
    found = answers(desk(slots=2), [chat(key, text="the same", temperature=1.0) for key in range(3)])

    assert all(each.extras is None for each in found.values())


def test_the_next_of_identical_requests_runs_when_the_first_is_cancelled(
    desk: Callable[..., Engine], case: Case
) -> None:
    engine = desk(slots=1, model_options=case.slowly)
    engine.add([chat(key, text="the same again", max_tokens=60) for key in range(3)])
    engine.step()
    engine.cancel(0)

    found = ends(run_all(engine, []))

    assert sorted(found) == [1, 2]
    assert all(isinstance(each, Finished) for each in found.values())


def test_parts_of_a_cancelled_request_free_their_slots(desk: Callable[..., Engine], case: Case) -> None:
    engine = desk(slots=4, model_options=case.slowly)
    engine.add([chat(0, n=4, temperature=1.0, max_tokens=60, ignore_eos=True), chat(1, max_tokens=4)])
    engine.step()
    engine.cancel(0)

    found = ends(run_all(engine, []))

    assert sorted(found) == [1]
    assert engine.active == 0


def test_a_request_whose_parts_cannot_run_is_one_error(desk: Callable[..., Engine]) -> None:
    found = ends(run_all(desk(slots=2), [chat(0, text="far too long " * 400, n=3, temperature=1.0), chat(1)]))

    assert isinstance(found[0], Rejected)
    assert found[0].error_class is ErrorClass.CONTEXT_OVERFLOW
    assert isinstance(found[1], Finished)


def test_waiting_keys_name_requests_and_not_their_parts(desk: Callable[..., Engine], case: Case) -> None:
    engine = desk(slots=1, model_options=case.slowly)
    engine.add([chat(0, text="one two three four five", max_tokens=30, ignore_eos=True)])
    engine.step()
    engine.add([chat(1, n=2, temperature=1.0), chat(2), chat(3, text="same"), chat(4, text="same")])

    assert set(engine.waiting_keys()) == {1, 2, 3, 4}


def test_sampling_defaults_need_no_logits() -> None:
    from promptmill_workers.engines.answer import needs_logits

    assert not needs_logits(SamplingParams(temperature=0.7, top_k=4, min_p=0.1, seed=3, stop=("a",)))
