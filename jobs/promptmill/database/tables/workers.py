"""Workers, their samples, and what ``/metrics`` counts."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, PrimaryKeyConstraint, String, Table, Text

from promptmill.database.tables.schema import metadata

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
    # That of the loaded model; NULL where another one lies in its place by now.
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
