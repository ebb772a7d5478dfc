"""Every figure a report prints: its name, unit, kind, which way is better, and how it is computed from rows.

A figure that is not here cannot be printed: reports take labels, units and digits from this table. Two figures may be
set against each other only when their kinds are equal, so that a prefill rate never meets an end-to-end rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from promptmill.database.figure_sql import FIGURE_SQL

if TYPE_CHECKING:
    from promptmill.reports.figures.measured import Measured


class Unit(StrEnum):
    """What a number counts. Part of the figure itself, not of its label."""

    SECONDS = "s"
    TOKENS = "tok"
    REQUESTS = "requests"
    SEQUENCES = "sequences"
    BYTES = "B"
    REQUESTS_PER_SECOND = "requests/s"
    TOKENS_PER_SECOND = "tok/s"
    SHARE = "%"
    #: In the unit of the field it is about.
    OWN = ""
    #: From 0 or -1 to 1, and not a share of anything.
    INDEX = "index"


class Kind(StrEnum):
    """What a figure is about: comparable figures are of one kind."""

    COUNT = "count"
    WALL_TIME = "wall time"
    SERVICE_TIME = "service time"
    QUEUE_TIME = "queue time"
    REQUEST_RATE = "request rate of the job"
    OUTPUT_RATE = "output token rate of the job"
    TOTAL_RATE = "computed token rate of the job"
    PREFILL_RATE = "prefill rate of the engine"
    DECODE_RATE = "decode rate of the engine"
    OCCUPANCY = "occupancy"
    LENGTH = "length of answers"
    CACHE = "prompt tokens not computed again"
    SUCCESS = "requests answered"
    QUALITY = "answers that are right"
    MEMORY = "memory"


class Better(StrEnum):
    """Which way is better; a count of what was asked is neither."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure. ``formula`` is in terms of columns of ``results`` (of ok rows unless it says otherwise)."""

    name: str
    label: str
    unit: Unit
    kind: Kind
    better: Better
    formula: str
    #: Fewest values behind the figure for it to say anything.
    min_n: int = 1
    #: The figure of a job; of a figure of each row its distribution. None: it is a score's, or a worker's.
    of: Callable[[Measured], Any] | None = None

    def text(self, value: float | None) -> str:
        """``value`` for people, without its unit; a dash for what was not measured."""
        if value is None or math.isnan(value):
            return "–"
        if self.unit is Unit.SHARE:
            return f"{100 * value:.1f}"
        if self.unit is Unit.INDEX:
            return f"{value:.3f}"
        if self.unit is Unit.BYTES:
            return f"{value / 2**20:,.0f}"
        return whole(value) if self.unit in _WHOLE and float(value).is_integer() else digits(value)

    def interval(self, bounds: tuple[float, float] | None) -> str:
        """An interval for people, in the figure's unit; a dash for none."""
        if bounds is None:
            return "–"
        return f"[{self.text(bounds[0])}, {self.text(bounds[1])}]"

    def shown(self, value: float | None) -> str:
        """``value`` for people, with its unit."""
        return self.text(value) if value is None else f"{self.text(value)} {self.shown_unit}".rstrip()

    @property
    def sql(self) -> str | None:
        """The query behind it, with JOB for the job's id; None where SQL is not enough and ``formula`` says what is."""
        return FIGURE_SQL.get(self.name)

    @property
    def shown_unit(self) -> str:
        if self.unit is Unit.INDEX:
            return ""
        return "MiB" if self.unit is Unit.BYTES else str(self.unit)


_WHOLE = frozenset({Unit.TOKENS, Unit.REQUESTS, Unit.SEQUENCES})


def whole(value: float) -> str:
    return f"{int(value):,}"


def digits(value: float) -> str:
    """Three significant digits, and never fewer than the whole number: 0.0123, 4.56, 78.9, 12,345."""
    if value == 0:
        return "0"
    # Rounded first: 9.999 is 10.0, not 10.00.
    rounded = float(f"{value:.3g}")
    decimals = max(0, min(6, 2 - math.floor(math.log10(abs(rounded)))))
    return f"{value:,.{decimals}f}"


def ratio(part: float, whole: float | None) -> float | None:
    """``part / whole``; None of nothing."""
    return part / whole if whole else None


def comparable(one: Metric, other: Metric) -> bool:
    """Whether two figures may be set against each other."""
    return one.kind is other.kind and one.unit is other.unit


def _quality(name: str, label: str, formula: str, unit: Unit = Unit.INDEX, better: Better = Better.HIGHER) -> Metric:
    return Metric(name, label, unit, Kind.QUALITY, better, formula)


_COUNT, _NEITHER, _HIGHER, _LOWER = Kind.COUNT, Better.NEITHER, Better.HIGHER, Better.LOWER
_WALL = "(max finished_at - min admitted_at over all rows that had a slot)"

#: In the order in which they are printed.
# fmt: off
_ALL = (
    Metric(
        "rows", "rows", Unit.REQUESTS, _COUNT, _NEITHER, "jobs.rows: lines of the dataset in this job",
        of=lambda m: m.job.rows,
    ),
    Metric(
        "attempted", "attempted", Unit.REQUESTS, _COUNT, _NEITHER, "rows of results, whatever their state",
        of=lambda m: m.ok + m.errors,
    ),
    Metric("ok", "ok", Unit.REQUESTS, _COUNT, _HIGHER, "rows of results with state ok", of=lambda m: m.ok),
    Metric(
        "errors", "errors", Unit.REQUESTS, _COUNT, _LOWER, "rows of results with state error, cancelled included",
        of=lambda m: m.errors,
    ),
    Metric(
        "cancelled", "cancelled", Unit.REQUESTS, _COUNT, _NEITHER, "errors of class cancelled",
        of=lambda m: m.by_class.get("cancelled", 0),
    ),
    Metric(
        "cut_off", "cut off", Unit.REQUESTS, _COUNT, _LOWER, "ok rows with finish_reason length",
        of=lambda m: m.cut_off,
    ),
    Metric(
        "copied", "copied", Unit.REQUESTS, _COUNT, _NEITHER,
        "ok rows with deduplicated: copied from an identical request, in no sum of tokens and in no time",
        of=lambda m: m.totals.copied,
    ),
    Metric(
        "success_rate", "success", Unit.SHARE, Kind.SUCCESS, _HIGHER, "ok / attempted",
        of=lambda m: ratio(m.ok, m.ok + m.errors),
    ),
    Metric("wall_s", "wall", Unit.SECONDS, Kind.WALL_TIME, _LOWER, _WALL, of=lambda m: m.wall_s),
    Metric(
        "items_per_s", "requests/s", Unit.REQUESTS_PER_SECOND, Kind.REQUEST_RATE, _HIGHER, "ok / wall_s",
        of=lambda m: ratio(m.ok, m.wall_s),
    ),
    Metric(
        "valid_per_s", "valid", Unit.REQUESTS_PER_SECOND, Kind.REQUEST_RATE, _HIGHER,
        "ok rows whose answer the task could read, not cut off before it was whole, by the score that read the fewest "
        "(of the rows that expect something) / wall_s",
        of=lambda m: None if m.valid is None else ratio(m.valid, m.wall_s),
    ),
    Metric(
        "output_tps", "output", Unit.TOKENS_PER_SECOND, Kind.OUTPUT_RATE, _HIGHER, "sum of output_tokens / wall_s",
        of=lambda m: ratio(m.output_tokens, m.wall_s),
    ),
    Metric(
        "total_tps", "prompt computed + output", Unit.TOKENS_PER_SECOND, Kind.TOTAL_RATE, _HIGHER,
        "sum of (prompt_tokens - cached_tokens + output_tokens) / wall_s",
        of=lambda m: ratio(m.totals.prompt_tokens - m.totals.cached_tokens + m.output_tokens, m.wall_s),
    ),
    Metric(
        "prefill_tps", "prefill", Unit.TOKENS_PER_SECOND, Kind.PREFILL_RATE, _HIGHER,
        "sum of attempts.prefill_tokens / sum of attempts.prefill_s: computed prompt tokens per second of prefill",
        of=lambda m: m.books.prefill_tps,
    ),
    Metric(
        "decode_tps", "decode", Unit.TOKENS_PER_SECOND, Kind.DECODE_RATE, _HIGHER,
        "sum of attempts.decode_tokens / sum of attempts.decode_s: tokens per second of decoding",
        of=lambda m: m.books.decode_tps,
    ),
    Metric(
        "prompt_tokens", "prompt", Unit.TOKENS, _COUNT, _NEITHER, "sum of prompt_tokens",
        of=lambda m: m.totals.prompt_tokens,
    ),
    Metric(
        "cached_tokens", "cached", Unit.TOKENS, _COUNT, _NEITHER, "sum of cached_tokens",
        of=lambda m: m.totals.cached_tokens,
    ),
    Metric(
        "output_tokens", "output", Unit.TOKENS, _COUNT, _NEITHER, "sum of output_tokens", of=lambda m: m.output_tokens,
    ),
    Metric(
        "reasoning_tokens", "reasoning", Unit.TOKENS, _COUNT, _NEITHER, "sum of reasoning_tokens (part of output)",
        of=lambda m: m.totals.reasoning_tokens,
    ),
    Metric(
        "wasted_tokens", "wasted", Unit.TOKENS, _COUNT, _LOWER,
        "sum of attempts.wasted_tokens: sampled for requests that were cancelled or failed, and in no answer",
        of=lambda m: m.books.wasted_tokens,
    ),
    Metric(
        "cached_share", "cached share", Unit.SHARE, Kind.CACHE, _HIGHER, "cached_tokens / prompt_tokens",
        of=lambda m: ratio(m.totals.cached_tokens, m.totals.prompt_tokens),
    ),
    Metric(
        "mean_output_tokens", "mean answer", Unit.TOKENS, Kind.LENGTH, _NEITHER, "output_tokens / (ok - copied)",
        of=lambda m: ratio(m.output_tokens, m.ok - m.totals.copied),
    ),
    Metric(
        "mean_active", "mean active", Unit.SEQUENCES, Kind.OCCUPANCY, _HIGHER,
        "sum of (finished_at - admitted_at) over all rows that had a slot / wall_s",
        of=lambda m: m.occupancy.mean_active,
    ),
    Metric(
        "peak_active", "peak active", Unit.SEQUENCES, Kind.OCCUPANCY, _NEITHER,
        "most rows between admitted_at and finished_at at one time", of=lambda m: m.occupancy.peak_active,
    ),
    Metric(
        "slots", "slots", Unit.SEQUENCES, _COUNT, _NEITHER, "most slots of workers with rows at one time",
        of=lambda m: m.occupancy.slots,
    ),
    Metric(
        "batch_efficiency", "batch efficiency", Unit.SHARE, Kind.OCCUPANCY, _HIGHER,
        "sum of attempts.decode_tokens / sum of (attempts.steps x attempts.slots): tokens by the most that so many "
        "steps could make", of=lambda m: m.books.batch_efficiency,
    ),
    Metric(
        "starved_share", "starved", Unit.SHARE, Kind.OCCUPANCY, _LOWER,
        "sum of attempts.starved_s (a slot free while requests waited) / (prefill_s + decode_s + overhead_s + idle_s)",
        of=lambda m: m.books.starved_share,
    ),
    Metric(
        "idle_share", "idle", Unit.SHARE, Kind.OCCUPANCY, _LOWER,
        "sum of attempts.idle_s / (prefill_s + decode_s + overhead_s + idle_s)", of=lambda m: m.books.idle_share,
    ),
    Metric(
        "latency_s", "latency", Unit.SECONDS, Kind.SERVICE_TIME, _LOWER, "finished_at - admitted_at of each row", 6,
        of=lambda m: m.folded.latency_s,
    ),
    Metric(
        "ttft_s", "TTFT", Unit.SECONDS, Kind.SERVICE_TIME, _LOWER, "first_token_at - admitted_at of each row", 6,
        of=lambda m: m.folded.ttft_s,
    ),
    Metric(
        "tpot_s", "TPOT", Unit.SECONDS, Kind.SERVICE_TIME, _LOWER,
        "(finished_at - first_token_at) / (output_tokens - 1) of each row with output_tokens >= 2", 6,
        of=lambda m: m.folded.tpot_s,
    ),
    Metric(
        "queue_s", "queue", Unit.SECONDS, Kind.QUEUE_TIME, _LOWER, "admitted_at - enqueued_at of each row", 6,
        of=lambda m: m.folded.queue_s,
    ),
    Metric(
        "accuracy", "accuracy", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "right answers / (scored + unparsed + truncated); requests without an answer count in success_rate instead",
    ),
    Metric(
        "accuracy_uncut", "accuracy of answers that were not cut off", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "right answers / rows of the accuracy whose answer did not end at max_tokens before it could be read",
    ),
    Metric(
        "majority_vote", "majority vote", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "inputs whose repetitions are right more often than not / inputs; one half for as often",
    ),
    Metric(
        "pass_at_k", "pass@k", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "mean over inputs of 1 - C(n - c, k) / C(n, k): n repetitions, c of them right",
    ),
    Metric(
        "pass_all_k", "pass^k", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "mean over inputs of C(c, k) / C(n, k): n repetitions, c of them right",
    ),
    Metric(
        "closeness", "closeness", Unit.SHARE, Kind.QUALITY, _HIGHER,
        "mean of max(0, 1 - |answer - expected| / span) over scored + unparsed + truncated; the last two count as 0",
    ),
    _quality(
        "set_f1", "set F1",
        "mean of 2 |both| / (|answer| + |expected|) of two lists as sets; unread answers count as 0", Unit.SHARE,
    ),
    _quality(
        "choice_probability", "probability of the expected choice",
        "mean of the probability that the model gave to the expected one of its choices", Unit.SHARE,
    ),
    _quality(
        "abs_error", "mean absolute error",
        "mean of |answer - expected|; an answer without a number counts as the task's worst, or is left out", Unit.OWN,
        Better.LOWER,
    ),
    _quality("mean", "mean", "mean of what the task's own function returned; unread answers count as 0", Unit.OWN),
    _quality("macro_f1", "macro F1", "mean over the classes of 2 TP / (2 TP + FP + FN); unread answers are FN"),
    _quality("weighted_f1", "weighted F1", "the same, each class weighted by the rows that expect it"),
    _quality("macro_precision", "macro precision", "mean over the classes of TP / (TP + FP)"),
    _quality("macro_recall", "macro recall", "mean over the classes of TP / (TP + FN)"),
    _quality("kappa", "kappa", "Cohen's kappa: agreement beyond chance; unread answers are a class of their own"),
    _quality(
        "quadratic_kappa", "quadratic kappa",
        "Cohen's kappa with squared distances on a scale of whole numbers; unread answers are as far off as can be",
    ),
    _quality(
        "precision", "precision", "rows rightly called yes / rows called yes; unread answers are wrong calls",
        Unit.SHARE,
    ),
    _quality("recall", "recall", "rows rightly called yes / rows that are yes", Unit.SHARE),
    _quality("f1", "F1", "2 TP / (2 TP + FP + FN) of yes"),
    _quality("auc", "AUC", "chance that a yes is given more confidence than a no (area under the ROC curve)"),
    _quality("average_precision", "average precision", "mean precision over the recall steps as confidence falls"),
    _quality(
        "brier", "Brier score", "mean of (confidence - outcome)^2; unread answers count as sure and wrong",
        better=Better.LOWER,
    ),
    _quality(
        "ece", "calibration error",
        "mean distance of confidence from outcome over 10 bins of equal mass; chance alone makes it larger than 0",
        better=Better.LOWER,
    ),
    _quality(
        "ece_debiased", "calibration error beyond chance",
        "the root of ece^2 less the square of what calibrated confidences would show in these bins by chance",
        better=Better.LOWER,
    ),
    Metric(
        "best_threshold", "best threshold", Unit.OWN, Kind.QUALITY, _NEITHER,
        "confidence from which on yes is best, by F1 or by the task's costs, on one half of the inputs",
    ),
    _quality("best_threshold_f1", "F1 at it", "F1 at the best threshold, on the other half of the inputs"),
    Metric(
        "best_threshold_cost", "cost at it", Unit.OWN, Kind.QUALITY, _LOWER,
        "mean cost of a row at the best threshold, on the other half of the inputs",
    ),
    Metric(
        "majority_baseline", "majority", Unit.SHARE, Kind.QUALITY, _NEITHER,
        "share of the commonest expected label: the accuracy of always giving it",
    ),
    Metric(
        "memory_bytes", "memory", Unit.BYTES, Kind.MEMORY, _LOWER,
        "max of worker_samples.memory_bytes (RSS) from the first admission to the last end, and 6 s around",
    ),
    Metric(
        "device_memory_bytes", "device memory", Unit.BYTES, Kind.MEMORY, _LOWER,
        "max of worker_samples.device_memory_bytes in the same time",
    ),
)
# fmt: on

#: Name -> figure.
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

#: Figures of a job, in the order in which they are printed; those with a value for each row.
DISTRIBUTIONS = ("latency_s", "ttft_s", "tpot_s", "queue_s")
SINGLE = tuple(metric.name for metric in _ALL if metric.of and metric.name not in DISTRIBUTIONS)
