"""Jobs over HTTP, health, metrics: a real server with a real worker."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from tests.api.conftest import ECHO, SLOW, Server, Starter
from tests.conftest import wait_until

TASK = """task: tiny
prompt: {user: "{{ input.text }}"}
expected: {label: label}
output: {schema: {type: object, properties: {label: {type: string}}}}
scores: [{exact: label}]
"""


CHAT = [{"role": "user", "content": "x"}]


def call(server: Server, path: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"} | headers)
    asked.method = method or ("POST" if body is not None else "GET")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read().decode()
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def refused(server: Server, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(server, path, body, method, **headers)
    return caught.value.code, json.loads(caught.value.read())["error"]


def ended(server: Server, job_id: str) -> dict[str, Any]:
    states = ("completed", "failed", "cancelled", "expired")
    wait_until(lambda: call(server, f"/v1/jobs/{job_id}")["state"] in states, "the job ends", 60)
    found: dict[str, Any] = call(server, f"/v1/jobs/{job_id}")
    return found


@pytest.fixture(scope="module")
def done(served: Server) -> dict[str, Any]:
    """A job of thirty lines that completed."""
    lines = [{"id": f"id-{row}", "prompt": f"say {row}"} for row in range(30)]
    job = call(served, "/v1/jobs", {"model": ECHO, "lines": lines, "name": "thirty"})
    return ended(served, job["id"])


def test_a_job_of_lines_completes(done: dict[str, Any]) -> None:
    assert (done["object"], done["state"], done["rows"], done["ok"], done["name"]) == (
        "job", "completed", 30, 30, "thirty",
    )  # fmt: skip


def test_results_stream_and_go_on_behind_a_row(served: Server, done: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in call(served, f"/v1/jobs/{done['id']}/results").splitlines()]
    assert [line["row"] for line in lines] == list(range(30))
    assert lines[7]["text"] == "say 7"
    rest = call(served, f"/v1/jobs/{done['id']}/results?after=27").splitlines()
    assert [json.loads(line)["row"] for line in rest] == [28, 29]
    assert call(served, f"/v1/jobs/{done['id']}/results?failed=true") == ""


def test_reports_and_comparisons_are_json_and_pages(served: Server, done: dict[str, Any]) -> None:
    assert call(served, f"/v1/jobs/{done['id']}/report")["job_id"] == done["id"]
    assert call(served, f"/v1/jobs/{done['id']}/report?format=html").startswith("<!")
    other = ended(served, call(served, "/v1/jobs", {"model": ECHO, "lines": ["say 1", "say 2"]})["id"])
    lines = [{"id": f"id-{row}", "prompt": f"say {row}"} for row in range(30)]
    twin = ended(served, call(served, "/v1/jobs", {"model": ECHO, "lines": lines})["id"])
    assert call(served, f"/v1/jobs/{done['id']}/compare/{twin['id']}")
    assert call(served, f"/v1/jobs/{done['id']}/compare/{twin['id']}?format=html").startswith("<!")
    apart = call(served, f"/v1/jobs/{done['id']}/compare/{other['id']}")
    assert (apart["common_rows"], apart["figures"][-1]["note"]) == (
        0,
        "not the same rows: not paired",
    )
    assert refused(served, f"/v1/jobs/{done['id']}/report?format=pdf")[1]["param"] == "format"


def test_a_file_with_a_task_is_scored(served: Server, client: openai.OpenAI) -> None:
    rows = [{"id": str(n), "input": {"text": json.dumps({"label": "a"})}, "label": "ab"[n % 2]} for n in range(10)]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("data.jsonl", content), purpose="user_data")
    job = ended(served, call(served, "/v1/jobs", {"model": ECHO, "file_id": file.id, "task": TASK})["id"])
    assert (job["state"], job["ok"]) == ("completed", 10)
    assert call(served, f"/v1/jobs/{job['id']}/report")["scores"]["label"]["value"] == 0.5
    query = f"SELECT AVG(value) AS v FROM v_scores WHERE job_id = '{job['id']}' AND score_run = 1"
    wait_until(lambda: "0.5" in served.command("query", query, "--format", "csv").out, "its scores are kept")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "model"),
        ({"model": "none", "lines": ["x"]}, 404, "model"),
        ({"model": ECHO}, 400, "file_id"),
        ({"model": ECHO, "lines": []}, 400, "lines"),
        ({"model": ECHO, "lines": [1]}, 400, "lines"),
        ({"model": ECHO, "file_id": "file-none"}, 404, None),
        ({"model": ECHO, "lines": [{"prompt": 1}]}, 400, None),
        ({"model": ECHO, "lines": ["x"], "nonsense": 1}, 400, "nonsense"),
        ({"model": ECHO, "lines": ["x"], "sampling": {"temperature": "hot"}}, 400, "sampling"),
        ({"model": ECHO, "lines": ["x"], "name": "@last"}, 400, "name"),
        ({"model": ECHO, "lines": ["x"], "deadline": "never"}, 400, "deadline"),
        ({"model": ECHO, "lines": ["x"], "deadline": "2001-01-01"}, 400, "deadline"),
        ({"model": ECHO, "lines": ["x"], "max_errors": "x"}, 400, "max_errors"),
        ({"model": ECHO, "lines": [{"input": {"a": 1}}], "template": "{{ b }}"}, 400, None),
        ({"model": ECHO, "lines": [{"input": {"a": 1}}], "template": "{{ b"}, 400, None),
    ],
)  # fmt: skip
def test_a_job_that_makes_no_sense_is_refused(served: Server, body: Any, status: int, param: str | None) -> None:
    code, problem = refused(served, "/v1/jobs", body)
    assert (code, problem["param"]) == (status, param)


def test_a_task_of_a_client_runs_no_code_of_this_machine(served: Server, client: openai.OpenAI) -> None:
    task = TASK.replace("exact: label", "python: 'os:system'")
    jobs_before = call(served, "/v1/jobs")["data"]
    status, problem = refused(served, "/v1/jobs", {"model": ECHO, "task": task, "lines": [{"text": "a", "label": "b"}]})
    assert status == 400
    assert "function of a file" in problem["message"]
    assert call(served, "/v1/jobs")["data"] == jobs_before
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(
            input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h", extra_body={"task": task}
        )
    assert caught.value.param == "task"


def test_hints_are_in_the_words_of_the_call(served: Server) -> None:
    message = refused(served, "/v1/jobs", {"model": ECHO, "lines": [{"other": 1}]})[1]["message"]
    assert "give 'template' or 'task'" in message
    assert "give 'skip_invalid'" in message
    assert "--" not in message


def test_a_body_is_not_nested_without_end(served: Server) -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    flat = {"model": ECHO, "lines": [{"prompt": "x", "meta": {"a": [[[]]] * 200}}] * 3}
    assert call(served, "/v1/jobs", flat)["rows"] == 3
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": deep}}}
    for path, body in (
        ("/v1/jobs", {"model": ECHO, "lines": [{"prompt": "x", "meta": {"a": deep}}]}),
        ("/v1/chat/completions", {"model": ECHO, "messages": deep}),
        (
            "/v1/chat/completions",
            {"model": ECHO, "messages": [{"role": "user", "content": "x"}], "response_format": schema},
        ),
    ):
        status, problem = refused(served, path, body)
        assert (status, "levels deep" in problem["message"]) == (400, True)


def test_a_template_is_text_and_names_no_file(served: Server) -> None:
    job = call(served, "/v1/jobs", {"model": ECHO, "lines": [{"input": {"a": 1}}], "template": "@/etc/passwd"})
    ended(served, job["id"])
    (line,) = call(served, f"/v1/jobs/{job['id']}/results").splitlines()
    assert json.loads(line)["text"] == "@/etc/passwd"


def test_verbs_answer_by_state(served: Server, done: dict[str, Any]) -> None:
    assert refused(served, f"/v1/jobs/{done['id']}/cancel", {})[0] == 409
    assert refused(served, f"/v1/jobs/{done['id']}/pause", {})[0] == 409
    assert refused(served, f"/v1/jobs/{done['id']}/resume", {})[0] == 409
    assert call(served, f"/v1/jobs/{done['id']}/retry", {})["state"] == "completed"
    assert refused(served, "/v1/jobs/none")[0] == 404


def test_jobs_are_listed_in_pages(served: Server, done: dict[str, Any]) -> None:
    first = call(served, "/v1/jobs?limit=1")
    assert first["has_more"] in (True, False)
    everything = call(served, "/v1/jobs?limit=100&state=completed")["data"]
    assert done["id"] in [each["id"] for each in everything]
    assert refused(served, "/v1/jobs?state=none")[1]["param"] == "state"


def test_a_job_is_followed_by_events(served: Server) -> None:
    job = call(served, "/v1/jobs", {"model": ECHO, "lines": [f"say {row}" for row in range(50)]})
    text = call(served, f"/v1/jobs/{job['id']}/events")
    events = [dict(re.findall(r"(\w+): (.*)", part)) for part in text.strip().split("\n\n")]
    assert events[-1]["event"] == "end"
    assert json.loads(events[-1]["data"])["ok"] == 50


def test_metrics_count_what_is_stored(served: Server, done: dict[str, Any]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    found = {family.name: family for family in text_string_to_metric_families(call(served, "/metrics"))}
    ok = [s.value for s in found["promptmill_items"].samples if s.labels == {"model": ECHO, "status": "ok"}]
    assert ok[0] >= 30
    assert {"promptmill_jobs", "promptmill_worker_up", "promptmill_queue_items"} <= set(found)
    buckets = [s for s in found["promptmill_item_latency_seconds"].samples if s.name.endswith("_bucket")]
    counts = [s.value for s in buckets if s.labels["model"] == ECHO]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    commits = [s for s in found["promptmill_db_commit_seconds"].samples if s.name.endswith("_count")]
    by_process = {s.labels["process"]: s.value for s in commits}
    # This server's own, which made the job, and those of the worker, which stored its results.
    assert by_process.pop("api") > 0
    assert [count > 0 for count in by_process.values()] == [True]
    ratios = list(found["promptmill_engine_kv_used_ratio"].samples)
    assert all(0 <= s.value <= 1 for s in ratios)


def test_prompts_that_cannot_fit_are_told_before_anything_runs(served: Server) -> None:
    lines: list[Any] = ["fits", "word " * 140_000, "fits too", {"prompt": "x", "tools": [{"type": "function"}]}]
    code, problem = refused(served, "/v1/jobs", {"model": ECHO, "lines": lines[:3]})
    assert code == 400
    assert "lines.jsonl:2: the prompt has 140001 tokens" in problem["message"].replace(",", "")
    code, problem = refused(served, "/v1/jobs", {"model": ECHO, "lines": lines})
    assert "lines.jsonl:4: 'tools' must be" in problem["message"]
    job = call(served, "/v1/jobs", {"model": ECHO, "lines": lines[:3], "skip_invalid": True})
    assert job["rows"] == 3
    wait_until(lambda: call(served, f"/v1/jobs/{job['id']}")["state"] == "completed", "the job ends", 30)
    found = [json.loads(each) for each in call(served, f"/v1/jobs/{job['id']}/results?failed=true").splitlines()]
    assert [(each["row"], each["error"]["class"]) for each in found] == [(1, "context_overflow")]
    # No worker was asked.
    assert found[0]["worker"] is None


def test_the_kv_cells_of_running_requests_are_a_metric(start: Starter) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    start.worker(SLOW)
    server = start.server()
    text = " ".join(["word"] * 1500)
    stream = server.client().chat.completions.create(
        model=SLOW, messages=[{"role": "user", "content": text}], max_tokens=1500, stream=True
    )
    next(iter(stream))

    def used() -> float:
        found = {family.name: family for family in text_string_to_metric_families(call(server, "/metrics"))}
        return max((s.value for s in found["promptmill_engine_kv_used_ratio"].samples), default=0.0)

    # Prompt and answer of 1,500 words each, of 131,072 cells.
    wait_until(lambda: 0.02 < used() < 0.03, "a sample of the worker is taken", 40)
    stream.close()


def test_the_status_names_devices_and_the_queue(served: Server) -> None:
    found = call(served, "/v1/system/status")
    assert found["devices"][0]["model"] == ECHO
    assert found["queue"]["live_requests"] == 0
    assert found["memory"]["server_bytes"] > 0


def test_errors_of_the_server_itself_have_the_shape(served: Server) -> None:
    code, problem = refused(served, "/v1/nothing")
    assert (code, problem["message"]) == (404, "Unknown request URL: GET /v1/nothing.")
    assert set(problem) == {"message", "type", "param", "code"}
    assert refused(served, "/v1/models", method="DELETE")[0] == 405
    assert refused(served, "/v1/jobs", [1])[0] == 400
    assert call(served, "/openapi.json")["info"]["title"] == "promptmill"
