"""``verify``: rows of a job once more, each alone and with nothing shared, against the answers that were stored.

Other batch servers have shipped answers that held a neighbour's text. This measures it on the user's own job.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row
from ulid import ULID

from promptmill import catalog
from promptmill.database import epoch, reading, writing
from promptmill.errors import JobError, PromptmillError
from promptmill.ledger import JobSpec, Ledger
from promptmill.prompts import Template, resolve_sampling, to_request
from promptmill.settings import Settings
from promptmill.tables import chunks, requests, results, verifications
from promptmill.task_file import parse_task
from promptmill.types import Ok, Request, Result

#: Characters of both texts that a mismatch shows, from where they part.
SHOWN = 40

#: Mismatches that are listed.
LISTED = 20


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A row whose answer alone is another one. The texts are excerpts from where they part."""

    row: int
    at: int
    stored: str
    alone: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. ``sums`` are laws of the ledger that do not hold."""

    job_id: str
    asked: int
    compared: int
    #: Rows that could not be compared: drawn without a seed, or without an answer this time.
    left_out: int
    mismatches: int
    examples: tuple[Mismatch, ...]
    sums: tuple[str, ...]

    @property
    def rate(self) -> float | None:
        return self.mismatches / self.compared if self.compared else None

    @property
    def ok(self) -> bool:
        return not self.mismatches and not self.sums

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mismatch_rate": self.rate, "ok": self.ok}


def verify(
    reference: str,
    sample: int,
    seed: int,
    settings: Settings,
    db: Engine,
    device: str = "auto",
    on_row: Callable[[int, int], None] = lambda done, of: None,
) -> Verification:
    """Run ``sample`` answered rows of an ended job again and store what was found with the job.

    Raises :class:`JobError` for a job that has not ended or has no answers, and what loading its model raises.
    """
    job = catalog.find_job(db, reference)
    ledger = Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
    if not ledger.progress(job.id).state.is_final:
        raise JobError(f"job {job.id} has not ended", hint="Wait for it, then verify it.")
    chosen = _sample(db, job.id, sample, seed)
    if not chosen:
        raise JobError(f"job {job.id} has no answers to verify")
    rows = list(_stored(db, ledger.job_spec(job.id), chosen))
    comparable = [(request, text) for request, text in rows if _repeats(request)]
    found: list[Mismatch] = []
    compared = 0
    for result, text in _alone(job, comparable, settings, device):
        on_row(compared, len(comparable))
        if isinstance(result, Ok):
            compared += 1
            if result.text != text:
                found.append(_mismatch(result, text))
    made = Verification(
        job.id, sample, compared, len(rows) - compared, len(found), tuple(found[:LISTED]), tuple(wrong_sums(db, job.id))
    )
    _store(db, made)
    return made


def _sample(db: Engine, job_id: str, sample: int, seed: int) -> list[int]:
    query = sa.select(results.c.row).where(results.c.job_id == job_id, results.c.state == "ok").order_by(results.c.row)
    with reading(db) as connection:
        rows = list(connection.execute(query).scalars())
    return sorted(random.Random(seed).sample(rows, min(sample, len(rows))))  # noqa: S311 - no secret


def _stored(db: Engine, spec: JobSpec, chosen: Sequence[int]) -> Iterator[tuple[Request, str]]:
    """The requests of the rows and the answers they had."""
    task = parse_task(spec.task_text, spec.task_name or "task") if spec.task_text else None
    template: Template | None = task.template if task else None
    query = (
        sa.select(
            requests.c.row, requests.c.custom_id, requests.c.input, requests.c.meta, requests.c.sampling, results.c.text
        )
        .join(results, sa.and_(results.c.job_id == requests.c.job_id, results.c.row == requests.c.row))
        .where(requests.c.job_id == spec.job_id, requests.c.row.in_(chosen))
        .order_by(requests.c.row)
    )
    with reading(db) as connection:
        found = connection.execute(query).all()
    for each in found:
        if each.input is None or each.text is None:
            raise JobError(f"job {spec.job_id} keeps no prompts or answers: there is nothing to compare")
        sampling = resolve_sampling(spec.sampling, json.loads(each.sampling) if each.sampling else {})
        meta = json.loads(each.meta) if each.meta else None
        body = json.loads(each.input)
        yield to_request(each.row, each.custom_id, body, meta, sampling, template, spec.system_prompt), each.text


def _repeats(request: Request) -> bool:
    """Whether the same prompt has the same answer again."""
    sampling = request.sampling
    return (sampling.is_greedy or sampling.seed is not None) and not sampling.embedding and not sampling.continuations


def _alone(
    job: Row[Any], rows: Sequence[tuple[Request, str]], settings: Settings, device: str
) -> Iterator[tuple[Result, str]]:
    """Each request by an engine that holds no other one, and shares nothing."""
    from promptmill_workers.checkpoints import engine_of
    from promptmill_workers.devices import parse_devices, usable
    from promptmill_workers.host import EngineHost, HostConfig, HostDied

    where = usable(parse_devices("auto")[:1], engine_of(job.model))[0] if device == "auto" else parse_devices(device)[0]
    config = HostConfig.of(
        settings, job.model, where, slots=1, context_tokens=settings.context_tokens or job.context_tokens
    )
    host = EngineHost(replace(config, deduplicate=False))
    try:
        host.wait_ready()
        for request, text in rows:
            # A session ends before the next one begins: the engine is empty in between.
            with host.session() as session:
                for batch in session.answer([request]):
                    for result in batch:
                        yield result, text
    except HostDied as death:
        raise PromptmillError(f"the engine ended while rows were verified: {death}") from death
    finally:
        host.kill()


def _mismatch(result: Ok, stored: str) -> Mismatch:
    at = next((index for index, (a, b) in enumerate(zip(stored, result.text, strict=False)) if a != b), -1)
    at = at if at >= 0 else min(len(stored), len(result.text))
    return Mismatch(result.row, at, stored[at : at + SHOWN], result.text[at : at + SHOWN])


def wrong_sums(db: Engine, job_id: str) -> list[str]:
    """Laws between job, chunks and results that do not hold, as sentences."""
    per_chunk = (
        sa.select(
            chunks.c.number, chunks.c.ok, chunks.c.errors, chunks.c.output_tokens,
            sa.func.count(results.c.row).filter(results.c.state == "ok").label("ok_rows"),
            sa.func.coalesce(sa.func.sum(results.c.output_tokens).filter(results.c.state == "ok"), 0).label("tokens"),
        )
        .join(results, sa.and_(results.c.job_id == chunks.c.job_id, results.c.chunk == chunks.c.number), isouter=True)
        .where(chunks.c.job_id == job_id)
        .group_by(chunks.c.number, chunks.c.ok, chunks.c.errors, chunks.c.output_tokens)
        .order_by(chunks.c.number)
    )  # fmt: skip
    counted = sa.select(sa.func.count(), sa.func.count().filter(results.c.state == "ok")).where(
        results.c.job_id == job_id
    )
    totals = sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.errors)).where(chunks.c.job_id == job_id)
    found: list[str] = []
    with reading(db) as connection:
        rows, ok = connection.execute(counted).one()
        chunk_ok, chunk_errors = (int(each or 0) for each in connection.execute(totals).one())
        parts = connection.execute(per_chunk).all()
    if (chunk_ok, chunk_errors) != (ok, rows - ok):
        found.append(f"chunks count {chunk_ok} ok and {chunk_errors} errors, the results are {ok} and {rows - ok}")
    for part in parts:
        if (part.ok, part.output_tokens) != (part.ok_rows, part.tokens):
            found.append(
                f"chunk {part.number} counts {part.ok} ok and {part.output_tokens} tokens, its results {part.ok_rows} "
                f"and {part.tokens}"
            )
    return found


def _store(db: Engine, made: Verification) -> None:
    with writing(db) as connection:
        connection.execute(
            sa.insert(verifications).values(
                id=str(ULID()), job_id=made.job_id, compared=made.compared, left_out=made.left_out,
                mismatches=made.mismatches, sums=json.dumps(made.sums), verified_at=epoch(),
                examples=json.dumps([asdict(each) for each in made.examples], ensure_ascii=False),
            )
        )  # fmt: skip
