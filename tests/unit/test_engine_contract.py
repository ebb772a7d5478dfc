"""The contract that every engine keeps, run against each with a tiny model.

A new engine is one line in ``CASES``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from promptmill.errors import RequestError
from promptmill.types import ErrorClass, FinishReason, Message, SamplingParams, Sharing
from promptmill_workers.checkpoints import Checkpoint, build_engine
from promptmill_workers.engines import ENGINES
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Event, Rejected
from promptmill_workers.limited_counter import token_counter
from tests.engine_runs import Load, alone, answers, finished, run, texts
from tests.unit.tiny_mlx import write_tiny_mlx
from tests.unit.tiny_models import write_tiny_gguf

#: Tokens of the tiny models' contexts.
CONTEXT = 512

RULES = "Is this comment an advertisement? Answer with JSON such as the one below, and nothing else. "

WORDS = ("Subscribe to my channel", "what a voice", "加我微信领取优惠券", "The second verse", "a free phone 🎁")


@dataclass(frozen=True)
class Case:
    """What the suite must know of an engine to judge it."""

    write: Callable[[Path], Path] | None = None
    needs: str | None = None
    #: Shares prompt prefixes, and so reports cached tokens.
    shares: bool = True
    #: Draws tokens at random when asked to.
    samples: bool = True
    #: Model options that make a step take time.
    slowly: dict[str, str] = field(default_factory=dict)


CASES = {
    "echo": Case(shares=False, samples=False, slowly={"token_s": "0.03"}),
    "llamacpp": Case(write=lambda folder: write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT)),
    "mlx": Case(write=lambda folder: write_tiny_mlx(folder / "tiny", context=CONTEXT), needs="mlx_lm"),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model of each engine in turn."""
    name: str = request.param
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"{case.needs} is not installed")
    path = case.write(tmp_path_factory.mktemp(name)) if case.write else None
    return Checkpoint(f"tiny-{name}", name, path)


@pytest.fixture
def case(checkpoint: Checkpoint) -> Case:
    return CASES[checkpoint.engine]


@pytest.fixture
def load(checkpoint: Checkpoint) -> Iterator[Load]:
    """Loads the tiny model with the options given, and closes it."""
    loaded: list[Engine] = []

    def load(slots: int = 4, model_options: dict[str, str] | None = None, **options: Any) -> Engine:
        options = {"context_tokens": CONTEXT, "threads": 1, "exact": True} | options
        model = replace(checkpoint, options=model_options or {})
        loaded.append(build_engine(model, EngineOptions(slots=slots, **options)))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def chat(key: int, *, system: str = RULES, text: str | None = None, **sampling: Any) -> EngineRequest:
    user = text if text is not None else f"{WORDS[key % len(WORDS)]} {key} " * (1 + key % 4)
    settings = SamplingParams(**{"max_tokens": 12, **sampling})
    return EngineRequest(key, settings, messages=(Message("system", system), Message("user", user)))


def raw(key: int, prompt: str, **sampling: Any) -> EngineRequest:
    return EngineRequest(key, SamplingParams(**{"max_tokens": 12, **sampling}), prompt=prompt)


def rejected(event: Event) -> Rejected:
    assert isinstance(event, Rejected), event
    return event


def test_the_suite_judges_every_engine() -> None:
    assert set(CASES) == set(ENGINES)


def test_a_batch_answers_as_each_request_alone(load: Load) -> None:
    requests = [chat(key, max_tokens=4 + 3 * (key % 5)) for key in range(11)]

    together = run(load(slots=4), requests)

    assert answers(together) == alone(load, requests)


def test_prompts_longer_than_a_pass_change_no_answer(load: Load) -> None:
    requests = [chat(key, system="", text="one two three free phone! " * (1 + 3 * key)) for key in range(6)]

    together = run(load(slots=3, batch_tokens=24), requests)

    assert answers(together) == alone(load, requests)


def test_requests_that_come_while_others_run_change_no_answer(load: Load) -> None:
    requests = [chat(key, max_tokens=16) for key in range(9)]
    engine = load(slots=3)
    events: list[Event] = []
    for request in requests:
        engine.add([request])
        events.extend(engine.step())
        events.extend(engine.step())

    found = {event.key: event for event in events} | run(engine)

    assert answers(found) == alone(load, requests)


def test_a_shared_prefix_changes_no_answer(load: Load, case: Case) -> None:
    requests = [chat(key) for key in range(12)]
    engine = load(slots=4)

    together = run(engine, requests)

    assert answers(together) == alone(load, requests)
    usage = [finished(event).usage for event in together.values()]
    assert all(0 <= each.cached_tokens < each.prompt_tokens for each in usage)
    assert sum(each.cached_tokens > 0 for each in usage) >= (11 if case.shares else 0)
    assert engine.counters.prefill_tokens == sum(each.prompt_tokens - each.cached_tokens for each in usage)


def test_fast_arithmetic_leaks_no_text_either(load: Load) -> None:
    """It may flip near ties of a random model, a few in a hundred; a neighbour's text would show in far more."""
    requests = [chat(key, max_tokens=8) for key in range(40)]

    together = answers(run(load(slots=4, exact=False), requests))

    same = [together[key] == answer for key, answer in alone(load, requests).items()]
    assert sum(same) >= 34


def test_two_tasks_in_one_batch_are_kept_apart(load: Load) -> None:
    other = "Judge the tone of what follows; say warm, cold or neither, and give no reason for it at all. "
    requests = [chat(key, system=RULES if key % 2 else other) for key in range(10)]

    assert answers(run(load(slots=4), requests)) == alone(load, requests)


def test_more_tasks_than_prefixes_are_kept_lose_nothing(load: Load) -> None:
    requests = [chat(key, system=f"Task {key // 3}: {RULES}", max_tokens=4) for key in range(36)]

    assert answers(run(load(slots=4), requests)) == alone(load, requests)


def test_the_same_prompt_many_times_has_the_same_answer(load: Load) -> None:
    events = run(load(slots=4), [chat(key, text="the very same") for key in range(9)])

    assert len(set(texts(events).values())) == 1


def test_slots_are_refilled_until_every_request_is_answered(load: Load) -> None:
    engine = load(slots=2)

    events = run(engine, [chat(key, max_tokens=1 + key % 7) for key in range(25)])

    assert sorted(events) == list(range(25))
    assert engine.counters.peak_active == 2
    assert (engine.active, engine.waiting) == (0, 0)


def test_few_cells_slow_a_batch_down_and_lose_nothing(load: Load) -> None:
    requests = [chat(key, text="free phone " * (5 + 9 * (key % 4)), max_tokens=30) for key in range(10)]
    engine = load(slots=6, kv_cells=CONTEXT)

    together = run(engine, requests)

    assert answers(together) == alone(load, requests)
    assert engine.counters.peak_kv_cells <= engine.info.kv_cells


def test_a_request_that_fills_the_cache_runs_among_small_ones(load: Load) -> None:
    large = chat(99, system="", text="x" * 300, max_tokens=150, ignore_eos=True)
    small = [chat(key, system="", max_tokens=8) for key in range(12)]
    engine = load(slots=4, kv_cells=CONTEXT)

    together = run(engine, [*small[:4], large, *small[4:]])

    assert answers(together) == alone(load, [*small, large])


@pytest.mark.parametrize("together", [True, False], ids=["at once", "one after the other"])
def test_nobody_learns_by_its_tokens_what_another_owner_asked(load: Load, case: Case, together: bool) -> None:
    engine = load(slots=4)
    owners = [Sharing("alice", "a"), Sharing("alice", "b"), Sharing("bob", "c")]
    requests = [replace(chat(key, text="the same"), sharing=owner) for key, owner in enumerate(owners)]

    events: dict[int, Event] = {}
    for batch in [requests] if together else [[each] for each in requests]:
        events |= run(engine, batch)

    cached = [finished(events[key]).usage.cached_tokens for key in range(3)]
    assert cached[2] == 0
    if case.shares and together:
        assert max(cached[:2]) > 0
    assert len(set(texts(events).values())) == 1


def test_max_tokens_bounds_the_answer(load: Load) -> None:
    events = run(load(), [chat(key, text="one two three four five six", max_tokens=1 + key) for key in range(4)])

    for key, event in events.items():
        answer = finished(event)
        assert answer.usage.output_tokens <= 1 + key
        assert answer.finish_reason == FinishReason.LENGTH or answer.usage.output_tokens < 1 + key


def test_the_context_bounds_the_answer(load: Load) -> None:
    engine = load(slots=1)

    answer = finished(run(engine, [raw(0, "free phone " * 20, max_tokens=10_000, ignore_eos=True)])[0])

    assert answer.usage.prompt_tokens + answer.usage.output_tokens <= engine.info.context_tokens


def test_an_answer_ends_before_its_stop_text(load: Load) -> None:
    whole = finished(run(load(slots=1), [chat(0, text="stop here, and not there", max_tokens=24)])[0]).text
    stop = next(whole[at : at + 2] for at in range(2, len(whole)) if "\ufffd" not in whole[at : at + 2])

    stopped = finished(run(load(), [chat(0, text="stop here, and not there", max_tokens=24, stop=(stop, "zzz"))])[0])

    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == FinishReason.STOP


def test_a_stop_text_concerns_only_its_own_request(load: Load) -> None:
    plain = [chat(key, max_tokens=20) for key in range(6)]
    expected = alone(load, plain)
    requests = [replace(each, sampling=replace(each.sampling, stop=("e",))) if each.key % 2 else each for each in plain]

    events = run(load(slots=4), requests)

    for key, event in events.items():
        text = expected[key][0]
        assert finished(event).text == (text.partition("e")[0] if key % 2 else text)


def test_a_seed_repeats_its_draw_among_any_neighbours(load: Load, case: Case) -> None:
    warm: dict[str, Any] = {"temperature": 1.5, "max_tokens": 16, "ignore_eos": True}
    seeded = [chat(key, seed=1000 + key, **warm) for key in range(5)]
    others = [chat(50 + key, **({} if key % 2 else warm), top_k=5 if key % 3 else 0) for key in range(8)]

    first = run(load(slots=4, batch_tokens=48), [*others[:4], *seeded, *others[4:]])

    assert {key: answer for key, answer in answers(first).items() if key < 50} == alone(load, seeded)
    if case.samples:
        assert len({finished(first[key]).text for key in range(5)}) == 5


@pytest.mark.parametrize(
    "shape",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05}, {"seed": 2**32 - 1}],
    ids=str,
)
def test_every_kind_of_sampling_repeats_with_its_seed(load: Load, shape: dict[str, Any]) -> None:
    requests = [chat(key, **({"temperature": 1.2, "seed": key, "max_tokens": 10} | shape)) for key in range(3)]
    engine = load(slots=2)

    assert texts(run(engine, requests)) == texts(run(engine, requests))


def test_seeds_differ_and_no_seed_is_drawn_anew(load: Load, case: Case) -> None:
    if not case.samples:
        pytest.skip("this engine draws nothing")
    warm: dict[str, Any] = {"text": "anything", "temperature": 2.0, "max_tokens": 16, "ignore_eos": True}
    engine = load(slots=4)

    seeded = texts(run(engine, [chat(key, seed=key, **warm) for key in range(4)]))
    drawn = texts(run(engine, [chat(key, **warm) for key in range(4)]))

    assert len(set(seeded.values())) == 4
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0001}, {"min_p": 1.0}, {"temperature": 0.0}], ids=str)
def test_the_narrowest_sampling_is_greedy(load: Load, narrow: dict[str, Any]) -> None:
    greedy = texts(run(load(slots=2), [chat(key) for key in range(4)]))

    assert texts(run(load(slots=2), [chat(key, **({"temperature": 0.9} | narrow)) for key in range(4)])) == greedy


def test_a_prompt_that_cannot_fit_is_one_requests_error(load: Load) -> None:
    requests = [chat(0), chat(1, text="much too long " * 400), chat(2)]

    events = run(load(), requests)

    assert rejected(events[1]).error_class == ErrorClass.CONTEXT_OVERFLOW
    assert "512" in rejected(events[1]).message
    assert texts({key: events[key] for key in (0, 2)}) == texts(run(load(), [requests[0], requests[2]]))


def test_a_text_far_beyond_the_context_is_refused(load: Load) -> None:
    event = run(load(), [chat(0, text="spam " * 60_000)])[0]

    assert rejected(event).error_class == ErrorClass.CONTEXT_OVERFLOW


def test_the_longest_prompt_that_fits_has_one_token_of_an_answer(load: Load, checkpoint: Checkpoint) -> None:
    counter = token_counter(checkpoint)
    words = 1
    while counter.count(raw(0, "free " * (words + 1))) < CONTEXT:
        words += 1
    prompt = raw(0, "free " * words, max_tokens=5, ignore_eos=True)

    answer = finished(run(load(slots=2), [prompt])[0])

    assert answer.usage.prompt_tokens == counter.count(prompt)
    assert answer.usage.output_tokens <= max(1, CONTEXT - answer.usage.prompt_tokens)


def test_a_request_that_takes_too_long_ends_as_a_timeout(load: Load, case: Case) -> None:
    engine = load(slots=2, model_options=case.slowly)
    requests = [chat(key, text="one two three four five six", max_tokens=400, ignore_eos=True) for key in range(2)]
    hurried = replace(requests[1], sampling=replace(requests[1].sampling, timeout_s=1e-6))

    events = run(engine, [requests[0], hurried])

    late = rejected(events[1])
    assert late.error_class == ErrorClass.TIMEOUT
    assert late.usage is not None
    assert late.usage.prompt_tokens > 0
    assert late.admitted_at is not None
    assert finished(events[0]).text == finished(run(load(slots=1), [requests[0]])[0]).text


def test_a_cancelled_request_frees_its_slot_and_is_heard_of_no_more(load: Load, case: Case) -> None:
    engine = load(slots=1, model_options=case.slowly)
    requests = [chat(key, text="one two three four five six", max_tokens=40, ignore_eos=True) for key in range(2)]
    engine.add(requests)
    while not engine.active:
        engine.step()
    (waiting,) = engine.waiting_keys()

    engine.cancel(1 - waiting)
    assert engine.active == 0
    events = run(engine)

    assert set(events) == {waiting}
    assert answers(events) == alone(load, [requests[waiting]])
    assert engine.counters.wasted_tokens <= engine.counters.decode_tokens


def test_cancelling_while_prompts_are_computed_leaves_the_others_whole(load: Load, case: Case) -> None:
    requests = [chat(key, text="free phone " * 12) for key in range(8)]
    engine = load(slots=4, batch_tokens=24, model_options=case.slowly)
    engine.add(requests)
    events: list[Event] = []
    for key in (0, 5, 2, 77):
        events.extend(engine.step())
        engine.cancel(key)

    found = {event.key: event for event in events} | run(engine)

    expected = alone(load, requests)
    assert {1, 3, 4, 6, 7} <= set(found)
    assert answers(found) == {key: expected[key] for key in sorted(found)}


def test_waiting_requests_can_be_cancelled_and_given_back(load: Load, case: Case) -> None:
    engine = load(slots=1, model_options=case.slowly)
    engine.add([chat(key) for key in range(4)])
    assert (engine.waiting, set(engine.waiting_keys())) == (4, {0, 1, 2, 3})

    engine.cancel(2)

    assert set(run(engine)) == {0, 1, 3}


def test_a_step_without_work_returns_nothing(load: Load) -> None:
    engine = load()
    engine.add([])

    assert list(engine.step()) == []
    assert engine.counters.steps == 0


def test_the_books_balance(load: Load) -> None:
    engine = load(slots=3)

    events = run(engine, [chat(key, max_tokens=1 + key % 9) for key in range(14)])

    answers_ = [finished(event) for event in events.values()]
    counters = engine.counters
    assert counters.decode_tokens == sum(each.usage.output_tokens for each in answers_)
    assert counters.prefill_tokens == sum(each.usage.prompt_tokens - each.usage.cached_tokens for each in answers_)
    assert counters.wasted_tokens == 0
    assert counters.steps > 0
    assert min(counters.prefill_s, counters.decode_s, counters.overhead_s, counters.idle_s, counters.starved_s) >= 0
    for each in answers_:
        assert each.admitted_at <= each.first_token_at <= each.finished_at


def test_prompts_and_answers_hold_any_character(load: Load, case: Case) -> None:
    odd = ["\x00 nul", "🏳️‍🌈 family 👨‍👩‍👧‍👦", "\ud800 half", "ﷺ\u200f עברית", "", "\r\n\t", "a" * 200]
    requests = [chat(key, text=text) for key, text in enumerate(odd)]

    together = run(load(slots=3), requests)

    assert answers(together) == alone(load, requests)
    for text in texts(together).values():
        if case.samples:
            text.encode()


def test_a_raw_prompt_is_sent_as_it_is(load: Load) -> None:
    engine = load(slots=2)
    rendered = engine.render(chat(0))

    assert engine.render(raw(1, "plain text")) == "plain text"
    assert RULES in rendered
    assert finished(run(engine, [raw(1, "plain text")])[1]).usage.prompt_tokens < len("plain text") + 2


def test_tokens_are_counted_before_any_device_is_used(load: Load, checkpoint: Checkpoint) -> None:
    counter = token_counter(checkpoint)
    engine = load(slots=4)
    requests = [*[chat(key) for key in range(5)], raw(9, "plain text")]

    events = run(engine, requests)

    for request in requests:
        assert counter.render(request) == engine.render(request)
        assert counter.count(request) == finished(events[request.key]).usage.prompt_tokens
    assert counter.context_tokens >= engine.info.context_tokens


def test_a_model_without_a_chat_template_takes_raw_prompts_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = {
        "llamacpp": lambda: write_tiny_gguf(tmp_path / "bare.gguf", chat_template=None),
        "mlx": lambda: write_tiny_mlx(tmp_path / "bare", chat_template=None),
    }
    if checkpoint.engine not in bare:
        pytest.skip("this engine needs no template")
    model = replace(checkpoint, path=bare[checkpoint.engine]())
    engine = build_engine(model, EngineOptions(slots=2, threads=1))

    events = run(engine, [chat(0), raw(1, "plain text")])

    assert rejected(events[0]).error_class == ErrorClass.INVALID_REQUEST
    assert "chat template" in rejected(events[0]).message
    assert finished(events[1]).usage.output_tokens > 0
    with pytest.raises(RequestError, match="chat template"):
        token_counter(model).count(chat(0))
    engine.close()


def test_what_was_set_up_is_told(load: Load, checkpoint: Checkpoint) -> None:
    info = load(slots=3, context_tokens=256).info

    assert (info.engine, info.slots, info.context_tokens) == (checkpoint.engine, 3, 256)
    assert info.device_got.startswith("cpu")
    assert info.layers_offloaded == 0
    assert info.version
    assert info.kv_cells >= 256
