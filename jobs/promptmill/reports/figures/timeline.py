"""What each worker of a job was at, and when one was started anew: leases are exact, samples are 5 s apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from promptmill.database.tables import attempts, worker_samples, workers

#: Seconds before the first admission that the timeline may show, and the longest time one sample speaks for.
BEFORE_S = 600.0
GAP_S = 30.0

#: Seconds after the last end in which samples are looked at: two of them are taken then.
AFTER_S = 10.0

#: Beginning and end, in seconds.
Span = tuple[float, float]

#: (worker, start, end, state), in seconds from the first admission.
Phase = tuple[str, float, float, str]


def read_phases(
    db: Connection, job_id: str, begin: float, end: float
) -> tuple[tuple[Phase, ...], tuple[tuple[str, float], ...]]:
    """The phases of the job's workers while it ran, and (worker, second) of each that was started anew."""
    own = sa.select(attempts.c.worker_id).where(attempts.c.job_id == job_id).distinct()
    known = {row.id: row for row in db.execute(sa.select(workers).where(workers.c.id.in_(own)))}
    samples, leases = _samples(db, own, begin, end), _leases(db, own, begin, end)
    phases: list[Phase] = []
    restarts = _successors(list(known.values()))
    for worker in sorted({*samples, *leases}):
        row, taken = known.get(worker), samples.get(worker, [])
        loads = _loads(taken, row.model_load_s if row else None)
        found = phases_of(taken, leases.get(worker, []), loads)
        phases += [(worker, max(one - begin, -BEFORE_S), two - begin, state) for one, two, state in found]
        if row and row.host_restarts:
            restarts += [(worker, one) for one, _ in loads[1:]]
    shown = (begin - BEFORE_S, end)
    return tuple(phases), tuple((name, at - begin) for name, at in restarts if shown[0] <= at <= shown[1])


def phases_of(
    samples: Sequence[tuple[float, str]], leases: Sequence[Span], loads: Sequence[Span]
) -> list[tuple[float, float, str]]:
    """(start, end, state): loading, else busy while there was a lease, else idle where samples or leases tell."""
    spoken = [(one, two, state) for (one, _), (two, state) in pairwise(samples) if two - one <= GAP_S]
    # Requests of the API have no lease: of them a sample says that there were some since the one before.
    sampled = [(one, two) for one, two, state in spoken if state == "busy"]
    live = set(without(sampled, leases)) & set(sampled)
    busy = without(merged([*leases, *live], 0.0), loads)
    seen = merged([*((one, two) for one, two, _ in spoken), *leases, *loads], 0.0)
    idle = without(seen, merged([*busy, *loads], 0.0))
    parts = (("loading", loads), ("busy", busy), ("idle", idle))
    return sorted((one, two, state) for state, spans in parts for one, two in spans)


def merged(spans: Iterable[Span], gap: float) -> list[Span]:
    """Spans with no more than ``gap`` between them as one: what is too close to be seen apart."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def without(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """What is left of sorted ``spans`` outside the sorted ``holes``."""
    found: list[Span] = []
    first = 0
    for begin, end in spans:
        while first < len(holes) and holes[first][1] <= begin:
            first += 1
        at = first
        while at < len(holes) and holes[at][0] < end:
            found += [(begin, holes[at][0])] if holes[at][0] > begin else []
            begin = max(begin, holes[at][1])
            at += 1
        found += [(begin, end)] if end > begin else []
    return found


def _loads(samples: Sequence[tuple[float, str]], load_s: float | None) -> list[Span]:
    """From the first sample of a load to the next other one; the last load ended after its own measured time."""
    found: list[Span] = []
    for (at, state), (later, _) in pairwise(samples):
        if state == "loading" and later - at <= GAP_S:
            if found and found[-1][1] == at:
                found[-1] = (found[-1][0], later)
            else:
                found.append((at, later))
    if found and load_s is not None:
        begin, end = found[-1]
        found[-1] = (begin, min(end, begin + load_s))
    return found


def _successors(rows: Sequence[Row[tuple[object, ...]]]) -> list[tuple[str, float]]:
    """Workers that took the place of one that ended, each with when it began: the same machine, the same device."""
    return [
        (row.id, row.started_at)
        for row in rows
        if any(
            (each.host, each.device_asked) == (row.host, row.device_asked) and each.heartbeat_at <= row.started_at
            for each in rows
            if each.id != row.id
        )
    ]


def _samples(
    db: Connection, own: sa.Select[tuple[str]], begin: float, end: float
) -> dict[str, list[tuple[float, str]]]:
    each = worker_samples.c
    query = sa.select(each.worker_id, each.at, each.state).where(
        each.worker_id.in_(own), each.state.is_not(None), each.at.between(begin - BEFORE_S, end + AFTER_S)
    )
    found: dict[str, list[tuple[float, str]]] = {}
    for worker, at, state in db.execute(query.order_by(each.worker_id, each.at)):
        found.setdefault(worker, []).append((at, state))
    return found


def _leases(db: Connection, own: sa.Select[tuple[str]], begin: float, end: float) -> dict[str, list[Span]]:
    """Spans of every job that these workers ran meanwhile: an engine that works for another one is not idle."""
    each = attempts.c
    low, high = begin - BEFORE_S, end + AFTER_S
    ended = sa.func.coalesce(each.ended_at, end)
    query = sa.select(each.worker_id, each.started_at, ended).where(
        each.worker_id.in_(own), each.started_at < high, ended > low
    )
    found: dict[str, list[Span]] = {}
    for worker, started, stopped in db.execute(query):
        found.setdefault(worker, []).append((max(started, low), min(stopped, high)))
    return {worker: merged(spans, 0.0) for worker, spans in found.items()}
