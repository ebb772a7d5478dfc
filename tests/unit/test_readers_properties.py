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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.errors import DatasetError, PromptmillError
from promptmill.readers import READERS, Dataset, checked, open_dataset, source
from promptmill.readers.ids import IdTable
from promptmill.tasks.task_file import Task
from promptmill.tasks.templates import Template, payload, to_request
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
    template = Template("{{ input | tojson }}") if has_template else None
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


#: Names that mean something somewhere: to datasets, to templates, to Python.
RESERVED = (
    "input", "meta", "messages", "prompt", "fields", "id", "custom_id", "choices", "n", "stop", "seed", "max_tokens",
    "self", "loop", "range", "dict", "namespace", "items", "values", "keys", "get", "title", "_fields", "_name",
    "target", "output", "label",
)  # fmt: skip

#: Ways by which a template may try to see all there is.
LOOKS = (
    "{{ input }}", "{{ meta }}", "{{ input | tojson }}", "{{ meta | tojson }}", "{{ input.items() | list }}",
    "{{ input | items | list }}", "{{ meta.values() | list }}", "{{ self._TemplateReference__context }}",
    "{{ input._fields }}", "{{ input['expec' ~ 'ted'] }}", "{{ input | attr('_fields') }}", "{{ input | pprint }}",
    "{% for name in input %}{{ name }}{{ input[name] }}{% endfor %}", "{{ input | string }}",
    "{{ input.keys | string }}",
    "{{ input.context | tojson }}", "{{ context | default({}) | tojson }}", "{{ [input, meta] | string }}",
    "{{ '%s %r' | format(input, meta) }}", "{{ input | map(attribute='expec' ~ 'ted') | list }}",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sets(st.sampled_from(RESERVED), max_size=6),
    st.sampled_from(["expected", "answer", "output", "input", "meta", "prompt", "id2", "self", "context.label"]),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]),
    st.sampled_from(LOOKS) | st.sampled_from(RESERVED).flatmap(
        lambda name: st.sampled_from([f"{{{{ {name} }}}}", f"{{{{ input.{name} }}}}", f"{{{{ meta['{name}'] }}}}"])
    ),
)  # fmt: skip
def test_what_is_expected_is_in_no_prompt_whatever_fields_are_called(
    names: set[str], answer: str, format_: str, look: str
) -> None:
    record: dict[str, Any] = {"text": "t", **{name: f"own {name}" for name in names}, "context": {"x": 1}}
    record |= {"id": "a"} if "id" in names else {}
    record |= {"custom_id": record.get("id", "a")} if "custom_id" in names else {}
    if format_ in ("csv", "tsv") and answer == "context.label":
        record["context.label"] = "SENTINEL"
    elif answer == "context.label":
        record["context"] = {"x": 1, "label": "SENTINEL"}
    else:
        record[answer] = "SENTINEL"
    named = {} if answer == "expected" else {"y": answer}
    content = as_file({name: value for name, value in record.items() if name != "context"} | (
        {} if format_ in ("csv", "tsv") else {"context": record["context"]}), format_)  # fmt: skip
    (line,) = read(f"a.{format_}", content, has_template=True, expected=named)
    assert line.error is None
    assert line.expected == ({"y": "SENTINEL"} if named else "SENTINEL")
    assert "SENTINEL" not in json.dumps(payload(line)) + json.dumps(line.meta)
    try:
        seen = str(to_request(0, "a", payload(line), line.meta, SamplingParams(), Template(look, look)).messages)
    except PromptmillError as problem:
        seen = str(problem)
    assert "SENTINEL" not in seen


def as_file(record: dict[str, Any], format_: str) -> bytes:
    """A file with the one record."""
    if format_ == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([record]), sink)
        return sink.getvalue()
    if format_ in ("json", "jsonl"):
        return json.dumps([record] if format_ == "json" else record).encode()
    file = io.StringIO()
    csv.writer(file, delimiter="," if format_ == "csv" else "\t").writerows([record.keys(), record.values()])
    return file.getvalue().encode()


@quick
@given(FIELDS, st.dictionaries(st.just("expected") | TEXT, JSON, max_size=3))
def test_rendering_shows_the_fields_and_never_the_expected_value(fields: dict[str, Any], about: dict[str, Any]) -> None:
    (message,) = Template("{{ input | tojson }}").render({**fields, "expected": "SECRET"}, about)
    assert message.role == "user"
    assert "SECRET" not in message.content
    assert Template("{{ input['x'] }}").render({"x": "as it is <&>"}, None) == (Message("user", "as it is <&>"),)
