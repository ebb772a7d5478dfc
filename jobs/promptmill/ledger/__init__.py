"""The state machine of jobs, chunks and results, and the only writer of states.

Every change is one conditional statement whose row count is checked. A lease's attempt number is its fencing token: a
worker that was overtaken changes nothing. Times are the database's, never a worker's.

One class in layers, a file each: base, jobs, results, endings, leases, recovery.
"""

from promptmill.ledger.jobs import waiting_requests
from promptmill.ledger.recovery import Recovery
from promptmill.ledger.results import RESULT_COLUMNS
from promptmill.ledger.values import (
    LEASE_S,
    MAX_ATTEMPTS,
    JobSpec,
    Progress,
    Standing,
    StoredRequest,
    guard_verdict,
)


class Ledger(Recovery):
    """The ledger over one database."""


__all__ = [
    "LEASE_S", "MAX_ATTEMPTS", "RESULT_COLUMNS", "JobSpec", "Ledger", "Progress", "Standing", "StoredRequest",
    "guard_verdict", "waiting_requests",
]  # fmt: skip
