"""What is refused before anything is read: names and limits of a job."""

from __future__ import annotations

import pytest

from promptmill.errors import BadLines, BadOption
from promptmill.service.job_options import JobOptions


@pytest.mark.parametrize("name", ["@last", "", " a", "a\n", "a" * 101, "01M7XXYM4ZEBJ1DDGAVYZ7GYA9"])
def test_a_name_that_could_be_something_else_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match=r"'name' .* cannot name a job"):
        JobOptions(dataset="a.jsonl", name=name)


@pytest.mark.parametrize("name", [None, "nightly", "每晚", "ads 2026-11-21", "7"])
def test_other_names_are_fine(name: str | None) -> None:
    assert JobOptions(dataset="a.jsonl", name=name).name == name


@pytest.mark.parametrize("spec", ["200%", "-1", "ten", "100.1%"])
def test_a_limit_of_errors_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(BadOption, match="'max_errors'"):
        JobOptions(dataset="a.jsonl", max_errors=spec)


def test_more_bad_lines_than_are_listed_can_be_seen() -> None:
    shown = [(line, "broken") for line in range(1, 21)]

    told = str(BadLines("a.jsonl", shown, 87))
    looked_at = str(BadLines("a.jsonl", shown, 87, submitting=False))

    assert "... and 67 more; --skip-invalid records each with its reason" in told
    assert "promptmill results --failed" in told
    assert "... and 67 more; shown when these are mended" in looked_at
