"""Pausing, retrying, time limits and asking twice, with the installed command."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect
from promptmill.ledger import Ledger
from promptmill.types import ErrorClass, Failed
from tests.conftest import Command, wait_until


def dataset(folder: Path, *prompts: str) -> str:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_timeouts_are_tried_three_times_and_then_by_hand(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, "a b", "a b c d e f g h i j k l m n o p q r s t")
    first = command("run", path, "--model", "echo:token_s=0.05", "--timeout", "0.3", "--json")
    report = json.loads(first.out)
    assert (report["ok"], report["errors"]) == (1, 1), first.err
    kept = "SELECT row, error_class, by_hand FROM retries ORDER BY chunk"
    assert rows_in(command, kept) == [(1, "timeout", 0), (1, "timeout", 0)]
    assert command("retry", "@last", "--class", "grammar").out.endswith("has no errors of class grammar to run again\n")
    again = command("retry", "@last", "--class", "timeout", "--json")
    assert json.loads(again.out)["errors"] == 1, again.err
    # By hand it begins anew: three more tries.
    assert rows_in(command, kept) == [(1, "timeout", 0), (1, "timeout", 0), (1, "timeout", 1), *[(1, "timeout", 0)] * 2]
    assert command("retry", "@last", "--class", "tiemout").code == 2
    nothing = command("retry", "@last", "--class", "grammar", "--json")
    assert json.loads(nothing.out)["rows"] == 0


def rows_in(command: Command, query: str) -> list[tuple[object, ...]]:
    engine = connect(command.environment["JOBS_DATABASE_URL"])
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(sa.text(query))]
    engine.dispose()
    return found


def test_a_pause_from_elsewhere_lets_what_runs_end(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, *[f"one two three four five {row}" for row in range(120)])
    # Leaving the block waits for the process, whatever went wrong inside.
    with command.start("run", path, "--model", "echo:token_s=0.2", "--slots", "8") as process:
        wait_until(lambda: state_of_last(command) == "running", "the job runs")
        assert command("pause", "@last").code == 0
        assert process.wait(timeout=60) == 130
    assert state_of_last(command) == "paused"
    assert command("pause", "@last").out.endswith("was paused already\n")
    assert rows_in(command, "SELECT count(*) FROM results WHERE state = 'error'") == [(0,)]
    assert command("resume", "@last").code == 0
    assert rows_in(command, "SELECT count(*) FROM results WHERE state = 'ok'") == [(120,)]
    assert command("pause", "@last").code == 2


def state_of_last(command: Command) -> str | None:
    done = command("status", "@last", "--json")
    return str(json.loads(done.out)["state"]) if done.code == 0 else None


def test_a_job_ends_at_its_time_limit(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, *(f"a b c d e f g h i {number}" for number in range(200)))
    done = command("run", path, "--model", "echo:token_s=0.2", "--slots", "1", "--time-limit", "2s")
    assert done.code == 1
    assert "expired: over its time limit" in done.err


def test_a_deadline_that_has_passed_is_refused_and_nothing_stored(command: Command, tmp_path: Path) -> None:
    done = command("run", dataset(tmp_path, "a"), "--model", "echo", "--deadline", "2020-01-01")
    assert done.code == 2
    assert "--deadline 2020-01-01 has passed" in done.err
    assert json.loads(command("list", "--json").out) == []


@pytest.mark.parametrize("choice", ["fail", "attach"])
def test_asking_the_same_twice(command: Command, tmp_path: Path, choice: str) -> None:
    path = dataset(tmp_path, "a", "b")
    assert command("run", path, "--model", "echo", "--if-exists", choice, "--json").code == 0
    second = command("run", path, "--model", "echo", "--if-exists", choice, "--json")
    assert len(json.loads(command("list", "--json").out)) == 1
    assert second.code == (2 if choice == "fail" else 0), second.err
    assert command("run", path, "--model", "echo", "--max-tokens", "7", "--if-exists", "fail").code == 0
    assert len(json.loads(command("list", "--json").out)) == 2


def at_a_terminal(command: Command, answer: str, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed of a command whose person types ``answer``."""
    master, slave = pty.openpty()
    process = command.start(*arguments, terminal=slave)
    os.close(slave)
    os.write(master, f"{answer}\n".encode())
    said = b""
    # A terminal that nobody has open any more is an error to read from.
    with contextlib.suppress(OSError):
        while more := os.read(master, 4096):
            said += more
    os.close(master)
    return process.wait(timeout=60), said.decode()


def test_a_person_is_asked_before_the_same_is_submitted_again(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, "a", "b")
    assert command("run", path, "--model", "echo").code == 0
    code, said = at_a_terminal(command, "attach", "submit", path, "--model", "echo")
    assert code == 0
    assert "asks the same and is completed" in said
    assert "promptmill report" in said
    code, said = at_a_terminal(command, "fail", "submit", path, "--model", "echo")
    assert code == 2
    assert len(json.loads(command("list", "--json").out)) == 1


def test_no_worker_is_waited_for_by_who_attaches_to_an_embedded_job(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, *[f"one two three {row}" for row in range(1000)])
    with command.start("run", path, "--model", "echo:token_s=0.2") as process:
        wait_until(lambda: state_of_last(command) == "running", "the job runs")
        elsewhere = Command(command.folder, {**command.environment, "JOBS_RUNTIME_DIR": str(tmp_path / "other")})
        taken = elsewhere("resume", "@last")
        assert taken.code == 2
        assert f"is being run by process {process.pid} on " in taken.err
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    done = command("submit", path, "--model", "echo:token_s=0.2", "--if-exists", "attach")
    assert done.code == 2
    assert "is paused on one machine" in done.err


def test_a_full_queue_refuses_with_the_number(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, *["a"] * 10)
    full = Command(command.folder, {**command.environment, "JOBS_MAX_QUEUED_REQUESTS": "9"})
    done = full("submit", path, "--model", "echo")
    assert done.code == 2
    assert "0 requests wait, and 10 more would exceed 9" in done.err
    assert json.loads(command("list", "--json").out) == []


@pytest.fixture
def without_redis(command: Command) -> Command:
    """The command while nothing listens where Redis should be."""
    return Command(command.folder, {**command.environment, "JOBS_REDIS_URL": "redis://127.0.0.1:1/0"})


def says_that_it_is_stored(err: str, job_id: str) -> bool:
    return "warning: cannot reach Redis" in err and f"Job {job_id} is stored, and nothing of it is lost" in err


def test_a_job_submitted_without_redis_is_accepted(without_redis: Command, tmp_path: Path) -> None:
    done = without_redis("submit", dataset(tmp_path, "a"), "--model", "echo", "--json")
    assert done.code == 0, done.err
    job_id = json.loads(done.out)["job_id"]
    assert rows_in(without_redis, "SELECT id, state FROM jobs") == [(job_id, "queued")]
    assert says_that_it_is_stored(done.err, job_id)


def test_waiting_begins_although_redis_is_away(without_redis: Command, tmp_path: Path) -> None:
    with without_redis.start("submit", dataset(tmp_path, "a"), "--model", "echo", "--wait") as process:
        log = next(path for path in tmp_path.glob("*.log"))
        wait_until(lambda: "is stored" in log.read_text() or process.poll() is not None, "the warning")
        assert process.poll() is None
        assert without_redis("cancel", "@last").code == 0
        assert process.wait(timeout=60) == 1


def test_a_job_is_resumed_and_retried_without_redis(without_redis: Command, tmp_path: Path) -> None:
    job_id = json.loads(without_redis("submit", dataset(tmp_path, "a"), "--model", "echo", "--json").out)["job_id"]
    assert without_redis("pause", job_id).code == 0
    unpublish(without_redis)
    resumed = without_redis("resume", job_id, "--json")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"job_id": job_id, "state": "queued"})
    assert says_that_it_is_stored(resumed.err, job_id)
    fail_every_row(without_redis)
    retried = without_redis("retry", job_id, "--json")
    assert retried.code == 0, retried.err
    assert json.loads(retried.out) == {"job_id": job_id, "rows": 1, "state": "queued"}
    assert says_that_it_is_stored(retried.err, job_id)


def unpublish(command: Command) -> None:
    """What a reconciler would do with messages that are lost."""
    engine = connect(command.environment["JOBS_DATABASE_URL"])
    (job_id,) = rows_in(command, "SELECT id FROM jobs")[0]
    assert Ledger(engine).unpublish(str(job_id), -60) == 1
    engine.dispose()


def fail_every_row(command: Command) -> None:
    """What a worker would do whose requests all fail."""
    engine = connect(command.environment["JOBS_DATABASE_URL"])
    ledger = Ledger(engine)
    (job_id,) = rows_in(command, "SELECT id FROM jobs")[0]
    lease = ledger.claim_next(str(job_id), "test")
    assert lease is not None
    failed = [(Failed(each.row, ErrorClass.INTERNAL, "no"), 1) for each in ledger.pending(lease)]
    assert ledger.finish(lease, last=failed)
    engine.dispose()


def test_a_job_that_another_process_holds_is_not_opened_for_a_retry(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, "a b c d e f g h i j k l m n o p q r s t")
    done = command("run", path, "--model", "echo:token_s=0.05", "--timeout", "0.1", "--json")
    assert done.code == 1, done.err
    job_id = json.loads(done.out)["job_id"]
    before = rows_in(command, "SELECT state, finished_at FROM jobs")
    with open(tmp_path / "run" / f"job-{job_id}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = command("retry", "@last")
    assert refused.code == 2
    assert "is being run by process" in refused.err
    assert rows_in(command, "SELECT state, finished_at FROM jobs") == before
    assert rows_in(command, "SELECT count(*) FROM retries WHERE by_hand") == [(0,)]
