"""The demo model as a user runs it: the bundled comments and real ones, with both engines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Command, unavailable

TASK = ROOT / "datasets" / "ad_comments.task.yaml"

#: Share of comments that the demo model judges rightly at least.
LEAST_ACCURACY = 0.93


def judge(command: Command, comments: Path, model: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The report, and the result line of every comment by its id."""
    out = f"{model.replace(':', '-')}.jsonl"
    done = command("run", str(comments), "--task", str(TASK), "--model", model, "--slots", "8", "-o", out, "--json")
    assert done.code == 0, done.err
    lines = (command.folder / out).read_text(encoding="utf-8").split("\n")
    return json.loads(done.out), {line["id"]: line for line in map(json.loads, filter(None, lines))}


def judgement(line: dict[str, Any]) -> bool | None:
    """What the model says; None for an answer of another shape, which a small model gives now and then."""
    try:
        said = json.loads(line["text"])
    except ValueError:
        return None
    return said.get("is_ad") if isinstance(said, dict) else None


def accuracy(report: dict[str, Any]) -> float:
    return float(report["scores"]["is_ad"]["value"])


def rows(comments: Path) -> dict[str, dict[str, Any]]:
    lines = comments.read_text(encoding="utf-8").split("\n")
    return {str(row["id"]): row for row in map(json.loads, filter(None, lines))}


def share_alike(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> float:
    """Of the comments, those that two models judge alike."""
    assert one.keys() == other.keys()
    return sum(judgement(one[key]) == judgement(other[key]) for key in one) / len(one)


@pytest.fixture
def real_comments(shared: Path) -> Path:
    """Comments under five music videos, labelled by people; the demo model has not seen them."""
    path = shared / "data" / "youtube_comments_test.jsonl"
    if not path.is_file():
        unavailable(f"the folder of real inputs has no {path.name}")
    return path


def test_the_bundled_comments_are_judged_in_the_asked_for_shape(command: Command) -> None:
    comments = ROOT / "datasets" / "ad_comments.jsonl"
    report, lines = judge(command, comments, "demo")
    known = rows(comments)

    assert report["ok"] == len(lines) == len(known)
    assert report["errors"] == 0
    for line in lines.values():
        said = json.loads(line["text"])
        assert set(said) == {"is_ad", "score"}
        assert said["score"] in range(6)
    assert report["cached_tokens"] > 0.3 * report["prompt_tokens"]
    right = sum(judgement(line) == known[key]["is_ad"] for key, line in lines.items())
    assert accuracy(report) == pytest.approx(right / len(known))
    assert accuracy(report) >= 0.75


def test_real_comments_are_judged_rightly(command: Command, real_comments: Path) -> None:
    report, lines = judge(command, real_comments, "demo")
    known = rows(real_comments)

    assert len(lines) == len(known)
    right = sum(judgement(line) == known[key]["is_ad"] for key, line in lines.items())
    assert right / len(known) >= LEAST_ACCURACY
    assert accuracy(report) == pytest.approx(right / len(known))


def test_both_engines_judge_real_comments_alike(command: Command, real_comments: Path) -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        unavailable("MLX is not installed: pip install 'promptmill[mlx]'")
    _, by_llama_cpp = judge(command, real_comments, "demo")
    _, by_mlx = judge(command, real_comments, "demo:mlx")

    assert share_alike(by_llama_cpp, by_mlx) >= 0.99
    assert all(by_llama_cpp[key]["prompt_tokens"] == line["prompt_tokens"] for key, line in by_mlx.items())
