"""Two jobs side by side: what differs, by how much, how sure that is, and whether it may be compared at all."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.core.registry import suggestion
from promptmill.database.engine import reading
from promptmill.database.tables import attempts, jobs, workers
from promptmill.errors import JobError, PromptmillError
from promptmill.reports.compare import quality
from promptmill.reports.compare.comparison import ONE_RUN, Comparison, Line, Tested, not_comparable
from promptmill.reports.compare.pairs import JobRows, Pairing, pair, read_rows
from promptmill.reports.figures.figures import metric_of, value_of
from promptmill.reports.figures.inputs import consistent
from promptmill.reports.figures.metrics import METRICS, Metric
from promptmill.reports.figures.summary import Summary, summarise
from promptmill.scoring.statistics import unpaired
from promptmill.scoring.statistics.families import holm
from promptmill.scoring.statistics.paired import Change
from promptmill.scoring.statistics.unpaired import LEAST_RUNS
from promptmill.tasks.sampling import PARAMETERS, check_parameter
from promptmill.types import JobState, SamplingParams

#: Change of the mean answer's length from which on two jobs did different work.
LENGTH_SHIFT = 0.05

#: Figures of work done in a time: other prompts or limits make them figures of other work.
WORK = ("wall_s", "items_per_s", "output_tps", "latency_s", "ttft_s", "latency_s.p50", "latency_s.p95")

#: Earlier jobs that asked the same and are looked at for the noise between runs, and most rows of each.
MOST_EARLIER, MOST_ROWS = 8, 200_000


class Runs(NamedTuple):
    """Runs of the one setting and of the other; ``others``: of what both ask, where they ask the same."""

    before: list[Summary]
    after: list[Summary]
    others: Sequence[Summary] = ()


#: What a run has one of.
RUN_FIGURES = ("output_tps", "items_per_s", "wall_s", "prefill_tps", "decode_tps", "latency_s.p50", "latency_s.p95")

SERVICE = ("latency_s", "ttft_s", "tpot_s")

#: Sampling that changes nothing of what is generated.
_ASIDE = ("timeout_s", "logprobs", "top_logprobs")

#: Differences of two jobs' configuration that make WORK incomparable.
SAME_WORK = ("dataset_sha256", "task_sha256", "system_prompt", *(name for name in PARAMETERS if name not in _ASIDE))


@dataclass(frozen=True, slots=True)
class Side:
    """A job, or a job as one of its score runs judged it."""

    job_id: str
    score_run: str | None = None


def compare(db: Engine | Connection, before: str | Side, after: str | Side, force: bool = False) -> Comparison:
    """Job ``after`` against job ``before``. ``force``: figures of different work are compared too."""
    return compare_all(db, [before], [[after]], force)[0]


def compare_all(
    db: Engine | Connection, before: Sequence[str | Side], others: Sequence[Sequence[str | Side]], force: bool = False
) -> list[Comparison]:
    """Each of ``others`` against ``before``, all of them runs of one setting; p-values are corrected together.

    Rows are those of the first run of either. What a run has one of is told by all runs, and by earlier jobs that
    asked the same on the same device. Raises :class:`JobError` for a job without results.
    """
    sides = [[Side(each) if isinstance(each, str) else each for each in runs] for runs in (before, *others)]
    with consistent(db) as connection:
        own = read_rows(connection, sides[0][0].job_id, sides[0][0].score_run)
        made = [
            _compared(connection, (sides[0][0], side[0]), _runs_of(connection, (sides[0], side)), own, force)
            for side in sides[1:]
        ]
    every = [line for _, lines in made for line in lines]
    verdicts = iter(holm([line.change if line.is_comparable else Change(math.nan) for line in every]))
    return [_judged(found, [line.judged(next(verdicts)) for line in lines]) for found, lines in made]


def _judged(found: Comparison, lines: Sequence[Line]) -> Comparison:
    """With its lines; the flips of a score have the corrected p of its accuracy."""
    p = {line.name: line.p for line in lines}
    flips = tuple(replace(each, p=p.get(f"{each.name}.accuracy", each.p)) for each in found.flips)
    return replace(found, lines=tuple(lines), flips=flips)


def _runs_of(db: Connection, sides: tuple[Sequence[Side], Sequence[Side]]) -> Runs:
    """The runs of either side: the jobs that were named, and before them those that asked the same, there.

    Where both sides ask the same, the earlier ones belong to neither: they tell the noise between runs.
    """
    named = [list(dict.fromkeys(side.job_id for side in each)) for each in sides]
    first = [db.execute(sa.select(jobs).where(jobs.c.id == each[0])).one() for each in named]
    earlier = [_earlier(db, job, {*named[0], *named[1]}) for job in first]
    if {*earlier[0]} & {*earlier[1]} or _asks(first[0]) == _asks(first[1]):
        return Runs(*([summarise(db, each) for each in own] for own in (*named, earlier[0])))
    sides_of = (own + more for own, more in zip(named, earlier, strict=True))
    return Runs(*([summarise(db, each) for each in own] for own in sides_of))


def _asks(job: sa.Row[Any]) -> tuple[Any, ...]:
    return job.key_sha256, job.slots, job.engine_settings, job.mode


def _earlier(db: Connection, job: sa.Row[Any], named: set[str]) -> list[str]:
    """The newest MOST_EARLIER completed jobs that asked the same on the same device."""
    if job.key_sha256 is None:
        return []
    same = sa.select(jobs).where(
        jobs.c.key_sha256 == job.key_sha256, jobs.c.slots.is_not_distinct_from(job.slots), jobs.c.mode == job.mode,
        jobs.c.engine_settings.is_not_distinct_from(job.engine_settings), jobs.c.state == JobState.COMPLETED.value,
        jobs.c.id.not_in(named), jobs.c.rows <= MOST_ROWS,
    )  # fmt: skip
    there = _place_of(db, job)
    found = db.execute(same.order_by(jobs.c.id.desc()).limit(MOST_EARLIER)).all()
    return [each.id for each in found if _place_of(db, each) == there]


def _place_of(db: Connection, job: sa.Row[Any]) -> tuple[Any, ...]:
    """What answered the job, and on which devices."""
    each = attempts.c
    devices = sa.select(workers.c.host, workers.c.device_got).join(attempts, each.worker_id == workers.c.id)
    found = db.execute(devices.where(each.job_id == job.id).distinct()).all()
    return sorted(tuple(row) for row in found), environment_of(db, job.id)


def _compared(
    db: Connection, sides: tuple[Side, Side], runs: Runs, own: JobRows, force: bool
) -> tuple[Comparison, list[Tested]]:
    """The comparison without its lines, and these before their p-values are corrected."""
    before, after = sides
    other = read_rows(db, after.job_id, after.score_run)
    if not len(own) or not len(other):
        empty = before if not len(own) else after
        raise JobError(f"job {empty.job_id} has no results to compare", hint="Wait until it has some.")
    common = pair(own, other)
    differences = _differences(db, before.job_id, after.job_id)
    reasons = {} if force else _reasons(differences)
    same = before.job_id == after.job_id
    # Two score runs of one job differ in nothing but the scores.
    times = [] if same else _time_lines(runs, own, other, common, reasons)
    rates, flips = quality.lines(own, other, common, _other_lines(differences))
    found = Comparison(
        before=runs[0][0],
        after=runs[1][0],
        runs=(len(runs.before), len(runs.after)),
        common=len(common.before),
        differences=differences,
        warnings=(*_mixed(db, runs), *_warnings(own, other, common, runs)),
        lines=(),
        flips=tuple(each.named(db, before.job_id, own, common) for each in flips),
    )
    return found, [*times, *(line for line in rates if not same or line.name != "success_rate")]


def _time_lines(runs: Runs, own: JobRows, other: JobRows, common: Pairing, reasons: dict[str, str]) -> list[Tested]:
    if min(len(runs.before), len(runs.after)) >= LEAST_RUNS or len(runs.others) >= LEAST_RUNS:
        return [_repeated_line(name, runs, reasons) for name in ("latency_s.mean", *RUN_FIGURES)]
    note = ONE_RUN if len(runs.before) == len(runs.after) == 1 else _few_runs(runs)
    return [*_service_lines(own, other, common, reasons, note), *_run_lines(runs, reasons, note)]


def _few_runs(runs: Runs) -> str:
    return f"{len(runs[0])} and {len(runs[1])} runs: {LEAST_RUNS} of each tell the noise between runs"


def _repeated_line(name: str, runs: Runs, reasons: dict[str, str]) -> Tested:
    """A figure of several runs of either: its interval holds the noise between runs."""
    values = [[value for each in own if (value := value_of(each, name))] for own in runs]
    one, two = (math.exp(sum(map(math.log, own)) / len(own)) if own else None for own in values[:2])
    note = f"{len(runs.before)} and {len(runs.after)} runs"
    if runs.others:
        note += f", {len(runs.others)} earlier ones tell the noise"
    note = reasons.get(name.removesuffix(".mean"), note)
    return Tested(name, metric_of(name), one, two, unpaired.runs(*values), note, "not measured in each run")


def config_of(job: sa.Row[Any]) -> dict[str, Any]:
    """Everything by which two jobs can differ, by name."""
    names = (
        "dataset_name", "dataset_sha256", "model", "model_fingerprint", "task_name", "task_sha256", "system_prompt",
        "slots", "mode", "rows",
    )  # fmt: skip
    sampling: dict[str, Any] = json.loads(job.sampling)
    env: dict[str, Any] = json.loads(job.env or "{}")
    settings: dict[str, Any] = json.loads(job.engine_settings or "{}")
    return {name: getattr(job, name) for name in names} | settings | sampling | {f"env.{key}": env[key] for key in env}


def settings_of(db: Engine, sides: Sequence[Side], name: str) -> list[list[Side]]:
    """The jobs grouped by their value of a setting, in the order of their first one. Raises PromptmillError."""
    with reading(db) as connection:
        configs = [
            config_of(connection.execute(sa.select(jobs).where(jobs.c.id == side.job_id)).one()) for side in sides
        ]
    known = sorted({key for config in configs for key in config})
    if name not in known:
        raise PromptmillError(f"--by {name}: the jobs have no such setting", hint=suggestion(name, known))
    groups: dict[str, list[Side]] = {}
    for side, config in zip(sides, configs, strict=True):
        groups.setdefault(json.dumps(config.get(name), sort_keys=True), []).append(side)
    return list(groups.values())


def _differences(db: Connection, before: str, after: str) -> tuple[tuple[str, Any, Any], ...]:
    one, two = (config_of(db.execute(sa.select(jobs).where(jobs.c.id == each)).one()) for each in (before, after))
    known = [environment_of(db, each) for each in (before, after)]
    if all(known):
        # A job that does not tell what answered it differs in nothing that is known.
        one, two = one | known[0], two | known[1]
    return tuple(
        (name, one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)
    )


def _reasons(differences: tuple[tuple[str, Any, Any], ...]) -> dict[str, str]:
    """Figure -> why it may not be compared."""
    changed = [name for name, one, two in differences if name in SAME_WORK and _asked(name, one) != _asked(name, two)]
    return {name: not_comparable(f"{', '.join(changed)} differs") for name in WORK} if changed else {}


def _asked(name: str, value: Any) -> Any:
    """What a value of SAME_WORK comes to: a parameter that was not given is the one that engines take then."""
    if name not in PARAMETERS:
        return value
    return getattr(SamplingParams(), name) if value is None else check_parameter(name, value)


def _other_lines(differences: tuple[tuple[str, Any, Any], ...]) -> str:
    return "" if all(name != "dataset_sha256" for name, _, _ in differences) else "over the common rows"


def _service_lines(own: JobRows, other: JobRows, common: Pairing, reasons: dict[str, str], note: str) -> list[Tested]:
    """Means of times of requests, over common rows that both jobs answered."""
    lines = []
    for name in SERVICE:
        one, two = getattr(own, name)[common.before], getattr(other, name)[common.after]
        both = np.isfinite(one) & np.isfinite(two)
        if both.any():
            means = float(one[both].mean()), float(two[both].mean())
            lines.append(_untested(f"{name}.mean", METRICS[name], *means, reasons.get(name, ""), note))
    return lines


def _run_lines(runs: Runs, reasons: dict[str, str], note: str) -> list[Tested]:
    """Figures that a run has one of."""
    lines = []
    for name in RUN_FIGURES:
        one, two = (value_of(each[0], name) for each in (runs.before, runs.after))
        lines.append(_untested(name, metric_of(name), one, two, reasons.get(name, ""), note))
    return lines


def _untested(name: str, metric: Metric, one: float | None, two: float | None, note: str, why: str) -> Tested:
    change = two / one - 1 if one and two is not None else math.nan
    return Tested(name, metric, one, two, Change(change), note, why)


def _mixed(db: Connection, runs: Runs) -> list[str]:
    """Jobs whose own answers come from more than one environment."""
    found = []
    for job_id in dict.fromkeys(summary.job_id for summary in (*runs.before, *runs.after)):
        parts = [f"{name} {value}" for name, value in environment_of(db, job_id).items() if ", " in value]
        if parts:
            found.append(f"job {job_id} was answered in more than one environment: {'; '.join(parts)}")
    return found


def _warnings(own: JobRows, other: JobRows, common: Pairing, runs: Runs) -> tuple[str, ...]:
    found = []
    for summary in (*runs.before, *runs.after):
        if not summary.complete:
            found.append(f"job {summary.job_id} is {summary.completeness}")
    if common.others:
        found.append(f"{common.others:,} rows have the same id and another input: they are not the same rows")
    changed = quality.relabelled(own, other, common)
    if changed:
        found.append(f"{changed:,} rows expect another answer in the other job: no score compares them")
    missing = len(own) + len(other) - 2 * len(common.before)
    if missing and len(common.before):
        found.append(f"{missing:,} rows are in one of the jobs only and are left out of paired figures")
    if min(len(runs.before), len(runs.after)) >= LEAST_RUNS and _are_apart(runs):
        found.append(
            "all runs of one side were before those of the other: what changed on the machine meanwhile looks like a "
            "difference; run them in turns, as 'sweep --repeat-runs' does"
        )
    lengths = [each[0].mean_output_tokens for each in (runs.before, runs.after)]
    if lengths[0] and lengths[1] and abs(lengths[1] / lengths[0] - 1) > LENGTH_SHIFT:
        found.append(f"answers have another length: {lengths[0]:.1f} and {lengths[1]:.1f} tokens, which is other work")
    return tuple(found)


def _are_apart(runs: Runs) -> bool:
    """Whether the runs of one side all began before those of the other."""
    begun = [[each.started_at or each.submitted_at for each in own] for own in (runs.before, runs.after)]
    return max(begun[0]) < min(begun[1]) or max(begun[1]) < min(begun[0])


def environment_of(db: Connection, job_id: str) -> dict[str, str]:
    """Everything beside the model that decided the job's answers: name -> its values, with commas between them.

    Empty for a job whose attempts do not tell: it ran before they did.
    """
    each = attempts.c
    query = sa.select(each.environment).where(each.job_id == job_id, each.environment.is_not(None)).distinct()
    values: dict[str, set[str]] = {}
    for text in db.execute(query).scalars():
        for name, value in json.loads(text).items():
            values.setdefault(f"engine.{name}", set()).add(value)
    return {name: ", ".join(sorted(found)) for name, found in sorted(values.items())}
