"""The most telling faults, once each: a short selection of what `make faults` does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.faults.arena import Arena
from tests.faults.run import run_one
from tests.faults.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena() as made:
        yield made


@pytest.mark.parametrize("number", [1, 2, 7, 11, 19], ids=lambda number: SCENARIOS[number].__name__)
def test_nothing_is_lost(arena: Arena, number: int) -> None:
    seed = secrets.randbelow(1_000_000)
    assert run_one(arena, number, seed).outcome == "ok", f"python -m tests.faults.run --scenario {number} --seed {seed}"
