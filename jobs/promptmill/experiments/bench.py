"""``bench``: one workload through the bare engine, through a whole job, and through a server, side by side.

The difference between the first two is what the queue's bookkeeping, the database and the processes cost.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.settings import Settings
from promptmill.database.engine import reading
from promptmill.database.revision import open_database
from promptmill.database.tables import attempts
from promptmill.errors import PromptmillError

if TYPE_CHECKING:
    from promptmill_workers.devices import Device
    from promptmill_workers.engines.contract import EngineOptions

#: Requests at one time to a peer when no number was asked for.
CLIENTS = 16

#: Words of the prompts: noise, because speed depends on lengths and not on sense.
WORDS = (
    "online", "follow", "channel", "free", "song", "click", "win", "great", "link", "new", "work", "buy", "chapter",
    "subscribe", "please", "the", "now", "out", "check", "love", "gift", "discount", "check", "scan", "telegram",
)  # fmt: skip

RULES = "You are a moderator. Decide whether the comment is an advertisement. "

SCHEMA = {
    "type": "object",
    "properties": {
        "is_ad": {"type": "boolean"}, "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "category": {"enum": ["ad", "spam", "normal", "other"]},
    },
    "required": ["is_ad", "score", "category"],
    "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: how many words each prompt has of its own and in common, and how long the answers are."""

    about: str
    own_words: int
    output_tokens: int
    shared_repeats: int = 0
    schema: Mapping[str, Any] | None = None

    def bodies(self, requests: int) -> list[dict[str, Any]]:
        """Bodies of ``/v1/completions``, the same every time."""
        rng = random.Random(7)  # noqa: S311 - no secret
        made = []
        for _ in range(requests):
            own = " ".join(rng.choice(WORDS) for _ in range(self.own_words))
            body: dict[str, Any] = {
                "prompt": RULES * self.shared_repeats + own, "max_tokens": self.output_tokens, "temperature": 0,
            }  # fmt: skip
            if self.schema is None:
                body["ignore_eos"] = True
            else:
                form = {"name": "answer", "strict": True, "schema": self.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": form}
            made.append(body)
        return made


WORKLOADS = {
    "short": Workload("prompts of 24 words, answers of 32 tokens", 24, 32),
    "shared": Workload("the same with 312 words in common, answers of 16 tokens", 24, 16, shared_repeats=28),
    "json": Workload("the same, answers bound by a JSON schema", 24, 128, shared_repeats=28, schema=SCHEMA),
}


#: Seconds below which a run says more of its beginning and its end than of its speed.
SHORTEST_S = 5.0

#: Where the seconds of an engine go, in the order of the report.
PARTS = ("prefill", "decode", "sampling", "grammar", "Python", "waiting")


@dataclass(frozen=True, slots=True)
class BenchFigures:
    """One way through the workload. ``budget_s``: where the seconds of an engine went, by :data:`PARTS`.

    A whole job knows its sampling, its grammar and the rest of its Python together only: as Python.
    """

    name: str
    seconds: float
    requests: int
    output_tokens: int
    steps: int | None = None
    budget_s: dict[str, float] = field(default_factory=dict)

    @property
    def output_tps(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output_tps": self.output_tps, "requests_per_s": self.requests_per_s}


@dataclass(frozen=True, slots=True)
class Way:
    """The runs of one way. Its figures are those of the run with the median rate."""

    runs: tuple[BenchFigures, ...]

    @property
    def median(self) -> BenchFigures:
        """The run in the middle; the slower one of two."""
        return sorted(self.runs, key=lambda run: run.output_tps)[(len(self.runs) - 1) // 2]

    @property
    def rates(self) -> tuple[float, float]:
        """The lowest and the highest output tokens per second."""
        found = [run.output_tps for run in self.runs]
        return min(found), max(found)

    def to_json(self) -> dict[str, Any]:
        low, high = self.rates
        return self.median.to_json() | {
            "runs": [run.to_json() for run in self.runs], "output_tps_min": low, "output_tps_max": high,
            "too_short": self.is_short,
        }  # fmt: skip

    @property
    def is_short(self) -> bool:
        return any(run.seconds < SHORTEST_S for run in self.runs)


def bench(
    workload: str,
    model: str,
    requests: int,
    slots: int | None,
    settings: Settings,
    *,
    device: str = "auto",
    peer: str | None = None,
    repeat: int = 1,
    on_start: Callable[[str], None] = lambda name: None,
) -> list[Way]:
    """Measure the workload ``repeat`` times in turns, the bare engine first.

    Raises PromptmillError for a model or server that cannot be used; a server is asked before anything runs.
    """
    if peer is not None:
        reach(peer)
    bodies = WORKLOADS[workload].bodies(requests)
    ways: dict[str, Callable[[], BenchFigures]] = {
        "bare engine": lambda: bare_engine(bodies, model, slots, settings, device),
        "whole job": lambda: whole_job(bodies, model, slots, settings, device),
    }
    if peer is not None:
        ways[peer] = lambda: server(bodies, peer, slots or settings.slots or CLIENTS, model)
    runs: dict[str, list[BenchFigures]] = {name: [] for name in ways}
    # In turns, so that what else the machine does meets all of them alike.
    for turn in range(repeat):
        for name, measure in ways.items():
            on_start(name if repeat == 1 else f"{name}, {turn + 1} of {repeat}")
            runs[name].append(measure())
    return [Way(tuple(found)) for found in runs.values()]


def reach(url: str) -> str:
    """The address of a server that answers, without its ``/v1``. Raises PromptmillError."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise PromptmillError(f"--peer {url}: not an address that begins with http:// or https://")
    try:
        urllib.request.urlopen(f"{base}/v1/models", timeout=10).close()  # noqa: S310 - the user's own address
    except urllib.error.HTTPError:
        pass  # A server is there; not every server lists its models.
    except (urllib.error.URLError, OSError, ValueError) as problem:
        raise PromptmillError(
            f"--peer {url}: no server answers there: {str(problem)[:160]}",
            hint="Start the server first; nothing was run.",
        ) from None
    return base


def bare_engine(
    bodies: Sequence[Mapping[str, Any]], model: str, slots: int | None, settings: Settings, device: str
) -> BenchFigures:
    """The engine's loop and nothing else, in a process of its own."""
    from promptmill_workers.checkpoints import engine_of
    from promptmill_workers.devices import parse_devices, usable
    from promptmill_workers.host.client import HostConfig

    where = usable(parse_devices("auto")[:1], engine_of(model))[0] if device == "auto" else parse_devices(device)[0]
    config = HostConfig.of(settings, model, where, slots=slots, context_tokens=settings.context_tokens)
    done = _bare_loop(model, config.options, bodies, where)
    if done.returncode < 0 and config.options.device == "cpu":
        # As a worker does it: a second chance without the CPU's special kernels.
        done = _bare_loop(model, replace(config.options, plain_kernels=True), bodies, where)
    if done.returncode != 0:
        raise PromptmillError(f"the bare engine ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return BenchFigures("bare engine", **json.loads(done.stdout))


def _bare_loop(
    model: str, options: EngineOptions, bodies: Sequence[Mapping[str, Any]], where: Device
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "promptmill_workers.bare_loop"],
        input=json.dumps({"model": model, "options": asdict(options), "bodies": list(bodies)}),
        capture_output=True, text=True, env=where.environment(os.environ), check=False,
    )  # fmt: skip


def whole_job(
    bodies: Sequence[Mapping[str, Any]], model: str, slots: int | None, settings: Settings, device: str
) -> BenchFigures:
    """A job on a fresh SQLite database, as ``promptmill run`` does it; its figures come from its rows."""
    from promptmill.reports.figures.summary import summarise
    from promptmill.service.job_options import JobOptions
    from promptmill.service.local_run import run

    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as folder:
        dataset = Path(folder) / "bench.jsonl"
        lines = ({"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body}
                 for index, body in enumerate(bodies))  # fmt: skip
        dataset.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        db = open_database(f"sqlite:///{folder}/bench.sqlite")
        try:
            options = JobOptions(dataset=str(dataset), model=model, slots=slots, device=device)
            job_id = run(options, settings, db).job_id
            summary, spent = summarise(db, job_id), _engine_seconds(db, job_id)
        finally:
            db.dispose()
    if summary.wall_s is None or summary.ok < len(bodies):
        raise PromptmillError(f"{len(bodies) - summary.ok} of {len(bodies)} requests failed in the whole job")
    return BenchFigures("whole job", summary.wall_s, summary.ok, summary.output_tokens, budget_s=spent)


def _engine_seconds(db: Engine, job_id: str) -> dict[str, float]:
    """Where the engine's seconds went, by the counters of its attempts; ``waiting`` for requests or the database."""
    parts = {"prefill": "prefill_s", "decode": "decode_s", "Python": "overhead_s", "waiting": "idle_s"}
    query = sa.select(*(sa.func.sum(attempts.c[column]) for column in parts.values()))
    with reading(db) as connection:
        sums = connection.execute(query.where(attempts.c.job_id == job_id)).one()
    return {part: float(spent or 0.0) for part, spent in zip(parts, sums, strict=True)}


def server(bodies: Sequence[Mapping[str, Any]], url: str, clients: int, model: str) -> BenchFigures:
    """An OpenAI-compatible server at ``url`` (which may end in ``/v1``), ``clients`` requests at a time."""
    base = reach(url)

    def ask(body: Mapping[str, Any]) -> int:
        payload = json.dumps({**body, "model": model}).encode()
        request = urllib.request.Request(  # noqa: S310 - the user's own address
            f"{base}/v1/completions", payload, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as reply:  # noqa: S310
            return int(json.load(reply)["usage"]["completion_tokens"])

    started = time.monotonic()
    try:
        with ThreadPoolExecutor(clients) as threads:
            tokens = sum(threads.map(ask, bodies))
    except (urllib.error.URLError, OSError, KeyError, ValueError) as problem:
        raise PromptmillError(f"{base} does not answer as an OpenAI-compatible server: {str(problem)[:160]}") from None
    return BenchFigures(base, time.monotonic() - started, len(bodies), tokens)
