"""The tables. Names explain themselves to people who query them; all ``*_at`` are seconds since the epoch (UTC)."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: A ULID: sorts by the time it was made.
JobId = String(26)

jobs = Table(
    "jobs",
    metadata,
    Column("id", JobId, primary_key=True),
    Column("name", Text),
    Column("state", String(16), nullable=False),
    # 'embedded' jobs are run by the process that made them, 'queue' jobs by Celery workers.
    Column("mode", String(16), nullable=False),
    Column("dataset_name", Text, nullable=False),
    Column("dataset_sha256", String(64), nullable=False),
    Column("dataset_format", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("model_fingerprint", String(64)),
    Column("task_name", Text),
    Column("task_text", Text),
    # Where the files are that the task names: those of 'python' scorers.
    Column("task_folder", Text),
    Column("task_sha256", String(64)),
    Column("system_prompt", Text),
    # JSON: sampling parameters of every row that sets none of its own.
    Column("sampling", Text, nullable=False),
    # 0 is the most urgent, 9 the least.
    Column("priority", Integer, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("slots", Integer),
    # Tokens that the longest request of the job may need, prompt and answer; NULL when the prompts were not measured.
    Column("context_tokens", Integer),
    Column("max_errors", String(16)),
    # Rows that were known to be bad at submission and skipped on purpose.
    Column("skipped", Integer, nullable=False, server_default="0"),
    # Seconds since the epoch: the end of everything, and the last moment to begin.
    Column("deadline_at", Double),
    Column("expires_at", Double),
    # Seconds from its start, or from the start of its last retry; while it is paused they do not pass.
    Column("time_limit_s", Double),
    # When its time limit began to count, put off by the time it was paused since.
    Column("limit_from", Double),
    # When it was last paused; NULL once it goes on.
    Column("paused_at", Double),
    # SHA-256 over dataset, model, task and parameters: two jobs with one key ask the same.
    Column("key_sha256", String(64)),
    # JSON of promptmill.service.selection.Selection; NULL: every line of the dataset once, in its order.
    Column("selection", Text),
    # Answers are looked up in the cache of all jobs, and kept there.
    Column("use_cache", Boolean, nullable=False, server_default="0"),
    Column("stop_reason", Text),
    # A person's remark.
    Column("note", Text),
    # JSON: settings of the engine that a sweep chose for this job.
    Column("engine_settings", Text),
    # What is kept of prompts and answers once the job has ended: 'full', 'hash' or 'none'.
    # While they go it is 'hashing' or 'removing', and then 'hashed' or 'removed'.
    Column("store", String(8), nullable=False, server_default="full"),
    # Until then one process scores and forgets the job's texts, and no other one does.
    Column("forgetting_until", Double),
    Column("env", Text, nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    # The API key that made it; NULL for jobs of the command line and of an API without keys.
    Column("api_key_id", String(26)),
    CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
    Index("ix_jobs_api_key_id", "api_key_id"),
    Index("ix_jobs_state", "state"),
    Index("ix_jobs_name", "name"),
    Index("ix_jobs_key_sha256", "key_sha256"),
)

job_tags = Table(
    "job_tags",
    metadata,
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("tag", String(100), nullable=False),
    PrimaryKeyConstraint("job_id", "tag"),
    Index("ix_job_tags_tag", "tag"),
)

requests = Table(
    "requests",
    metadata,
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    # JSON: {"prompt": ...}, {"messages": [...]} or {"fields": {...}}; NULL for a line that could not be read.
    Column("input", Text),
    # JSON; never sent to an engine.
    Column("expected", Text),
    Column("meta", Text),
    # JSON: the sampling parameters that this line sets for itself.
    Column("sampling", Text),
    PrimaryKeyConstraint("job_id", "row"),
)

#: Chunks that wait and have failed before. As text: databases do not look behind parameters for an index of such rows.
FAILED = text("state = 'queued' AND failures > 0")

chunks = Table(
    "chunks",
    metadata,
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("first_row", Integer, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    # Counts leases; the number is the fencing token.
    Column("attempt", Integer, nullable=False),
    # Attempts that ended badly. A chunk that was given back in order has not failed.
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("worker_id", String(64)),
    # When its last lease began.
    Column("leased_at", Double),
    Column("leased_until", Double),
    # Not to be run before this time: the back-off after a failed attempt.
    Column("not_before", Double),
    # When its message was last published; NULL while it waits for its place in the window.
    Column("published_at", Double),
    Column("ok", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    # Rows that failed and were given to another chunk, to be tried again: ok + errors + moved = rows at its end.
    Column("moved", Integer, nullable=False, server_default="0"),
    Column("output_tokens", BigInteger, nullable=False),
    Column("last_error", Text),
    PrimaryKeyConstraint("job_id", "number"),
    Index("ix_chunks_state_job_id_number", "state", "job_id", "number"),
    # The few that are to be tried before all others.
    Index("ix_chunks_failed", "job_id", sqlite_where=FAILED, postgresql_where=FAILED),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", JobId, nullable=False),
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    # 'done', 'released' (given back), 'failed' (the host died) or 'lost' (the lease ran out); NULL while it runs.
    Column("outcome", String(16)),
    Column("slots", Integer),
    Column("steps", BigInteger),
    Column("prefill_s", Double),
    Column("decode_s", Double),
    Column("overhead_s", Double),
    Column("idle_s", Double),
    Column("starved_s", Double),
    Column("prefill_tokens", BigInteger),
    Column("decode_tokens", BigInteger),
    Column("wasted_tokens", BigInteger),
    Column("peak_active", Integer),
    Column("peak_kv_cells", Integer),
    # Requests of the API that ran on the same engine meanwhile: the counters are theirs too.
    Column("live_requests", Integer),
    # Which model answered, and JSON of what else changes its answers: engine, version, chat template, KV cache, flash
    # attention. NULL before a host took the chunk, for an engine without files, and for older workers.
    Column("model_fingerprint", String(64)),
    Column("environment", Text),
    PrimaryKeyConstraint("job_id", "number", "attempt"),
    ForeignKeyConstraint(["job_id", "number"], ["chunks.job_id", "chunks.number"], ondelete="CASCADE"),
    Index("ix_attempts_worker_id", "worker_id"),
)

results = Table(
    "results",
    metadata,
    Column("job_id", JobId, nullable=False),
    Column("row", Integer, nullable=False),
    Column("state", String(8), nullable=False),
    Column("text", Text),
    Column("finish_reason", String(16)),
    Column("error_class", String(32)),
    Column("error_message", Text),
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("output_tokens", Integer),
    Column("reasoning_tokens", Integer),
    # The limit this request ran under.
    Column("max_tokens", Integer),
    Column("enqueued_at", Double),
    Column("received_at", Double),
    Column("admitted_at", Double),
    Column("first_token_at", Double),
    Column("finished_at", Double),
    Column("committed_at", Double, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker_id", String(64)),
    Column("chunk", Integer),
    Column("reasoning", Text),
    # JSON, of the shapes that promptmill.types.Extras documents.
    Column("choices", Text),
    Column("logprobs", Text),
    Column("choice_probs", Text),
    Column("continuations", Text),
    Column("embedding", Text),
    # Copied from an identical request of the job or of the cache: it has no times.
    Column("deduplicated", Boolean, nullable=False, server_default="0"),
    PrimaryKeyConstraint("job_id", "row"),
    ForeignKeyConstraint(["job_id", "row"], ["requests.job_id", "requests.row"], ondelete="CASCADE"),
    CheckConstraint("state IN ('ok', 'error')", name="state"),
    # Token counts of an answer are never missing (they come from token ids, not from text).
    CheckConstraint(
        "state = 'error' OR (prompt_tokens IS NOT NULL AND cached_tokens IS NOT NULL AND output_tokens IS NOT NULL)",
        name="counts",
    ),
)

# Greedy answers by what they answer (promptmill.store.answer_cache), for jobs that ask for it.
answers = Table(
    "answers",
    metadata,
    Column("key_sha256", String(64), primary_key=True),
    Column("text", Text, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    # JSON of promptmill.types.Extras.
    Column("extras", Text),
    Column("stored_at", Double, nullable=False),
)

# Errors that were tried again: what a result was before. ``chunk`` is the chunk that gave the row away.
retries = Table(
    "retries",
    metadata,
    Column("job_id", JobId, nullable=False),
    Column("row", Integer, nullable=False),
    Column("chunk", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker_id", String(64)),
    Column("error_class", String(32), nullable=False),
    Column("error_message", Text),
    Column("prompt_tokens", Integer),
    Column("output_tokens", Integer),
    Column("admitted_at", Double),
    Column("finished_at", Double),
    Column("retried_at", Double, nullable=False),
    # True for 'promptmill retry', False for what the ledger does of itself.
    Column("by_hand", Boolean, nullable=False),
    PrimaryKeyConstraint("job_id", "row", "chunk"),
    ForeignKeyConstraint(["job_id", "row"], ["requests.job_id", "requests.row"], ondelete="CASCADE"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    # 'loading', 'idle', 'busy', 'stopping', 'stopped'.
    Column("state", String(16), nullable=False),
    # JSON: the models it serves; "model" is the one that is loaded.
    Column("models", Text, nullable=False, server_default="[]"),
    Column("device_asked", Text, nullable=False),
    Column("device_got", Text),
    Column("engine", String(32)),
    Column("model", Text),
    # Of the model that is loaded; NULL where another one lies in its place by now.
    Column("model_fingerprint", String(64)),
    Column("layers", Integer),
    Column("layers_offloaded", Integer),
    Column("slots", Integer),
    Column("kv_cells", Integer),
    # JSON: versions of promptmill, the engine, Python and the platform.
    Column("versions", Text),
    # The database's clock minus this machine's, in seconds.
    Column("clock_offset_s", Double),
    Column("model_load_s", Double),
    Column("host_restarts", Integer, nullable=False, default=0, server_default="0"),
    Column("started_at", Double, nullable=False),
    Column("heartbeat_at", Double, nullable=False),
)

worker_samples = Table(
    "worker_samples",
    metadata,
    Column("worker_id", String(64), ForeignKey("workers.id", ondelete="CASCADE"), nullable=False),
    Column("at", Double, nullable=False),
    # CPU seconds used per second by the worker and its engine host: 2.0 is two cores.
    Column("cpu_ratio", Double),
    Column("memory_bytes", BigInteger),
    Column("device_memory_bytes", BigInteger),
    Column("device_use_ratio", Double),
    Column("active_sequences", Integer),
    Column("waiting_requests", Integer),
    Column("slots", Integer),
    Column("kv_cells_used", Integer),
    # Output tokens per second since the sample before.
    Column("output_tps", Double),
    # 'loading', 'idle' or 'busy': the phase of the worker.
    Column("state", String(16)),
    PrimaryKeyConstraint("worker_id", "at"),
    Index("ix_worker_samples_at", "at"),
)

# What /metrics counts: it only grows. Each worker has rows of its own, so that none waits for another one.
counters = Table(
    "counters",
    metadata,
    # '' for what no worker did, and for workers that ended long ago.
    Column("worker_id", String(64), nullable=False),
    Column("model", Text, nullable=False),
    # JSON of promptmill.database.counting.Counts.
    Column("counts", Text, nullable=False),
    PrimaryKeyConstraint("worker_id", "model"),
)

score_runs = Table(
    "score_runs",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("task_sha256", String(64), nullable=False),
    Column("scorer_sha256", String(64)),
    # The run before it.
    Column("parent_id", String(26)),
    # Counts from 1 in each job: JOB@s2 is the second.
    Column("number", Integer),
    Column("task_text", Text),
    # The figures that it came to, as JSON.
    Column("figures", Text),
    Column("created_at", Double, nullable=False),
    Index("ix_score_runs_job_id", "job_id"),
)

scores = Table(
    "scores",
    metadata,
    Column("score_run_id", String(26), ForeignKey("score_runs.id", ondelete="CASCADE"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("metric", Text, nullable=False),
    Column("value", Double),
    Column("predicted", Text),
    Column("expected", Text),
    # 'scored', 'unparsed', 'truncated', 'scorer_error', 'abstain' or 'infra_error'.
    Column("outcome", String(16), nullable=False),
    # How sure the answer is of yes, or of the choice it made.
    Column("confidence", Double),
    # What the scorer raised.
    Column("error", Text),
    PrimaryKeyConstraint("score_run_id", "row", "metric"),
    # The key is most of the row: a tree of rows and one of keys beside it would take twice the time and the space.
    sqlite_with_rowid=False,
)

# What ``promptmill verify`` found. ``examples`` and ``sums`` are JSON.
verifications = Table(
    "verifications",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("compared", Integer, nullable=False),
    Column("left_out", Integer, nullable=False),
    Column("mismatches", Integer, nullable=False),
    Column("examples", Text, nullable=False),
    Column("sums", Text, nullable=False),
    Column("verified_at", Double, nullable=False),
)

# One row: the id of this database, by which folders are marked that belong to it.
installation = Table("installation", metadata, Column("id", String(32), primary_key=True))

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("name", Text, nullable=False),
    # The key itself is shown once and never stored.
    Column("key_sha256", String(64), nullable=False, unique=True),
    # Of 'read', 'submit' and 'admin', with commas between them.
    Column("scopes", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked", Boolean, nullable=False, default=False, server_default="0"),
    # Limits; NULL stands for the settings' own.
    Column("requests_per_s", Double),
    Column("queued_requests", BigInteger),
    Column("stored_bytes", BigInteger),
    Column("concurrent", Integer),
    Column("last_used_at", Double),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("api_key_id", String(26), ForeignKey("api_keys.id")),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    # 'processed'; 'arriving' until its bytes are in their place, 'deleting' while they are removed.
    Column("status", String(16), nullable=False, server_default="processed"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", JobId, ForeignKey("jobs.id")),
    # No foreign keys: an unknown file fails the batch and not the call, and files may be deleted before it.
    Column("input_file_id", String(64), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("endpoint", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    # JSON, as the client gave it.
    Column("metadata", Text),
    Column("api_key_id", String(26), ForeignKey("api_keys.id")),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("completion_window", String(16), nullable=False, server_default="24h"),
    Column("priority", Integer, nullable=False, server_default="5"),
    # YAML of a task file.
    Column("task_text", Text),
    Column("model", Text),
    # JSON: a list of {code, line, message, param}.
    Column("errors", Text),
    Column("idempotency_key", String(255)),
    Column("output_expires_after_s", BigInteger),
    # The server that looks after it, and until when.
    Column("claimed_by", String(64)),
    # Counts at its end; those of a running one come from its job.
    Column("total", Integer, nullable=False, server_default="0"),
    Column("completed", Integer, nullable=False, server_default="0"),
    Column("failed", Integer, nullable=False, server_default="0"),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("completed_at", Double),
    Column("failed_at", Double),
    Column("expired_at", Double),
    Column("cancelling_at", Double),
    Column("cancelled_at", Double),
    Column("claimed_until", Double),
    Index("ix_batches_state", "state"),
)
