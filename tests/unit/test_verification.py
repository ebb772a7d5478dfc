"""What ``verify`` makes of what it found."""

from __future__ import annotations

from dataclasses import replace

from promptmill.cli.measure.verify import summary
from promptmill.experiments.verify import Verification

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
