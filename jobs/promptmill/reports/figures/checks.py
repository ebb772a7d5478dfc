"""Whether the figures of a report agree with each other: laws that true numbers keep, printed in every report."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from promptmill.reports.figures.aggregate import Totals
from promptmill.reports.figures.budget import Budget
from promptmill.reports.figures.distributions import Curve
from promptmill.reports.figures.metrics import digits
from promptmill.types import ErrorClass, JobState

#: Share by which two ways to the same number may differ through rounding of doubles.
ROUNDING = 1e-6

#: Share, seconds, and seconds an attempt, by which an engine's time may exceed the time its worker held leases: two
#: clocks measure them, and older versions stored when the counters were taken as an attempt's end.
BUDGET_SHARE = 0.05
BUDGET_S = 0.25
BUDGET_ATTEMPT_S = 0.005

NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Check:
    """One law. ``ok`` is None when what it needs was not measured."""

    name: str
    ok: bool | None
    detail: str

    def to_json(self) -> dict[str, str | bool | None]:
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Rows that had a slot, by their timestamps: ``rows`` of them took ``active_s`` seconds in all."""

    rows: int
    began_at: float | None
    ended_at: float | None
    active_s: float
    peak_active: int
    slots: int | None

    @property
    def wall_s(self) -> float | None:
        return None if self.began_at is None or self.ended_at is None else self.ended_at - self.began_at

    @property
    def mean_active(self) -> float | None:
        return self.active_s / self.wall_s if self.wall_s else None


def counts(state: JobState, rows: int, ok: int, by_class: Mapping[str, int]) -> Check:
    """Every row of the dataset has one result, or the job says that it is incomplete."""
    errors, cancelled = sum(by_class.values()), by_class.get(ErrorClass.CANCELLED, 0)
    attempted = ok + errors
    sum_text = f"{ok:,} ok + {errors:,} errors" + (f" ({cancelled:,} cancelled)" if cancelled else "")
    if attempted == rows:
        return Check("counts", True, f"{sum_text} = {rows:,} {'row' if rows == 1 else 'rows'}")
    if attempted > rows or state is JobState.COMPLETED:
        return Check("counts", False, f"{sum_text} = {attempted:,}, and the job has {rows:,} rows")
    return Check("counts", None, f"INCOMPLETE {attempted:,}/{rows:,}: {sum_text}")


def little(occupancy: Occupancy) -> Check:
    """Little's law: sequences in the engine = requests per second x seconds each."""
    wall_s, mean_active = occupancy.wall_s, occupancy.mean_active
    if not wall_s or mean_active is None:
        return Check("little", None, NOT_MEASURED)
    rate, latency_s = occupancy.rows / wall_s, occupancy.active_s / occupancy.rows
    agrees = math.isclose(mean_active, rate * latency_s, rel_tol=ROUNDING)
    within = mean_active <= occupancy.peak_active * (1 + ROUNDING)
    detail = f"{digits(mean_active)} active = {digits(rate)} requests/s x {digits(latency_s)} s"
    return Check("little", agrees and within, detail)


def slots(occupancy: Occupancy) -> Check:
    """No more rows at one time than there are slots."""
    if occupancy.slots is None or not occupancy.rows:
        return Check("slots", None, NOT_MEASURED)
    detail = f"at most {occupancy.peak_active:,} active at one time, {occupancy.slots:,} slots"
    return Check("slots", occupancy.peak_active <= occupancy.slots, detail)


def tokens(in_rows: int, budget: Budget) -> Check:
    """The engines generated what the rows hold, and what was wasted: all together, and each that lost no attempt."""
    if budget.unbalanced:
        worst = budget.unbalanced[0]
        others = f" (and {len(budget.unbalanced) - 1:,} more workers)" if len(budget.unbalanced) > 1 else ""
        sums = f"{worst.in_rows:,} in rows + {worst.wasted:,} wasted ≠ {worst.generated:,} generated"
        return Check("tokens", False, f"worker {worst.worker_id}: {sums}{others}")
    if budget.generated_tokens is None or budget.wasted_tokens is None:
        return Check("tokens", None, budget.missing or NOT_MEASURED)
    total = in_rows + budget.wasted_tokens
    sign = "=" if total == budget.generated_tokens else "≠"
    lost = f" ({budget.lost_attempts:,} lost attempts: by subtraction)" if budget.lost_attempts else ""
    detail = f"{in_rows:,} in rows + {budget.wasted_tokens:,} wasted{lost} {sign} {budget.generated_tokens:,} generated"
    return Check("tokens", total == budget.generated_tokens, detail)


def time_budget(budget: Budget) -> Check:
    """Per worker: prefill + decode + overhead + idle are within the time it held leases."""
    if budget.missing or any(each.accounted_s is None for each in budget.workers):
        return Check("time", None, budget.missing or NOT_MEASURED)
    excesses = [((each.accounted_s or 0.0) - each.wall_s, each) for each in budget.workers]
    _, worst = max(excesses, key=lambda pair: pair[0] / max(pair[1].wall_s, BUDGET_S))
    fits = all(
        excess <= max(BUDGET_S, BUDGET_SHARE * each.wall_s, BUDGET_ATTEMPT_S * each.attempts)
        for excess, each in excesses
    )
    parts = " + ".join(f"{digits(seconds)}" for seconds in worst.parts_s)
    detail = f"prefill + decode + overhead + idle: {parts} s of {digits(worst.wall_s)} s"
    others = f" (the worst of {len(budget.workers)} workers)" if len(budget.workers) > 1 else ""
    return Check("time", fits, detail + others)


def limits(totals: Totals, rows: int) -> Check:
    """No answer over ``max_tokens``, no more cached than prompt tokens."""
    over, cached = totals.over_max_tokens, totals.over_cached
    if over or cached:
        return Check("limits", False, f"{over:,} rows over max_tokens, {cached:,} with more cached than prompt tokens")
    return Check("limits", True, "output <= max_tokens, cached <= prompt") if rows else _nothing("limits")


def order(totals: Totals, timed: int) -> Check:
    """Each row: enqueued, then admitted, then first token, then finished."""
    disordered, early = totals.disordered, totals.early
    if disordered or early:
        return Check("order", False, f"{disordered:,} rows out of order, {early:,} admitted before they were enqueued")
    return Check("order", True, "enqueued <= admitted <= first token <= finished") if timed else _nothing("order")


def curve(shape: Curve | None, output_tokens: int) -> Check:
    """The throughput curve holds every output token, and no more."""
    if shape is None:
        return Check("curve", None, NOT_MEASURED)
    fits = math.isclose(shape.tokens, output_tokens, rel_tol=1e-4, abs_tol=0.5)
    sign = "=" if fits else "≠"
    return Check(
        "curve", fits, f"output tok/s over time adds up to {shape.tokens:,.0f} {sign} {output_tokens:,} tokens"
    )


def model(wanted: str | None, named: Collection[str | None]) -> Check:
    """All attempts that answered rows name the model that the job is for. ``named``: by them; None by an older one."""
    others = sorted({each for each in named if each not in (None, wanted)}, key=str)
    if others:
        shown = ", ".join(str(each)[:12] for each in others)
        return Check("model", False, f"the job is for {str(wanted)[:12]}, attempts were answered by {shown}")
    if wanted is None or not named or None in named:
        return Check("model", None, NOT_MEASURED)
    return Check("model", True, f"all attempts were answered by {wanted[:12]}")


def _nothing(name: str) -> Check:
    return Check(name, None, "no rows")
