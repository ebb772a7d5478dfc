"""A model's chat template is evaluated in a child: one that never ends is one clear error."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from promptmill.core.child_processes import ChildLimits
from promptmill.core.settings import Settings
from promptmill.errors import ModelError, PromptmillError
from promptmill.service.job_options import JobOptions
from promptmill.service.service import dry_run
from promptmill_workers import limited_counter
from tests.unit.tiny_models import write_tiny_gguf

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_counter, "PROMPT", ChildLimits(1.5, 1_024))


def problem_of(tmp_path: Path, template: str) -> PromptmillError:
    file = write_tiny_gguf(tmp_path / "m.gguf", chat_template=template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n' * 50)
    with pytest.raises(PromptmillError) as caught:
        dry_run(JobOptions(dataset=str(rows), model=str(file)), Settings(_env_file=None), "embedded")
    return caught.value


@pytest.mark.parametrize("template", ["{{ 'a'.ljust(8000000000) }}", "{{ 'a'|center(8000000000) }}"])
def test_a_template_that_fills_the_memory_is_told(tmp_path: Path, template: str) -> None:
    assert re.search("too much memory|MiB of memory", problem_of(tmp_path, template).message)


def test_a_template_that_never_ends_is_one_error_for_all_rows(tmp_path: Path) -> None:
    started = time.monotonic()
    problem = problem_of(tmp_path, ENDLESS)
    assert time.monotonic() - started < 60
    assert isinstance(problem, ModelError)
    assert "cannot be used to count tokens" in problem.message
    assert problem.exit_code == 2


@pytest.mark.parametrize("template", ["{% if a %}" * 150 + "x" + "{% endif %}" * 150, "{{ " + "(" * 3000 + " }}"])
def test_a_template_that_nests_too_deeply_is_told(tmp_path: Path, template: str) -> None:
    assert "the model's chat template cannot be used" in problem_of(tmp_path, template).message


def test_a_good_template_counts_as_before(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m.gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n' * 5)
    found = dry_run(JobOptions(dataset=str(rows), model=str(file)), Settings(_env_file=None), "embedded")
    assert found is not None
    assert (found.rows, found.context_tokens) == (5, 512)
    assert found.tokens_min == found.tokens_max > 1
