"""What is broken, and how. Each scenario submits a job, breaks something at a random moment and says what holds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from promptmill.queue.broker import KEY_PREFIX, Broker
from promptmill.queue.interactive_wire import live_queue
from promptmill.types import ChunkId
from promptmill_workers.host.socket_folder import FOLDER_PREFIX
from tests.faults.arena import (
    ENDED,
    ENDING_S,
    LEASE_S,
    MODEL,
    PROMPTMILL,
    Arena,
    Missed,
    Skipped,
    Violation,
    check,
    free_port,
    prompt_of,
    until,
)
from tests.faults.proxy import TROUBLES, Proxy
from tests.poolers import Pooler, pgbouncer
from tests.two_models import put

Scenario = Callable[[Arena, random.Random], None]


def _begin(
    arena: Arena, rng: random.Random, *, rows: int = 160, bad: dict[int, str] | None = None, latest: float = 0.7
) -> None:
    """A job under way, at a random moment of its life: a tenth to ``latest`` of its rows have a result.

    Where a job has ended before that was seen, one of twice its length is begun.
    """
    moment = rng.uniform(0.1, latest)
    for length in (rows, 2 * rows, 4 * rows, 8 * rows):
        arena.fresh()
        arena.start_workers()
        arena.submit(length, bad)
        try:
            arena.wait_for_results(int(length * moment))
        except Missed:
            continue
        return
    raise Missed(f"missed: four jobs of up to {length} rows had ended before anything was broken")


def _begin_in_redis(arena: Arena, rng: random.Random) -> None:
    """A job under way of which a part still waits in Redis: workers finish what they hold without it."""
    _begin(arena, rng, rows=320, latest=0.5)


def _require_unclaimed(arena: Arena) -> None:
    """A chunk still needs Redis, which has just been broken."""
    if not arena.rows("SELECT 1 FROM chunks WHERE state = 'queued'"):
        raise Missed("missed: every chunk was claimed before Redis was broken")


def _end(arena: Arena, *, lossy: bool = False) -> None:
    """``lossy``: attempts may have been lost with a part of what they counted."""
    arena.wait_for_end()
    check(arena, lossy=lossy)


#: Rows of a job of the demo model: some 15 seconds of an idle machine; and what they may take on a busy one.
DEMO_ROWS = 4000
UNDISTURBED_S = 600

#: Rows of a job whose model is replaced: it must still run when the other one has been loaded.
SWAPPED_ROWS = 1000

#: Jobs that are begun until a victim is caught while it holds a lease.
CATCHES = 5

#: Rows of a job that is one chunk; the model that takes 4 s for it; rounds of each who races for it, at least; and the
#: priority of a job that is given none.
CHUNK_ROWS = 16
SLOW_MODEL = MODEL.replace("token_s=0.05", "token_s=0.2")
RACE_ROUNDS = 3
DEFAULT_PRIORITY = 5

#: Leases that PostgreSQL is away for, where none is to outlast it.
AWAY_LEASES = 1.5

#: Exit codes of a command that did what was wished, or said in a sentence why it cannot be done now.
DONE_OR_REFUSED = (0, 2)

#: Chunks and attempts.
Held = list[tuple[int, int]]


def _catch(
    arena: Arena, rng: random.Random, of: Callable[[], list[psutil.Process]]
) -> tuple[psutil.Process, Held] | None:
    """One of these processes, suspended, and the leases its worker holds now; None when the job ended before."""
    deadline = time.monotonic() + 60
    while arena.state not in ENDED:
        if time.monotonic() > deadline:
            raise Violation("waited 60 s in vain until a worker holds a lease")
        victim = rng.choice(of())
        # A worker or its host: leases are the worker's.
        worker = victim.pid if victim.pid in {each.pid for each in arena.consumers()} else victim.ppid()
        victim.suspend()
        # What it has sent may still be committed.
        time.sleep(0.2)
        held = arena.held_by(worker)
        if held:
            return victim, held
        victim.resume()
        time.sleep(rng.uniform(0, 0.2))
    return None


def _hit(
    arena: Arena, rng: random.Random, of: Callable[[], list[psutil.Process]], begin: Callable[[], None] | None = None
) -> tuple[psutil.Process, Held]:
    """Begin jobs until one of these processes is suspended while its worker holds a lease."""
    for _ in range(CATCHES):
        begin() if begin else _begin(arena, rng)
        caught = _catch(arena, rng, of)
        if caught is not None:
            return caught
    raise Violation(f"missed: nobody held a lease in {CATCHES} jobs")


def _require(arena: Arena, held: Held, outcome: str) -> None:
    """The attempts that were hit ended as attempts that were hit do."""
    found = arena.outcomes(held)
    if set(found) != {outcome}:
        raise Violation(f"the attempts {held} that were hit ended as {found}, expected '{outcome}'")


def kill_worker(arena: Arena, rng: random.Random) -> None:
    victim, held = _hit(arena, rng, arena.consumers)
    victim.kill()
    _end(arena, lossy=True)
    _require(arena, held, "lost")


def kill_host(arena: Arena, rng: random.Random) -> None:
    victim, held = _hit(arena, rng, arena.hosts)
    victim.kill()
    _end(arena, lossy=True)
    _require(arena, held, "failed")


def kill_everything(arena: Arena, rng: random.Random) -> None:
    _begin(arena, rng)
    arena.stop_workers()
    arena.start_workers()
    _end(arena, lossy=True)


def suspend_worker(arena: Arena, rng: random.Random) -> None:
    victim, held = _hit(arena, rng, arena.consumers)
    time.sleep(LEASE_S * rng.uniform(1.1, 1.6))
    until(lambda: None not in arena.outcomes(held), "another worker has found the leases lost", 3 * LEASE_S)
    with contextlib.suppress(psutil.Error):
        victim.resume()
    _end(arena, lossy=True)
    _require(arena, held, "lost")


def redis_killed(arena: Arena, rng: random.Random) -> None:
    _begin_in_redis(arena, rng)
    arena.stop_redis(signal.SIGKILL)
    _require_unclaimed(arena)
    time.sleep(rng.uniform(0.1, 3))
    arena.start_redis()
    _end(arena)


def redis_empty(arena: Arena, rng: random.Random) -> None:
    _begin_in_redis(arena, rng)
    arena.stop_redis(signal.SIGKILL)
    _require_unclaimed(arena)
    time.sleep(rng.uniform(0.1, 3))
    arena.start_redis(empty=True)
    _end(arena)


def redis_flushed(arena: Arena, rng: random.Random) -> None:
    _begin_in_redis(arena, rng)
    for turn in range(3):
        with arena.redis() as client:
            client.flushall()
        if turn == 0:
            _require_unclaimed(arena)
        time.sleep(rng.uniform(0.1, 1))
    _end(arena)


def redis_hangs(arena: Arena, rng: random.Random) -> None:
    _begin_in_redis(arena, rng)
    with arena.redis() as client:
        hanging = client.connection_pool.get_connection()
        hanging.send_command("DEBUG", "SLEEP", 20)
        _require_unclaimed(arena)
        hanging.read_response()
    _end(arena)


def redis_connections_cut(arena: Arena, rng: random.Random) -> None:
    _begin_in_redis(arena, rng)
    for turn in range(5):
        with contextlib.suppress(redis.RedisError), arena.redis() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        if turn == 0:
            _require_unclaimed(arena)
        time.sleep(1)
    _end(arena)


def postgres_restarts(arena: Arena, rng: random.Random) -> None:
    _begin(arena, rng)
    arena.restart_postgres(rng.choice(["fast", "immediate"]), away_s=rng.uniform(0.1, 3))
    _end(arena)


def postgres_read_only(arena: Arena, rng: random.Random) -> None:
    """The server takes no changes for a while, as when a service that runs it finds its disk full."""
    _begin(arena, rng)
    arena.set_read_only(True)
    # Shorter than a lease: nothing is lost that has to be run again.
    time.sleep(rng.uniform(1, LEASE_S / 3))
    arena.set_read_only(False)
    _end(arena)
    if lost := arena.rows("SELECT number, attempt FROM attempts WHERE outcome <> 'done'"):
        raise Violation(f"attempts were given up: {lost}")


def postgres_away(arena: Arena, rng: random.Random) -> None:
    """The server takes no changes, or is stopped, for longer than a lease: what ran then may be run again."""
    _begin(arena, rng, rows=320, latest=0.5)
    read_only = rng.random() < 0.5
    if read_only:
        arena.set_read_only(True)
    before = _stored(arena)
    if not arena.rows("SELECT 1 FROM chunks WHERE state = 'leased'"):
        raise Missed("missed: no chunk ran when the database went away")
    if read_only:
        time.sleep(AWAY_LEASES * LEASE_S)
        arena.set_read_only(False)
    else:
        arena.restart_postgres("fast", away_s=AWAY_LEASES * LEASE_S)
    back_at = time.time()
    _end(arena, lossy=True)
    if changed := before - _stored(arena):
        raise Violation(f"results that were stored before have changed: {sorted(changed)[:5]}")
    again = arena.rows(f"SELECT number, attempt FROM attempts WHERE outcome <> 'done' AND started_at > {back_at}")
    if again:
        raise Violation(f"attempts were given up although the database was back: {again}")


def _stored(arena: Arena) -> set[tuple[Any, ...]]:
    """Each row's result, and the attempt that it is of."""
    return set(arena.rows("SELECT row, chunk, attempt, state, text FROM results"))


def postgres_connections_cut(arena: Arena, rng: random.Random) -> None:
    _begin(arena, rng)
    for _ in range(6):
        arena.cut_connections()
        time.sleep(rng.uniform(0.5, 1))
    _end(arena)


def real_answers(arena: Arena, rng: random.Random) -> None:
    """A real model: what it says must not depend on what was killed meanwhile."""
    undisturbed = {"JOBS_DATABASE_URL": f"sqlite:///{arena.folder / 'undisturbed.sqlite'}"}

    def begin() -> None:
        arena.fresh()
        arena.model = "demo"
        arena.start_workers()
        arena.submit(DEMO_ROWS, None, "--max-tokens", "6", "--param", "ignore_eos=true")
        arena.wait_for_results(rng.randint(100, 800))

    for _ in range(CATCHES):
        host, of_host = _hit(arena, rng, arena.hosts, begin)
        host.kill()
        time.sleep(rng.uniform(0.1, 1))
        caught = _catch(arena, rng, arena.consumers)
        if caught is not None:
            break
    else:
        raise Violation(f"missed: no second victim held a lease in {CATCHES} jobs")
    caught[0].kill()
    arena.wait_for_end(UNDISTURBED_S)
    # Of the host's worker some may have been lost with it before it could say that they failed.
    if not set(arena.outcomes(of_host)) <= {"failed", "lost"} or set(arena.outcomes(caught[1])) != {"lost"}:
        raise Violation(f"hit attempts ended as {arena.outcomes(of_host)} and {arena.outcomes(caught[1])}")
    environment, arena.environment = arena.environment, arena.environment | undisturbed
    path = str(arena.folder / "prompts.jsonl")
    given = ("--max-tokens", "6", "--param", "ignore_eos=true", "--slots", "4", "--device", "cpu", "--json")
    if not (arena.folder / "said.jsonl").exists():
        arena("run", path, "--model", "demo", *given, "-o", str(arena.folder / "said.jsonl"), timeout=UNDISTURBED_S)
    arena.environment = environment
    said = [json.loads(line)["text"] for line in (arena.folder / "said.jsonl").read_text().splitlines()]
    check(arena, answer=said.__getitem__, lossy=True)


def poison(arena: Arena, rng: random.Random) -> None:
    arena.fresh()
    arena.start_workers()
    # One bad request, or one in nearly every chunk.
    bad = dict.fromkeys(rng.sample(range(100), rng.choice([1, 6])), "CRASH")
    arena.submit(100, bad)
    arena.wait_for_end(240)
    check(arena, bad=bad, lossy=True)


def stall(arena: Arena, rng: random.Random) -> None:
    arena.fresh()
    arena.start_workers()
    bad = {rng.randrange(12): "STALL"}
    arena.submit(12, bad)
    arena.wait_for_end(150)
    check(arena, bad=bad, lossy=True)


def race(arena: Arena, rng: random.Random) -> None:
    """Ten workers and two reconcilers around one chunk, whose holder is killed: all of them see its lease run out."""
    arena.fresh()
    arena.model = SLOW_MODEL
    arena.start_workers(10)
    job = arena.submit(CHUNK_ROWS)
    if (chunks := arena.rows("SELECT count(*) FROM chunks")) != [(1,)]:
        raise Violation(f"missed: the job has {chunks[0][0]} chunks")
    ended = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        try:
            racing = [threads.submit(_reconcile_until, arena, ended) for _ in range(2)]
            racing.append(threads.submit(_publish_until, arena, job, ended))
            arena.wait_for_results(rng.randint(0, CHUNK_ROWS // 2))
            caught = _catch(arena, rng, arena.holders)
            if caught is None:
                raise Missed("missed: nobody was caught with the chunk")
            caught[0].kill()
            arena.wait_for_end()
        finally:
            ended.set()
    rounds = [each.result() for each in racing]
    if min(rounds) < RACE_ROUNDS:
        raise Violation(f"missed: reconcilers and publisher had only {rounds} rounds")
    check(arena, lossy=True)
    _require_two_attempts(arena)


def _require_two_attempts(arena: Arena) -> None:
    """However many saw that the lease had run out: it was taken back once, counted once and given out once."""
    found = arena.rows(
        "SELECT a.attempt, a.outcome, c.failures FROM attempts a JOIN chunks c ON c.number = a.number "
        "ORDER BY a.attempt"
    )
    if found != [(1, "lost", 1), (2, "done", 1)]:
        raise Violation(f"attempts, their outcomes and the chunk's failures are {found}")


def _reconcile_until(arena: Arena, ended: threading.Event) -> int:
    """Reconcile again and again; returns how often."""
    rounds = 0
    while not ended.is_set():
        arena("reconcile")
        rounds += 1
    return rounds


def _publish_until(arena: Arena, job: str, ended: threading.Event) -> int:
    """Several messages of the job's first chunk, again and again, for every worker at once; returns how often."""
    broker = Broker(arena.redis_url)
    rounds = 0
    while not ended.wait(0.2):
        broker.publish([ChunkId(job, 0)] * 20, arena.model, DEFAULT_PRIORITY)
        rounds += 1
    return rounds


def wrong_clock(arena: Arena, rng: random.Random) -> None:
    """One machine's clock is ten minutes off; leases go by the database's clock, timestamps by Redis'."""
    if shutil.which("faketime") is None:
        raise Skipped("faketime is not installed")
    arena.fresh()
    arena.start_workers(1)
    right = {each.pid for each in arena.consumers()}
    arena.start_workers(1, wait=False, prefix=("faketime", "-f", rng.choice(["+600s", "-600s"])), runtime="elsewhere")
    until(lambda: arena.alive() >= 2, "both are alive", 60)
    [wrong] = [each.pid for each in arena.consumers() if each.pid not in right]
    arena.submit(160)
    _end(arena)
    if not arena.chunks_done_by(wrong):
        raise Violation("missed: the worker with the wrong clock ran no chunk")


def clock_jumps(arena: Arena, rng: random.Random) -> None:
    """Somebody sets the clock of a worker's machine while it runs, forwards and back; then its host is started anew."""
    told = arena.folder / "clock"
    told.write_text("0")
    arena.fresh()
    arena.start_workers(1)
    right = {each.pid for each in arena.consumers()}
    arena.start_workers(1, wait=False, prefix=("env", *_faked(told)), runtime="elsewhere")
    until(lambda: arena.alive() >= 2, "both are alive", 60)
    [wrong] = [each for each in arena.consumers() if each.pid not in right]
    arena.submit(640)
    offset = f"SELECT clock_offset_s FROM workers WHERE pid = {wrong.pid}"
    hours = rng.sample([1, -1, 2], 3)
    for turn, hour in enumerate(hours):
        arena.wait_for_results(rng.randint(100 * turn + 20, 100 * turn + 100))
        told.write_text(str(3600 * hour))
        if turn == 1:
            for host in wrong.children():
                host.kill()
    # The worker's row says how wrong the clock is, however often it was set.
    until(lambda: abs(arena.rows(offset)[0][0] + 3600 * hours[-1]) < 60, "the worker's row tells of its clock", 30)
    _end(arena, lossy=True)
    if not arena.chunks_done_by(wrong.pid):
        raise Violation("missed: the worker with the wrong clock ran no chunk")


#: Imported by every Python that starts with its folder on its path: the wall clock is ahead by what a file says. Only
#: the wall clock is: the library of ``faketime`` cannot leave the other one alone where a program sleeps by it.
FAKED_CLOCK = """
import os, time
_time, _time_ns = time.time, time.time_ns
def _ahead_s():
    with open(os.environ["FAKED_CLOCK"]) as file:
        return int(file.read() or 0)
time.time = lambda: _time() + _ahead_s()
time.time_ns = lambda: _time_ns() + _ahead_s() * 10**9
"""


def _faked(told: Path) -> list[str]:
    """The environment in which the wall clock is ahead by the seconds that the file says."""
    folder = told.parent / "faked"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(FAKED_CLOCK)
    return [f"PYTHONPATH={folder}", f"FAKED_CLOCK={told}"]


#: Chats that are sent at once, twice what two workers take; tokens of each; and seconds in which all are answered.
CHATS, CHAT_TOKENS, CHATS_S = 40, 30, 60.0

#: Chats that wait when Redis is killed, at least.
FEW_CHATS = 12


def chats_survive_redis(arena: Arena, rng: random.Random) -> None:
    """Redis is killed and started again empty while chats wait and while others are answered."""
    arena.fresh(JOBS_FILES_DIR=str(arena.folder / "files"))
    arena.start_workers()
    with _server(arena) as url, ThreadPoolExecutor(CHATS) as threads:
        asked = [" ".join(f"w{chat}-{word}" for word in range(CHAT_TOKENS)) for chat in range(CHATS)]
        chats = [threads.submit(_chat, url, arena.model, text, chat % 2 == 0) for chat, text in enumerate(asked)]
        with arena.redis() as client:
            waiting = partial(client.llen, live_queue(arena.model))
            until(lambda: waiting() > FEW_CHATS, "chats wait", 30)
            moment = time.monotonic() + rng.uniform(0, 2.5)
            while time.monotonic() < moment and waiting() > FEW_CHATS:
                time.sleep(0.01)
            if not waiting():
                raise Missed("missed: every chat was taken before Redis was killed")
        arena.stop_redis(signal.SIGKILL)
        time.sleep(rng.uniform(0.1, 3))
        arena.start_redis(empty=True)
        back_at = time.monotonic()
        found = [each.result(timeout=3 * CHATS_S) for each in chats]
        took_s = time.monotonic() - back_at
    if wrong := [(text, answer) for text, answer in zip(asked, found, strict=True) if text != answer]:
        raise Violation(f"{len(wrong)} of {CHATS} chats have another answer: {wrong[:2]}")
    if took_s > CHATS_S:
        raise Violation(f"the last chat was answered {took_s:.0f} s after Redis was back")


def _chat(url: str, model: str, text: str, streamed: bool) -> str:
    """The answer, or what became of it."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=2 * CHATS_S) as client:
        asked: Any = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": CHAT_TOKENS}
        try:
            if not streamed:
                return str(client.chat.completions.create(**asked).choices[0].message.content)
            parts = client.chat.completions.create(**asked, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        except openai.OpenAIError as problem:
            return f"{type(problem).__name__}: {problem}"


@contextlib.contextmanager
def _server(arena: Arena) -> Iterator[str]:
    """The URL of an API server that runs."""
    port = free_port()
    with arena.log.open("ab") as log:
        process = subprocess.Popen([PROMPTMILL, "api", "--port", str(port)], env=_env(arena), stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthz", timeout=5):
            return True
        return False

    try:
        until(answers, "the server answers", 60)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(ENDING_S)


def proxied(arena: Arena, rng: random.Random) -> None:
    """A proxy before Redis and PostgreSQL that delays, cuts and half-closes."""
    arena.fresh()
    direct = arena.environment
    with Proxy(arena.redis_port, rng) as to_redis, Proxy(arena.postgres_socket(), rng) as to_postgres:
        url = sa.make_url(direct["JOBS_DATABASE_URL"]).set(host="127.0.0.1", port=to_postgres.port, query={})
        arena.environment = direct | {
            "JOBS_DATABASE_URL": url.render_as_string(hide_password=False),
            "JOBS_REDIS_URL": f"redis://127.0.0.1:{to_redis.port}/0",
        }
        arena.start_workers(2, wait=False)
        arena.environment = direct
        until(lambda: arena.alive() >= 2, "2 workers are alive", 60)
        arena.submit(240)
        # Each kind of trouble to each of both, in random order.
        for proxy, kind in rng.sample([(each, kind) for each in (to_redis, to_postgres) for kind in TROUBLES], 6):
            time.sleep(rng.uniform(0.2, 0.8))
            proxy.trouble(kind)
        if arena.state in ENDED:
            raise Missed("missed: the job had ended before the last trouble")
        _end(arena, lossy=True)


@contextlib.contextmanager
def _small_disk(arena: Arena, megabytes: int) -> Iterator[Path]:
    """A folder on a file system of its own."""
    folder = arena.folder / "small"
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        raise Skipped("no permission to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(folder: Path) -> Path:
    """Leave no room in the folder's file system; returns the file to remove."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        # More than there is room for, and no more than that should the folder be no small file system after all.
        for _ in range(256):
            file.write(b"x" * 65536)
        raise Violation("missed: the file system did not get full")
    return filler


def disk_full(arena: Arena, rng: random.Random) -> None:
    """An embedded run into a SQLite file on a full file system: it waits, and goes on when there is room."""
    with _small_disk(arena, megabytes=3) as folder:
        arena.fresh()
        arena.environment["JOBS_DATABASE_URL"] = f"sqlite:///{folder / 'jobs.sqlite'}"
        path = arena.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt_of(row)}) + "\n" for row in range(200)))
        said = arena.folder / "run.log"
        with said.open("wb") as log:
            process = subprocess.Popen(
                [PROMPTMILL, "run", str(path), "--model", MODEL, "--slots", "4"],
                env=_env(arena),
                stdout=log,
                stderr=log,
            )
        wanted = rng.randint(10, 120)
        until(lambda: _results_in(folder / "jobs.sqlite") >= wanted, f"{wanted} results", 60)
        filler = _fill(folder)
        time.sleep(rng.uniform(1, 4))
        filler.unlink()
        code = process.wait(timeout=90)
        assert code == 0, f"the run ended with {code} when there was room again: {said.read_text()[-600:]}"
        check(arena)


def log_disk_full(arena: Arena, rng: random.Random) -> None:
    """The workers' log, and with it what their hosts say, is on a full file system: they work on without a word."""
    with _small_disk(arena, megabytes=1) as folder:
        arena.log = folder / "workers.log"
        try:
            _begin(arena, rng)
            _fill(folder)
            before = arena.log.stat().st_size
            # What loses its host has much to say.
            rng.choice(arena.hosts()).kill()
            _end(arena, lossy=True)
            if (grown := arena.log.stat().st_size - before) > 4096:
                raise Violation(f"missed: the log still grew by {grown} bytes")
        finally:
            arena.stop_workers()
            arena.log = arena.folder / "workers.log"


def embedded_run(arena: Arena, rng: random.Random) -> None:
    """PostgreSQL is away for a few seconds during an embedded run, which waits for it as workers do."""
    arena.fresh()
    path = arena.folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt_of(row)}) + "\n" for row in range(200)))
    said = arena.folder / "run.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [PROMPTMILL, "run", str(path), "--model", MODEL, "--slots", "4"], env=_env(arena), stdout=log, stderr=log
        )
    try:
        for mode in rng.sample(["fast", "immediate"], 2):
            arena.wait_for_results(arena.rows("SELECT count(*) FROM results")[0][0] + rng.randint(10, 40))
            arena.restart_postgres(mode, away_s=rng.uniform(1, 4))
        code = process.wait(timeout=90)
    finally:
        process.kill()
        process.wait(ENDING_S)
    if code != 0:
        raise Violation(f"the run ended with {code}: {said.read_text()[-600:]}")
    check(arena)


def _results_in(path: Path) -> int:
    """Results in a SQLite file; 0 while it has no tables yet."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM results").fetchone()[0])
    return 0


def out_of_memory(arena: Arena, rng: random.Random) -> None:
    # Early in a longer job: a host that gets no further chunk needs no further memory.
    _begin(arena, rng, rows=400, latest=0.3)
    victim = rng.choice(arena.hosts())
    victim.rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
    _end(arena, lossy=True)
    if victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        raise Violation("missed: the host got by without memory")


def delivered_twice(arena: Arena, rng: random.Random) -> None:
    """Every message again, in random order, from another process."""
    _begin(arena, rng)
    for _ in range(6):
        _send_again(arena, rng)
        time.sleep(rng.uniform(0.1, 0.6))
    _end(arena)


def _send_again(arena: Arena, rng: random.Random) -> None:
    """Every message that waits, in random order."""
    with arena.redis() as client:
        for key in client.scan_iter(f"{KEY_PREFIX}bulk.*"):
            if client.type(key) == b"list":
                messages = client.lrange(key, 0, -1)
                rng.shuffle(messages)
                if messages:
                    client.rpush(key, *messages)


def commands_at_random(arena: Arena, rng: random.Random) -> None:
    bad = dict.fromkeys(rng.sample(range(160), 3), "FAIL")
    _begin(arena, rng, bad=bad)
    commands = ["pause", "resume", "reconcile", "retry"]
    # A cancelled job stays so, whatever comes after it.
    commands += ["cancel"] if rng.random() < 0.3 else []
    for _ in range(5):
        command = rng.choice(commands)
        if command == "reconcile":
            arena(command)
        else:
            arena(command, "@last", codes=DONE_OR_REFUSED)
        time.sleep(rng.uniform(0.0, 0.5))
    arena("resume", "@last", codes=DONE_OR_REFUSED)
    if arena.state == "cancelled":
        time.sleep(2)
        check(arena, bad=bad, state="cancelled")
        return
    arena.wait_for_end()
    arena("retry", "@last")
    arena.wait_for_end()
    check(arena, bad=bad)
    # Once more where a retry of those before came after the job's end.
    if len(arena.rows("SELECT DISTINCT row FROM retries WHERE by_hand")) != len(bad):
        raise Violation("the retried errors were not kept")


def submission_killed(arena: Arena, rng: random.Random) -> None:
    arena.fresh()
    arena.start_workers()
    path = arena.folder / "large.jsonl"
    path.write_text("".join(f'{{"prompt": "row {row}"}}\n' for row in range(200_000)))
    process = subprocess.Popen(
        [PROMPTMILL, "submit", str(path), "--model", "echo"], env=_env(arena), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(rng.uniform(0.3, 3))
    process.kill()
    process.wait(ENDING_S)
    half = arena.rows("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM requests)")
    assert half in ([(0, 0)], [(1, 200_000)]), f"half of a job is stored: {half}"
    arena("cancel", "@last", codes=DONE_OR_REFUSED)
    arena.submit(60)
    _end(arena)


def wrong_model(arena: Arena, rng: random.Random) -> None:
    """Another model takes the place of the job's file: one of two workers loads it, from its start or anew."""
    arena.fresh()
    path = arena.folder / "model.gguf"
    put(path, right=True)
    arena.model = str(path)
    from_the_start = rng.random() < 0.5
    arena.start_workers(1 if from_the_start else 2)
    job = arena.submit(SWAPPED_ROWS, None, "--max-tokens", "6", "--param", "ignore_eos=true")
    right = arena.rows("SELECT model_fingerprint FROM jobs")[0][0]
    arena.wait_for_results(rng.randint(1, 100))
    put(path, right=False)
    if from_the_start:
        arena.start_workers(1, wait=False, runtime="elsewhere")
    else:
        rng.choice(arena.hosts()).kill()
    until(
        lambda: bool(arena.rows(f"SELECT 1 FROM workers WHERE model_fingerprint <> '{right}'")),
        "the other is loaded",
        60,
    )
    if arena.state in ENDED:
        raise Missed("missed: the job had ended before another model was loaded")
    arena.wait_for_end(UNDISTURBED_S)
    if "the files here are another model" not in arena.log.read_text(errors="replace").partition(job)[2]:
        raise Missed("missed: no worker with another model was given a chunk")
    put(path, right=True)
    said = _said_by(arena, path)
    check(arena, answer=said.__getitem__, lossy=True)
    if others := arena.rows(f"SELECT * FROM attempts WHERE outcome = 'done' AND model_fingerprint <> '{right}'"):
        raise Violation(f"attempts were answered by another model: {others}")
    if failed := arena.rows("SELECT number, attempt FROM attempts WHERE outcome = 'failed'")[2:]:
        raise Violation(f"more than the chunks of the killed host failed: {failed}")


def _said_by(arena: Arena, path: Path) -> list[str]:
    """What a run that nobody disturbs answers to the last job's prompts."""
    environment, arena.environment = (
        arena.environment,
        arena.environment | {"JOBS_DATABASE_URL": f"sqlite:///{arena.folder / 'right.sqlite'}"},
    )
    out = str(arena.folder / "right.jsonl")
    given = ("--max-tokens", "6", "--param", "ignore_eos=true", "--slots", "4", "--device", "cpu", "--json", "-o", out)
    arena("run", str(arena.folder / "prompts.jsonl"), "--model", str(path), *given, timeout=UNDISTURBED_S)
    arena.environment = environment
    return [json.loads(line)["text"] for line in Path(out).read_text().splitlines()]


#: Programs that run in a pid namespace of their own.
ELSEWHERE = ("unshare", "--pid", "--fork", "--mount-proc")


def other_namespace(arena: Arena, rng: random.Random) -> None:
    """A worker of another container that shares the temporary folder starts beside live hosts, again and again."""
    if shutil.which(ELSEWHERE[0]) is None or subprocess.run([*ELSEWHERE, "true"], check=False).returncode != 0:
        raise Skipped("no permission to make a pid namespace")
    _begin(arena, rng, rows=320, latest=0.3)
    ours = {each.pid for each in arena.consumers()}
    hosts = {each.pid for each in arena.hosts()}
    folders = [each for pid in ours for each in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}{pid}-*")]
    if len(folders) != len(ours):
        raise Violation(f"missed: {len(ours)} workers have {len(folders)} folders of sockets")
    arena.start_workers(1, wait=False, prefix=ELSEWHERE, runtime="elsewhere")
    until(lambda: arena.alive() >= len(ours) + 1, "the other one is alive too", 60)
    if gone := [each.name for each in folders if not each.is_dir()]:
        raise Violation(f"folders of live hosts were removed: {gone}")
    _end(arena)
    if hosts - {each.pid for each in arena.hosts()}:
        raise Violation("a host was lost")
    _require_undisturbed(arena)


def _require_undisturbed(arena: Arena) -> None:
    if lost := arena.rows("SELECT number, attempt, outcome FROM attempts WHERE outcome <> 'done'"):
        raise Violation(f"attempts were given up: {lost}")


#: Rows of the job that is forgotten; its id, which sorts before all others; and its task.
FORGOTTEN_ROWS = 60_000
FORGOTTEN = "00000000000000000000000000"
SCORED_TASK = """
task: words
prompt: {user: "{{ input.prompt }}"}
output:
  schema: {type: object, required: [is_ad], properties: {is_ad: {type: boolean}}}
scores: [{exact: is_ad}]
"""

#: Leases after the death of a worker by which its chunks are taken back, on a busy machine: 1.2 on an idle one.
TAKEOVER_LEASES = 2.0


def forgetting_beside_recovery(arena: Arena, rng: random.Random) -> None:
    """A worker dies while the texts of a large job wait to be scored and forgotten, and while that is done."""
    _begin(arena, rng, rows=1600, latest=0.12)
    _add_forgotten(arena)
    with ThreadPoolExecutor(1) as threads:
        # As a person or the API does it; workers do not.
        forgetting = threads.submit(arena, "reconcile", timeout=UNDISTURBED_S) if rng.random() < 0.5 else None
        time.sleep(rng.uniform(0.5, 2))
        caught = _catch(arena, rng, arena.consumers)
        if caught is None:
            raise Missed("missed: no worker held a lease")
        caught[0].kill()
        killed = time.monotonic()
        until(lambda: None not in arena.outcomes(caught[1]), "the chunks are taken back", 60)
        took_s = time.monotonic() - killed
        if took_s > TAKEOVER_LEASES * LEASE_S:
            raise Violation(f"the chunks of a dead worker were taken back after {took_s:.1f} s")
        if forgetting is not None:
            forgetting.result()
            _require_forgotten(arena)
    arena("rm", FORGOTTEN, "--yes")
    _end(arena, lossy=True)


def _add_forgotten(arena: Arena) -> None:
    """A scored job of the queue that ended more than an hour ago and is to keep no texts."""
    series = f"generate_series(0, {FORGOTTEN_ROWS - 1}) AS s(n)"
    arena.change(
        "INSERT INTO jobs (id, state, mode, store, dataset_name, dataset_sha256, dataset_format, model, task_name, "
        'task_text, task_sha256, sampling, priority, "rows", env, submitted_at, finished_at) VALUES '
        f"('{FORGOTTEN}', 'completed', 'queue', 'none', 'd', '0', 'jsonl', 'echo', 'words', '{SCORED_TASK}', '0', "
        f"'{{}}', 5, {FORGOTTEN_ROWS}, '{{}}', 1.0, extract(epoch FROM now()) - 4000)",
        'INSERT INTO requests (job_id, "row", custom_id, input, expected) SELECT '
        f"'{FORGOTTEN}', n, 'r' || n, '{{\"prompt\": \"secret\"}}', '{{\"is_ad\": true}}' FROM {series}",
        'INSERT INTO results (job_id, "row", state, text, finish_reason, prompt_tokens, cached_tokens, output_tokens, '
        "committed_at, attempt) SELECT "
        f"'{FORGOTTEN}', n, 'ok', '{{\"is_ad\": true}}', 'stop', 1, 0, 1, 1.0, 1 FROM {series}",
    )


def _require_forgotten(arena: Arena) -> None:
    [(texts, scored)] = arena.rows(
        f"SELECT (SELECT count(*) FROM requests WHERE job_id = '{FORGOTTEN}' AND input IS NOT NULL), "
        f"(SELECT count(*) FROM scores s JOIN score_runs r ON r.id = s.score_run_id WHERE r.job_id = '{FORGOTTEN}')"
    )
    if (texts, scored) != (0, FORGOTTEN_ROWS):
        raise Violation(f"{texts} texts are left, {scored} rows are scored")


def behind_pgbouncer(arena: Arena, rng: random.Random) -> None:
    """Four workers behind pgbouncer in transaction mode, with fewer servers than connections; then these are cut."""
    if pgbouncer() is None:
        raise Skipped("pgbouncer is not installed")
    arena.fresh()
    direct = arena.environment
    with Pooler(direct["JOBS_DATABASE_URL"]) as pooler:
        arena.environment = direct | {"JOBS_DATABASE_URL": pooler.url}
        arena.start_workers(4)
        arena.submit(640)
        # What looks on does so past the pooler.
        arena.environment = direct
        arena.wait_for_results(rng.randint(60, 400))
        _require_undisturbed(arena)
        arena.cut_connections()
        _end(arena, lossy=True)
        arena.stop_workers()


def _env(arena: Arena) -> dict[str, str]:
    return dict(os.environ) | arena.environment


#: By their numbers in the table of tests/faults/README.md.
SCENARIOS: dict[int, Scenario] = {
    1: kill_worker, 2: kill_host, 3: kill_everything, 4: suspend_worker, 5: redis_killed, 6: redis_empty,
    7: redis_flushed, 8: redis_hangs, 9: redis_connections_cut, 10: postgres_restarts, 11: postgres_connections_cut,
    12: proxied, 13: disk_full, 14: poison, 15: stall, 16: out_of_memory, 17: race, 18: wrong_clock,
    19: delivered_twice, 20: commands_at_random, 21: submission_killed, 22: real_answers,
    23: embedded_run, 24: log_disk_full, 25: postgres_read_only,
    26: postgres_away, 27: wrong_model, 28: clock_jumps, 29: chats_survive_redis,
    30: other_namespace, 31: forgetting_beside_recovery, 32: behind_pgbouncer,
}  # fmt: skip
