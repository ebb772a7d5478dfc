"""Cached answers, verified answers and the bench, with the installed command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa

from tests.conftest import Command, Completed


def ok(done: Completed, code: int = 0) -> Completed:
    assert done.code == code, done.err
    return done


def read(done: Completed) -> Any:
    return json.loads(ok(done).out)


def answers_of(command: Command, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ok(command("results", job)).out.splitlines()]


def lines(path: Path, *records: Mapping[str, object]) -> str:
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
    assert (second["ok"], second["copied"]) == (21, 20)


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
    assert found["left_out_rows"] == [{"row": 12, "reason": "drawn without a seed"}]


@pytest.mark.parametrize("option", ["--repeat=2", "--cache"])
def test_copied_answers_are_no_wrong_sum(command: Command, tmp_path: Path, option: str) -> None:
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"say {n % 2}"} for n in range(4)))
    for _ in range(2):
        ok(command("run", data, "--model", "echo", option))
    assert read(command("verify", "@last", "--json"))["sums"] == []


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
    asked = ("--workload", "json", "--requests", "6", "--slots", "2", "--repeat", "2")
    found = command("bench", "--model", "demo", *asked, "--json")

    bare, whole = read(found)["json"]
    assert (bare["name"], whole["name"]) == ("bare engine", "whole job")
    assert bare["output_tokens"] == whole["output_tokens"] > 0
    assert set(bare["budget_s"]) == {"prefill", "decode", "sampling", "grammar", "Python"}
    assert whole["budget_s"]["decode"] > 0
    assert set(whole["budget_s"]) == {"prefill", "decode", "Python", "waiting"}
    assert len(bare["runs"]) == len(whole["runs"]) == 2
    assert bare["output_tps_min"] <= bare["output_tps"] <= bare["output_tps_max"]


def test_a_peer_that_is_none_is_an_error(command: Command) -> None:
    found = command("bench", "--model", "echo", "--workload", "short", "--requests", "2", "--peer", "localhost:1")

    assert found.code == 2
    assert "not an address" in found.err

    away = command("bench", "--model", "echo", "--peer", "http://127.0.0.1:1")

    assert away.code == 2
    assert "no server answers there" in away.err
    assert "bare engine" not in away.err


@pytest.mark.parametrize(
    ("option", "error_class"), [("oom_on", "oom"), ("stall_on", "stall"), ("crash_on", "engine_crash")]
)
def test_the_request_that_ends_its_engine_ends_alone(
    command: Command, tmp_path: Path, option: str, error_class: str
) -> None:
    command.environment["JOBS_STALL_TIMEOUT_S"] = "2"
    data = lines(tmp_path / "a.jsonl", {"prompt": "a BAD one"}, {"prompt": "b"}, {"prompt": "c"})

    found = read(command("run", data, "--model", f"echo:{option}=BAD", "--json"))

    assert (found["ok"], found["errors_by_class"]) == (2, {error_class: 1})


def test_a_schema_file_binds_every_answer(command: Command, tmp_path: Path) -> None:
    ad = {"ad": {"type": "boolean"}}
    form = {"type": "object", "properties": ad, "required": ["ad"], "additionalProperties": False}
    (tmp_path / "form.json").write_text(json.dumps(form), encoding="utf-8")
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"comment {n}"} for n in range(5)))

    ok(command("run", data, "--model", "demo", "--schema", str(tmp_path / "form.json")))

    assert all(set(json.loads(each["text"])) == {"ad"} for each in answers_of(command, "@last"))


def test_choices_come_with_probabilities(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"prompt": f"comment {n}"} for n in range(3)))

    ok(command("run", data, "--model", "demo", "--choice", "ad", "--choice", "not ad"))

    for each in answers_of(command, "@last"):
        assert each["text"] in ("ad", "not ad")
        assert sum(each["choice_probs"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--param", "n=0"], "'n' must be a whole number of 1 or more"),
        (["--param", "nonsense"], "not NAME=VALUE"),
        (["--regex", "(a"], "unclosed group"),
        (["--schema", "missing.json"], "--schema missing.json"),
        (["--choice", "a", "--regex", "b"], "an answer is bound by one of them"),
        (["--param", "top_logprobs=3"], "without 'logprobs'"),
        (["--timeout", "-1"], "--timeout must be a number above 0"),
        (["--schema", "/dev/null"], "--schema must be a JSON schema"),
        (["--temperature", "0", "--param", "temperature=1"], "--param temperature says again what --temperature says"),
        (["--stop", "a", "--choice", "a"], "--stop is given with --choice"),
        (["-n", "2"], "needs a 'temperature' above 0"),
        (["--model", "echo:foo=1"], "echo has no option 'foo'"),
        (["--model", "demo", "--slots", "100000"], "at most 248 slots, not 100,000"),
        (["--model", "demo:mlx", "--slots", "100000"], "at most 248 slots, not 100,000"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_stored(
    command: Command, given: list[str], problem: str
) -> None:
    found = command("run", "-p", "hello", "--model", "echo", *given)

    assert found.code == 2
    assert problem in found.err
    assert command("status", "@last").code == 2


def test_a_kv_cache_that_an_engine_lacks_is_refused_before_anything_is_stored(command: Command) -> None:
    command.environment["JOBS_KV_TYPE"] = "q8_0"

    found = command("run", "-p", "hello", "--model", "demo:mlx")

    assert (found.code, "Unset JOBS_KV_TYPE" in found.err) == (2, True)
    assert command("status", "@last").code == 2


def test_an_echo_in_no_time_has_slots_all_the_same(command: Command) -> None:
    found = read(command("run", "-p", "say this", "--model", "echo", "--slots", "3", "--json"))

    assert found["slots"] == 3


def test_all_answers_to_one_prompt_are_printed(command: Command) -> None:
    found = ok(command("run", "-p", "say this", "--model", "echo", "-n", "2", "--temperature", "1"))

    assert found.out == "--- answer 1 of 2\nsay this\n--- answer 2 of 2\nsay this\n"


def test_lines_are_shown_as_the_model_will_see_them(command: Command, tmp_path: Path) -> None:
    task = tmp_path / "a.yaml"
    task.write_text("task: a\nprompt: {system: Judge., user: 'C: {{ input.text }}'}\nexpected: {is_ad: is_ad}\n")
    data = lines(tmp_path / "a.jsonl", *({"id": f"n{n}", "text": f"word {n}", "is_ad": n % 2 == 0} for n in range(9)))

    shown = read(command("datasets", "show", data, "--task", str(task), "--model", "demo", "--sample", "3", "--json"))
    chosen = read(command("datasets", "show", data, "--task", str(task), "--where", "is_ad=true", "--json"))

    assert len(shown) == 3
    for each in shown:
        assert each["prompt"].startswith("<|im_start|>system\nJudge.")
        assert each["tokens"] > 5
        assert "true" not in each["prompt"].lower()
    assert [each["id"] for each in chosen] == ["n0", "n2", "n4", "n6", "n8"]


def test_a_job_of_chosen_lines_remembers_the_choice(command: Command, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"id": f"n{n}", "prompt": "p", "meta": {"g": n % 2}} for n in range(8)))

    ok(command("run", data, "--model", "echo", "--where", "g=1", "--sample", "3", "--repeat", "2"))
    refused = command("run", data, "--model", "echo", "--where", "h=1")

    names = [each["id"] for each in answers_of(command, "@last")]
    assert len(names) == 6
    assert names[1] == f"{names[0]}~2"
    [kept] = (read(command("query", "SELECT selection FROM jobs", "--format", "jsonl"))["selection"],)
    assert json.loads(kept) == {"where": [["g", "1"]], "sample": 3, "repeat": 2}
    assert refused.code == 2
    assert "no line has a field 'h'" in refused.err


def test_gates_are_written_for_ci_systems(command: Command, tmp_path: Path) -> None:
    task = tmp_path / "a.yaml"
    task.write_text(
        "task: a\nprompt: {user: '{{ input.text }}'}\nexpected: {is_ad: is_ad}\nscores: [{exact: is_ad}]\n"
        "gates: {is_ad.accuracy: '>=0.5', parsed: '>=0.9'}\n"
    )
    answer = json.dumps({"is_ad": True})
    data = lines(tmp_path / "a.jsonl", {"text": answer, "is_ad": True}, {"text": "no idea", "is_ad": True})

    done = command("run", data, "--task", str(task), "--model", "echo", "--junit", str(tmp_path / "gates.xml"))

    assert done.code == 3
    suite = ElementTree.parse(tmp_path / "gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["parsed >=0.9"]


def test_one_prompts_copied_or_scored_answer_is_printed(command: Command) -> None:
    first = ok(command("run", "-p", "hello", "--model", "demo", "--cache", "--max-tokens", "4"))
    again = ok(command("run", "-p", "hello", "--model", "demo", "--cache", "--max-tokens", "4"))
    chosen = ok(command("run", "-p", "hello", "--model", "demo", "--choice", "a", "--choice", "b"))

    assert first.out == again.out != ""
    assert "copied" in again.err
    assert set(json.loads(chosen.out.partition("\n")[2])["choice_probs"]) == {"a", "b"}
