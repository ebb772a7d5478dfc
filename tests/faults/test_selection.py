"""The most telling faults, once each: a short selection of what `make faults` does."""

from __future__ import annotations

import secrets

import pytest

from tests.faults.run import run_one
from tests.faults.scenarios import SCENARIOS


@pytest.mark.parametrize("number", [1, 7, 11, 19, 20], ids=lambda number: SCENARIOS[number].__name__)
def test_nothing_is_lost(number: int) -> None:
    seed = secrets.randbelow(1_000_000)
    outcome, _ = run_one(number, seed)
    assert outcome == "ok", f"python -m tests.faults.run --scenario {number} --seed {seed}"
