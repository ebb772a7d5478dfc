"""The folders of examples/ run as their README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, free_port

EXAMPLES = ROOT / "examples"


@pytest.fixture
def ran(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> tuple[Path, str]:
    """A copy of the folder after its script, and what the script printed."""
    folder = tmp_path / request.param
    shutil.copytree(EXAMPLES / request.param, folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    done = subprocess.run(
        ["bash", "run.sh"], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env=kept | {
            "PATH": f"{Path(Command.path()).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONSAFEPATH": "1",
            "JOBS_DATABASE_URL": f"sqlite:///{tmp_path}/jobs.sqlite", "JOBS_REDIS_URL": redis_url,
            "JOBS_RUNTIME_DIR": str(tmp_path / "run"), "JOBS_FILES_DIR": str(tmp_path / "files"),
            "PORT": str(free_port()),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("ran", ["score_ads"], indirect=True)
def test_comments_are_scored(ran: tuple[Path, str]) -> None:
    folder, out = ran
    assert "8 ok, 0 errors of 8" in out
    assert len((folder / "results.jsonl").read_text().splitlines()) == 8
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("ran", ["compare_prompts"], indirect=True)
def test_two_prompts_are_compared(ran: tuple[Path, str]) -> None:
    folder, out = ran
    assert out.count("8 ok, 0 errors of 8") == 2
    assert "is_ad" in (folder / "comparison.html").read_text()


@pytest.mark.parametrize("ran", ["structured_output"], indirect=True)
def test_answers_through_the_api_keep_to_the_schema(ran: tuple[Path, str]) -> None:
    _, out = ran
    assert out.count("{'is_ad': ") == 2


@pytest.mark.parametrize(("folder", "said"), [("score_ads", "score run @s2"), ("compare_prompts", "is_ad.accuracy")])
def test_a_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, folder: str, said: str) -> None:
    copy = tmp_path / folder
    shutil.copytree(EXAMPLES / folder, copy)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=copy, capture_output=True, text=True, timeout=240, check=False,
        env=kept | {
            "JOBS_DATABASE_URL": f"sqlite:///{tmp_path}/jobs.sqlite", "JOBS_RUNTIME_DIR": str(tmp_path / "run"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_each_folder_is_listed_and_run() -> None:
    folders = {path.parent.name for path in EXAMPLES.glob("*/run.sh")}
    assert folders == {"score_ads", "compare_prompts", "structured_output"}
    assert all(f"]({name})" in (EXAMPLES / "README.md").read_text() for name in folders)
