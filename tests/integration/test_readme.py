"""Every command of the README runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, free_port

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

#: Blocks of code: the language, and the lines.
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
SHELL = [text for language, text in BLOCKS if language == "sh"]

#: The beginning of a command that no test can run -> why.
SKIPPED = {
    "make ": "it sets a checkout up, and 'make test' runs this file",
    "pip install ": "it asks a registry; test_packaging.py installs the wheel",
    "CMAKE_ARGS=": "it builds llama.cpp for an NVIDIA GPU",
    "promptmill worker --device cuda": "it needs an NVIDIA GPU",
    "docker compose ": "it needs Docker",
    'promptmill run -p "hello" --model hf:': "it needs the hub",
}

#: A command that serves until it is ended -> what succeeds once it is ready.
SERVERS = {
    "promptmill worker": "promptmill workers --json | grep -qE 'idle|busy'",
    "promptmill api": "(exec 3<>/dev/tcp/127.0.0.1/PORT) 2>/dev/null",
}

#: What must be so before a command: a job that waits, and one that has errors of the class.
BEFORE = {
    "promptmill pause @last": "promptmill submit prompts.txt --model demo",
    "promptmill retry @last": "promptmill run prompts.txt --model echo:token_s=0.2 --timeout 0.1 || true",
    "promptmill rm @last": "promptmill run prompts.txt --model echo",
}

SCHEMA = {"type": "object", "required": ["is_ad"], "properties": {"is_ad": {"type": "boolean"}}}


@dataclass(frozen=True)
class Home:
    """The folder of a user who has the files that the README speaks of."""

    folder: Path
    environment: dict[str, str]

    def bash(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=240, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, redis_server: str, postgres_server: str) -> Home:
    folder = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    made = Home(
        folder,
        kept
        | {
            "PATH": f"{Path(Command.path()).parent}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONSAFEPATH": "1",
            "JOBS_DATABASE_URL": postgres_server, "JOBS_REDIS_URL": redis_server, "JOBS_SLOTS": "4",
            "JOBS_THREADS": "1", "JOBS_RUNTIME_DIR": str(folder / "run"), "JOBS_FILES_DIR": str(folder / "files"),
        },
    )  # fmt: skip
    _write_files(folder)
    jobs = "\n".join(
        f"promptmill run comments.jsonl --task ad_comments.task.yaml --model demo --name {name}"
        for name in ("before", "after")
    )
    done = made.bash(f"set -e\npromptmill db upgrade\n{jobs}")
    assert done.returncode == 0, done.stderr
    return made


def _write_files(folder: Path) -> None:
    data, model = ROOT / "datasets", ROOT / "workers" / "promptmill_workers" / "demo_model"
    comments = [json.loads(line) for line in (data / "ad_comments.jsonl").read_text("utf-8").splitlines()[:8]]
    texts = {
        "comments.jsonl": "".join(json.dumps(each) + "\n" for each in comments),
        "comments.csv": "comment\nCheap followers at my page\nI liked the second chapter\n",
        "prompts.txt": "hello\nwhat is the time?\n",
        "prompts.jsonl": '{"id": "a", "prompt": "hello"}\n{"id": "b", "prompt": "what is the time?"}\n',
        "alpaca.jsonl": '{"instruction": "Add.", "input": "1 and 2", "output": "3"}\n',
        "inspect.jsonl": '{"input": "1 + 2", "target": "3"}\n',
        "answer.schema.json": json.dumps(SCHEMA),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("ad_comments.task.yaml", "ads.task.yaml"):
        (folder / name).write_bytes((data / "ad_comments.task.yaml").read_bytes())
    (folder / "model.gguf").symlink_to(model / "demo.gguf")
    (folder / "mlx-folder").symlink_to(model / "mlx")


def _script(block: str, home: Home) -> str:
    """The commands of a block that can be run here, for bash: servers beside the rest, and ended with it."""
    lines = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for command in block.splitlines():
        if command.startswith(tuple(SKIPPED)):
            continue
        lines += [text for start, text in BEFORE.items() if command.startswith(start)]
        lines.append(f"echo {shlex.quote(f'$ {command}')} >&2")
        ready = [check for start, check in SERVERS.items() if command.startswith(start)]
        # While it is not ready it must be alive.
        lines += [f"{command.partition('#')[0]} &", f"until {ready[0]}; do kill -0 $!; done"] if ready else [command]
    script = "\n".join(lines)
    for url in ("postgresql://user:password@host/name", "postgresql://promptmill:...@127.0.0.1/promptmill"):
        script = script.replace(url, home.environment["JOBS_DATABASE_URL"])
    script = script.replace("redis://host:6379/0", home.environment["JOBS_REDIS_URL"])
    return script.replace("promptmill api ", "promptmill api --port PORT ").replace("PORT", str(free_port()))


def test_every_block_of_code_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"console", "python", "sh", "sql", "text", "yaml"}


@pytest.mark.parametrize("start", SKIPPED)
def test_a_reason_to_skip_belongs_to_a_command_of_the_page(start: str) -> None:
    assert any(line.startswith(start) for block in SHELL for line in block.splitlines())


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.splitlines()[0][:40])
def test_the_commands_of_a_block_run(home: Home, block: str) -> None:
    done = home.bash(_script(block, home))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_first_command_prints_what_the_page_shows(home: Home) -> None:
    (shown,) = [text for language, text in BLOCKS if language == "console"]
    command, _, output = shown.removeprefix("$ ").partition("\n")
    done = home.bash(command)
    assert done.returncode == 0, done.stderr
    titles = [line for line in output.splitlines() if re.fullmatch("[A-Z][a-z]+", line)]
    assert titles == ["Work", "Scores", "Checks"]
    assert [line for line in done.stdout.splitlines() if line in titles] == titles


def test_the_python_of_the_page_runs(home: Home) -> None:
    for program in [text for language, text in BLOCKS if language == "python"]:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=home.folder, env=home.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_query_of_the_page_runs(home: Home) -> None:
    for query in [text for language, text in BLOCKS if language == "sql"]:
        done = home.bash(f"promptmill query {shlex.quote(query)}")
        assert done.returncode == 0, done.stderr


def test_the_whole_task_file_of_the_page_is_valid(home: Home) -> None:
    (task,) = [text for language, text in BLOCKS if language == "yaml" and text.startswith("task:")]
    (home.folder / "page.task.yaml").write_text(task, encoding="utf-8")
    done = home.bash("promptmill run comments.jsonl --task page.task.yaml --model demo --dry-run")
    assert done.returncode == 0, done.stderr
