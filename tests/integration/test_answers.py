"""Cached answers, verified answers and the bench, with the installed command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.conftest import Command, Completed


def ok(done: Completed, code: int = 0) -> Completed:
    assert done.code == code, done.err
    return done


def read(done: Completed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok(done).out)
    return found


def answers_of(command: Command, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ok(command("results", job)).out.splitlines()]


def lines(path: Path, *records: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    return str(path)


def test_a_second_job_takes_its_answers_from_the_cache(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"word {n}", "max_tokens": 4} for n in range(20)),
                 {"prompt": "word 1", "temperature": 1.0, "seed": 3, "max_tokens": 4})  # fmt: skip
    first = read(command("run", data, "--model", "demo", "--cache", "--json"))
    second = read(command("run", data, "--model", "demo", "--cache", "--json"))

    answers = [answers_of(command, job["job_id"]) for job in (first, second)]
    assert [each["text"] for each in answers[0]] == [each["text"] for each in answers[1]]
    assert not any(each.get("deduplicated") for each in answers[0])
    assert [each.get("deduplicated", False) for each in answers[1]] == [True] * 20 + [False]
    assert second["output_tokens"] == answers[1][20]["output_tokens"]
    assert not [check for check in second["checks"] if check["ok"] is False]


def test_other_parameters_are_other_answers(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", {"prompt": "word"})
    ok(command("run", data, "--model", "demo", "--cache", "--max-tokens", "2"))
    found = read(command("run", data, "--model", "demo", "--cache", "--max-tokens", "3", "--json"))

    assert found["output_tokens"] > 0


def test_verify_finds_no_difference_and_says_so(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"is this an ad? number {n}", "max_tokens": 6} for n in range(12)),
                 {"prompt": "warm", "temperature": 1.0})  # fmt: skip
    ok(command("run", data, "--model", "echo"))

    found = read(command("verify", "@last", "--sample", "13", "--json"))

    assert (found["compared"], found["left_out"], found["mismatches"]) == (12, 1, 0)
    assert found["sums"] == []


def test_verify_shows_a_changed_answer_and_a_wrong_sum(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"say {n}"} for n in range(4)))
    command("run", data, "--model", "echo")
    engine = sa.create_engine(command.environment["JOBS_DATABASE_URL"])
    with engine.begin() as db:
        db.execute(sa.text("UPDATE results SET text = 'say what', output_tokens = 9 WHERE row = 2"))
    engine.dispose()

    found = ok(command("verify", "@last"), code=1)

    assert "1 of 4 answers differ" in found.out
    assert "row 2, character 4: 'what' stored, '2' alone" in found.out
    assert "chunk 0 counts 4 ok" in found.out


def test_verify_needs_a_job(command: Command) -> None:
    assert "no job" in ok(command("verify", "@last"), code=2).err


@pytest.mark.slow
def test_the_bench_measures_three_ways(command: Command) -> None:
    found = command("bench", "--model", "demo", "--workload", "json", "--requests", "6", "--slots", "2", "--json")

    bare, whole = read(found)["json"]
    assert (bare["name"], whole["name"]) == ("bare engine", "whole job")
    assert bare["output_tokens"] == whole["output_tokens"] > 0
    assert set(bare["budget_s"]) == {"prefill", "decode", "sampling", "grammar", "Python"}
    assert whole["budget_s"]["decode"] > 0


def test_a_peer_that_is_none_is_an_error(command: Command) -> None:
    found = command("bench", "--model", "echo", "--workload", "short", "--requests", "2", "--peer", "localhost:1")

    assert found.code == 2
    assert "not an address" in found.err
