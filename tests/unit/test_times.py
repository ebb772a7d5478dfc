"""Spans and moments as people write them."""

from __future__ import annotations

import pytest

from promptmill.core.spans import moment, span_s
from promptmill.errors import BadOption


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2h30m", 9000), ("1d", 86400), ("0.5h", 1800), (None, None)]
)
def test_spans(text: str | None, seconds: float | None) -> None:
    assert span_s(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["", "5", "2 hours", "-1h", "0s", "h"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="time_limit"):
        span_s(text, "time_limit")


def test_a_span_counts_from_the_database_s_now() -> None:
    found = moment("2h", "deadline")
    assert found.by(1_000_000.0) == 1_007_200.0


def test_a_time_is_taken_as_it_is() -> None:
    found = moment("2999-01-01T00:00:00+00:00", "deadline")
    assert found.by(1_000_000.0) == 32472144000.0


@pytest.mark.parametrize("text", ["tomorrow", "1e9"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="expires"):
        moment(text, "expires")


def test_a_time_that_has_passed_by_the_database_s_clock_is_refused() -> None:
    found = moment("2020-01-01T00:00:00+00:00", "expires")
    with pytest.raises(BadOption, match=r"'expires' 2020-01-01.* has passed"):
        found.by(1_700_000_000.0)
    assert found.by(1_000_000.0) == 1_577_836_800.0
