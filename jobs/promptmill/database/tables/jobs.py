"""Jobs and what becomes of their rows."""

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
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)

from promptmill.database.tables.schema import JobId, metadata

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
    # As many rows, none a copy of another, would tell as much. NULL for jobs of older versions.
    Column("effective_rows", Double),
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
    # 64 bits of the input: equal for one line of a dataset in two jobs. NULL for rows of older versions.
    Column("input_digest", BigInteger),
    # 64 bits of what a template makes of it: equal for rows that ask the model the same. NULL without a template.
    Column("prompt_digest", BigInteger),
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
