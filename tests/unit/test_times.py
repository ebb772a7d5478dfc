"""Spans and moments as people write them."""

from __future__ import annotations

import time

import pytest

from promptmill.errors import JobError
from promptmill.times import moment, span_s


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2h30m", 9000), ("1d", 86400), ("0.5h", 1800), (None, None)]
)
def test_spans(text: str | None, seconds: float | None) -> None:
    assert span_s(text, "--time-limit") == seconds


@pytest.mark.parametrize("text", ["", "5", "2 hours", "-1h", "0s", "h"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="--time-limit"):
        span_s(text, "--time-limit")


def test_a_span_counts_from_now() -> None:
    found = moment("2h", "--deadline")
    assert found is not None
    assert found == pytest.approx(time.time() + 7200, abs=5)


def test_a_time_is_taken_as_it_is() -> None:
    assert moment("2999-01-01T00:00:00+00:00", "--deadline") == 32472144000.0


@pytest.mark.parametrize("text", ["2020-01-01", "tomorrow"])
def test_what_has_passed_or_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="--expires"):
        moment(text, "--expires")
