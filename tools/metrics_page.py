"""Writes docs/metrics.md from the registry of figures; --check says whether it is current."""

# ruff: noqa: E501 - rows of tables cannot be broken

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.metrics import METRICS, Metric

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """# Figures

Every figure that a report, a comparison, a gate or a trend prints is an entry of one table in the program; this page is
made from it (`python tools/metrics_page.py`). Figures come from rows: `promptmill query` with the SQL below gives the
same number, with the job's id in place of `JOB` (a score's run and name in place of `RUN` and `SCORE`, a worker in
place of `WORKER`). Shares are from 0 to 1 in SQL, JSON and CSV.

Percentiles are of type 7 (linear between neighbours, as numpy and `percentile_cont` have it). They are exact up to
2,000,000 rows; of larger jobs they come from buckets 0.01 % wide, so that memory does not grow, and the JSON report
says `"exact": false`. The most active sequences at one time are then counted in 4,194,304 slices of the job's time.
Everything else is exact for any number of rows. A percentile is dimmed, with the number of values that it needs, where
there are fewer than a two-sided 95 % interval needs: """

TAIL = """
## Checks

Every report checks itself; `✗` means that two figures disagree and the job has not passed.

| check | law |
|---|---|
| counts | ok + errors = rows of the dataset, or the job says INCOMPLETE k/n |
| little | mean active = requests/s x mean latency, and no more than the peak |
| slots | no more rows at one time than slots |
| tokens | output tokens of rows + wasted tokens = tokens that the engines generated |
| time | prefill + decode + overhead + idle of the engine, within the time that its worker held leases |
| limits | no answer over max_tokens, no more cached than prompt tokens |
| order | enqueued, then admitted, then first token, then finished, in every row |
| curve | output tok/s over time adds up to the output tokens |
| model | every attempt that answered rows names the model of the job |

## Copies

Rows of one input are one observation, whatever their ids: the repetitions that `--repeat` makes, and lines that ask the
same. Every interval, every test and every gate takes such rows together. A report says `n 320 (as 40)`: 320 rows that
tell as much as 40 different ones.

## Intervals

All are of 95 %. [How often they cover](coverage.md) was simulated.

| figure | interval |
|---|---|
| rates, and means of values from 0 to 1 (accuracy, precision, recall, closeness, set F1, Brier score) | Wilson's (1927), of as many truths as would have the variance of the rows' mean between inputs; where nearly all rows lie at one end, of as many as there are inputs |
| means of other values (absolute errors, numbers of a scorer) | Student's t, between inputs; of equal values there is none |
| F1, macro and weighted figures, kappa | percentiles of 1,000 drawings of inputs; where no drawing changes a figure, as in a perfect run, one mistake more is assumed |
| AUC | Newcombe's method 5 (2006), scaled to DeLong's variance (1988) between inputs (Obuchowski 1997) the more, the more rows the rarer class has |
| average precision | Wilson's, of the rows of yes (Boyd, Eng and Page 2013) |
| calibration error beyond chance | multiples of the distances found under which the error would be no surprise; the plain error has none, because chance alone raises it |
| success rate | Wilson's, of as many rows as tell something of their own |

## Comparisons

Rows of two jobs are pairs where their ids and their inputs are the same. Rows of one id and different inputs are left
out with a warning; jobs without a common row are compared unpaired: rates by Newcombe's interval (1998) and Fisher's
exact test, means by Welch's t. A score is compared with a score of the same kind, field and options; another one of the
same name is "not comparable".

| what | test | interval |
|---|---|---|
| rates | whether each input's change could as well have had the other sign: McNemar's exact test where no row has copies | Bonett and Price's (2012) |
| means | Student's t of the inputs' differences | the same |
| F1, precision, recall, macro F1, kappa | bootstrap of inputs that both jobs share | the same |
| AUC | DeLong's covariance, between inputs | the same |
| times and rates of work | Welch's t of the logs of at least three runs each | the same |

P-values of all lines are corrected together (Holm 1979). The interval of a line has the level at which its test was
decided, so it holds zero exactly where the verdict is `≈`.

A machine's mood changes all times of a run together, so the rows of one run tell nothing of the next one. With one or
two runs of each, changes of times are shown with the words "one run each: not tested". `run`, `submit` and `sweep` take
`--repeat-runs N`; `compare` also counts earlier jobs that asked the same (dataset, model, task, parameters, slots) on
the same device, the newest eight of each. Where both sides ask the same, earlier jobs belong to neither and tell the
noise between runs only. `--by SETTING` takes jobs that share a setting for runs of it. Other prompts,
sampling or datasets make figures of work "not comparable". A change of a time of less than 1 µs is none: doubles of
seconds since 1970 are 0.24 µs apart. Figures that both jobs have and no test was made of are named in the verdict.

## Trends

`promptmill trend` marks a job from which on the mean differs: the split with the largest difference between both sides,
where fewer than 1 % of 999 random orders of the same values show one as large, and at least four complete jobs on each
side.
"""


def page() -> str:
    """The whole text."""
    needed = ", ".join(f"{name} {least}" for name, (_, least) in PERCENTILES.items())
    kinds = dict.fromkeys(metric.kind for metric in METRICS.values())
    parts = [f"{HEAD}{needed}.\n"]
    for kind in kinds:
        own = [metric for metric in METRICS.values() if metric.kind is kind]
        parts.append(f"\n## {kind.value[:1].upper()}{kind.value[1:]}\n")
        parts += [_entry(metric) for metric in own]
    return "".join(parts) + TAIL


def _entry(metric: Metric) -> str:
    better = {"higher": "more is better", "lower": "less is better"}.get(metric.better.value, "neither way is better")
    least = f", from {metric.min_n} values on" if metric.min_n > 1 else ""
    sql = f"\n```sql\n{metric.sql}\n```\n" if metric.sql else ""
    text = f"**`{metric.name}`** ({metric.unit.value}; {better}{least}): {metric.formula}"
    lines = textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    return "\n" + "\n".join(lines) + f"\n{sql}"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/metrics.md is not current: python tools/metrics_page.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
