"""Requests that ask for endless work: while they run, the server answers everybody else as if they were not there.

Each attack is one line of ATTACKS: a name, the statuses that it may end with, and what makes its requests.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import ECHO, Server, end_all, starter_of
from tests.api.test_security import key
from tests.conftest import Command, wait_until

#: Seconds that /healthz may take, and that another key's chat may take whatever its usual time is.
HEALTH_S, CHAT_S = 0.25, 0.5

#: Seconds for which an attack is watched; what is not answered then is looked at in the end.
WATCH_S = 3.0

#: Seconds after which an answer counts as never coming, on a machine however busy.
NEVER_S = 600

#: MiB that the server itself may ever have had.
MOST_MB = 600

CHAT = "/v1/chat/completions"
#: The command with shorter limits of what ends in any case: these tests look at what happens until it does.
HURRIED = f"""#!{sys.executable} -P
from promptmill.api.jobs import creation
from promptmill.core import child_processes

creation.LONGEST_S = 8.0
less = "from promptmill.tasks.patterns import SearchTime; SearchTime.__init__.__defaults__ = (2.0,); "
child_processes.START = less + child_processes.START

from promptmill.cli import main

main()
"""

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"


@dataclass(frozen=True)
class Sent:
    """One request of an attack."""

    path: str
    body: bytes | None = None
    kind: str = "application/json"


@dataclass
class Target:
    """A server, a key that attacks and one that is not to notice, and the answers that are still to come."""

    server: Server
    bob: str
    alice: str
    threads: ThreadPoolExecutor
    answers: list[tuple[str, tuple[int, ...], Future[tuple[int, Any]]]] = field(default_factory=list)

    def ask(self, sent: Sent, key_: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key_}", "Content-Type": sent.kind}
        request = urllib.request.Request(self.server.url + sent.path, sent.body, headers)
        try:
            with urllib.request.urlopen(request, timeout=NEVER_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as problem:
            return problem.code, json.loads(problem.read())

    def chat_s(self) -> float:
        started = time.monotonic()
        assert self.ask(chat("hello there"), self.alice)[0] == 200
        return time.monotonic() - started

    def health_s(self) -> float:
        started = time.monotonic()
        self.server.get("/healthz")
        return time.monotonic() - started


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("attacked")
    starter = starter_of(folder, f"sqlite:///{folder / 'jobs.sqlite'}", redis_server)
    threads = ThreadPoolExecutor(32)
    try:
        starter.worker(ECHO)
        program = folder / "promptmill"
        program.write_text(HURRIED, encoding="utf-8")
        program.chmod(0o700)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Command, "path", staticmethod(lambda: str(program)))
            server = starter.server("--require-key")
        keys = [key(server, name, "--scope", "submit") for name in ("bob", "alice")]
        yield Target(server, keys[0], keys[1], threads)
        # Its children end with it, in the middle of endless templates.
        server.process.kill()
    finally:
        end_all(starter.started)
        threads.shutdown(cancel_futures=True)


def chat(text: str = "x", **more: Any) -> Sent:
    body = {"model": ECHO, "messages": [{"role": "user", "content": text}], "max_tokens": 400} | more
    return Sent(CHAT, json.dumps(body).encode())


def calling(schema: Any, arguments: Any, stream: bool = False) -> Sent:
    """A chat whose answer calls a strict tool: the echo says what it was told."""
    function = {"name": "f", "parameters": schema, "strict": True}
    text = json.dumps({"name": "f", "arguments": arguments}, separators=(",", ":"))
    return chat(text, tools=[{"type": "function", "function": function}], stream=stream)


def batch(task: str) -> Sent:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h", "task": task}
    return Sent("/v1/batches", json.dumps(body).encode())


def job(**more: Any) -> Sent:
    return Sent("/v1/jobs", json.dumps({"model": ECHO, "lines": [{"input": {"a": 1}}]} | more).encode())


def upload(content: bytes) -> Sent:
    head = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
    return Sent("/v1/files", head + content + b"\r\n--B--\r\n", "multipart/form-data; boundary=B")


def task(user: str, **parts: Any) -> str:
    return json.dumps({"task": "t", "prompt": {"user": user}} | parts)


def bomb(place: str) -> str:
    levels = "".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    return f"task: a\nprompt: {{user: hi}}\n{place}  l0: &l0 [x]\n{levels}"


def reports_of(asked: Callable[[str], dict[str, Any]]) -> Callable[[Target], list[Sent]]:
    """Reports, six at a time, of a job whose answers are what ``asked`` looks at."""

    def make(target: Target) -> list[Sent]:
        text = json.dumps({"a": "a" * 60 + "!"})
        rows = [{"input": {"q": text + " " * row}, "expected": {"a": "aa"}} for row in range(300)]
        found = target.ask(job(lines=rows, task=task("{{ q }}", **asked("^(a|aa)+$"))), target.bob)
        assert found[0] == 200, found
        path = f"/v1/jobs/{found[1]['id']}"
        wait_until(lambda: target.ask(Sent(path), target.bob)[1]["state"] == "completed", "the job ends", 60)
        return [Sent(f"{path}/report")] * 6

    return make


def validating(pattern: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
    return {"output": {"schema": schema, "mode": "validate"}, "scores": [{"exact": "a"}], "expected": {"a": "a"}}


def matching(pattern: str) -> dict[str, Any]:
    return {"scores": [{"regex": "a", "pattern": pattern}]}


SLOW = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a|aa)+$"}}}
SLOW_BY_LOOKING = {"type": "object", "properties": {"a": {"pattern": r"^(?=a)(a|aa)+$"}}}
WAYS: dict[str, Any] = {
    "type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}},
    "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {"type": "null"}},
}  # fmt: skip
LARGE = {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": f"^a{n}"} for n in range(4_000)}}
ALTERNATIVES = {"type": "object", "patternProperties": {f"^(a{n}|b{n}|c{n})+$": {"type": "string"} for n in range(900)}}
LONG = {"a": "a" * 60 + "!"}
MANY_KEYS = b"{" + b",".join(b'"k%d":1' % n for n in range(80_000)) + b',"k1":2}\n'

#: Name, statuses that it may end with, what makes its requests.
ATTACKS: list[tuple[str, tuple[int, ...], Callable[[Target], list[Sent]]]] = [
    ("strict tools, slow pattern", (200,), lambda at: [calling(SLOW, LONG)]),
    ("strict tools, slow look-ahead", (200,), lambda at: [calling(SLOW_BY_LOOKING, LONG)] * 2),
    ("strict tools, endless ways", (200, 400), lambda at: [calling(WAYS, {"a": 1})] * 2),
    ("batch task, endless examples", (400,), lambda at: [batch(task(ENDLESS, prompt={
        "user": ENDLESS, "examples": [{"input": {}, "output": "x"}]}))] * 2),
    ("batch task, a width", (200, 400), lambda at: [batch(task("{{ 'a'|center(1500000000) }}"))] * 2),
    ("batch task, a format", (200, 400), lambda at: [batch(task("{{ '%01500000000d'|format(1) }}"))] * 2),
    ("job template, a width", (400,), lambda at: [job(template="{{ 'a'.center(1500000000)|length }}")] * 2),
    ("aliases in a schema", (400,), lambda at: [batch(bomb("output:\n mode: constrain\n schema:\n"))] * 2),
    ("aliases in generate", (400,), lambda at: [batch(bomb("generate:\n json_schema:\n"))] * 2),
    ("a file of newlines", (400,), lambda at: [upload(b"\n" * 2**26)]),
    ("a line of 80,000 keys", (200,), lambda at: [upload(MANY_KEYS)]),
    ("json_schema as a field", (200, 400, 413), lambda at: [chat(json_schema=LARGE)]),
    ("patterns of properties", (200, 400), lambda at: [chat(json_schema=ALTERNATIVES)]),
    ("20,000 stops", (400,), lambda at: [chat(stop=[f"{n}" * 60 for n in range(20_000)], stream=True)]),
    ("300,000 messages", (413,), lambda at: [chat(messages=[{"role": "user", "content": "x"}] * 300_000)]),
    ("50,000 messages", (400,), lambda at: [chat(messages=[{"role": "user", "content": "x"}] * 50_000)]),
    ("500,000 biases", (413,), lambda at: [chat(logit_bias={str(n): 1 for n in range(500_000)})]),
    ("reports, slow schema", (200, 400), reports_of(validating)),
    ("reports, slow scorer", (200, 400), reports_of(matching)),
    ("endless templates", (400, 429), lambda at: [job(template=ENDLESS)] * 24),
]  # fmt: skip


@pytest.mark.parametrize(("name", "statuses", "make"), ATTACKS, ids=[name for name, *_ in ATTACKS])
def test_nobody_else_notices(
    target: Target, name: str, statuses: tuple[int, ...], make: Callable[[Target], list[Sent]]
) -> None:
    requests = make(target)
    usual_chat, usual_health = max(target.chat_s() for _ in range(3)), max(target.health_s() for _ in range(10))
    # What a busy machine does to one request it does not do each time; an attack does.
    for _ in range(4):
        slow = watched(target, name, statuses, requests, usual_chat, usual_health)
        if not slow:
            break
    assert not slow
    assert memory_mb(target.server) < MOST_MB


def watched(
    target: Target, name: str, statuses: tuple[int, ...], requests: list[Sent], usual_chat: float, usual_health: float
) -> str:
    """Run the attack; says what was too slow meanwhile."""
    sent = [target.threads.submit(target.ask, each, target.bob) for each in requests]
    target.answers += [(name, statuses, each) for each in sent]
    health = chat_ = 0.0
    ends = time.monotonic() + WATCH_S
    while time.monotonic() < ends and (health == 0.0 or not all(each.done() for each in sent)):
        health = max(health, *(target.health_s() for _ in range(3)))
        chat_ = max(chat_, target.chat_s())
    for each in sent:
        if each.done():
            assert each.result()[0] in statuses, each.result()
    is_fine = health < max(HEALTH_S, 2 * usual_health) and chat_ < max(CHAT_S, 2 * usual_chat)
    return "" if is_fine else f"/healthz {health:.2f} s (usually {usual_health:.2f}), a chat {chat_:.2f} s"


def memory_mb(server: Server) -> float:
    if sys.platform != "linux":
        return 0.0
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def test_references_lead_nowhere(target: Target, tmp_path: Path) -> None:
    (tmp_path / "sec.json").write_text('{"enum": ["hunter2"]}')
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        for place in (f"http://127.0.0.1:{listening.getsockname()[1]}/x", f"file://{tmp_path}/sec.json", "sec.json"):
            schema = {"type": "object", "properties": {"a": {"$ref": place}}}
            wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            asked = [
                calling(schema, {"a": "hunter2"}), chat(response_format=wrapped), chat(json_schema=schema),
                *(batch(task("x", output={"schema": schema, "mode": mode})) for mode in ("constrain", "validate")),
                job(task=task("x", output={"schema": schema, "mode": "validate"})),
                job(sampling={"json_schema": schema}),
            ]  # fmt: skip
            for each in asked:
                status, answer = target.ask(each, target.alice)
                assert status == 400
                assert "leads out of the schema" in answer["error"]["message"]
        with pytest.raises(TimeoutError):
            listening.accept()


def test_another_key_has_its_job_while_one_has_endless_templates(target: Target) -> None:
    assert target.ask(job(lines=["x"]), target.alice)[0] == 200
    # A key has two at a time, and each takes its whole time.
    assert not all(answer.done() for name, _, answer in target.answers if name == "endless templates")


def test_every_attack_has_its_answer(target: Target) -> None:
    endless = [answer for name, _, answer in target.answers if name == "endless templates"]
    wait_until(lambda: 400 in [each.result()[0] for each in endless if each.done()], "an endless template is given up")
    # Not all of the endless templates are waited for.
    for name, statuses, answer in target.answers:
        if answer.done() or name != "endless templates":
            status, body = answer.result()
            assert status in statuses, (name, body)
