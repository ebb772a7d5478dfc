"""Writes docs/metrics.md from the registry of figures; --check says whether it is current."""

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
| time | prefill + decode + overhead + idle of the engine = the time that its worker held leases |
| limits | no answer over max_tokens, no more cached than prompt tokens |
| order | enqueued, then admitted, then first token, then finished, in every row |
| curve | output tok/s over time adds up to the output tokens |
| model | every attempt that answered rows names the model of the job |

## Comparisons

Rows of two jobs are paired by id. A change of a mean time comes with a 95 % interval that draws whole batches, because
requests of one batch share their fate: chunks where there are 20 or more, else 20 blocks of rows by admission; where
the batches of the two runs hold different rows, variance is clustered both ways (Cameron, Gelbach and Miller 2011).
Rates are tested by McNemar's exact test with Bonett and Price's interval, and change in percentage points. Jobs without
a row in common are compared with `--force`, by their rates only, with Newcombe's interval and Fisher's exact test.
Scores that are means of parts (closeness, set F1) are compared by the t interval of the rows' differences, distances by
the ratio of their means. P-values of all lines are corrected together (Holm). Throughput and wall time are one
observation a run: with one run of each there is no test, and the interval of `output_tps` is of the noise within the
run. `--by SETTING` takes jobs that share a setting for runs of it; from three runs of each on, t intervals of the log
ratio hold the noise between runs. Other prompts, sampling or datasets make figures of work "not comparable". A change
of a time of less than 1 µs is none: doubles of seconds since 1970 are 0.24 µs apart. Figures that both jobs have and no
test was made of are named in the verdict.

`tests/integration/test_compare_simulated.py` holds the promise: of 200 pairs of identical jobs (512 rows, 16 slots, 5 %
noise of rows and 4 % of the machine's load) at least 95 % end in "no detectable difference", and of 200 jobs that are 5
% slower at least 95 % are called worse. With 5 % of load noise 186 of the 200 slowdowns were found on the same seeds:
the promise holds for machines as steady as that.

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
