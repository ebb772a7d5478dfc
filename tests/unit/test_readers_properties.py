"""What holds for every dataset, whatever it contains."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.errors import DatasetError, PromptmillError
from promptmill.prompts import Template, payload, to_request
from promptmill.readers import READERS, Dataset, checked, open_dataset, source
from promptmill.readers.ids import IdTable
from promptmill.task_file import Task
from promptmill.types import DatasetLine, Message, SamplingParams

#: Text that a file can hold: no halves of surrogate pairs, no NUL.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
LINE = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1).filter(
    lambda line: line.strip() and not line.startswith("\ufeff")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(TEXT.filter(lambda name: name not in {"id", "custom_id", "expected", "meta", "input"}), JSON)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

quick = settings(max_examples=60, deadline=None)


@contextmanager
def dataset(name: str, content: bytes, **how: Any) -> Iterator[Dataset]:
    """A file with that content, opened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with open_dataset(path, **how) as opened:
            yield opened


def read(name: str, content: bytes, **how: Any) -> list[DatasetLine]:
    with dataset(name, content, **how) as opened:
        return list(checked(opened.lines()))


@quick
@given(st.lists(LINE, min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from(sorted(PACKERS)))
def test_each_line_of_text_is_one_prompt(lines: list[str], end: str, closed: bool, packing: str) -> None:
    content = (end.join(lines) + (end if closed else "")).encode()
    found = read("a.txt" + packing, PACKERS[packing](content))
    assert [line.prompt for line in found] == lines


@quick
@given(st.lists(TEXT.filter(bool), min_size=1), st.booleans())
def test_a_prompt_comes_back_from_jsonl_as_it_was(prompts: list[str], ascii_only: bool) -> None:
    content = "".join(json.dumps({"prompt": prompt}, ensure_ascii=ascii_only) + "\n" for prompt in prompts)
    assert [line.prompt for line in read("a.jsonl", content.encode())] == prompts


@quick
@given(st.lists(FIELDS, min_size=1))
def test_fields_come_back_from_jsonl_and_from_what_is_stored(records: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(record) + "\n" for record in records)
    found = read("a.jsonl", content.encode(), has_template=True, format="jsonl")
    assert [json.loads(json.dumps(payload(line)))["fields"] for line in found] == records


@quick
@given(st.lists(st.tuples(LINE, TEXT.map(lambda text: text.replace("\r", ""))), min_size=1), st.sampled_from(",\t"))
def test_cells_come_back_from_csv_as_they_were(rows: list[tuple[str, str]], delimiter: str) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "other"), *rows])
    found = read("a.csv" if delimiter == "," else "a.tsv", file.getvalue().encode())
    assert [(line.prompt, line.meta) for line in found] == [(prompt, {"other": other}) for prompt, other in rows]


@quick
@given(st.binary(min_size=1), st.sampled_from(sorted(READERS)), st.booleans(), st.sampled_from(["", ".gz", ".zst"]))
def test_no_bytes_make_a_reader_fail_in_any_other_way_than_it_says(
    content: bytes, format_: str, has_template: bool, packing: str
) -> None:
    try:
        found = read("a.x" + packing, content, format=format_, has_template=has_template)
    except DatasetError:
        return
    assert found
    assert [line.line for line in found] == sorted({line.line for line in found})
    for line in found:
        given_parts = [line.prompt, line.messages, line.fields]
        assert sum(part is not None for part in given_parts) == (0 if line.error else 1)


SHAPES = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON, "custom_id": JSON, "prompt": JSON, "messages": JSON, "input": JSON, "meta": JSON, "expected": JSON,
        "max_tokens": JSON, "stop": JSON, "body": JSON, "method": st.just("POST"), "url": st.just("/v1/completions"),
    },
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON | SHAPES, min_size=1, max_size=5), st.sampled_from(["jsonl", "openai_batch"]), st.booleans())
def test_no_json_makes_a_reader_fail(records: list[Any], format_: str, has_template: bool) -> None:
    content = "".join(json.dumps(record) + "\n" for record in records)
    found = read("a.jsonl", content.encode(), format=format_, has_template=has_template, expected={"y": "prompt"})
    assert len(found) == len(records)
    template = Template("{{ input }}") if has_template else None
    for line in (line for line in found if line.error is None):
        stored = json.dumps(payload(line), allow_nan=False, ensure_ascii=False)
        stored.encode()
        to_request(0, "a", json.loads(stored), line.meta, SamplingParams(**line.sampling), template)


@quick
@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), min_size=1), st.integers(1, 64))
def test_where_blocks_end_changes_nothing(lines: list[bytes], block: int) -> None:
    content = b"x\n" + b"\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "LONGEST_LINE", 32)
        whole = read("a.txt", content)
        patch.setattr(source, "BLOCK", block)
        assert read("a.txt", content) == whole
    too_long = {number for number, line in enumerate(lines, 2) if len(line) > 32}
    assert {line.line for line in whole if line.error == source.TOO_LONG} == too_long


@quick
@given(st.lists(st.sampled_from("abcdefgh") | TEXT), st.sampled_from([4, 1 << 22]))
def test_the_table_of_ids_agrees_with_a_dictionary(ids: list[str], most_places: int) -> None:
    table, known = IdTable(places=2, most_places=most_places), dict[str, int]()
    for line, custom_id in enumerate(ids, 1):
        assert table.first_line(custom_id, line) == known.setdefault(custom_id, line)


@quick
@given(st.text(), st.none() | st.text(min_size=1))
def test_a_template_of_the_command_line_comes_back_or_is_refused(template: str, system: str | None) -> None:
    try:
        task = Task.from_template(template, system)
    except PromptmillError:
        return
    assert (task.template.user, task.template.system) == (template, system)


@quick
@given(FIELDS, st.dictionaries(st.just("expected") | TEXT, JSON, max_size=3))
def test_rendering_shows_the_fields_and_never_the_expected_value(fields: dict[str, Any], about: dict[str, Any]) -> None:
    (message,) = Template("{{ input | tojson }}").render({**fields, "expected": "SECRET"}, about)
    assert message.role == "user"
    assert "SECRET" not in message.content
    assert Template("{{ input['x'] }}").render({"x": "as it is <&>"}, None) == (Message("user", "as it is <&>"),)
