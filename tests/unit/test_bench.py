"""What the bench makes of its runs."""

from __future__ import annotations

from promptmill.experiments.bench import BenchFigures, Way


def run(seconds: float) -> BenchFigures:
    return BenchFigures("whole job", seconds, requests=10, output_tokens=100)


def test_a_way_is_known_by_its_median_run_and_by_its_range() -> None:
    way = Way((run(10), run(5), run(20)))

    assert way.median == run(10)
    assert way.rates == (5, 20)
    assert not way.is_short
    assert Way((run(10), run(5))).median == run(10)


def test_a_run_that_is_too_short_is_said_to_be_one() -> None:
    assert Way((run(10), run(4.9))).is_short
    assert Way((run(4.9),)).to_json()["too_short"] is True
