"""What may go better in a moment, and is no fault of a batch: no database, no Redis, a full disk."""

from __future__ import annotations

import psycopg
import sqlalchemy as sa

from promptmill.errors import BrokerError, DatabaseError

PASSING = (
    sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, psycopg.OperationalError, DatabaseError,
    BrokerError, OSError,
)  # fmt: skip
