"""The first tables, and the view for people who query results."""

import sqlalchemy as sa
from alembic import op

from promptmill.database.views import VIEWS

#: ``v_scores`` as it was before 0004.
V_SCORES = """
SELECT s.score_run_id, u.job_id, u.created_at, s."row", q.custom_id AS id, s.metric, s.value, s.predicted, s.expected,
    s.outcome
FROM scores s
JOIN score_runs u ON u.id = s.score_run_id
JOIN requests q ON q.job_id = u.job_id AND q."row" = s."row"
"""

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

V_RESULTS = """
CREATE VIEW v_results AS
SELECT
    r.job_id,
    j.name AS job_name,
    j.model,
    r.row,
    q.custom_id AS id,
    {prompt} AS prompt,
    q.meta,
    q.expected,
    r.state,
    r.text AS answer,
    r.finish_reason,
    r.error_class,
    r.error_message,
    r.prompt_tokens,
    r.cached_tokens,
    r.output_tokens,
    CASE WHEN r.admitted_at > r.enqueued_at THEN r.admitted_at - r.enqueued_at
         WHEN r.admitted_at IS NOT NULL THEN 0.0 END AS queue_s,
    r.first_token_at - r.admitted_at AS ttft_s,
    CASE WHEN r.output_tokens > 1
         THEN (r.finished_at - r.first_token_at) / (r.output_tokens - 1) END AS tpot_s,
    r.finished_at - r.admitted_at AS latency_s,
    r.finished_at - r.enqueued_at AS turnaround_s,
    r.attempt,
    r.worker_id,
    r.finished_at,
    r.committed_at
FROM results r
JOIN requests q ON q.job_id = r.job_id AND q.row = r.row
JOIN jobs j ON j.id = r.job_id
"""

#: The text of a plain prompt; for messages and template fields their JSON.
PROMPT = {
    "sqlite": "COALESCE(json_extract(q.input, '$.prompt'), q.input)",
    "postgresql": "COALESCE(CAST(q.input AS json) ->> 'prompt', q.input)",
}


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Boolean(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_sha256", name=op.f("uq_api_keys_key_sha256")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("dataset_name", sa.Text(), nullable=False),
        sa.Column("dataset_sha256", sa.String(length=64), nullable=False),
        sa.Column("dataset_format", sa.String(length=32), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("model_fingerprint", sa.String(length=64), nullable=True),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("task_text", sa.Text(), nullable=True),
        sa.Column("task_sha256", sa.String(length=64), nullable=True),
        sa.Column("system_prompt", sa.Text(), nullable=True),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.Column("context_tokens", sa.Integer(), nullable=True),
        sa.Column("max_errors", sa.String(length=16), nullable=True),
        sa.Column("skipped", sa.Integer(), server_default="0", nullable=False),
        sa.Column("deadline_at", sa.Double(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("time_limit_s", sa.Double(), nullable=True),
        sa.Column("key_sha256", sa.String(length=64), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("env", sa.Text(), nullable=False),
        sa.Column("submitted_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("ck_jobs_priority")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_key_sha256", "jobs", ["key_sha256"], unique=False)
    op.create_index("ix_jobs_name", "jobs", ["name"], unique=False)
    op.create_index("ix_jobs_state", "jobs", ["state"], unique=False)
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("models", sa.Text(), server_default="[]", nullable=False),
        sa.Column("device_asked", sa.Text(), nullable=False),
        sa.Column("device_got", sa.Text(), nullable=True),
        sa.Column("engine", sa.String(length=32), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("layers", sa.Integer(), nullable=True),
        sa.Column("layers_offloaded", sa.Integer(), nullable=True),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.Column("kv_cells", sa.Integer(), nullable=True),
        sa.Column("versions", sa.Text(), nullable=True),
        sa.Column("clock_offset_s", sa.Double(), nullable=True),
        sa.Column("model_load_s", sa.Double(), nullable=True),
        sa.Column("host_restarts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "chunks",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("first_row", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=True),
        sa.Column("leased_at", sa.Double(), nullable=True),
        sa.Column("leased_until", sa.Double(), nullable=True),
        sa.Column("not_before", sa.Double(), nullable=True),
        sa.Column("published_at", sa.Double(), nullable=True),
        sa.Column("ok", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("moved", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_chunks_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_chunks")),
    )
    op.create_index("ix_chunks_state_job_id_number", "chunks", ["state", "job_id", "number"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("api_key_id", sa.String(length=26), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name=op.f("fk_files_api_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_table(
        "requests",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("input", sa.Text(), nullable=True),
        sa.Column("expected", sa.Text(), nullable=True),
        sa.Column("meta", sa.Text(), nullable=True),
        sa.Column("sampling", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_requests_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "row", name=op.f("pk_requests")),
    )
    op.create_table(
        "score_runs",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("task_sha256", sa.String(length=64), nullable=False),
        sa.Column("scorer_sha256", sa.String(length=64), nullable=True),
        sa.Column("parent_id", sa.String(length=26), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_score_runs_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_score_runs")),
    )
    op.create_index("ix_score_runs_job_id", "score_runs", ["job_id"], unique=False)
    op.create_table(
        "worker_samples",
        sa.Column("worker_id", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("cpu_ratio", sa.Double(), nullable=True),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device_use_ratio", sa.Double(), nullable=True),
        sa.Column("active_sequences", sa.Integer(), nullable=True),
        sa.Column("waiting_requests", sa.Integer(), nullable=True),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.Column("kv_cells_used", sa.Integer(), nullable=True),
        sa.Column("output_tps", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["worker_id"], ["workers.id"], name=op.f("fk_worker_samples_worker_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("worker_id", "at", name=op.f("pk_worker_samples")),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.Column("steps", sa.BigInteger(), nullable=True),
        sa.Column("prefill_s", sa.Double(), nullable=True),
        sa.Column("decode_s", sa.Double(), nullable=True),
        sa.Column("overhead_s", sa.Double(), nullable=True),
        sa.Column("idle_s", sa.Double(), nullable=True),
        sa.Column("starved_s", sa.Double(), nullable=True),
        sa.Column("prefill_tokens", sa.BigInteger(), nullable=True),
        sa.Column("decode_tokens", sa.BigInteger(), nullable=True),
        sa.Column("wasted_tokens", sa.BigInteger(), nullable=True),
        sa.Column("peak_active", sa.Integer(), nullable=True),
        sa.Column("peak_kv_cells", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id", "number"],
            ["chunks.job_id", "chunks.number"],
            name=op.f("fk_attempts_job_id_number"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "number", "attempt", name=op.f("pk_attempts")),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=True),
        sa.Column("input_file_id", sa.String(length=64), nullable=False),
        sa.Column("output_file_id", sa.String(length=64), nullable=True),
        sa.Column("error_file_id", sa.String(length=64), nullable=True),
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.Column("api_key_id", sa.String(length=26), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name=op.f("fk_batches_api_key_id")),
        sa.ForeignKeyConstraint(["error_file_id"], ["files.id"], name=op.f("fk_batches_error_file_id")),
        sa.ForeignKeyConstraint(["input_file_id"], ["files.id"], name=op.f("fk_batches_input_file_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_batches_job_id")),
        sa.ForeignKeyConstraint(["output_file_id"], ["files.id"], name=op.f("fk_batches_output_file_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_table(
        "results",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("finish_reason", sa.String(length=16), nullable=True),
        sa.Column("error_class", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("cached_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("reasoning_tokens", sa.Integer(), nullable=True),
        sa.Column("max_tokens", sa.Integer(), nullable=True),
        sa.Column("enqueued_at", sa.Double(), nullable=True),
        sa.Column("received_at", sa.Double(), nullable=True),
        sa.Column("admitted_at", sa.Double(), nullable=True),
        sa.Column("first_token_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=True),
        sa.Column("chunk", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "state = 'error' OR (prompt_tokens IS NOT NULL AND cached_tokens IS NOT NULL "
            "AND output_tokens IS NOT NULL)",
            name=op.f("ck_results_counts"),
        ),
        sa.CheckConstraint("state IN ('ok', 'error')", name=op.f("ck_results_state")),
        sa.ForeignKeyConstraint(
            ["job_id", "row"],
            ["requests.job_id", "requests.row"],
            name=op.f("fk_results_job_id_row"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "row", name=op.f("pk_results")),
    )
    op.create_table(
        "retries",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("chunk", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=True),
        sa.Column("error_class", sa.String(length=32), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("admitted_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("retried_at", sa.Double(), nullable=False),
        sa.Column("by_hand", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "row"], ["requests.job_id", "requests.row"], name=op.f("fk_retries_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "row", "chunk", name=op.f("pk_retries")),
    )
    op.create_table(
        "scores",
        sa.Column("score_run_id", sa.String(length=26), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("predicted", sa.Text(), nullable=True),
        sa.Column("expected", sa.Text(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(
            ["score_run_id"], ["score_runs.id"], name=op.f("fk_scores_score_run_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("score_run_id", "row", "metric", name=op.f("pk_scores")),
    )
    op.execute(V_RESULTS.format(prompt=PROMPT[op.get_bind().dialect.name]))
    for name, query in (VIEWS | {"v_scores": V_SCORES}).items():
        op.execute(f"CREATE VIEW {name} AS {query}")


def downgrade() -> None:
    for name in ("v_results", *VIEWS):
        op.execute(f"DROP VIEW {name}")
    for table in (
        "batches",
        "files",
        "api_keys",
        "scores",
        "score_runs",
        "worker_samples",
        "workers",
        "retries",
        "results",
        "attempts",
        "chunks",
        "requests",
        "jobs",
    ):
        op.drop_table(table)
