"""Takes the measuring out of a process of promptmill, for measuring.py to see what it costs. Python runs this first."""

import os
from typing import Any

if os.environ.get("WITHOUT_MEASURING") is not None:
    # Both sides of the comparison import the same, so that only what is measured differs.
    from promptmill.ledger import endings, results
    from promptmill_workers.engines.contract import Finished
    from promptmill_workers.engines.echo import EchoBackend
    from promptmill_workers.engines.scheduler import Scheduler
    from promptmill_workers.worker.heartbeat import Heartbeat

    def take_out() -> None:
        """No timestamps of requests, no counters of attempts, no samples of workers."""
        plain = Scheduler.step

        def step(self: Scheduler[Any]) -> list[Any]:
            events = plain(self)
            for event in events:
                if isinstance(event, Finished):
                    # A result without its admission has no times at all: none are sent, and none are stored.
                    object.__setattr__(event, "admitted_at", None)
            return events

        replaced: tuple[tuple[Any, str, Any], ...] = (
            (Scheduler, "step", step),
            (results, "add_counters", lambda *_: None),
            (endings, "add_counters", lambda *_: None),
            (Heartbeat, "_add_sample", lambda *_: None),
            (Scheduler.__init__, "__defaults__", (lambda: 0.0,)),
            (EchoBackend.__init__, "__defaults__", (lambda: 0.0,)),
        )
        for owner, name, value in replaced:
            setattr(owner, name, value)

    if os.environ["WITHOUT_MEASURING"] == "1":
        take_out()
