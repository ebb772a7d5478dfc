"""The English of documents and docstrings: words that were agreed to be left out, and lines that fit a screen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    if path.exists()
]

#: Folders whose docstrings and comments keep to the rules.
CLEAN = ("jobs/promptmill", "workers/promptmill_workers")
MODULES = [path for folder in CLEAN for path in (ROOT / folder).rglob("*.py")]

WORDS = re.compile(r"\b(?:somebody|nobody|whoever)\b(?!_)", re.IGNORECASE)
#: The first word of a sentence: at the start of a text, or behind the end of the sentence before.
OPENING = re.compile(r"(?:^|[.!?:]\s+|\n\s*\n\s*)Of\s")


def _faults(text: str) -> list[str]:
    return [match.group().strip() for rule in (WORDS, OPENING) for match in rule.finditer(text)]


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page that are neither code nor a table."""
    code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            code = not code
        elif not code and not line.startswith("|"):
            yield number, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_page_has_none_of_the_words(path: Path) -> None:
    assert _faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_line_of_prose_is_wider_than_120_characters(path: Path) -> None:
    assert [(number, line) for number, line in _prose(path) if len(line) > 120] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(path.parts[-2:]))
def test_docstrings_and_comments_have_none_of_the_words(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, with_docstring)
    ]  # fmt: skip
    texts += [line.strip().lstrip("#: ") for line in source.splitlines() if line.strip().startswith("#")]
    assert {text: _faults(text) for text in texts if _faults(text)} == {}
