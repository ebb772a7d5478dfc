"""What happens to one chunk, top to bottom: rows become requests, the host answers, the ledger records."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from promptmill.errors import DeviceError, ModelError, PromptmillError, first_line
from promptmill.ledger import JobSpec, Ledger
from promptmill.store.answer_cache import keep, key_of, look_up
from promptmill.tasks.sampling import LARGEST_WHOLE
from promptmill.tasks.task_file import parse_task
from promptmill.tasks.templates import Template, resolve_sampling, to_request
from promptmill.types import ChunkId, EngineCounters, ErrorClass, Failed, Lease, Ok, Request, Result, Sharing
from promptmill_workers.host.client import HostDied, Session
from promptmill_workers.host.model_hosts import ModelHosts, NotWanted
from promptmill_workers.worker.database_retry import PASSING, DatabaseRetry
from promptmill_workers.worker.held_leases import watching
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Chunks a worker holds at once, so that its batch never drains at a chunk's end.
CHUNKS_AT_ONCE = 2

#: Engine hosts that die one after the other, with no answer between, before their job is given up. A worker's window of
#: four chunks with a bad request each loses at most eight until they are split, and four more until their pieces are
#: single requests; then each good one is an answer.
DEATHS_IN_A_ROW = 16

#: Jobs of which something is remembered: a worker lives for months.
KEPT_JOBS = 256

#: Results with the ``max_tokens`` each ran under.
Outcomes = list[tuple[Result, int]]


@dataclass(slots=True)
class Refused:
    """What the ledger did not take, because the job had ended or the lease was lost: it still was computed."""

    outcomes: Outcomes = field(default_factory=list)
    counters: EngineCounters = field(default_factory=EngineCounters)

    def add(self, outcomes: Outcomes, counters: EngineCounters) -> None:
        self.outcomes += outcomes
        self.counters = self.counters.plus(counters)


class ChunkRunner:
    """Runs chunks of any job on the hosts of one device. Its threads may run several chunks at once."""

    def __init__(
        self,
        ledger: Ledger,
        hosts: ModelHosts,
        stop: Shutdown,
        patience: DatabaseRetry,
        others_serve: Callable[[str], bool] | None = None,
        renewing: Ledger | None = None,
    ) -> None:
        """``others_serve``: whether another worker has a model loaded, so that its jobs can do without this one.
        None: no other worker can ever run what is run here.

        ``renewing``: the same ledger over a connection of its own, so that no lease waits for results.
        """
        self._ledger = ledger
        self._renewing = renewing or ledger
        self._others_serve = others_serve or (lambda model: False)
        self._is_alone = others_serve is None
        #: Jobs that are for another model than the one here, with that one: what was told in the log.
        self._told_wrong: OrderedDict[str, str | None] = OrderedDict()
        self._hosts = hosts
        self._stop = stop
        self._patiently = patience
        self._specs: OrderedDict[str, tuple[JobSpec, Template | None]] = OrderedDict()
        #: Hosts that ended under a job with no answer of anybody between: how many, the answers then, and which the
        #: last one was.
        self._ends: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        #: Row -> key of the cache, of the chunks that run.
        self._keys: dict[ChunkId, dict[int, str]] = {}

    def refuses(self, job_id: str, model: str, fingerprint: str | None) -> bool:
        """Whether this worker's files of the job's model are another model, so that it can answer nothing of it."""
        if not self._hosts.holds_another(model, fingerprint):
            return False
        self._tell_wrong(job_id, model, fingerprint, self._hosts.fingerprint_of(model))
        return True

    def run(self, lease: Lease) -> None:
        """Answer the leased rows that have no result yet, record each, and close the attempt."""
        try:
            self._run(lease)
        except PASSING:
            raise
        except Exception as problem:
            self._broke(lease, problem)
        finally:
            self._keys.pop(lease.chunk, None)

    def _run(self, lease: Lease) -> None:
        ledger, hosts = self._ledger, self._hosts
        requests, failures = self._patiently(lambda again: self._requests(lease))
        self._record(lease, [(failure, 0) for failure in failures])
        # The last results are stored together with the chunk's end, in one transaction.
        last: Outcomes = []
        refused = Refused()
        try:
            with (
                # Renewal begins first: loading a model or waiting for another one may take longer than a lease.
                watching(self._renewing, lease, self._stop) as watched,
                hosts.session(
                    lease.model,
                    lease.context_tokens,
                    alone=ledger.is_suspect(lease),
                    unwanted=watched.unwanted,
                    fingerprint=lease.model_fingerprint,
                ) as session,
            ):
                watched.session = session
                if not self._may_answer(lease, session):
                    self._give_back(lease, session)
                elif not self._answer(lease, session, requests, last, refused):
                    self._overwritten(lease, session)
                else:
                    watched.all_answered = True
                    self._finish(lease, session, last, refused)
        except HostDied as death:
            self._host_died(lease, last, death)
        except NotWanted:
            ledger.release(lease)
        except (ModelError, DeviceError) as problem:
            self._not_loaded(lease, problem)

    def _answer(
        self, lease: Lease, session: Session, requests: list[Request], last: Outcomes, refused: Refused
    ) -> bool:
        """Record answers as they come, all but the ``last``. False when the model's files were written to meanwhile."""
        requests, kept = self._from_cache(lease, session, requests)
        self._record(lease, kept)
        limits = {request.row: _limit(request) for request in requests}
        for batch in session.answer(requests):
            if session.info.is_overwritten:
                return False
            self._keep(lease, batch)
            outcomes = [(result, limits.pop(result.row)) for result in batch]
            if not limits:
                last += outcomes
                continue
            counters = session.take_counters()
            if not self._record(lease, outcomes, counters):
                refused.add(outcomes, counters)
        return True

    def _may_answer(self, lease: Lease, session: Session) -> bool:
        """Whether the model that is loaded is the job's. The attempt names it."""
        info = session.info
        return self._patiently(lambda again: self._ledger.answered_by(lease, info.fingerprint, info.environment))

    def _give_back(self, lease: Lease, session: Session) -> None:
        """The files here are another model: the chunk waits for a worker with the right ones, where there may be one.

        It has not failed.
        """
        job_id = lease.chunk.job_id
        # Another worker may have been the first to say which model the job is for.
        _, wanted = self._ledger.model_of(job_id) or (lease.model, lease.model_fingerprint)
        words = self._tell_wrong(job_id, lease.model, wanted, session.info.fingerprint)
        if self._is_alone:
            self._ledger.stop(job_id, words, lease)
        self._release(lease, session)

    def _overwritten(self, lease: Lease, session: Session) -> None:
        """The files changed under the engine: what it says now is no model's answer. The next claim loads them anew."""
        log.error("job %s: the files of %s were written to while they were in use", lease.chunk.job_id, lease.model)
        self._release(lease, session)

    def _release(self, lease: Lease, session: Session) -> None:
        counters = session.counters()
        self._patiently(lambda again: self._ledger.release(lease, counters, self._hosts.slots))

    def _tell_wrong(self, job_id: str, model: str, wanted: str | None, found: str | None) -> str:
        words = wrong_model(model, wanted, found)
        if self._told_wrong.get(job_id, "") != found:
            self._told_wrong[job_id] = found
            _forget_oldest(self._told_wrong)
            log.error("job %s: %s", job_id, words)
        return words

    def _not_loaded(self, lease: Lease, problem: PromptmillError) -> None:
        """No attempt on this job can go better here. Any other error leaves the chunk to its next attempt."""
        ledger, job_id = self._ledger, lease.chunk.job_id
        log.error("job %s: %s", job_id, problem.message)
        if self._others_serve(lease.model):
            # One machine whose memory is full, or whose file is gone, must not end what others do well.
            wait_s = self._hosts.back_off()
            if not self._is_hopeless(job_id):
                ledger.release(lease)
                # Meanwhile this thread takes no chunk that another worker could run.
                self._stop.draining.wait(wait_s)
                return
        ledger.stop(job_id, problem.message, lease)
        ledger.release(lease)

    def _is_hopeless(self, job_id: str) -> bool:
        """Another host ended: whether so many did, one after the other, with no answer to the job between."""
        answers, which = self._ledger.progress(job_id).ok, self._hosts.restarts
        count, before, last = self._ends.get(job_id, (0, answers, -1))
        if answers != before:
            count = 0
        # Two chunks tell of one death.
        count += which != last
        self._ends[job_id] = count, answers, which
        _forget_oldest(self._ends)
        return count >= DEATHS_IN_A_ROW

    def _record(self, lease: Lease, outcomes: Outcomes, counters: EngineCounters | None = None) -> int:
        return self._patiently(lambda again: self._ledger.record(lease, outcomes, counters, maybe_stored=again))

    def _finish(self, lease: Lease, session: Session, last: Outcomes, refused: Refused) -> None:
        """Close the attempt: done, or given back when the ledger does not take its end."""
        ledger, slots, counters = self._ledger, self._hosts.slots, refused.counters.plus(session.counters())

        def close(again: bool) -> bool:
            if ledger.finish(lease, counters, slots, last, maybe_stored=again):
                return True
            return ledger.release(lease, counters, slots, [*refused.outcomes, *last])

        self._patiently(close)

    def _host_died(self, lease: Lease, last: Outcomes, death: HostDied) -> None:
        ledger = self._ledger
        if self._stop.abandoning.is_set():
            ledger.release(lease)
            return
        log.warning("chunk %s/%d: %s", lease.chunk.job_id, lease.chunk.number, death)
        self._record(lease, last)
        if self._patiently(lambda again: self._is_hopeless(lease.chunk.job_id)):
            words = f"the engine ended {DEATHS_IN_A_ROW} times in a row: {death}"
            self._patiently(lambda again: ledger.stop(lease.chunk.job_id, words, lease))
        self._patiently(lambda again: ledger.fail(lease, death.error_class, str(death)))

    def _broke(self, lease: Lease, problem: Exception) -> None:
        """A bug, or a row that the database will never take: a failure that is counted, as that of a host is."""
        what = f"{type(problem).__name__}: {first_line(problem)}"
        # Its message holds statements and their values, prompts and answers among them: only where it happened is told.
        log.error(
            "chunk %s/%d: internal error: %s\n%s",
            lease.chunk.job_id, lease.chunk.number, what, "".join(traceback.format_tb(problem.__traceback__)),
        )  # fmt: skip
        if self._stop.abandoning.is_set():
            self._ledger.release(lease)
            return
        self._patiently(lambda again: self._ledger.fail(lease, ErrorClass.INTERNAL, f"internal error: {what}"))

    def _from_cache(self, lease: Lease, session: Session, requests: list[Request]) -> tuple[list[Request], Outcomes]:
        """The requests whose answers are not known, and the answers of the others. Remembers the keys of the former.

        Keys are of what is loaded, not of what the job says.
        """
        info = session.info
        if not self._spec(lease.chunk.job_id)[0].use_cache or info.fingerprint is None:
            return requests, []
        answering = [info.fingerprint, info.environment]
        keys = {each.row: key for each in requests if (key := key_of(answering, each)) is not None}
        found = self._patiently(lambda again: look_up(self._ledger.db, keys))
        limits = {each.row: _limit(each) for each in requests}
        known = {each.row for each in found}
        self._keys[lease.chunk] = {row: key for row, key in keys.items() if row not in known}
        return [each for each in requests if each.row not in known], [(each, limits[each.row]) for each in found]

    def _keep(self, lease: Lease, batch: Sequence[Result]) -> None:
        """Put answers into the cache. It is only a cache: a database that does not take them now is no trouble."""
        keys = self._keys.get(lease.chunk)
        if keys:
            with contextlib.suppress(*PASSING):
                keep(
                    self._ledger.db,
                    [(keys[each.row], each) for each in batch if isinstance(each, Ok) and each.row in keys],
                )

    def _requests(self, lease: Lease) -> tuple[list[Request], list[Result]]:
        """The rows to be answered, and those that cannot even be rendered."""
        spec, template = self._spec(lease.chunk.job_id)
        usual, sharing = resolve_sampling(spec.sampling, {}), Sharing(spec.owner, spec.job_id)
        requests: list[Request] = []
        failures: list[Result] = []
        for row in self._ledger.pending(lease):
            try:
                # One object for all rows without parameters of their own: it is pickled once.
                sampling = resolve_sampling(spec.sampling, row.sampling) if row.sampling else usual
                requests.append(
                    to_request(
                        row.row, row.custom_id, row.input, row.meta, sampling, template, spec.system_prompt, sharing
                    )
                )
            except PromptmillError as problem:
                failures.append(Failed(row.row, ErrorClass.INVALID_REQUEST, problem.message))
        return requests, failures

    def _spec(self, job_id: str) -> tuple[JobSpec, Template | None]:
        """What never changes about a job: read and parsed once."""
        if job_id not in self._specs:
            spec = self._ledger.job_spec(job_id)
            task = parse_task(spec.task_text, spec.task_name or "task") if spec.task_text else None
            self._specs[job_id] = spec, task.template if task else None
            _forget_oldest(self._specs)
        return self._specs[job_id]


def wrong_model(model: str, wanted: str | None, found: str | None) -> str:
    """What is told where the files of a job's model are another model."""
    return (
        f"it is for the model {model} with the fingerprint {(wanted or 'none')[:12]}, and the files here are another "
        f"model: {(found or 'none')[:12]}"
    )


def _limit(request: Request) -> int:
    """Tokens that all answers of the request may have together, as ``results.max_tokens`` can hold them."""
    return min(request.sampling.max_tokens * request.sampling.n, LARGEST_WHOLE)


def _forget_oldest(of_jobs: OrderedDict[str, Any]) -> None:
    while len(of_jobs) > KEPT_JOBS:
        of_jobs.popitem(last=False)
