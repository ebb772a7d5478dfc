"""Slots and KV cells by what was asked for and what the memory holds."""

from __future__ import annotations

from typing import Any

import pytest

from promptmill.errors import ModelError
from promptmill_workers.engines.kv_budget import CPU_SLOTS, GPU_SLOTS, KVBudget, fit

USUAL: dict[str, Any] = {
    "slots": None, "cells": None, "context_tokens": 4096, "cell_bytes": 100_000,
    "free_bytes": 100 * 2**30, "gpu": False,
}  # fmt: skip


def test_enough_memory_gives_the_usual() -> None:
    assert fit(**USUAL) == KVBudget(CPU_SLOTS, CPU_SLOTS * 1024)
    assert fit(**{**USUAL, "gpu": True}) == KVBudget(GPU_SLOTS, GPU_SLOTS * 1024)
    assert fit(**{**USUAL, "context_tokens": 512}) == KVBudget(CPU_SLOTS, CPU_SLOTS * 512)


def test_what_was_asked_for_is_kept() -> None:
    assert fit(**{**USUAL, "slots": 3, "cells": 5000}) == KVBudget(3, 5000)
    assert fit(**{**USUAL, "slots": 3, "cells": 100}) == KVBudget(3, 4096)  # one request must fit


def test_little_memory_gives_fewer_slots() -> None:
    found = fit(**{**USUAL, "free_bytes": 800_000_000})  # 6,400 cells

    assert found == KVBudget(6, 6400)


def test_asked_slots_wait_for_cells_where_memory_is_short() -> None:
    assert fit(**{**USUAL, "slots": 32, "free_bytes": 800_000_000}) == KVBudget(32, 6400)


def test_a_context_that_cannot_fit_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ModelError, match=r"4,096 tokens: its KV cache takes 0.4 GiB, and 0.2 GiB are free"):
        fit(**{**USUAL, "free_bytes": 200_000_000})


def test_unknown_memory_is_taken_for_enough() -> None:
    assert fit(**{**USUAL, "free_bytes": None}).slots == CPU_SLOTS
