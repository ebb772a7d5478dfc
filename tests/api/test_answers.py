"""Chats, completions and embeddings, by the official client against a real server with a real worker."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.api.conftest import ECHO, SLOW, Server, Starter, answered, batch_lines, finished
from tests.conftest import wait_until


def chat(client: openai.OpenAI, text: str = "say it again", model: str = ECHO, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == ECHO
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "say it again", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 4 + 3
    assert chat(client, "one two three four", max_completion_tokens=2).choices[0].finish_reason == "length"
    assert chat(client, "one two three four", stop=" three").choices[0].message.content == "one two"


def test_a_chat_says_what_of_its_time_was_the_servers_own(client: openai.OpenAI, served: Server) -> None:
    began = time.monotonic()
    raw = client.chat.completions.with_raw_response.create(model=ECHO, messages=[{"role": "user", "content": "x"}])
    took_ms = 1000 * (time.monotonic() - began)
    found = re.fullmatch(r"before;dur=([0-9.]+), after;dur=([0-9.]+)", raw.headers["server-timing"])
    assert found is not None
    # Server and worker read the database's clock, and SQLite's ticks in milliseconds.
    assert 0 < float(found[1]) + float(found[2]) < took_ms + 20
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    count = re.search(r"promptmill_api_overhead_seconds_count\S* (\d+)", text)
    assert count is not None
    assert int(count[1]) >= 1


def test_an_answer_names_what_answered(client: openai.OpenAI) -> None:
    named = {each.system_fingerprint for each in chat(client, stream=True, stream_options={"include_usage": True})}
    named |= {chat(client).system_fingerprint, client.completions.create(model=ECHO, prompt="x").system_fingerprint}
    (one,) = named
    assert re.fullmatch(r"fp_echo_[0-9a-f]{8}", one)


def test_a_chat_is_streamed(client: openai.OpenAI) -> None:
    text = " ".join(f"word{number}" for number in range(50))
    chunks = list(chat(client, text, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 50
    assert len({each.id for each in chunks}) == 1
    assert all(each.usage is None for each in chunks[:-1])


def test_tokens_come_one_by_one(start: Starter) -> None:
    start.worker(SLOW)
    client = start.server().client()
    began, times = time.monotonic(), []
    for chunk in chat(client, " ".join(["word"] * 60), SLOW, stream=True, logprobs=True, top_logprobs=1):
        if text := chunk.choices[0].delta.content:
            times.append(time.monotonic() - began)
            # Each chunk has the tokens of its own text.
            assert "".join(each.token for each in chunk.choices[0].logprobs.content) == text
            assert len(chunk.choices[0].logprobs.content[0].top_logprobs) == 1
    # 60 tokens take 1.2 s: the first is there long before the last.
    assert len(times) > 10
    assert times[-1] - times[0] > 0.5


def test_several_answers_and_their_tokens(client: openai.OpenAI) -> None:
    answer = chat(client, "a b", n=2, logprobs=True, top_logprobs=1)
    assert [each.index for each in answer.choices] == [0, 1]
    assert [each.token for each in answer.choices[1].logprobs.content] == ["a", " b"]
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == 0.0
    chunks = list(chat(client, "a b", n=2, logprobs=True, stream=True))
    for index in (0, 1):
        own = [each.choices[0] for each in chunks if each.choices[0].index == index]
        assert "".join(each.delta.content or "" for each in own) == "a b"
        assert own[-1].finish_reason == "stop"


def test_texts_are_completed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=ECHO, prompt=["one", "two words"], max_tokens=5, logprobs=1)
    assert [each.text for each in answer.choices] == ["one", "two words"]
    assert answer.choices[1].logprobs is not None
    assert answer.choices[1].logprobs.tokens == ["two", " words"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    streamed = client.completions.create(model=ECHO, prompt="one two", stream=True)
    assert "".join(each.choices[0].text for each in streamed) == "one two"


def test_several_prompts_with_several_answers_are_streamed(client: openai.OpenAI) -> None:
    prompts = ["one", "two words", "and three more"]
    chunks = list(
        client.completions.create(
            model=ECHO, prompt=prompts, n=2, logprobs=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 2 * (1 + 2 + 3)
    found = [each.choices[0] for each in chunks[:-1]]
    for index in range(6):
        own = [each for each in found if each.index == index]
        assert "".join(each.text for each in own) == prompts[index // 2]
        assert own[-1].finish_reason == "stop"
        told = [each.logprobs for each in own if each.logprobs]
        assert "".join(token for each in told for token in each.tokens or ()) == prompts[index // 2]
        assert [place for each in told for place in each.text_offset or ()][:1] == [0]
    whole = client.completions.create(model=ECHO, prompt=prompts, n=2)
    assert [each.text for each in whole.choices] == [prompts[index // 2] for index in range(6)]
    with pytest.raises(openai.APIError, match="the context 131072"):
        list(client.completions.create(model=ECHO, prompt=["fine", "word " * 140_000], stream=True))


def test_several_answers_come_side_by_side(start: Starter) -> None:
    start.worker(SLOW)
    client = start.server().client()
    order = [
        each.choices[0].index
        for each in chat(client, " ".join(["word"] * 40), SLOW, n=2, stream=True)
        if each.choices[0].delta.content
    ]
    # The second does not wait for the end of the first.
    assert order.index(1) < len(order) // 4


def test_texts_become_vectors(client: openai.OpenAI) -> None:
    asked = client.embeddings.create(model=ECHO, input=["one", "two"])
    plain = client.embeddings.create(model=ECHO, input=["one", "two"], encoding_format="float")
    assert [each.index for each in asked.data] == [0, 1]
    assert asked.data[1].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)
    assert asked.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools", "invalid_value"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "unsupported_parameter"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"model": ""}, "model", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"continuations": ["a", "b"]}}, "continuations", "unsupported_parameter"),
        ({"extra_body": {"embedding": True}}, "embedding", "unsupported_parameter"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(
    client: openai.OpenAI, changes: dict[str, Any], param: str, code: str | None
) -> None:
    asked: dict[str, Any] = {"model": ECHO, "messages": [{"role": "user", "content": "x"}]} | changes
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


@pytest.mark.parametrize("name", ["continuations", "nonsense"])
def test_what_no_answer_has_a_place_for_is_not_offered(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Known: .*") as caught:
        client.completions.create(model=ECHO, prompt="x", extra_body={name: ["a"]})
    assert "continuations" not in caught.value.message.partition("Known: ")[2]
    assert "embedding" not in caught.value.message


def test_an_unknown_model_and_a_prompt_too_long_have_their_codes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, "word " * 140_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=ECHO, prompt="word " * 140_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model=ECHO, input="word " * 140_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError, match="could not parse the JSON"):
        client.post("/chat/completions", content=b"{", cast_to=object)


def test_a_large_schema_holds_nobody_else_up(served: Server, client: openai.OpenAI) -> None:
    properties = {f"p{number}": {"type": "string", "minLength": 3, "maxLength": 1000} for number in range(2_500)}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": properties}}}

    def ask() -> None:
        # No worker is asked: the time is the server's own.
        with pytest.raises(openai.NotFoundError):
            chat(client, model="nobody serves it", response_format=form)

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        began, longest = time.monotonic(), 0.0
        while not asked.done():
            asked_at = time.monotonic()
            served.get("/healthz")
            longest = max(longest, time.monotonic() - asked_at)
        asked.result()
    assert longest < (time.monotonic() - began) / 2


def test_one_prompt_in_the_form_of_another_server(served: Server) -> None:
    body = json.dumps({"prompt": "say it", "max_tokens": 5, "temperature": 0}).encode()
    asked = urllib.request.Request(f"{served.url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        found = json.loads(answer.read())
    assert found["success"] is True
    assert set(found["data"]) == {"id", "text", "response_time", "tokens_per_second"}
    assert found["data"]["text"] == "say it"


def test_structured_output_and_real_tokens_from_a_real_model(start: Starter) -> None:
    start.worker("demo")
    client = start.server().client()

    class Verdict(BaseModel):
        is_ad: bool
        score: int

    messages: list[Any] = [{"role": "user", "content": "Comment: buy now at cheap.example"}]
    parsed = client.chat.completions.parse(model="demo", messages=messages, response_format=Verdict, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    streamed = list(client.chat.completions.create(model="demo", messages=messages, max_tokens=12, stream=True))
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=12)
    text = "".join(each.choices[0].delta.content or "" for each in streamed)
    assert text == whole.choices[0].message.content
    options: Any = {"model": "demo", "messages": messages, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    asked = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    told = [each.choices[0].logprobs.content for each in chunks if each.choices[0].logprobs]
    assert len(told) > 1
    assert [each.token for part in told for each in part] == [each.token for each in asked.choices[0].logprobs.content]
    assert client.embeddings.create(model="demo", input="a text").data[0].embedding


def test_who_waits_goes_first_while_a_batch_runs_on(start: Starter) -> None:
    """Four slots of twenty seconds' work each, all taken: a chat is answered at once all the same."""
    start.worker(SLOW, slots=4)
    server = start.server()
    client = server.client()
    file = client.files.create(file=("b.jsonl", _long(40)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_until(lambda: answered(client, batch.id) > 0, "the batch runs", 90)
    began = time.monotonic()
    assert chat(client, "hello there", SLOW).choices[0].message.content == "hello there"
    # Its own two tokens take 0.02 s; a slot of the batch would be free after seconds.
    assert time.monotonic() - began < 1.5
    ended = finished(client, batch.id, 120)
    assert (ended.status, ended.request_counts.completed) == ("completed", 40)
    checks = verdicts(server, ended.job_id)
    assert False not in checks.values()
    assert checks["tokens"] is None


def verdicts(server: Server, job_id: str) -> dict[str, bool | None]:
    """The consistency checks of a job's report."""
    return {each["name"]: each["ok"] for each in server.get(f"/v1/jobs/{job_id}/report")["checks"]}


def test_the_books_of_a_job_hold_nothing_of_chats_before_it(start: Starter) -> None:
    start.worker(SLOW, slots=4)
    server = start.server()
    client = server.client()
    for number in range(10):
        chat(client, f"hello there {number}", SLOW)
    lines = [f"say {row} again" for row in range(40)]
    job: Any = client.post("/jobs", body={"model": SLOW, "lines": lines}, cast_to=object)
    wait_until(lambda: server.get(f"/v1/jobs/{job['id']}")["state"] == "completed", "the job ends", 60)
    checks = verdicts(server, job["id"])
    assert False not in checks.values()
    assert checks["tokens"] is True
    assert checks["time"] is True


def _long(count: int) -> bytes:
    lines = [json.loads(line) for line in batch_lines(count, SLOW).splitlines()]
    for number, line in enumerate(lines):
        line["body"] |= {"messages": [{"role": "user", "content": f"{number} " + "word " * 150}], "max_tokens": 140}
    return "\n".join(map(json.dumps, lines)).encode()


def test_a_client_that_goes_away_frees_its_slot(start: Starter) -> None:
    start.worker(SLOW, slots=1)
    client = start.server().client()
    stream = chat(client, " ".join(["word"] * 3000), SLOW, stream=True, max_tokens=3000)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        chat(client, " ".join(["word"] * 3000), SLOW, max_tokens=3000, timeout=1.0)
    began = time.monotonic()
    assert chat(client, "hello there", SLOW).choices[0].message.content == "hello there"
    # Each of the two would have held the only slot for a minute.
    assert time.monotonic() - began < 5


def test_a_worker_that_is_killed_loses_no_request(start: Starter) -> None:
    import threading

    import psutil

    supervisor = start.worker(SLOW)
    client = start.server().client()
    found: list[str] = []
    text = " ".join(["word"] * 200)
    threads = [
        threading.Thread(target=lambda: found.append(chat(client, text, SLOW).choices[0].message.content))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    for child in psutil.Process(supervisor.pid).children():
        child.kill()
    for thread in threads:
        thread.join(90)
    assert found == [text] * 4


def test_models_are_loaded_and_unloaded(start: Starter) -> None:
    start.worker(ECHO, SLOW)
    client = start.server().client()

    def loaded() -> list[str]:
        return [each.id for each in client.models.list() if each.workers[0]["loaded"]]  # type: ignore[attr-defined]

    assert loaded() == [ECHO]
    client.post("/models/load", body={"model": SLOW}, cast_to=object)
    wait_until(lambda: loaded() == [SLOW], "the other model is loaded", 60)
    client.post("/models/unload", body={"model": SLOW}, cast_to=object)
    wait_until(lambda: loaded() == [], "no model is loaded", 60)
    assert chat(client).choices[0].message.content == "say it again"
    assert chat(client, model=SLOW).choices[0].message.content == "say it again"
    with pytest.raises(openai.NotFoundError):
        client.post("/models/load", body={"model": ECHO, "worker": "none"}, cast_to=object)
