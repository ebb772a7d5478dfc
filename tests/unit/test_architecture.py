"""docs/architecture.md and CONTRIBUTING.md name files and functions that exist, and count them rightly."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")

#: A file, and a function, class or method in it.
NAMED = re.compile(r"`(promptmill(?:_workers)?/[\w/]+\.py)`: `([\w.]+)`")

#: A numbered step of a way.
STEP = re.compile(r"^\d+\. " + NAMED.pattern, re.MULTILINE)

COUNTS = re.compile(r"^(\d+) functions in (\d+) files, (\d+) returns to a file that was left\.$", re.MULTILINE)

#: Most functions, files and returns from a dataset line to a stored row: the way must stay one that can be read.
MOST = (35, 16, 5)


def file_of(name: str) -> Path:
    return ROOT / ("workers" if name.startswith("promptmill_workers/") else "jobs") / name


def defined_in(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{each.name}" for each in methods}
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED.findall(PAGE))))
def test_a_function_that_is_named_exists(file: str, name: str) -> None:
    assert name in defined_in(file_of(file))


@pytest.mark.parametrize("picture", ["architecture.dot", "architecture.svg"])
def test_a_file_in_the_picture_exists(picture: str) -> None:
    named = set(re.findall(r"promptmill(?:_workers)?/[\w/]+\.py", (DOCS / picture).read_text(encoding="utf-8")))
    assert len(named) > 5
    assert [each for each in named if not file_of(each).is_file()] == []


def test_the_picture_shows_what_its_text_says() -> None:
    shown = set(re.findall(r">([^<>]+)</text>", (DOCS / "architecture.svg").read_text(encoding="utf-8")))
    text = (DOCS / "architecture.dot").read_text(encoding="utf-8")
    labels = {line for label in re.findall(r'label="([^"]+)"', text) for line in label.split(r"\n")}
    assert labels <= shown


def test_every_folder_is_told() -> None:
    folders = {each.parent.name for each in (ROOT / "jobs/promptmill").glob("*/__init__.py")}
    told = set(re.findall(r"`(\w+)`", "".join(line for line in PAGE.splitlines(True) if line.startswith("| `"))))
    assert folders <= told


def test_the_ways_are_counted_rightly_and_stay_short() -> None:
    ways, counts = [], []
    for section in PAGE.split("\n## "):
        if steps := STEP.findall(section):
            ways.append([file for file, _ in steps])
            counts.append(tuple(map(int, COUNTS.findall(section)[0])))
    assert len(ways) == 2
    for way, told in zip(ways, counts, strict=True):
        returns = sum(file != before and file in way[:at] for at, (before, file) in enumerate(pairwise(way), start=1))
        assert told == (len(way), len(set(way)), returns)
    assert all(count <= most for count, most in zip(counts[0], MOST, strict=True))


#: Files and folders of the tree, as CONTRIBUTING.md writes them.
PATHS = re.compile(r"`((?:jobs|workers|migrations|tests|tools|docs)/[\w./]+)`")

#: A name, and the file that it stands in.
NAMES_IN = re.compile(r"`([A-Z_]+)` (?:in|of)\s+`([\w/]+\.py)`")


def test_a_file_that_a_recipe_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {path for path in PATHS.findall(text) if "NAME" not in path}
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_a_name_that_a_recipe_gives_is_in_its_file() -> None:
    pairs = NAMES_IN.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(pairs) > 5
    assert [(name, path) for name, path in pairs if f"\n{name}" not in (ROOT / path).read_text(encoding="utf-8")] == []
