"""Views of the tables, equal on SQLite and PostgreSQL, and queries with a name: made to be read by people.

Migrations make the views from here: a view holds no data, and a later revision drops and makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.database.figure_sql import PERCENTILES

_TIMES = "r.state = 'ok' AND r.admitted_at IS NOT NULL AND r.finished_at IS NOT NULL"

_JOBS = """
SELECT j.id AS job_id, j.name, j.state, j.mode, j.dataset_name, j.dataset_sha256, j.model, j.task_name, j."rows",
    COALESCE(c.ok, 0) AS ok, COALESCE(c.errors, 0) AS errors, COALESCE(c.output_tokens, 0) AS output_tokens,
    j.priority, j.stop_reason, j.submitted_at, j.started_at, j.finished_at, j.finished_at - j.started_at AS run_s
FROM jobs j
LEFT JOIN (
    SELECT job_id, SUM(ok) AS ok, SUM(errors) AS errors, SUM(output_tokens) AS output_tokens
    FROM chunks GROUP BY job_id
) c ON c.job_id = j.id
"""

# Type 7 (linear between neighbours), as numpy and percentile_cont have it.
_PERCENTILES = """
WITH times AS (
    SELECT r.job_id, 'latency_s' AS metric, r.finished_at - r.admitted_at AS value FROM results r WHERE {times}
    UNION ALL
    SELECT r.job_id, 'ttft_s', r.first_token_at - r.admitted_at FROM results r
    WHERE {times} AND r.first_token_at IS NOT NULL
    UNION ALL
    SELECT r.job_id, 'tpot_s', (r.finished_at - r.first_token_at) / (r.output_tokens - 1) FROM results r
    WHERE {times} AND r.first_token_at IS NOT NULL AND r.output_tokens > 1
    UNION ALL
    SELECT r.job_id, 'queue_s', CASE WHEN r.admitted_at > r.enqueued_at THEN r.admitted_at - r.enqueued_at ELSE 0 END
    FROM results r WHERE {times} AND r.enqueued_at IS NOT NULL
), ranked AS (
    SELECT job_id, metric, value,
        ROW_NUMBER() OVER (PARTITION BY job_id, metric ORDER BY value) - 1 AS place,
        COUNT(*) OVER (PARTITION BY job_id, metric) AS n
    FROM times
)
SELECT job_id, metric, MAX(n) AS n, AVG(value) AS mean,
{points}
FROM ranked
GROUP BY job_id, metric
"""

_WORKERS = """
SELECT a.job_id, a.worker_id, w.host, w.device_asked, w.device_got, w.engine, w.model, COUNT(*) AS attempts,
    SUM(CASE WHEN a.outcome IN ('lost', 'failed') THEN 1 ELSE 0 END) AS failed_attempts, MAX(a.slots) AS slots,
    SUM(a.prefill_s) AS prefill_s, SUM(a.decode_s) AS decode_s, SUM(a.overhead_s) AS overhead_s,
    SUM(a.idle_s) AS idle_s, SUM(a.starved_s) AS starved_s, SUM(a.prefill_tokens) AS prefill_tokens,
    SUM(a.decode_tokens) AS decode_tokens, SUM(a.wasted_tokens) AS wasted_tokens, MAX(w.model_load_s) AS model_load_s
FROM attempts a LEFT JOIN workers w ON w.id = a.worker_id
GROUP BY a.job_id, a.worker_id, w.host, w.device_asked, w.device_got, w.engine, w.model
"""

_ERRORS = """
SELECT e.job_id, e.error_class, e."rows", e.first_row, r.error_message AS example
FROM (
    SELECT job_id, error_class, COUNT(*) AS "rows", MIN("row") AS first_row
    FROM results WHERE state = 'error' GROUP BY job_id, error_class
) e
JOIN results r ON r.job_id = e.job_id AND r."row" = e.first_row
"""

_SCORES = """
SELECT s.score_run_id, u.job_id, u.created_at, s."row", q.custom_id AS id, s.metric, s.value, s.predicted, s.expected,
    s.outcome, u.number AS score_run, s.confidence, s.error, s.is_right
FROM scores s
JOIN score_runs u ON u.id = s.score_run_id AND u.figures IS NOT NULL
JOIN requests q ON q.job_id = u.job_id AND q."row" = s."row"
"""

_CONFUSION = """
SELECT s.score_run_id, u.job_id, s.metric, s.expected, s.predicted, COUNT(*) AS "rows"
FROM scores s JOIN score_runs u ON u.id = s.score_run_id
WHERE s.expected IS NOT NULL
GROUP BY s.score_run_id, u.job_id, s.metric, s.expected, s.predicted
"""

_PAIRS = """
SELECT a.job_id AS job_a, b.job_id AS job_b, qa.custom_id AS id, a."row" AS row_a, b."row" AS row_b,
    a.state AS state_a, b.state AS state_b, a.text AS answer_a, b.text AS answer_b,
    a.output_tokens AS output_tokens_a, b.output_tokens AS output_tokens_b,
    a.finished_at - a.admitted_at AS latency_s_a, b.finished_at - b.admitted_at AS latency_s_b, qa.expected
FROM results a
JOIN requests qa ON qa.job_id = a.job_id AND qa."row" = a."row"
JOIN requests qb ON qb.custom_id = qa.custom_id AND qb.job_id <> qa.job_id
JOIN results b ON b.job_id = qb.job_id AND b."row" = qb."row"
"""


def _percentiles() -> str:
    weight = "CASE WHEN ABS({q} * (n - 1) - place) < 1 THEN 1 - ABS({q} * (n - 1) - place) ELSE 0 END"
    lines = [
        f"    SUM(value * {weight.format(q=f'{point / 100:g}')}) AS {name}" for name, (point, _) in PERCENTILES.items()
    ]
    return _PERCENTILES.format(times=_TIMES, points=",\n".join(lines))


#: Name -> SELECT, in the order in which they are made. ``v_results`` differs by database and is in its migration.
VIEWS = {
    "v_jobs": _JOBS,
    "v_percentiles": _percentiles(),
    "v_workers": _WORKERS,
    "v_errors": _ERRORS,
    "v_scores": _SCORES,
    "v_confusion": _CONFUSION,
    "v_pairs": _PAIRS,
}


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """A query that ``promptmill query NAME`` runs."""

    about: str
    sql: str


#: Name -> a query over each view.
QUERIES = {
    "jobs": NamedQuery("The newest jobs (v_jobs).", "SELECT * FROM v_jobs ORDER BY job_id DESC LIMIT 20"),
    "percentiles": NamedQuery(
        "Times of the newest jobs (v_percentiles).",
        "SELECT * FROM v_percentiles WHERE job_id IN (SELECT id FROM jobs ORDER BY id DESC LIMIT 5) "
        "ORDER BY job_id DESC, metric",
    ),
    "workers": NamedQuery(
        "What each worker did of each job (v_workers).",
        "SELECT * FROM v_workers ORDER BY job_id DESC, worker_id LIMIT 50",
    ),
    "errors": NamedQuery("Errors by job and class (v_errors).", "SELECT * FROM v_errors ORDER BY job_id DESC LIMIT 50"),
    "slowest": NamedQuery(
        "The slowest answers (v_results).",
        'SELECT job_id, "row", id, latency_s, output_tokens FROM v_results WHERE latency_s IS NOT NULL '
        "ORDER BY latency_s DESC LIMIT 20",
    ),
    "scores": NamedQuery("Rows scored wrong (v_scores).", "SELECT * FROM v_scores WHERE NOT is_right LIMIT 50"),
    "confusion": NamedQuery(
        "Expected against predicted labels (v_confusion).",
        'SELECT * FROM v_confusion ORDER BY score_run_id DESC, metric, expected, "rows" DESC LIMIT 200',
    ),
    "pairs": NamedQuery(
        "Answers that differ between the two newest jobs (v_pairs).",
        "SELECT id, answer_a, answer_b FROM v_pairs WHERE answer_a <> answer_b "
        "AND job_a = (SELECT id FROM jobs ORDER BY id DESC LIMIT 1 OFFSET 1) "
        "AND job_b = (SELECT id FROM jobs ORDER BY id DESC LIMIT 1) LIMIT 50",
    ),
}
