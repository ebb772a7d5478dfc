"""The SQL behind figures of a report: run one with ``promptmill query``, the job's id in place of ``JOB``.

They are equal on SQLite and PostgreSQL. Figures that are not here need more than SQL: their formula says what.
"""

# ruff: noqa: S608 - texts of our own, to be read and run by people

from __future__ import annotations

#: Percentiles of every distribution, and the fewest values that give a two-sided 95 % interval for each: below, a
#: percentile is shown dimmed, with this number beside it.
PERCENTILES: dict[str, tuple[float, int]] = {"p50": (50, 6), "p90": (90, 36), "p95": (95, 72), "p99": (99, 368)}

_ROWS = "FROM results WHERE job_id = 'JOB'"
_OK = f"{_ROWS} AND state = 'ok'"
_OWN = f"{_OK} AND NOT deduplicated"
_SLOT = f"{_ROWS} AND admitted_at IS NOT NULL AND finished_at IS NOT NULL"
_WALL = f"(SELECT NULLIF(MAX(finished_at) - MIN(admitted_at), 0) {_SLOT})"
_TRIED = "FROM attempts WHERE job_id = 'JOB'"
_ENGINE_S = "NULLIF(SUM(prefill_s) + SUM(decode_s) + SUM(overhead_s) + SUM(idle_s), 0)"
_SCORED = "outcome IN ('scored', 'unparsed', 'truncated', 'scorer_error')"
_RUN = "FROM scores WHERE score_run_id = 'RUN' AND metric = 'SCORE'"


#: Seconds around a job in which a sample of its workers counts: they are taken every 5 s, at a start and at an end.
SAMPLED_S = 6.0

_SAMPLED = (
    "FROM worker_samples WHERE worker_id = 'WORKER' "
    f"AND at BETWEEN (SELECT MIN(admitted_at) {_SLOT}) - {SAMPLED_S:g} "
    f"AND (SELECT MAX(finished_at) {_SLOT}) + {SAMPLED_S:g}"
)


def _times(name: str) -> str:
    return f"SELECT {', '.join(PERCENTILES)}, mean, n FROM v_percentiles WHERE job_id = 'JOB' AND metric = '{name}'"


#: Figure -> a SELECT of one value; of a time, of its percentiles, mean and n.
FIGURE_SQL = {
    "rows": "SELECT \"rows\" FROM jobs WHERE id = 'JOB'",
    "attempted": f"SELECT COUNT(*) {_ROWS}",
    "ok": f"SELECT COUNT(*) {_OK}",
    "errors": f"SELECT COUNT(*) {_ROWS} AND state = 'error'",
    "cancelled": f"SELECT COUNT(*) {_ROWS} AND error_class = 'cancelled'",
    "cut_off": f"SELECT COUNT(*) {_OK} AND finish_reason = 'length'",
    "copied": f"SELECT COUNT(*) {_OK} AND deduplicated",
    "success_rate": f"SELECT 1.0 * COUNT(CASE WHEN state = 'ok' THEN 1 END) / NULLIF(COUNT(*), 0) {_ROWS}",
    "wall_s": f"SELECT {_WALL}",
    "items_per_s": f"SELECT COUNT(*) / {_WALL} {_OK}",
    "valid_per_s": (
        f"SELECT MIN(n) / {_WALL} FROM (SELECT 1.0 * SUM(CASE WHEN outcome IN ('scored', 'abstain', 'scorer_error') "
        "THEN 1 ELSE 0 END) AS n FROM scores WHERE score_run_id = 'RUN' GROUP BY metric) AS readable"
    ),
    "output_tps": f"SELECT SUM(output_tokens) / {_WALL} {_OWN}",
    "total_tps": f"SELECT SUM(prompt_tokens - cached_tokens + output_tokens) / {_WALL} {_OWN}",
    "prefill_tps": f"SELECT SUM(prefill_tokens) / NULLIF(SUM(prefill_s), 0) {_TRIED}",
    "decode_tps": f"SELECT SUM(decode_tokens) / NULLIF(SUM(decode_s), 0) {_TRIED}",
    "prompt_tokens": f"SELECT COALESCE(SUM(prompt_tokens), 0) {_OWN}",
    "cached_tokens": f"SELECT COALESCE(SUM(cached_tokens), 0) {_OWN}",
    "output_tokens": f"SELECT COALESCE(SUM(output_tokens), 0) {_OWN}",
    "reasoning_tokens": f"SELECT COALESCE(SUM(reasoning_tokens), 0) {_OWN}",
    "wasted_tokens": f"SELECT SUM(wasted_tokens) {_TRIED}",
    "mean_output_tokens": f"SELECT 1.0 * SUM(output_tokens) / COUNT(*) {_OWN}",
    "cached_share": f"SELECT 1.0 * SUM(cached_tokens) / NULLIF(SUM(prompt_tokens), 0) {_OWN}",
    "mean_active": f"SELECT SUM(finished_at - admitted_at) / {_WALL} {_SLOT}",
    "peak_active": (
        "SELECT MAX(active) FROM (SELECT SUM(change) OVER (ORDER BY moment, change ROWS UNBOUNDED PRECEDING) AS active "
        f"FROM (SELECT admitted_at AS moment, 1 AS change {_SLOT} UNION ALL SELECT finished_at, -1 {_SLOT}) AS steps) "
        "AS curve"
    ),
    "batch_efficiency": (
        f"SELECT 1.0 * SUM(decode_tokens) / NULLIF(SUM(steps * slots), 0) {_TRIED} AND slots IS NOT NULL"
    ),
    "starved_share": f"SELECT SUM(starved_s) / {_ENGINE_S} {_TRIED}",
    "idle_share": f"SELECT SUM(idle_s) / {_ENGINE_S} {_TRIED}",
    "latency_s": _times("latency_s"),
    "ttft_s": _times("ttft_s"),
    "tpot_s": _times("tpot_s"),
    "queue_s": _times("queue_s"),
    "accuracy": f"SELECT AVG(CASE WHEN is_right THEN 1.0 ELSE 0.0 END) {_RUN} AND {_SCORED}",
    "closeness": f"SELECT AVG(value) {_RUN} AND {_SCORED}",
    "majority_baseline": (
        f"SELECT 1.0 * MAX(n) / SUM(n) FROM (SELECT COUNT(*) AS n {_RUN} AND {_SCORED} GROUP BY expected) AS labels"
    ),
    "memory_bytes": f"SELECT MAX(memory_bytes) {_SAMPLED}",
    "device_memory_bytes": f"SELECT MAX(device_memory_bytes) {_SAMPLED}",
}
