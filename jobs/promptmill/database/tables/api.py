"""What only the API and its batches need."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, Integer, String, Table, Text

from promptmill.database.tables.schema import JobId, metadata

# One row: the id of this database, by which folders are marked that belong to it.
installation = Table("installation", metadata, Column("id", String(32), primary_key=True))

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("name", Text, nullable=False),
    # The key itself is shown once and never stored.
    Column("key_sha256", String(64), nullable=False, unique=True),
    # Some of 'read', 'submit' and 'admin', with commas between them.
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
