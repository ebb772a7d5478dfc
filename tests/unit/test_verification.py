"""What ``verify`` makes of what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from promptmill.cli.measure.verify import summary
from promptmill.experiments import verify
from promptmill.experiments.verify import Verification
from promptmill.types import FinishReason, Ok, Request, Result, SamplingParams, Usage

CLEAN = Verification(
    "01JOB", asked=9, compared=8, left_out=1, mismatches=0, sampled_compared=3, sampled_mismatches=0, exact=False,
    examples=(), left_out_rows=(), sums=(),
)  # fmt: skip


def test_a_draw_that_differs_fails_only_a_model_that_computes_alike_in_every_batch() -> None:
    drawn = replace(CLEAN, mismatches=1, sampled_mismatches=1)

    assert CLEAN.ok
    assert drawn.ok
    assert not replace(drawn, exact=True).ok
    assert not replace(drawn, mismatches=2).ok
    assert not replace(CLEAN, sums=("chunk 0 counts 4 ok",)).ok


def test_sampled_answers_are_told_apart() -> None:
    assert summary(replace(CLEAN, mismatches=1, sampled_mismatches=1)) == (
        "0 of 5 greedy answers differ (0.0%), 1 of 3 sampled ones (33.3%); 1 left out"
    )
    assert summary(replace(CLEAN, sampled_compared=0, mismatches=2)) == "2 of 8 answers differ (25.0%); 1 left out"


def test_a_character_that_no_database_takes_is_no_difference() -> None:
    request = Request(0, "a", SamplingParams(), prompt="one")
    answered = Ok(0, "one\0two", FinishReason.STOP, Usage(1, 0, 2), None)

    @contextmanager
    def alone() -> Iterator[tuple[bool, Callable[[Request], Result]]]:
        yield True, lambda request: answered

    job: Any = SimpleNamespace(id="01JOB")
    for stored, mismatches in (("one\N{REPLACEMENT CHARACTER}two", 0), ("one two", 1)):
        found = verify._compared(job, 1, [(request, stored)], (), alone(), lambda done, of: None)
        assert found.mismatches == mismatches
