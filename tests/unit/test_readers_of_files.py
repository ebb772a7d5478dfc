"""Datasets that are more, or other, than one file of text: Parquet, folders and patterns, the hub's own."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from promptmill.errors import DatasetError
from promptmill.readers import open_dataset
from promptmill.types import DatasetLine


def lines_of(path: str | Path, **options: Any) -> list[DatasetLine]:
    with open_dataset(path, **options) as dataset:
        return list(dataset.checked())


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_reads_as_the_same_records_in_jsonl_do(tmp_path: Path) -> None:
    records = [
        {"id": f"r{row}", "评论": f"看 {row}", "stars": row % 6, "meta": {"day": "2026"}} for row in range(5_000)
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=700)
    options: dict[str, Any] = {"has_template": True, "expected": {"stars": "stars"}}
    assert lines_of(tmp_path / "a.parquet", **options) == lines_of(jsonl(tmp_path / "a.jsonl", *records), **options)


def test_parquet_values_that_json_lacks_are_written_as_people_write_them(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 11, 21, 8, 30)
    table = pa.table({"at": [when], "price": [decimal.Decimal("1.50")], "share": [float("nan")], "raw": [b"x"]})
    pq.write_table(table.drop_columns(["raw"]), tmp_path / "a.parquet")
    (line,) = lines_of(tmp_path / "a.parquet", has_template=True)
    assert line.fields == {"at": "2026-11-21T08:30:00", "price": 1.5, "share": None}
    pq.write_table(table, tmp_path / "b.parquet")
    (bad,) = lines_of(tmp_path / "b.parquet", has_template=True)
    assert bad.error == "the column 'raw' holds bytes, which no prompt can show"


def parquet(path: Path, *records: Any) -> Path:
    pq.write_table(pa.Table.from_struct_array(pa.array(list(records))), path)
    return path


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"]}}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "description": "d", "strict": True}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"json_schema": {"type": "string", "enum": ["a", None]}}, {"json_schema": {"const": "x"}}),
        ({"tools": [TOOL]}, {"tools": [OTHER_TOOL]}),
        ({"logit_bias": {"5": 1.0}}, {"logit_bias": {"6": -1.0}}),
        ({"max_tokens": 5}, {"stop": ["x"]}),
    ],
    ids=lambda each: str(*each),
)
def test_keys_that_parquet_fills_with_null_are_keys_that_the_record_lacks(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    records = [{"prompt": "p", **first}, {"prompt": "p", **second}]
    lines = lines_of(parquet(tmp_path / "a.parquet", *records))
    assert [line.error for line in lines] == [None, None]
    assert lines == lines_of(jsonl(tmp_path / "a.jsonl", *records))


def test_keys_of_messages_that_parquet_fills_with_null_are_keys_that_they_lack(tmp_path: Path) -> None:
    call = CALL | {"function": {"name": "f", "arguments": {"day": 5}}}
    turns = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL, call]},
        {"role": "tool", "tool_call_id": "a", "content": "5"},
    ]  # fmt: skip
    assert lines_of(parquet(tmp_path / "a.parquet", {"messages": turns})) == lines_of(
        jsonl(tmp_path / "a.jsonl", {"messages": turns})
    )


def test_null_that_is_data_stays(tmp_path: Path) -> None:
    schema = {"properties": {"a": {"const": None, "default": None}, "b": {"enum": [None, 1]}}}
    (line,) = lines_of(jsonl(tmp_path / "a.jsonl", {"prompt": "p", "json_schema": schema}))
    assert json.loads(line.sampling["json_schema"]) == schema
    # As text a schema is what it says in Parquet too.
    (line,) = lines_of(parquet(tmp_path / "a.parquet", {"prompt": "p", "json_schema": json.dumps(schema)}))
    assert json.loads(line.sampling["json_schema"]) == schema
    # Fields of a template are data, whatever they are called.
    record = {"tools": {"a": None, "b": 1}, "meta": {"c": None, "d": 1}, "expected": {"e": None, "f": 1}}
    lines = lines_of(parquet(tmp_path / "b.parquet", record), has_template=True)
    assert lines == lines_of(jsonl(tmp_path / "b.jsonl", record), has_template=True)
    assert lines[0].fields == {"tools": {"a": None, "b": 1}}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array([[("a", 1), ("b", None)], []], pa.map_(pa.string(), pa.int64())), [{"a": 1, "b": None}, {}]),
        (pa.array([[(1, "x")], None], pa.map_(pa.int64(), pa.string())), [{"1": "x"}, None]),
        (pa.array([decimal.Decimal(12345678901234567890), None], pa.decimal128(38, 0)), [12345678901234567890, None]),
        (pa.array([1, None], pa.date32()), ["1970-01-02", None]),
        (pa.array([1_001, None], pa.timestamp("us", "UTC")), ["1970-01-01T00:00:00.001001+00:00", None]),
        (pa.array([1_500_000, None], pa.time64("us")), ["00:00:01.500000", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([[1.5, float("nan")], []]), [[1.5, None], []]),
        (pa.array([b"\0" * 16, None], pa.uuid()), ["00000000-0000-0000-0000-000000000000", None]),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)
def test_values_of_parquet_are_values_of_json(tmp_path: Path, values: pa.Array, found: list[Any]) -> None:
    pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
    lines = lines_of(tmp_path / "a.parquet", has_template=True)
    assert [line.fields for line in lines] == [{"x": each} for each in found]
    json.dumps([line.fields for line in lines], allow_nan=False)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pa.array([1.0, float("inf")]), "an infinite number, which JSON has not"),
        (pa.array([[], [float("-inf")]], pa.list_(pa.float32())), "an infinite number, which JSON has not"),
        (pa.array([[], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), "a map<.*> that cannot be read"),
        (pa.array([[], [(b"a", 1)]], pa.map_(pa.binary(), pa.int64())), "bytes, which no prompt can show"),
        (pa.array([0, 2**62], pa.timestamp("us")), r"a timestamp\[us\] that cannot be read: .* out of range"),
        (pa.array([0, 2**30], pa.date32()), r"a date32\[day\] that cannot be read"),
        (pa.array([b"a", b"\xff"]).view(pa.string()), "a string that cannot be read: 'utf-8' codec"),
        (pa.array([None, 5], pa.duration("s")), "timedelta, which no prompt can show"),
        (pa.array([None, b"x"]), "bytes, which no prompt can show"),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)
def test_a_value_of_parquet_that_json_lacks_is_named_by_row_and_column(
    tmp_path: Path, values: pa.Array, problem: str
) -> None:
    pq.write_table(pa.table({"y": ["1", "2"], "x": values}), tmp_path / "a.parquet", store_schema=True)
    good, bad = lines_of(tmp_path / "a.parquet", has_template=True)
    assert (good.error, good.line, bad.line) == (None, 1, 2)
    assert re.fullmatch(f"the column 'x' holds {problem}.*", bad.error or "")


def test_a_parquet_file_with_a_column_twice_is_one_clear_error(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a\.parquet has two columns called 'x'"):
        lines_of(tmp_path / "a.parquet", has_template=True)


def test_a_parquet_file_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(DatasetError, match="no readable Parquet file"):
        lines_of(tmp_path / "a.parquet")


# --- folders and patterns --------------------------------------------------------------------------------------------


def test_a_folder_or_a_pattern_is_its_files_one_after_the_other(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {"prompt": "3"}, {"prompt": "4"})
    jsonl(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"})
    (tmp_path / "notes.md").write_text("not a dataset")
    for name in (tmp_path, tmp_path / "*.jsonl"):
        lines = lines_of(name)
        assert [line.prompt for line in lines] == ["1", "2", "3", "4"]
        assert [line.custom_id for line in lines] == ["row-0", "row-1", "row-2", "row-3"]


def test_a_bad_line_of_many_files_is_named_by_its_file_and_its_line_there(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"id": "x", "prompt": "1"}, {"prompt": "2"})
    jsonl(tmp_path / "b.jsonl", {"prompt": "3"}, {"id": "x", "prompt": "4"})
    with open_dataset(tmp_path) as dataset:
        bad = [line for line in dataset.checked() if line.error]
        assert [dataset.place(line.line) for line in bad] == [f"{tmp_path / 'b.jsonl'}:2"]
        assert bad[0].error == f"duplicate id 'x', first in {tmp_path / 'a.jsonl'}:1"


def test_what_a_folder_holds_is_in_its_sha256(tmp_path: Path) -> None:
    def sha() -> str:
        with open_dataset(tmp_path) as dataset:
            return dataset.sha256

    jsonl(tmp_path / "a.jsonl", {"prompt": "1"})
    first = sha()
    jsonl(tmp_path / "b.jsonl", {"prompt": "1"})
    second = sha()
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert len({first, second, sha()}) == 3


@pytest.mark.parametrize(
    ("files", "name", "problem"),
    [
        ({}, "", "holds no dataset files"), ({"a.md": "x"}, "", "holds no dataset files"),
        ({}, "*.jsonl", "there is no file"),
        ({"a.jsonl": '{"prompt": "x"}', "b.txt": "x"}, "", "more than one format"),
        ({"a.jsonl": '{"prompt": "x"}', "b.jsonl": ""}, "", "b.jsonl is empty"),
    ],
)  # fmt: skip
def test_a_folder_without_a_dataset_is_one_clear_error(
    tmp_path: Path, files: dict[str, str], name: str, problem: str
) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError, match=problem):
        lines_of(tmp_path / name)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_dataset_of_the_hubs_library_is_read_by_that_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "ads"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"text": "one", "label": 1})
    jsonl(folder / "test.jsonl", {"text": "two", "label": 0}, {"text": "three", "label": 1})
    options: dict[str, Any] = {"has_template": True, "expected": {"label": "label"}}
    assert [line.fields for line in lines_of(f"hf:{folder}", **options)] == [{"text": "two"}, {"text": "three"}]
    (line,) = lines_of(f"hf:{folder}:train", **options)
    assert (line.fields, line.expected) == ({"text": "one"}, {"label": 1})
    with pytest.raises(DatasetError, match="cannot load hf:"):
        lines_of(f"hf:{folder}:nowhere", **options)


def test_without_the_hubs_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError) as caught:
        lines_of("hf:owner/name")
    assert caught.value.hint == "pip install 'promptmill[hf]'"
