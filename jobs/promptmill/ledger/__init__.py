"""The state machine of jobs, chunks and results, and the only writer of states.

A change is a function over a Connection, in the module of its subject: one conditional statement whose row count is
checked, or several that hold the chunk's lock. A lease's attempt number is its fencing token: a worker that was
overtaken changes nothing. Times are the database's, never a worker's. :class:`Ledger` gives each change a transaction.
"""

from promptmill.ledger.facade import Ledger
from promptmill.ledger.results import RESULT_COLUMNS
from promptmill.ledger.status import waiting_requests
from promptmill.ledger.values import (
    LEASE_S,
    MAX_ATTEMPTS,
    JobSpec,
    Progress,
    Standing,
    StoredRequest,
    guard_verdict,
)

__all__ = [
    "LEASE_S", "MAX_ATTEMPTS", "RESULT_COLUMNS", "JobSpec", "Ledger", "Progress", "Standing", "StoredRequest",
    "guard_verdict", "waiting_requests",
]  # fmt: skip
