"""Seeds of 64 bits as llama.cpp takes them."""

from __future__ import annotations

import pytest

from promptmill_workers.engines.llama.sampling import _in_32_bits


@pytest.mark.parametrize(("one", "other"), [(2**63 - 1, -(2**63)), (0, 2**32 - 1), (-1, 2**32 - 2), (5, 5 + 2**32)])
def test_seeds_that_differ_draw_differently(one: int, other: int) -> None:
    assert _in_32_bits(one) != _in_32_bits(other)


def test_small_seeds_are_what_they_are() -> None:
    assert [_in_32_bits(seed) for seed in (0, 7, 2**32 - 2)] == [0, 7, 2**32 - 2]
