"""The installed command as a user meets it, on SQLite: what it prints, how it ends, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.cli import COMMANDS
from tests.conftest import ROOT, Command, unavailable, wait_until

RESULT_KEYS = {
    "row", "id", "state", "text", "finish_reason", "prompt_tokens", "cached_tokens", "output_tokens", "latency_s",
    "ttft_s", "queue_s", "attempt", "worker",
}  # fmt: skip

REPORT_KEYS = {
    "job_id", "state", "attempted", "ok", "errors", "wall_s", "items_per_s", "output_tps", "prompt_tokens",
    "cached_tokens", "output_tokens", "mean_active", "slots", "latency_s", "ttft_s", "tpot_s", "queue_s",
    "errors_by_class", "checks", "scores",
}  # fmt: skip


def write(folder: Path, name: str, *lines: Any) -> str:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def prompts(folder: Path, count: int) -> str:
    return write(folder, "prompts.jsonl", *({"id": f"p{i}", "prompt": f"prompt number {i}"} for i in range(count)))


def count(command: Command, table: str) -> int:
    engine = sa.create_engine(command.environment["JOBS_DATABASE_URL"])
    with engine.connect() as connection:
        found = connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar()
    engine.dispose()
    assert found is not None
    return int(found)


def execute(command: Command, statement: str) -> None:
    engine = sa.create_engine(command.environment["JOBS_DATABASE_URL"])
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_run_answers_every_line_and_reports(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 300), "--model", "echo", "-o", "out.jsonl", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report.keys() >= REPORT_KEYS
    assert (report["ok"], report["errors"], report["state"]) == (300, 0, "completed")
    assert all(report[name].keys() >= {"p50", "p90", "p95", "p99", "mean"} for name in ("latency_s", "queue_s"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [f"prompt number {i}" for i in range(300)]
    assert set(lines[0]) == RESULT_KEYS


def test_without_a_model_the_error_names_those_at_hand(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 3))
    assert done.code == 2
    assert "no model was named" in done.err
    assert "demo" in done.err
    assert "Traceback" not in done.err


def test_one_prompt_prints_its_answer(command: Command) -> None:
    done = command("run", "-p", "hello there", "--model", "echo")
    assert (done.code, done.out) == (0, "hello there\n")


def test_standard_input_is_a_dataset(command: Command) -> None:
    done = command("run", "-", "--model", "echo", "-o", "-", stdin='{"prompt": "from a pipe"}\n')
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == "from a pipe"


def test_bad_lines_are_listed_and_nothing_is_stored(command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "bad.jsonl", {"prompt": "fine"}, "{broken", *[{"promt": "x"}] * 30, {"id": 1, "prompt": 7})
    done = command("run", path, "--model", "echo")
    assert done.code == 2
    assert "bad.jsonl:2: broken JSON" in done.err
    assert "32 bad lines" in done.err
    assert len(re.findall(r"bad\.jsonl:\d+:", done.err)) == 20
    assert count(command, "jobs") == count(command, "requests") == 0


def test_bad_lines_can_be_kept_as_errors(command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "bad.jsonl", {"prompt": "fine"}, "{broken", {"prompt": "also fine"})
    done = command("run", path, "--model", "echo", "--skip-invalid", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["attempted"], report["ok"], report["errors_by_class"]) == (3, 2, {"invalid_request": 1})
    failed = command("results", "@last", "--failed")
    assert json.loads(failed.out)["error"]["class"] == "invalid_request"


def test_a_dry_run_measures_and_stores_nothing(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 50), "--model", "echo", "--dry-run", "--json")
    found = json.loads(done.out)
    assert (done.code, found["rows"], found["tokens_max"], found["too_long"]) == (0, 50, 4, 0)
    assert not (tmp_path / "jobs.sqlite").exists()


def test_a_prompt_that_cannot_fit_is_refused_before_anything_runs(command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "long.jsonl", {"prompt": "short"}, {"prompt": "word " * 5000})
    done = command("run", path, "--model", "demo")
    assert done.code == 2
    assert "long.jsonl:2: the prompt has" in done.err
    kept = command("run", path, "--model", "demo", "--skip-invalid", "--max-tokens", "4", "--json")
    assert json.loads(kept.out)["errors_by_class"] == {"context_overflow": 1}


def test_a_job_whose_every_row_failed_ends_with_code_1(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 20), "--model", "echo:error_on=prompt")
    assert done.code == 1
    assert "every row failed" in done.err
    assert "passed" not in done.out


def test_a_plainly_wrong_job_is_stopped(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 3000), "--model", "echo:error_on=prompt", "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["state"] == "failed"
    assert 50 <= report["errors"] < 1000, "the first 50 that all fail are enough"
    assert count(command, "results") < 1000


def test_max_errors_stops_a_job(command: Command, tmp_path: Path) -> None:
    done = command("run", prompts(tmp_path, 2000), "--model", "echo:error_on=number 1", "--max-errors", "5")
    assert done.code == 1
    assert "more than --max-errors 5" in done.err
    assert command("run", prompts(tmp_path, 1), "--model", "echo", "--max-errors", "few").code == 2


def test_ctrl_c_pauses_and_resume_runs_nothing_twice(command: Command, tmp_path: Path) -> None:
    process = command.start("run", prompts(tmp_path, 200), "--model", "echo:token_s=0.05", "--slots", "8")
    wait_until(lambda: (tmp_path / "jobs.sqlite").exists() and _stored(command) > 10, "some rows are answered")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    before = _stored(command)
    assert 10 < before < 200
    assert json.loads(command("status", "@last", "--json").out)["state"] == "paused"
    done = command("resume", "@last", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["ok"] == 200
    assert count(command, "results") == 200
    assert command("resume", "@last").code == 2


def test_what_store_asked_for_is_done_at_the_end_of_a_resumed_run(command: Command, tmp_path: Path) -> None:
    slow = ("--model", "echo:token_s=0.05", "--slots", "8", "--store", "none")
    process = command.start("run", prompts(tmp_path, 100), *slow)
    wait_until(lambda: (tmp_path / "jobs.sqlite").exists() and _stored(command) > 10, "some rows are answered")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert count(command, "results WHERE text IS NOT NULL") > 10
    assert command("resume", "@last").code == 0
    assert (count(command, "results"), count(command, "results WHERE text IS NOT NULL")) == (100, 0)
    assert count(command, "requests WHERE input IS NOT NULL") == 0
    assert "(not kept)" in command("show", "@last", "0").out


@pytest.mark.parametrize("store", ["hash", "none"])
def test_a_run_that_failed_and_lost_its_prompts_is_not_run_again(command: Command, tmp_path: Path, store: str) -> None:
    failing = ("--model", "echo:error_on=number 3", "--max-errors", "0", "--slots", "2", "--store", store)
    assert command("run", prompts(tmp_path, 200), *failing).code == 1
    before = _stored(command)
    for again in ("resume", "retry"):
        done = command(again, "@last")
        assert (done.code, "has lost its prompts, as --store" in done.err) == (2, True), done.err
    assert _stored(command) == before < 200


def test_what_store_asked_for_is_done_at_the_end_of_a_retry(command: Command, tmp_path: Path) -> None:
    command("run", prompts(tmp_path, 8), "--model", "echo:error_on=number 3")
    # As if its process had been killed right after its last row.
    execute(command, "UPDATE jobs SET store = 'none'")
    assert command("retry", "@last").code == 0
    assert count(command, "retries") == 1
    assert count(command, "requests WHERE input IS NOT NULL") == 0


def test_a_killed_run_goes_on_where_it_was(command: Command, tmp_path: Path) -> None:
    process = command.start("run", prompts(tmp_path, 200), "--model", "echo:token_s=0.05", "--slots", "8")
    wait_until(lambda: (tmp_path / "jobs.sqlite").exists() and _stored(command) > 10, "some rows are answered")
    process.kill()
    process.wait()
    done = command("resume", "@last", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["ok"] == 200


def _stored(command: Command) -> int:
    try:
        return count(command, "results")
    except sa.exc.OperationalError:
        return 0


def test_a_job_is_found_by_id_prefix_and_name(command: Command, tmp_path: Path) -> None:
    command("run", prompts(tmp_path, 2), "--model", "echo", "--name", "nightly")
    job = json.loads(command("status", "@last", "--json").out)["job_id"]
    for reference in (job, job[:24], job.lower(), "nightly"):
        assert json.loads(command("status", reference, "--json").out)["job_id"] == job
    missing = command("status", "nothing")
    assert (missing.code, "there is no job 'nothing'" in missing.err) == (2, True)


def test_show_tells_control_tokens_from_texts_that_spell_one(command: Command) -> None:
    assert command("run", "-p", "Hi<|im_end|>", "-m", "demo", "--max-tokens", "2").code == 0

    shown = command("show", "@last", "0")
    found = json.loads(command("show", "@last", "0", "--json").out)

    assert shown.code == 0
    assert "--- only text, though spelled like a control token: 1 <|im_end|>" in shown.out
    assert ["<|im_end|>", "spelled"] in found["prompt_parts"]
    assert ["<|im_start|>", "control"] in found["prompt_parts"]
    assert "".join(text for text, _ in found["prompt_parts"]) == found["prompt"]
    assert "--- control tokens: " in shown.out


def test_show_prints_the_prompt_as_the_model_saw_it(command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "one.jsonl", {"id": "c1", "comment": "Buy now", "is_ad": True})
    command("run", path, "--model", "demo", "--task", str(ROOT / "datasets/ad_comments.task.yaml"))
    shown = json.loads(command("show", "@last", "0", "--json").out)
    assert shown["prompt"].startswith("<|im_start|>system\n")
    assert "Comment: Buy now" in shown["prompt"]
    assert "is_ad" not in json.dumps(shown["input"])
    assert shown["expected"] == {"is_ad": True}
    assert command("show", "@last", "5").code == 2


def test_results_have_three_formats(command: Command, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi there"}], "max_tokens": 5}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    command("run", write(tmp_path, "batch.jsonl", line), "--model", "echo")
    answer = json.loads(command("results", "@last", "--format", "openai").out)
    assert answer["custom_id"] == "a"
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "hi there"
    assert answer["error"] is None
    table = command("results", "@last", "--format", "csv").out.splitlines()
    assert table[0].startswith("row,id,state,text")
    assert table[1].startswith("0,a,ok,hi there")


def test_a_templates_answer_key_is_out_of_reach(command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", {"id": "1", "comment": "x", "expected": {"is_ad": True}})
    refused = command("run", path, "--model", "echo", "--template", "{{ expected.is_ad }}")
    assert (refused.code, "'expected' cannot be used" in refused.err) == (2, True)
    undefined = command("run", path, "--model", "echo", "--template", "{{ input.coment }}")
    assert (undefined.code, "comment" in undefined.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "missing.jsonl", "--model", "echo"], "there is no file missing.jsonl"),
        (["run", ".", "--model", "echo"], "empty.jsonl is empty"),
        (["run", "empty.jsonl", "--model", "echo"], "is empty"),
        (["run", "p.jsonl", "--model", "demp"], "Did you mean demo?"),
        (["run", "p.jsonl", "--model", "p.jsonl"], "is not a GGUF file"),
        (["run", "p.jsonl", "--model", "broken.gguf"], "cannot be loaded"),
        (["run", "p.jsonl", "--model", "echo:speed=3"], "echo has no option 'speed'"),
        (["run", "p.jsonl", "--model", "echo", "--temperature", "-1"], "--temperature must be"),
        (["run", "p.jsonl", "--model", "echo:token_s=-1"], "echo: token_s=-1 is no time"),
        (["run", "p.jsonl", "--model", "echo", "--task", "none.yaml"], "there is no task file"),
        (["run", "p.jsonl", "--model", "echo", "--device", "cuda:7"], "cuda"),
        (["run", "p.jsonl", "--model", "echo", "--device", "tpu"], "'tpu' is no device"),
        (["run", "p.jsonl", "--model", "echo", "-o", "no/such/folder/x.jsonl"], "there is no folder"),
        (["run", "p.jsonl", "--model", "hf:nobody"], "is no repository"),
        (["worker", "--model", "demo", "--device", "metal"], "metal"),
        (["statsu"], "Did you mean status?"),
    ],
)
def test_bad_input_gets_one_clear_error(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 100)
    write(tmp_path, "p.jsonl", {"prompt": "hello"})
    done = command(*arguments)
    assert done.code == 2, done.err
    assert says.lower() in done.err.lower()
    assert "Traceback" not in done.err


def test_config_says_where_each_value_comes_from(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("JOBS_SLOTS=5\nPOSTGRES_PASSWORD=x\n")
    command.environment["JOBS_REDIS_URL"] = "redis://user:secret@example/0"
    found = json.loads(command("config", "--json").out)
    assert found["JOBS_SLOTS"] == {"value": 5, "source": ".env"}
    assert found["JOBS_REDIS_URL"] == {"value": "redis://user:***@example/0", "source": "environment"}
    assert found["JOBS_MODEL"]["source"] == "default"
    assert "secret" not in command("config").out
    command.environment["JOBS_SLOT"] = "5"
    typo = command("config")
    assert (typo.code, "Did you mean JOBS_SLOTS?" in typo.err) == (2, True)


def test_every_command_has_help_with_an_example(command: Command) -> None:
    for name in COMMANDS:
        done = command(name, "--help")
        assert done.code == 0
        assert "Example" in done.out or "Commands:" in done.out, name


def test_help_answers_within_three_tenths_of_a_second(command: Command) -> None:
    """The bar for a user's fingers: median of 5, files in the cache."""
    command.in_process_of_its_own("--help")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command.in_process_of_its_own("--help")
        times.append(time.perf_counter() - start)
    # Twice the bar here, because tests share their machine; `tests/benchmarks` measures the bar itself.
    assert statistics.median(times) < 0.6


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_function_hands_over_what_is_ours(shell: str, command: Command, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        unavailable(f"{shell} is not installed")
    prompts(tmp_path, 3)
    script = """
        eval "$(promptmill shell-init)"
        jobs run prompts.jsonl --model echo --json >report.json 2>/dev/null || exit 3
        jobs status @last >/dev/null || exit 4
        sleep 5 & jobs >list.txt; grep -q sleep list.txt || exit 5
        kill %1
    """
    environment = command._env | {"PATH": f"{Path(command.path()).parent}:{command._env['PATH']}"}
    done = subprocess.run([shell, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["ok"] == 3


def test_a_gate_that_fails_ends_the_run_with_code_3(command: Command, tmp_path: Path) -> None:
    """The echo engine gives the prompt back: three of four answers are right, one cannot be read."""
    answers = ['{"label": "a"}', '{"label": "b"}', '{"label": "b"}', "no idea"]
    data = [{"text": text, "label": label} for text, label in zip(answers, "abba", strict=True)]
    task = "task: t\nprompt: {user: '{{ input.text }}'}\nexpected: {label: label}\nscores: [{exact: label}]\n"
    for demand, code, word in ((">=0.75", 0, "passed"), (">0.75", 3, "FAILED")):
        (tmp_path / "t.yaml").write_text(f"{task}gates: {{label.accuracy: '{demand}'}}\n")
        done = command("run", write(tmp_path, "d.jsonl", *data), "--task", "t.yaml", "--model", "echo")
        assert done.code == code, done.err
        (line,) = [each for each in done.err.splitlines() if each.startswith(f"gate label.accuracy {demand}: 0.75, ")]
        assert line.endswith(f", n 4 (as 3 without copies), {word}")


def test_score_appends_runs_and_leaves_answers_alone(command: Command, tmp_path: Path) -> None:
    answers = ['{"label": "a"}', '{"label": "B"}', '{"label": "b"}', "no idea"]
    data = [{"text": text, "label": label} for text, label in zip(answers, "abba", strict=True)]
    task = "task: t\nprompt: {user: '{{ input.text }}'}\nexpected: {label: label}\nscores: [{exact: label}]\n"
    (tmp_path / "t.yaml").write_text(task)
    done = command("run", write(tmp_path, "d.jsonl", *data), "--task", "t.yaml", "--model", "echo")
    assert done.code == 0, done.err
    first = json.loads(command("score", "@last", "--json").out)
    (tmp_path / "u.yaml").write_text(
        f"{task}output: {{aliases: {{label: {{B: b}}}}}}\ngates: {{label.accuracy: '>0.8'}}\n"
    )
    second = command("score", "@last", "--task", "u.yaml", "--json")
    assert second.code == 3
    assert [run["scores"]["label"]["value"] for run in (first, json.loads(second.out))] == [0.5, 0.75]
    assert (count(command, "score_runs"), count(command, "scores"), count(command, "results")) == (3, 12, 4)


def test_a_query_may_begin_with_a_comment_and_show_what_looks_like_markup(command: Command) -> None:
    command("db", "upgrade")
    found = command("query", "-- what a model may write\nSELECT '[/b] :x: [red]' AS \"[answer]\"")
    assert found.code == 0
    assert found.out.split("\n")[:2] == ["[answer]      ", "[/b] :x: [red]"]


def test_the_form_of_a_query_is_told_by_the_name_of_its_file(command: Command) -> None:
    command("db", "upgrade")
    for name, begin in (("out.parquet", b"PAR1"), ("out.jsonl", b'{"n": 1}'), ("out.csv", b"n\n1")):
        path = command.folder / name
        assert command("query", "SELECT 1 AS n", "-o", str(path)).code == 0
        assert path.read_bytes().startswith(begin)


def test_a_query_that_fails_leaves_the_file_that_was_there(command: Command) -> None:
    command("db", "upgrade")
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        path = command.folder / name
        path.write_text("precious")
        # The first rows are there before the fault is met.
        sql = (
            "SELECT abs(CASE WHEN n < 9 THEN n ELSE -9223372036854775807 - 1 END) AS n FROM "
            "(WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x WHERE n < 9) SELECT n FROM x) AS y"
        )
        failed = command("query", sql, "-o", str(path), "--force")
        assert (failed.code, path.read_text()) == (2, "precious"), failed.err
    assert sorted(each.name for each in command.folder.glob("out.*")) == ["out.csv", "out.jsonl", "out.parquet"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "q.json"], "the name q.json tells no format"),
        (["-o", "q.csv", "--format", "jsonl"], "--format jsonl and the name q.csv contradict each other"),
        (["-o", "q.parquet", "--format", "table"], "a table is for a terminal"),
        (["-o", "q.csv", "--json"], "contradict each other"),
        (["--format", "parquet"], "Parquet is written to a file"),
    ],
)
def test_a_form_that_does_not_go_with_its_file_is_refused(command: Command, arguments: list[str], problem: str) -> None:
    command("db", "upgrade")
    done = command("query", "SELECT 1 AS n", *arguments)
    assert (done.code, problem in done.err) == (2, True), done.err
    assert not [each for each in command.folder.iterdir() if each.name.startswith("q.")]
    assert command("query", "SELECT 1 AS n", "-o", "q.json", "--format", "jsonl").code == 0
    assert (command.folder / "q.json").read_text() == '{"n": 1}\n'


def test_what_a_model_wrote_moves_no_cursor(command: Command) -> None:
    command("db", "upgrade")
    found = command("query", "SELECT 'a' || char(27) || '[2Jb' || char(155) || char(7) AS n")
    assert found.out.split() == ["n", "a[2Jb"]


def test_results_are_not_written_over_a_file_unasked(command: Command, tmp_path: Path) -> None:
    assert command("run", prompts(tmp_path, 2), "--model", "echo").code == 0
    for name in ("out.jsonl", "out.parquet"):
        path = tmp_path / name
        path.write_text("precious")
        refused = command("results", "@last", "-o", str(path))
        assert (refused.code, path.read_text()) == (2, "precious")
        assert "--force" in refused.err
        assert command("results", "@last", "-o", str(path), "--force").code == 0
        assert path.read_bytes() != b"precious"


def test_a_condition_on_a_figure_that_there_is_not_is_refused_before_anything_is_printed(
    command: Command, tmp_path: Path
) -> None:
    for name in ("before", "after"):
        assert command("run", prompts(tmp_path, 8), "--model", "echo", "--name", name).code == 0
    refused = command("compare", "before", "after", "--fail-if", "output_tp<-5%")
    assert (refused.code, refused.out) == (2, "")
    assert "Did you mean output_tps?" in refused.err
    assert refused.err.count(" wall_s") == 1
    assert command("compare", "before", "after", "--fail-if", "ok<9").code == 3
