"""How rows are cut into chunks: all of them, in order, within the budget, small at both ends."""

from __future__ import annotations

from array import array
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from promptmill.service.submission import (
    CHUNK_ROWS,
    CHUNK_TOKENS,
    FIRST_CHUNK_ROWS,
    LAST_CHUNK_ROWS,
    TAPER,
    plan_chunks,
)

#: Tokens of a row: mostly small, some near the budget of a chunk, some far above it.
costs = st.lists(
    st.one_of(st.integers(0, 400), st.integers(CHUNK_TOKENS - 2, CHUNK_TOKENS + 2), st.just(2**32 - 1)), max_size=900
)


@given(costs)
def test_every_row_is_in_exactly_one_chunk_and_in_order(costs: list[int]) -> None:
    plan = list(plan_chunks(array("I", costs)))
    assert list(chain.from_iterable(plan)) == list(range(len(costs)))
    assert all(len(chunk) for chunk in plan)


@given(costs)
def test_no_chunk_is_above_its_budget_but_a_row_that_travels_alone(costs: list[int]) -> None:
    for chunk in plan_chunks(costs):
        assert len(chunk) <= CHUNK_ROWS
        assert len(chunk) == 1 or sum(costs[row] for row in chunk) <= CHUNK_TOKENS


def test_a_job_without_rows_has_no_chunks() -> None:
    assert list(plan_chunks([])) == []


def test_the_first_chunks_are_small_so_that_results_show_at_once() -> None:
    sizes = [len(chunk) for chunk in plan_chunks([1] * 20_000)]
    assert sizes[:2] == [FIRST_CHUNK_ROWS] * 2
    assert max(sizes) == CHUNK_ROWS


def test_the_last_chunks_shrink_so_that_devices_end_together() -> None:
    total = 20_000
    for chunk in plan_chunks([1] * total):
        assert len(chunk) <= max(LAST_CHUNK_ROWS, (total - chunk.start) // TAPER)


def test_long_rows_make_chunks_of_few_rows() -> None:
    half = CHUNK_TOKENS // 2
    assert [len(chunk) for chunk in plan_chunks([half] * 5)] == [2, 2, 1]
