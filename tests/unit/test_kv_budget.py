"""Slots and KV cells by what was asked for and what the memory holds."""

from __future__ import annotations

from typing import Any

import pytest

from promptmill.errors import ModelError
from promptmill_workers.engines.kv_budget import CPU_SLOTS, GPU_SLOTS, KVBudget, fit

USUAL: dict[str, Any] = {
    "slots": None, "cells": None, "context": 4096, "needed": None, "trained": 32_768, "cell_bytes": 100_000,
    "free_bytes": 100 * 2**30, "gpu": False,
}  # fmt: skip


def test_enough_memory_gives_the_usual() -> None:
    assert fit(**USUAL) == KVBudget(CPU_SLOTS, CPU_SLOTS * 1024, 4096)
    assert fit(**{**USUAL, "gpu": True}) == KVBudget(GPU_SLOTS, GPU_SLOTS * 1024, 4096)
    assert fit(**{**USUAL, "context": 512}) == KVBudget(CPU_SLOTS, CPU_SLOTS * 512, 512)


def test_what_was_asked_for_is_kept() -> None:
    assert fit(**{**USUAL, "slots": 3, "cells": 5000}) == KVBudget(3, 5000, 4096)
    assert fit(**{**USUAL, "slots": 3, "cells": 100}) == KVBudget(3, 4096, 4096)  # one request must fit


def test_little_memory_gives_fewer_slots() -> None:
    found = fit(**{**USUAL, "free_bytes": 800_000_000})  # 6,400 cells

    assert found == KVBudget(6, 6400, 4096)


def test_asked_slots_wait_for_cells_where_memory_is_short() -> None:
    assert fit(**{**USUAL, "slots": 32, "free_bytes": 800_000_000}) == KVBudget(32, 6400, 4096)


def test_a_context_that_cannot_fit_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ModelError, match=r"4,096 tokens: its KV cache takes 0.4 GiB, and 0.2 GiB are free"):
        fit(**{**USUAL, "free_bytes": 200_000_000})


def test_unknown_memory_is_taken_for_enough() -> None:
    assert fit(**{**USUAL, "free_bytes": None}).slots == CPU_SLOTS


UNASKED = {**USUAL, "context": None}


def test_a_small_job_leaves_room_for_the_longer_texts_of_clients() -> None:
    assert fit(**{**UNASKED, "needed": 512}) == KVBudget(CPU_SLOTS, CPU_SLOTS * 512, 4096)
    assert fit(**{**UNASKED, "needed": 9000}) == KVBudget(CPU_SLOTS, CPU_SLOTS * 1024, 9000)
    assert fit(**UNASKED) == KVBudget(CPU_SLOTS, CPU_SLOTS * 1024, 4096)
    assert fit(**{**UNASKED, "needed": 512, "slots": 1}) == KVBudget(1, 4096, 4096)


def test_no_request_is_longer_than_what_the_model_was_trained_for() -> None:
    assert fit(**{**UNASKED, "needed": 512, "trained": 2048}).context == 2048
    assert fit(**{**USUAL, "context": 9000, "trained": 2048}).context == 2048


def test_where_memory_is_short_the_context_is_what_is_needed() -> None:
    assert fit(**{**UNASKED, "needed": 700, "free_bytes": 150_000_000}) == KVBudget(1, 1200, 1200)
    assert fit(**{**UNASKED, "needed": 2000, "cells": 1500}) == KVBudget(CPU_SLOTS, 2000, 2000)
    with pytest.raises(ModelError, match="2,000 tokens"):
        fit(**{**UNASKED, "needed": 2000, "free_bytes": 150_000_000})
    with pytest.raises(ModelError, match="512 tokens"):
        fit(**{**UNASKED, "free_bytes": 1_000_000})
