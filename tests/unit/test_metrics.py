"""The table of figures."""

from __future__ import annotations

import pytest

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.metrics import METRICS, Kind, Unit, comparable, digits


def test_every_figure_says_what_it_is_and_how_it_is_computed() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.label
        assert metric.formula
        assert metric.min_n >= 1


def test_f5_a_prefill_rate_is_never_set_against_an_end_to_end_rate() -> None:
    assert METRICS["prefill_tps"].unit is METRICS["output_tps"].unit
    assert not comparable(METRICS["prefill_tps"], METRICS["output_tps"])
    assert not comparable(METRICS["decode_tps"], METRICS["output_tps"])
    assert comparable(METRICS["latency_s"], METRICS["ttft_s"])


def test_f5b_the_unit_belongs_to_the_figure_and_not_to_its_label() -> None:
    for metric in METRICS.values():
        assert isinstance(metric.unit, Unit)
        assert isinstance(metric.kind, Kind)
    rates = {name for name, metric in METRICS.items() if metric.unit is Unit.TOKENS_PER_SECOND}
    assert rates == {"output_tps", "total_tps", "prefill_tps", "decode_tps"}


def test_f10_the_name_carries_unit_and_aggregation() -> None:
    suffix = {
        Unit.SECONDS: "_s",
        Unit.TOKENS_PER_SECOND: "_tps",
        Unit.REQUESTS_PER_SECOND: "_per_s",
        Unit.BYTES: "_bytes",
    }
    for metric in METRICS.values():
        assert metric.name.endswith(suffix.get(metric.unit, ""))
    assert METRICS["mean_output_tokens"].unit is Unit.TOKENS


def test_f16_no_two_figures_have_one_name_or_one_meaning() -> None:
    formulas = [metric.formula for metric in METRICS.values()]
    assert len(formulas) == len(set(formulas))


def test_each_percentile_knows_how_many_values_it_needs() -> None:
    assert {name: least for name, (_, least) in PERCENTILES.items()} == {"p50": 6, "p90": 36, "p95": 72, "p99": 368}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (4.5678, "4.57"),
        (78.91, "78.9"),
        (12345.6, "12,346"),
        (999.7, "1,000"),
        (9.9996, "10.0"),
    ],
)
def test_numbers_show_three_digits_and_never_fewer_than_the_whole_number(value: float, text: str) -> None:
    assert digits(value) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert METRICS["prefill_tps"].text(None) == "–"
    assert METRICS["wall_s"].text(float("nan")) == "–"


def test_shares_are_shown_in_per_cent_and_memory_in_mebibytes() -> None:
    assert METRICS["success_rate"].text(0.9715) == "97.2"
    assert METRICS["memory_bytes"].text(3 * 2**20) == "3"
    assert METRICS["memory_bytes"].shown_unit == "MiB"
    assert METRICS["prompt_tokens"].text(40_000_000) == "40,000,000"
