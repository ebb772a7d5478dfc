"""Pausing, retrying, time limits and asking twice, with the installed command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.database import connect
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
    assert rows_in(command, "SELECT count(*) FROM retries WHERE by_hand") == [(1,)]
    assert command("retry", "@last", "--class", "tiemout").code == 2


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


def test_a_full_queue_refuses_with_the_number(command: Command, tmp_path: Path) -> None:
    path = dataset(tmp_path, *["a"] * 10)
    full = Command(command.folder, {**command.environment, "JOBS_MAX_QUEUED_REQUESTS": "9"})
    done = full("submit", path, "--model", "echo")
    assert done.code == 2
    assert "0 requests wait, and 10 more would exceed 9" in done.err
    assert json.loads(command("list", "--json").out) == []
