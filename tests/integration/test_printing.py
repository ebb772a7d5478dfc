"""What commands print and write: to a terminal, to a pipe that is closed, over files that are there."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Command, wait_until
from tests.unit.test_terminal import HOSTILE


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.name


def on_terminal(command: Command, *arguments: str) -> str:
    """What a terminal is sent by a command."""
    outer, inner = pty.openpty()
    process = command.start(*arguments, terminal=inner)
    os.close(inner)
    found = b""
    try:
        while piece := os.read(outer, 65536):
            found += piece
    except OSError:
        # Linux says so when the last program has left the terminal.
        pass
    process.wait(timeout=60)
    os.close(outer)
    return found.decode()


@pytest.fixture
def hostile(command: Command) -> Command:
    """A job whose prompt, answer, id and dataset's name would command a terminal, and whose answer is a formula."""
    command.environment |= {"TERM": "xterm-256color"}
    name = "d\x1b]0;title\x07.jsonl"
    write(command.folder / name, {"id": f"i{HOSTILE}", "prompt": f"=1+1 {HOSTILE}", "expected": HOSTILE})
    done = command("run", name, "--model", "echo")
    assert done.code == 0, done.err
    return command


def test_nothing_foreign_commands_a_terminal(hostile: Command) -> None:
    for arguments in (
        ["show", "@last", "0"], ["results"], ["results", "--format", "csv"], ["status"], ["report"],
        ["query", "SELECT answer, id FROM v_results", "--format", "csv"],
        ["datasets", "show", "d\x1b]0;title\x07.jsonl"],
        ["run", "missing\x1b[2J.jsonl", "--model", "echo"],
    ):  # fmt: skip
        sent = on_terminal(hostile, *arguments)
        assert "]0;title" in sent or "b]0;t" in sent or "missing" in sent, f"{arguments}: the text itself is shown"
        for sequence in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", "\x08"):
            assert sequence not in sent, (arguments, sent)


def test_a_pipe_and_a_file_get_every_character(hostile: Command) -> None:
    shown = hostile("show", "@last", "0").out
    assert HOSTILE.replace("\r", "\n") in shown, "the test reads line ends as Python does"
    assert json.loads(hostile("results").out)["text"] == f"=1+1 {HOSTILE}"


def test_a_csv_file_has_no_formulas_unless_it_is_to_be_exact(command: Command) -> None:
    data = write(command.folder / "d.jsonl", {"prompt": "=1+1"}, {"prompt": "-5"})
    assert command("run", data, "--model", "echo", "-o", "run.csv").code == 0
    query = ("query", "SELECT answer AS text FROM v_results ORDER BY row")
    for name, arguments in (
        ("run.csv", []), ("results.csv", ["results"]), ("query.csv", [*query]),
    ):  # fmt: skip
        if arguments:
            assert command(*arguments, "-o", name).code == 0
            exact = f"exact-{name}"
            assert command(*arguments, "-o", exact, "--exact").code == 0
            assert texts(command, exact) == ["=1+1", "-5"]
        assert texts(command, name) == ["'=1+1", "-5"]
    assert "'" not in command("results", "--format", "csv").out
    assert "'=1+1" in command("results", "--format", "csv", "--spreadsheet").out


def texts(command: Command, name: str) -> list[str]:
    with (command.folder / name).open(newline="") as file:
        return [line["text"] for line in csv.DictReader(file)]


def test_a_reader_that_has_seen_enough_is_no_error(command: Command) -> None:
    data = write(command.folder / "d.jsonl", *({"prompt": f"prompt {number} {'x' * 400}"} for number in range(2000)))
    assert command("run", data, "--model", "echo").code == 0
    everything = "SELECT * FROM v_results"
    # Unbuffered, Python takes the last piece that a pipe took for the whole of what was written.
    environment = {name: value for name, value in command._env.items() if name != "PYTHONUNBUFFERED"}
    for arguments in (
        ["results", "@last"], ["results", "--format", "csv"], ["query", "SELECT answer FROM v_results"],
        ["query", everything, "--format", "jsonl"], ["datasets", "show", data, "--sample", "2000"],
        ["run", data, "--model", "echo", "-o", "-"],
    ):  # fmt: skip
        process = subprocess.Popen(
            [command.path(), *arguments], cwd=command.folder, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        said = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(timeout=60) == 141, (arguments, said)
        assert not any(word in said for word in ("error:", "Error", "Traceback")), said


def test_a_run_goes_on_when_nobody_reads_its_progress(command: Command) -> None:
    data = write(command.folder / "d.jsonl", *({"prompt": f"prompt {number}"} for number in range(300)))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [command.path(), "run", data, "--model", "echo", "-o", "out.jsonl"], cwd=command.folder, env=command._env,
        stdout=subprocess.DEVNULL, stderr=writer, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert len((command.folder / "out.jsonl").read_text().splitlines()) == 300


def test_a_full_disk_is_one_clear_error(command: Command) -> None:
    command("run", "-p", "hi", "--model", "echo")
    for arguments in (["results"], ["list"], ["list", "--json"], ["query", "SELECT 1", "--format", "csv"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [command.path(), *arguments], cwd=command.folder, env=command._env, stdout=full,
                stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            )  # fmt: skip
        assert (done.returncode, "No space left on device" in done.stderr) == (1, True), done.stderr
        assert "internal error" not in done.stderr


def test_nothing_is_written_over_what_a_command_reads(command: Command) -> None:
    """Refused before anything runs; ``--force`` is no answer to it."""
    data = write(command.folder / "d.jsonl", {"text": "one", "label": "one"})
    (command.folder / "link.jsonl").symlink_to("d.jsonl")
    (command.folder / "score.py").write_text("def score(row): return 1.0\n")
    (command.folder / "t.txt").write_text("{{ text }}")
    (command.folder / "t.yaml").write_text("task: t\nprompt: {user: '{{ text }}'}\nexpected: {label: label}\n"
                                           "scores: [{python: score.py:score}]\n")  # fmt: skip
    before = {each.name: each.read_bytes() for each in command.folder.iterdir() if each.is_file()}
    for read, output in (
        ([data, "--template", "@t.txt"], "d.jsonl"), ([data, "--template", "@t.txt"], "link.jsonl"),
        ([data, "--template", "@t.txt"], "t.txt"), ([data, "--task", "t.yaml"], "t.yaml"),
        ([data, "--task", "t.yaml"], "score.py"),
    ):  # fmt: skip
        done = command("run", *read, "--model", "echo", "-o", output, "--force")
        assert (done.code, "this command reads it" in done.err) == (2, True), done.err
    assert {each.name: each.read_bytes() for each in command.folder.iterdir() if each.is_file()} == before
    assert command("run", data, "--template", "{{ text }}", "--model", "echo").code == 0
    database = (command.folder / "jobs.sqlite").read_bytes()
    assert command("results", "-o", "jobs.sqlite", "--force").code == 2
    assert (command.folder / "jobs.sqlite").read_bytes() == database


def test_a_file_that_is_there_is_replaced_by_force_alone_everywhere(command: Command) -> None:
    assert command("run", "-p", "hi", "--model", "echo", "--name", "a").code == 0
    assert command("run", "-p", "hi", "--model", "echo", "--name", "b").code == 0
    jobs = json.loads(command("list", "--json").out)
    for name, arguments in (
        ("x.jsonl", ["run", "-p", "hi", "--model", "echo"]), ("x.parquet", ["results"]), ("x.csv", ["report"]),
        ("x.yaml", ["init", "free"]), ("x.json", ["compare", "a", "b"]),
    ):  # fmt: skip
        path = command.folder / name
        path.write_text("precious")
        refused = command(*arguments, "-o", name)
        assert (refused.code, path.read_text(), "--force" in refused.err) == (2, "precious", True), refused.err
    assert json.loads(command("list", "--json").out) == jobs, "refused before anything runs"
    (command.folder / "g.xml").write_text("precious")
    assert command("run", "-p", "hi", "--model", "echo", "--junit", "g.xml").code == 2
    assert command("run", "-p", "hi", "--model", "echo", "--junit", "g.xml", "--force").code == 0
    assert (command.folder / "g.xml").read_text().startswith("<?xml")


def test_a_pipe_can_be_an_output_of_a_job(command: Command) -> None:
    os.mkfifo(command.folder / "pipe")
    process = command.start("run", "-p", "hi", "--model", "echo", "-o", "pipe")
    assert json.loads((command.folder / "pipe").read_text())["text"] == "hi"
    wait_until(lambda: process.poll() is not None, "it has ended")
    assert process.returncode == 0
    assert (command.folder / "pipe").is_fifo()
