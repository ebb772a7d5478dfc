"""How urgent a job is that has waited."""

from __future__ import annotations

import pytest

from promptmill.dispatch import AGE_S, _aged


@pytest.mark.parametrize(
    ("priority", "waited_s", "expected"),
    [(5, 0, 5), (5, AGE_S - 1, 5), (5, AGE_S, 4), (9, 4.5 * AGE_S, 5), (2, 100 * AGE_S, 0), (5, -3, 5)],
)
def test_a_waiting_job_moves_up(priority: int, waited_s: float, expected: int) -> None:
    assert _aged(priority, waited_s) == expected
