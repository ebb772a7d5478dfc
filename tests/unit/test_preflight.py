"""What is known of a job before it runs: lengths, rows that cannot fit, the context that is enough."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.cli.progress import preflight_line
from promptmill.service.preflight import (
    CONTEXT_STEP,
    MEASURED_ROWS,
    SAMPLE_EVERY,
    SMALLEST_CONTEXT,
    TEMPLATE_TOKENS,
    PromptGauge,
)
from promptmill.tasks.sampling import BadParameter, PromptTooLong
from promptmill.types import ErrorClass, Message, Request, SamplingParams


def words(request: Request) -> int:
    """Tokens of a prompt, one a word: the counter of these tests."""
    text = request.prompt if request.prompt is not None else " ".join(each.content for each in request.messages or ())
    return len(text.split())


def asked(tokens: int, max_tokens: int = 8) -> Request:
    """A raw prompt of so many tokens, two bytes each."""
    return Request(0, "r", SamplingParams(max_tokens=max_tokens), prompt="w " * tokens)


def gauge_of(requests: Iterable[Request], context: int = 4096) -> PromptGauge:
    gauge = PromptGauge(words, context)
    for request in requests:
        gauge(request)
    return gauge


def test_a_beginning_that_is_there_twice_is_told() -> None:
    gauge = PromptGauge(words, 4096, has_two_starts=lambda request: request.row % 2 == 0)
    for request in (asked(3, 10) for _ in range(4)):
        gauge(request)

    assert gauge.findings().two_starts == 4
    assert "4 begin with the token of a beginning (BOS) twice" in preflight_line(gauge.findings())
    assert "BOS" not in preflight_line(gauge_of([asked(3, 10)]).findings())


def test_the_findings_of_a_small_job_are_exact() -> None:
    found = gauge_of(asked(tokens, 10) for tokens in range(1, 101)).findings()
    assert (found.rows, found.measured, found.too_long) == (100, 100, 0)
    assert (found.tokens_min, found.tokens_p50, found.tokens_p99, found.tokens_max) == (1, 50, 99, 100)
    assert (found.prompt_tokens, found.max_output_tokens) == (5050, 1000)
    assert found.context_tokens == 4096
    assert json.loads(json.dumps(found.to_json()))["tokens_p50"] == 50


def test_a_job_without_rows_has_findings_of_nothing() -> None:
    found = PromptGauge(words, 4096).findings()
    assert (found.rows, found.measured, found.tokens_max, found.prompt_tokens) == (0, 0, 0, 0)


def test_messages_are_counted_with_all_their_texts() -> None:
    turns = (Message("system", "a b c"), Message("user", "d e"))
    found = gauge_of([Request(0, "r", SamplingParams(), messages=turns)]).findings()
    assert found.tokens_max == 5


@pytest.mark.parametrize("tokens", [512, 513, 900])
def test_a_prompt_that_leaves_no_room_for_one_token_is_refused(tokens: int) -> None:
    with pytest.raises(PromptTooLong, match=rf"the prompt has {tokens} tokens, the model's context 512") as caught:
        PromptGauge(words, 512)(asked(tokens))
    assert caught.value.error_class is ErrorClass.CONTEXT_OVERFLOW
    assert "w w" not in caught.value.message


def test_a_prompt_that_leaves_room_for_one_token_is_taken() -> None:
    assert gauge_of([asked(511)], 512).findings().too_long == 0


def test_a_refused_row_is_counted_and_adds_no_tokens() -> None:
    gauge = gauge_of([asked(10, 8)], 512)
    with pytest.raises(PromptTooLong):
        gauge(asked(600, 8))
    found = gauge.findings()
    assert (found.rows, found.too_long, found.measured) == (2, 1, 1)
    assert (found.tokens_max, found.prompt_tokens, found.max_output_tokens) == (10, 10, 8)


def test_after_the_first_rows_only_samples_are_tokenised_and_stand_for_the_others() -> None:
    calls = 0

    def count(request: Request) -> int:
        nonlocal calls
        calls += 1
        return words(request)

    gauge = PromptGauge(count, 4096)
    request = asked(10)
    rows = MEASURED_ROWS + 100 * SAMPLE_EVERY
    for _ in range(rows):
        gauge(request)
    found = gauge.findings()
    assert calls == found.measured == MEASURED_ROWS + 100
    assert (found.rows, found.prompt_tokens, found.max_output_tokens) == (rows, 10 * rows, 8 * rows)


def test_a_long_prompt_is_refused_however_late_it_comes() -> None:
    gauge = gauge_of([asked(1)] * (MEASURED_ROWS + 1), 512)
    with pytest.raises(PromptTooLong):
        gauge(asked(600))


def test_long_rows_that_are_all_measured_stand_for_themselves_alone() -> None:
    short, long = [asked(1)] * (MEASURED_ROWS + 10 * SAMPLE_EVERY), [asked(400)] * (10 * SAMPLE_EVERY)
    found = gauge_of([*short, *long], 512).findings()
    assert found.measured == MEASURED_ROWS + 10 + len(long)
    assert found.prompt_tokens == len(short) + 400 * len(long)
    assert found.tokens_p50 == 1


def test_the_context_is_that_of_the_longest_row_rounded_up() -> None:
    gauge = gauge_of([asked(1000, 100), asked(10, 8)])
    assert gauge.context_needed == -(-1100 // CONTEXT_STEP) * CONTEXT_STEP


def test_the_context_is_never_above_the_models_nor_tiny() -> None:
    assert gauge_of([asked(10, 100_000)]).context_needed == 4096
    assert gauge_of([asked(1, 1)]).context_needed == SMALLEST_CONTEXT
    assert gauge_of([asked(1, 1)], 256).context_needed == 256


@given(st.text(max_size=200))
def test_a_row_that_is_not_tokenised_fits_by_its_bytes(text: str) -> None:
    """What is not measured is bounded: a token is at least a byte."""
    gauge = PromptGauge(lambda request: len((request.prompt or "").encode()), 4096)
    gauge._rows = MEASURED_ROWS
    gauge(Request(0, "r", SamplingParams(max_tokens=2000), prompt=text))
    assert gauge.findings().measured == 0
    assert gauge.context_needed >= len(text.encode()) + TEMPLATE_TOKENS + 2000


def test_answers_that_the_context_may_cut_are_counted() -> None:
    found = gauge_of([asked(10, max_tokens=6), asked(10, max_tokens=7), asked(3)], context=16).findings()

    assert (found.cut, found.too_long) == (1, 0)


def test_a_bias_on_a_token_that_the_model_lacks_is_refused() -> None:
    gauge = PromptGauge(words, 64, vocabulary=400)
    request = asked(3)
    gauge(replace(request, sampling=SamplingParams(logit_bias=((1, 2.0), (399, 1.0)))))

    with pytest.raises(BadParameter, match="'logit_bias' names token 400: the model's tokens are 0 to 399"):
        gauge(replace(request, sampling=SamplingParams(logit_bias=((1, 2.0), (400, 1.0)))))
