"""``verify``: rows of a job once more, each alone and with nothing shared, against the answers that were stored.

Other batch servers have shipped answers that held a neighbour's text. This measures it on the user's own job.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill.core.settings import Settings
from promptmill.database.engine import epoch, id_at, now_of, reading, writing
from promptmill.database.tables import chunks, jobs, requests, results, verifications
from promptmill.errors import JobError, PromptmillError
from promptmill.ledger import JobSpec, Ledger
from promptmill.ledger.values import storable
from promptmill.service.local_run import require_same_model
from promptmill.store import catalog
from promptmill.tasks.task_file import parse_task
from promptmill.tasks.templates import Template, resolve_sampling, to_request
from promptmill.types import WITHOUT_TEXTS, Failed, Ok, Request, Result

#: Characters of both texts that a mismatch shows, from where they part.
SHOWN = 40

#: Mismatches that are listed.
LISTED = 20

#: Gives whether an engine is exact, and what answers a request by it.
Alone = AbstractContextManager[tuple[bool, Callable[[Request], Result]]]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A row whose answer alone is another one. The texts are excerpts from where they part."""

    row: int
    at: int
    stored: str
    alone: str
    #: Drawn at random, with a seed.
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that was not compared, and why."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. ``sums`` are laws of the ledger that do not hold; ``sampled_...`` are parts of the counts."""

    job_id: str
    asked: int
    compared: int
    left_out: int
    mismatches: int
    sampled_compared: int
    sampled_mismatches: int
    #: The model computes alike whatever the size of the batch: float32 on a CPU.
    exact: bool
    examples: tuple[Mismatch, ...]
    left_out_rows: tuple[LeftOut, ...]
    sums: tuple[str, ...]

    @property
    def rate(self) -> float | None:
        return self.mismatches / self.compared if self.compared else None

    @property
    def ok(self) -> bool:
        """A draw turns the smallest difference of two sums into another text: it proves nothing of a rounded model."""
        proven = self.mismatches if self.exact else self.mismatches - self.sampled_mismatches
        return not proven and not self.sums

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
    made = _compared(job, sample, rows, tuple(wrong_sums(db, job.id)), _alone(job, settings, device), on_row)
    _store(db, made)
    return made


def _compared(
    job: Row[Any],
    sample: int,
    rows: Sequence[tuple[Request, str]],
    sums: tuple[str, ...],
    alone: Alone,
    on_row: Callable[[int, int], None],
) -> Verification:
    left_out = [LeftOut(request.row, reason) for request, _ in rows if (reason := _why_not(request))]
    found: list[Mismatch] = []
    compared: Counter[bool] = Counter()
    with alone as (exact, answer):
        for request, text in rows:
            if _why_not(request):
                continue
            on_row(compared.total(), len(rows))
            result, sampled = answer(request), not request.sampling.is_greedy
            if isinstance(result, Failed):
                left_out.append(LeftOut(request.row, f"no answer this time: {result.error_class}: {result.message}"))
                continue
            compared[sampled] += 1
            if storable(result.text) != text:
                found.append(_mismatch(result, text, sampled))
    return Verification(
        job.id, sample, compared.total(), len(left_out), len(found), compared[True],
        sum(each.sampled for each in found), exact, tuple(found[:LISTED]), tuple(left_out), sums,
    )  # fmt: skip


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
        store = connection.execute(sa.select(jobs.c.store).where(jobs.c.id == spec.job_id)).scalar()
    for each in found:
        if store in WITHOUT_TEXTS or each.input is None or each.text is None:
            raise JobError(f"job {spec.job_id} keeps no prompts or answers: there is nothing to compare")
        sampling = resolve_sampling(spec.sampling, json.loads(each.sampling) if each.sampling else {})
        meta = json.loads(each.meta) if each.meta else None
        body = json.loads(each.input)
        yield to_request(each.row, each.custom_id, body, meta, sampling, template, spec.system_prompt), each.text


def _why_not(request: Request) -> str | None:
    """Why the same prompt may have another answer, or none that is a text."""
    sampling = request.sampling
    if sampling.embedding or sampling.continuations:
        return "its answer is a vector" if sampling.embedding else "its answer is scores"
    return None if sampling.is_greedy or sampling.seed is not None else "drawn without a seed"


@contextlib.contextmanager
def _alone(job: Row[Any], settings: Settings, device: str) -> Iterator[tuple[bool, Callable[[Request], Result]]]:
    """Answers a request by an engine that holds no other one, and shares nothing; and whether that engine is exact."""
    from promptmill_workers.checkpoints import engine_of
    from promptmill_workers.devices import parse_devices, usable
    from promptmill_workers.host.client import EngineHost, HostConfig, HostDied

    where = usable(parse_devices("auto")[:1], engine_of(job.model))[0] if device == "auto" else parse_devices(device)[0]
    config = HostConfig.of(
        settings, job.model, where, slots=1, context_tokens=settings.context_tokens or job.context_tokens
    )
    host = EngineHost(replace(config, deduplicate=False))

    def answer(request: Request) -> Result:
        # A session ends before the next one begins: the engine is empty in between.
        with host.session() as session:
            return next(result for batch in session.answer([request]) for result in batch)

    try:
        info = host.wait_ready()
        require_same_model(job, info.fingerprint)
        yield info.exact, answer
    except HostDied as death:
        raise PromptmillError(f"the engine ended while rows were verified: {death}") from death
    finally:
        host.kill()


def _mismatch(result: Ok, stored: str, sampled: bool) -> Mismatch:
    at = next((index for index, (a, b) in enumerate(zip(stored, result.text, strict=False)) if a != b), -1)
    at = at if at >= 0 else min(len(stored), len(result.text))
    return Mismatch(result.row, at, stored[at : at + SHOWN], result.text[at : at + SHOWN], sampled)


#: Answers whose tokens were computed for them: copies of others cost nothing.
IS_COMPUTED = sa.and_(results.c.state == "ok", results.c.deduplicated.is_(False))


def wrong_sums(db: Engine, job_id: str) -> list[str]:
    """Laws between job, chunks and results that do not hold, as sentences."""
    per_chunk = (
        sa.select(
            chunks.c.number, chunks.c.ok, chunks.c.errors, chunks.c.output_tokens,
            sa.func.count(results.c.row).filter(results.c.state == "ok").label("ok_rows"),
            sa.func.coalesce(sa.func.sum(results.c.output_tokens).filter(IS_COMPUTED), 0).label("tokens"),
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
                id=id_at(now_of(connection)), job_id=made.job_id, compared=made.compared, left_out=made.left_out,
                mismatches=made.mismatches, sums=json.dumps(made.sums), verified_at=epoch(),
                examples=json.dumps([asdict(each) for each in made.examples], ensure_ascii=False),
            )
        )  # fmt: skip
