"""What the ledger's callers see: constants, the values it returns, and the judgement over too many errors."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import Any

from promptmill.core.backoff import Backoff
from promptmill.database.clock import DatabaseClock
from promptmill.types import ErrorClass, JobState

#: Seconds a chunk stays ours unrenewed. Five renewals may be missed.
LEASE_S = 30.0

#: Attempts of a chunk before it is split to find the request that ends its host.
MAX_ATTEMPTS = 3

#: Pieces that a chunk is split into; fewer rows than this become chunks of one.
SPLIT_PIECES = 8

#: The wait before a failed chunk is tried again.
BACKOFF = Backoff(first_s=1.0, longest_s=60.0)

#: A wait is stretched by up to this share, drawn anew each time, so that what failed together is not tried together.
JITTER = 0.25

#: Further attempts of a single request whose worker was lost, before it is given up.
LOST_WORKERS = 3

#: The default guard: a job whose first results are all errors is plainly wrong.
GUARD_ROWS = 50

#: Most rows of a chunk of retried requests.
RETRY_CHUNK_ROWS = 64

#: Errors of one request that may go better another time. (``engine_crash`` and ``worker_lost`` are of whole chunks.)
RETRYABLE = frozenset({ErrorClass.TIMEOUT, ErrorClass.DATABASE})

OPEN_STATES = (JobState.QUEUED.value, JobState.RUNNING.value)

#: States from which a job can still be ended.
UNENDED = (*OPEN_STATES, JobState.PAUSED.value)


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which chunks are leased and tried."""

    lease_s: float = LEASE_S
    max_attempts: int = MAX_ATTEMPTS
    #: Read whenever a chunk is claimed and results are stored.
    clock: DatabaseClock = field(default_factory=DatabaseClock)


class Standing(enum.Enum):
    """What a worker may do with its lease."""

    HELD = "held"
    #: Another worker has the chunk.
    LOST = "lost"
    #: The job is paused: start nothing more of the chunk, let run what runs.
    PAUSED = "paused"
    #: The job was cancelled, or stopped by its guard or its deadline: drop the chunk.
    UNWANTED = "unwanted"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a worker needs to know of a job to turn its rows into requests."""

    job_id: str
    model: str
    task_text: str | None
    task_name: str | None
    system_prompt: str | None
    sampling: dict[str, Any]
    #: Greedy answers are looked up in the cache, and kept there.
    use_cache: bool = False
    #: The id of the API key that the job belongs to; empty where it belongs to none.
    owner: str = ""


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A row of ``requests`` that has no result yet."""

    row: int
    custom_id: str
    input: dict[str, Any]
    meta: dict[str, Any] | None
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a job while it runs."""

    state: JobState
    rows: int
    ok: int
    errors: int
    output_tokens: int
    stop_reason: str | None

    @property
    def done(self) -> int:
        return self.ok + self.errors


def guard_verdict(spec: str | None, ok: int, errors: int) -> str | None:
    """Why a job with these counts must stop; None when it may go on.

    ``spec`` is what ``--max-errors`` was given: a count, a share such as ``5%`` (judged from the 50th result on), or
    None for the default (the first 50 results all errors).
    """
    done = ok + errors
    if spec is None:
        return f"the first {done} rows all failed" if done >= GUARD_ROWS and ok == 0 else None
    if spec.endswith("%"):
        share = float(spec[:-1]) / 100
        too_many = done >= GUARD_ROWS and errors > share * done
    else:
        too_many = errors > int(spec)
    return f"{errors} of {done} rows failed, more than --max-errors {spec}" if too_many else None


def back_off_s(failures: int) -> float:
    """Seconds to wait before that is tried again which has failed so often."""
    return BACKOFF.delay_s(failures) * (1 + JITTER * random.random())  # noqa: S311 - no secret


def storable(text: str) -> str:
    """PostgreSQL has no room for NUL in a text."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}") if "\x00" in text else text
