"""Datasets: every format, and every way in which a file or a line can be wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from promptmill.core.registry import resolve
from promptmill.errors import DatasetError
from promptmill.readers import ENDINGS, FILE_READERS, FORMATS, READERS, checked, open_dataset
from promptmill.readers.ids import IdTable
from promptmill.readers.source import LONGEST_LINE
from promptmill.tasks.openai import ANSWERED, CHAT, translate
from promptmill.tasks.sampling import ALIASES, CONSTRAINTS, PARAMETERS, resolve_sampling
from promptmill.tasks.templates import Template
from promptmill.types import DatasetLine, Message

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Put content into a file of that name."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def read(path: Path | str, **how: Any) -> list[DatasetLine]:
    with open_dataset(path, **how) as dataset:
        return list(checked(dataset.lines()))


def jsonl(*records: Mapping[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def one(write: Write, record: Mapping[str, Any], **how: Any) -> DatasetLine:
    (line,) = read(write("one.jsonl", jsonl(record)), **how)
    return line


def error(write: Write, record: Mapping[str, Any], **how: Any) -> str:
    found = one(write, record, **how).error
    assert found is not None
    return found


def batch_line(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in url else {}
    question = {"prompt": "hi"} if "completions" in url and not question else question
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **question, **body}}


# ---- the file as a whole


def test_every_format_that_is_listed_can_be_resolved() -> None:
    assert all(callable(resolve("dataset format", name, READERS | FILE_READERS)) for name in FORMATS)
    assert set(ENDINGS.values()) <= set(FORMATS)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no file"):
        open_dataset(tmp_path / "none.jsonl")


def test_a_prompt_given_in_place_of_a_path_is_a_clear_error() -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        open_dataset("why is the sky blue? " * 500)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_is_an_error(write: Write, name: str) -> None:
    with pytest.raises(DatasetError, match="is empty"):
        open_dataset(write(name, ""))


@pytest.mark.parametrize("format_", [None, "text"])
def test_a_file_of_blank_lines_is_an_error(write: Write, format_: str | None) -> None:
    with pytest.raises(DatasetError, match="no lines but blank ones"):
        open_dataset(write("a.txt", "\n  \n\r\n"), format=format_)


def test_an_unknown_ending_lists_the_known_ones(write: Write) -> None:
    with pytest.raises(DatasetError, match=r"\.jsonl.*\.csv.*\.gz"):
        open_dataset(write("a.xlsx", "x"))


def test_an_unknown_format_lists_the_known_ones(write: Write) -> None:
    with pytest.raises(DatasetError, match=r"Did you mean jsonl\? Known: csv"):
        open_dataset(write("a.jsonl", "x"), format="jsnl")


def test_the_format_asked_for_wins_over_the_name(write: Write) -> None:
    (line,) = read(write("a.csv", "just a prompt\n"), format="text")
    assert line.prompt == "just a prompt"


def test_the_checksum_is_that_of_the_bytes_on_disk(write: Write) -> None:
    path = write("a.txt.gz", gzip.compress(b"hello\n", mtime=0))
    expected = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    with open_dataset(path) as dataset:
        assert dataset.sha256 == expected


def test_a_dataset_can_be_read_twice(write: Write) -> None:
    with open_dataset(write("a.txt", "one\ntwo\n")) as dataset:
        assert list(dataset.lines()) == list(dataset.lines())
        assert (dataset.name, dataset.format) == ("a.txt", "text")


def test_utf16_is_named_as_such(write: Write) -> None:
    with pytest.raises(DatasetError, match=r"not UTF-8 at byte 0 .* UTF-16"):
        read(write("a.txt", "hello\n".encode("utf-16")))


# ---- streams and compression


def pack_gz(data: bytes) -> bytes:
    return gzip.compress(data)


def pack_zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKERS = {"gz": pack_gz, "zst": pack_zst}


@pytest.mark.parametrize("packing", sorted(PACKERS))
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"prompt": "p"}\n'), ("a.csv", "prompt\np\n"), ("a.txt", "p")]
)
def test_every_format_is_read_compressed(write: Write, packing: str, name: str, content: str) -> None:
    (line,) = read(write(f"{name}.{packing}", PACKERS[packing](content.encode())))
    assert line.prompt == "p"


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_files_packed_in_several_parts_are_read_to_their_end(write: Write, packing: str) -> None:
    pack = PACKERS[packing]
    lines = read(write(f"a.txt.{packing}", pack(b"one\ntw") + pack(b"o\nthree\n")))
    assert [line.prompt for line in lines] == ["one", "two", "three"]


@pytest.mark.parametrize("packing", sorted(PACKERS))
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_an_error_and_never_a_shorter_dataset(
    write: Write, packing: str, kept: float
) -> None:
    packed = PACKERS[packing]("".join(f"line {number}\n" for number in range(20_000)).encode())
    with pytest.raises(DatasetError, match="is damaged"):
        read(write(f"a.txt.{packing}", packed[: int(len(packed) * kept)]))


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(write: Write, packing: str) -> None:
    with pytest.raises(DatasetError, match="is damaged"):
        read(write(f"a.txt.{packing}", "hello\n"))


@pytest.mark.parametrize(
    ("content", "format_"),
    [
        (b'\n{"prompt": "p"}\n', "jsonl"),
        (b"p\n", "text"),
        (json.dumps(batch_line()).encode(), "openai_batch"),
        (gzip.compress(b'{"prompt": "p"}\n', mtime=0), "jsonl"),
        (pack_zst(b"p\n"), "text"),
    ],
)
def test_standard_input_is_told_by_its_content(monkeypatch: pytest.MonkeyPatch, content: bytes, format_: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with open_dataset("-") as dataset:
        assert (dataset.name, dataset.format) == ("<stdin>", format_)
        assert list(dataset.lines()) == list(dataset.lines()) != []


def test_an_empty_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(DatasetError, match="<stdin> is empty"):
        open_dataset("-")


def test_a_named_pipe_can_be_read_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", f"echo hello > '{pipe}'"]), open_dataset(pipe) as dataset:
        assert [line.prompt for line in dataset.lines()] == ["hello"]
        assert [line.prompt for line in dataset.lines()] == ["hello"]


# ---- lines of text


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(write: Write, name: str) -> None:
    content = {"a.jsonl": '{"prompt": "p"}\r\n', "a.csv": "prompt\r\np\r\n", "a.txt": "p\r\n"}[name]
    (line,) = read(write(name, "\ufeff" + content))
    assert line.prompt == "p"


def test_blank_lines_are_left_out_and_counted(write: Write) -> None:
    lines = read(write("a.jsonl", '\n{"prompt": "p"}\n  \n{"prompt": "q"}'))
    assert [(line.line, line.prompt) for line in lines] == [(2, "p"), (4, "q")]


@pytest.mark.parametrize("packing", ["", "gz"])
def test_what_is_not_utf8_is_named_by_its_byte(write: Write, packing: str) -> None:
    content = "\ufeffgut\nü\n".encode() + b"ab\xffcd\nlast\n"
    path = write("a.txt.gz", gzip.compress(content)) if packing else write("a.txt", content)
    lines = read(path)
    assert [line.line for line in lines] == [1, 2, 3, 4]
    assert lines[2].error == f"not UTF-8 at byte {content.index(0xFF)} of the file"
    assert lines[3].prompt == "last"


def test_a_nul_character_is_refused_since_no_postgresql_takes_it(write: Write) -> None:
    lines = read(write("a.txt", b"ok\na\0b\n"))
    assert lines[1].error == "a NUL character at byte 4 of the file"


def test_a_line_over_16_mib_is_an_error_and_its_neighbours_are_read(write: Write) -> None:
    long = b"x" * (LONGEST_LINE + 1)
    lines = read(write("a.txt", b"before\n" + long + b"\nafter\n" + long + b"\nlast \xff\n" + long))
    assert [line.line for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.error for line in lines][1::2] == ["the line is longer than 16 MiB"] * 2 + [lines[5].error]
    assert lines[5].error == "the line is longer than 16 MiB"
    assert [lines[0].prompt, lines[2].prompt] == ["before", "after"]
    assert lines[4].error == f"not UTF-8 at byte {7 + 2 * (LONGEST_LINE + 2) + 6 + 5} of the file"


def test_a_line_of_exactly_16_mib_is_read(write: Write) -> None:
    lines = read(write("a.txt", b"x" * LONGEST_LINE + b"\nafter\n"))
    assert [len(line.prompt or "") for line in lines] == [LONGEST_LINE, 5]


def test_an_endless_line_is_never_in_memory_whole(write: Write) -> None:
    path = write("a.txt.gz", gzip.compress(b"x" * (120 * 2**20) + b"\none\ntwo\n", compresslevel=1))
    tracemalloc.start()
    try:
        lines = [line.error or line.prompt for line in read(path)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines == ["the line is longer than 16 MiB", "one", "two"]
    assert peak < 4 * LONGEST_LINE


# ---- JSONL


def test_a_prompt_with_everything_that_a_line_may_say(write: Write) -> None:
    record = {
        "custom_id": 7, "prompt": "p", "expected": {"x": 1}, "meta": {"group": "g"},
        "max_completion_tokens": 9, "temperature": 1, "top_k": 3, "top_p": 0.5, "min_p": 0, "seed": -1,
        "stop": "END", "timeout_s": 2, "ignore_eos": True,
    }  # fmt: skip
    assert one(write, record) == DatasetLine(
        1, "7", "p", expected={"x": 1}, meta={"group": "g"},
        sampling={
            "max_tokens": 9, "temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.0, "seed": -1,
            "stop": ("END",), "timeout_s": 2.0, "ignore_eos": True,
        },
    )  # fmt: skip


def test_messages_may_hold_text_parts(write: Write) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = one(write, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]})
    assert line.messages == (Message("system", "s"), Message("user", "a\nb"))


ASSISTANT = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ASSISTANT | {"reasoning_content": "r"}, Message("assistant", "c", '{"reasoning_content": "r"}')),
        (ASSISTANT | {"reasoning": "r"}, Message("assistant", "c", '{"reasoning_content": "r"}')),
        (ASSISTANT | {"reasoning_content": None, "annotations": []}, Message("assistant", "c")),
        (ASSISTANT | {"tool_calls": [], "refusal": None, "audio": None}, Message("assistant", "c")),
        ({"role": "assistant", "content": None, "reasoning_content": "r"},
         Message("assistant", "", '{"reasoning_content": "r"}')),
        ({"role": "user", "content": "c", "name": "n", "annotations": [{"type": "x"}]}, Message("user", "c")),
    ],
)  # fmt: skip
def test_an_answer_can_be_sent_back_as_history(write: Write, turn: dict[str, Any], message: Message) -> None:
    for record in ({"messages": [turn]}, batch_line(messages=[turn])):
        assert one(write, record).messages == (message,)


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"role": "user", "content": "c", "reasoning_content": "r"}, "unsupported key 'reasoning_content'"),
        (ASSISTANT | {"reasoning_content": ["r"]}, "'reasoning_content' is a text"),
        (ASSISTANT | {"refusal": "no"}, "unsupported key 'refusal'"),
    ],
)
def test_history_that_says_what_no_model_hears_is_refused(write: Write, turn: dict[str, Any], problem: str) -> None:
    assert problem in error(write, {"messages": [turn]})


@pytest.mark.parametrize("name", ["prompt", "messages", "input", "id", "custom_id", "meta", "expected"])
def test_null_is_as_if_the_key_were_not_there(write: Write, name: str) -> None:
    for record in ({"prompt": "p"}, {"messages": [{"role": "user", "content": "p"}]}):
        if name not in record:
            assert replace(one(write, {**record, name: None}), custom_id=None) == replace(
                one(write, record), custom_id=None
            )


def test_a_whole_number_of_a_table_library_is_an_id(write: Write) -> None:
    assert one(write, {"id": 7.0, "prompt": "p"}).custom_id == "7"


def test_tables_may_hold_decimals_and_words_as_pandas_writes_them(write: Write) -> None:
    (first, second) = read(write("a.csv", "prompt,max_tokens,ignore_eos\np,8.0,True\nq,,False\n"))
    assert (first.sampling, second.sampling) == ({"max_tokens": 8, "ignore_eos": True}, {"ignore_eos": False})


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("field", ["input", "meta", "messages", "prompt", "choices", "n", "stop", "seed", "max_tokens"])
def test_with_a_template_a_field_is_a_field_whatever_it_is_called(tmp_path: Path, name: str, field: str) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text(f"{field},label\ntext,SECRET\n", encoding="utf-8")
    elif name == "a.jsonl":
        path.write_text(jsonl({field: "text", "label": "SECRET"}), encoding="utf-8")
    else:
        pq.write_table(pa.table({field: ["text"], "label": ["SECRET"]}), path)
    (line,) = read(path, has_template=True, expected={"y": "label"})
    assert (line.fields, line.expected, line.meta, line.sampling) == ({field: "text"}, {"y": "SECRET"}, None, {})


def test_what_is_expected_inside_an_object_is_taken_out_of_it(write: Write) -> None:
    record = {"context": {"title": "t", "label": "SECRET"}}
    how: dict[str, Any] = {"has_template": True, "expected": {"y": "context.label"}}
    line = one(write, record, **how)
    assert (line.fields, line.expected) == ({"context": {"title": "t"}}, {"y": "SECRET"})
    assert one(write, record, **how, input={"all": "context"}).fields == {"all": {"title": "t"}}
    assert one(write, record, **how, meta={"all": "context"}).meta == {"all": {"title": "t"}}
    assert "no field 'expected'" in error(write, {"expected": 5}, has_template=True, input={"x": "expected"})


@pytest.mark.parametrize("column", ["choices", "continuations", "json_schema", "regex", "embedding", "tools", "n"])
def test_a_column_that_would_bind_answers_is_never_taken_for_a_parameter(write: Write, column: str) -> None:
    with pytest.raises(DatasetError, match=f"the column '{column}' is called as a parameter"):
        read(write("a.csv", f"prompt,{column}\np,1\n"))


def test_input_is_the_templates(write: Write) -> None:
    line = one(write, {"input": {"a": 1}, "max_tokens": 3, "expected": 5}, has_template=True)
    assert (line.fields, line.expected, line.sampling) == ({"a": 1}, 5, {"max_tokens": 3})


def test_a_flat_record_is_input_but_for_id_meta_and_what_is_expected(write: Write) -> None:
    record = {"id": "x", "comment": "c", "is_ad": True, "meta": {"m": 1}, "prompt": "also a field", "max_tokens": 5}
    line = one(write, record, has_template=True, expected={"ad": "is_ad", "absent": "absent"})
    assert (line.custom_id, line.expected, line.meta) == ("x", {"ad": True}, {"m": 1})
    assert line.fields == {"comment": "c", "prompt": "also a field", "max_tokens": 5}


@pytest.mark.parametrize(
    ("record", "expected", "labels"),
    [
        ({"c": 1, "y": 2}, {"a": "y", "b": "y"}, {"a": 2, "b": 2}),
        ({"c": 1, "expected": 2}, {"a": "expected"}, {"a": 2}),
        ({"c": 1, "expected": {"z": 3}, "y": 2}, {"a": "y"}, {"z": 3, "a": 2}),
        ({"c": 1, "expected": {"z": 3}}, {"a": "y"}, {"z": 3}),
        ({"c": 1}, {"a": "y"}, None),
        ({"input": {"c": 1, "y": 2}}, {"a": "y"}, {"a": 2}),
        ({"input": {"c": 1}, "y": 2}, {"a": "y"}, {"a": 2}),
    ],
)
def test_expected_values_are_kept_apart_from_the_input(
    write: Write, record: dict[str, Any], expected: dict[str, str], labels: Any
) -> None:
    line = one(write, record, has_template=True, expected=expected)
    assert (line.fields, line.expected) == ({"c": 1}, labels)


def test_a_label_may_stand_beside_a_prompt(write: Write) -> None:
    assert one(write, {"prompt": "p", "is_ad": 1}, expected={"ad": "is_ad"}).expected == {"ad": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": }', "broken JSON at column 12: Expecting value"),
        ('{"prompt": "a"} x', "broken JSON at column 17: Extra data"),
        ('{"prompt": "a', "broken JSON at column 12: Unterminated string starting at"),
        ("[1]", "the line is a list, not a JSON object"),
        ("null", "the line is null, not a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"prompt": "a", "meta": {"k": 1, "k": 2}}', "the key 'k' is there twice"),
        ('{"prompt": "a", "seed": NaN}', "broken JSON: NaN is no JSON number"),
        ('{"prompt": "a", "expected": 1e999}', "the number 1e999 is out of range"),
        ('{"prompt": "a", "expected": ' + "9" * 5000 + "}", "broken JSON: a number with too many digits"),
        ('{"prompt": ' + "[" * 100_000, "broken JSON: nested too deeply"),
        (r'{"prompt": "a\ud800b"}', r"half of a surrogate pair: its \u escape stands for no character"),
        (r'{"prompt": "a\u0000b"}', r"a NUL character (\u0000)"),
    ],
)
def test_broken_json_names_the_place(write: Write, text: str, problem: str) -> None:
    first, second, third = read(write("a.jsonl", '{"prompt": "p"}\n' + text + '\n{"prompt": "q"}\n'))
    assert (first.prompt, third.prompt) == ("p", "q")
    assert (second.line, second.error) == (2, problem)


@pytest.mark.parametrize("text", [r"\\u0000", r"\\ud800", r"\ud83d\ude00", r"\u00e9"])
def test_escapes_that_stand_for_characters_are_read(write: Write, text: str) -> None:
    (line,) = read(write("a.jsonl", f'{{"prompt": "{text}"}}'))
    assert line.prompt == json.loads(f'"{text}"')


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"comment": "c"}, "neither 'prompt' nor 'messages'"),
        ({"prompt": "p", "messages": []}, "both 'prompt' and 'messages'"),
        ({"input": {"a": 1}}, "there is no template: give --template or --task"),
        ({"prompt": 5}, "'prompt' is a number, not a text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "'prompt' is null, not a text"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": ["hi"]}, r"messages\[0\] is a text, not an object"),
        ({"messages": [{"role": "usr", "content": "c"}]}, r"messages\[0\].role is not one of"),
        ({"messages": [{"role": ["user"], "content": "c"}]}, r"messages\[0\].role is not one of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is neither"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content is neither"),
        ({"messages": [{"role": "user", "content": "c", "tool_calls": [{}]}]}, "belong to messages of the assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a call is"),
        ({"messages": [{"role": "user", "content": "c", "audio": {"id": "a"}}]}, "unsupported key 'audio'"),
        ({"prompt": "p", "max_token": 5}, "unknown parameter 'max_token'. Did you mean max_tokens?"),
        ({"prompt": "p", "max_tokens": "5"}, "'max_tokens' must be a whole number"),
        ({"prompt": "p", "max_tokens": 0}, "'max_tokens' must be a whole number of 1 or more"),
        ({"prompt": "p", "max_tokens": True}, "'max_tokens' must be a whole number"),
        (
            {"prompt": "p", "max_tokens": 3, "max_completion_tokens": 4},
            "'max_completion_tokens' and 'max_tokens' differ",
        ),
        ({"prompt": "p", "temperature": -1}, "'temperature' must be a number from 0"),
        ({"prompt": "p", "top_p": 0}, "'top_p' must be a number above 0 to 1"),
        ({"prompt": "p", "min_p": 1.5}, "'min_p' must be"),
        ({"prompt": "p", "stop": [""]}, "'stop' must be"),
        ({"prompt": "p", "stop": [5]}, "'stop' must be"),
        ({"prompt": "p", "seed": 2**64}, "'seed' must be"),
        ({"prompt": "p", "ignore_eos": 1}, "'ignore_eos' must be true or false"),
        ({"prompt": "p", "id": "a", "custom_id": "b"}, "id and custom_id differ"),
        ({"prompt": "p", "id": 1.5}, "an id is a text or a whole number"),
        ({"prompt": "p", "id": True}, "an id is a text or a whole number"),
        ({"prompt": "p", "id": ""}, "the id is empty"),
        ({"prompt": "p", "meta": [1]}, "'meta' is a list, not an object"),
    ],
)
def test_a_line_that_cannot_be_used_says_why(write: Write, record: dict[str, Any], problem: str) -> None:
    line = one(write, record)
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(line.error)


def test_a_line_that_cannot_be_used_keeps_its_id(write: Write) -> None:
    assert one(write, {"id": "a", "prompt": "p", "tmperature": 1}).custom_id == "a"
    assert one(write, {"id": 5, "comment": "c"}).custom_id == "5"


# ---- duplicate ids


def test_a_second_line_with_the_same_id_names_the_first(write: Write) -> None:
    records = [{"id": "a", "prompt": "p"}, {"prompt": "q"}, {"id": "b", "prompt": "r"}, {"id": "a", "prompt": "s"}]
    lines = read(write("a.jsonl", jsonl(*records)))
    assert [line.error for line in lines] == [None, None, None, "duplicate id 'a', first in line 1"]


def test_the_number_7_and_the_text_7_are_the_same_id(write: Write) -> None:
    lines = read(write("a.jsonl", jsonl({"id": 7, "prompt": "p"}, {"custom_id": "7", "prompt": "q"})))
    assert lines[1].error == "duplicate id '7', first in line 1"


@pytest.mark.parametrize("most_places", [1 << 22, 1 << 10])
def test_the_table_of_ids_remembers_each_first_line_in_memory_and_behind_it(most_places: int) -> None:
    table = IdTable(places=4, most_places=most_places)
    assert all(table.first_line(f"id {line}", line) == line for line in range(1, 10_001))
    assert all(table.first_line(f"id {line}", 99_999) == line for line in range(1, 10_001))


# ---- OpenAI batch lines


def test_batch_lines_are_told_by_their_first_line(write: Write) -> None:
    with open_dataset(write("a.jsonl", "\n" + jsonl(batch_line()))) as dataset:
        assert dataset.format == "openai_batch"


def test_a_flat_record_with_a_body_of_text_is_no_batch_line(write: Write) -> None:
    path = write("a.jsonl", jsonl({"custom_id": "a", "body": "the text of a mail", "url": "of.the.mail"}))
    with open_dataset(path, has_template=True) as dataset:
        assert dataset.format == "jsonl"


def test_parameters_are_those_of_their_own_line(write: Write) -> None:
    bodies: list[dict[str, Any]] = [
        {"max_tokens": 1},
        {"max_tokens": True},
        {"max_tokens": 1},
        {"n": 2, "temperature": 1},
        {},
        {"max_tokens": 2},
    ]
    made = [batch_line(**body) | {"custom_id": str(place)} for place, body in enumerate(bodies)]
    found = read(write("a.jsonl", jsonl(*made)))
    assert "max_tokens" in (found[1].error or "")
    wanted = [{"max_tokens": 1}, {}, {"max_tokens": 1}, {"n": 2, "temperature": 1.0}, {}, {"max_tokens": 2}]
    assert [line.sampling for line in found] == wanted
    assert [line.error is None for line in found] == [True, False, True, True, True, True]


def test_a_chat_line_is_messages(write: Write) -> None:
    line = one(write, batch_line(max_completion_tokens=5, temperature=0.5, top_p=None, user="u", n=1, stream=False))
    assert (line.custom_id, line.messages) == ("a", (Message("user", "hi"),))
    assert line.sampling == {"max_tokens": 5, "temperature": 0.5, "n": 1}


def test_a_chat_line_brings_what_binds_and_describes_its_answer(write: Write) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    line = one(write, batch_line(response_format=form, logprobs=True, top_logprobs=2, logit_bias={"7": -3}, n=2))

    assert line.sampling == {
        "json_schema": json.dumps(schema), "logprobs": True, "top_logprobs": 2, "logit_bias": ((7, -3.0),), "n": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"input": ["a", "b"]}, "unsupported 'body.input': give one text, not a list"),
        (
            {"input": "a", "encoding_format": "base64"},
            "'body.encoding_format': vectors are lists of numbers",
        ),
        ({"input": "a", "dimensions": 8}, "'body.dimensions': vectors have the model's own size"),
    ],
    ids=str,
)
def test_what_embeddings_lines_cannot_ask_for_is_refused(write: Write, body: dict[str, Any], problem: str) -> None:
    error = one(write, batch_line("/v1/embeddings", **body)).error

    assert error is not None
    assert problem in error


def test_an_embeddings_line_asks_for_a_vector(write: Write) -> None:
    line = one(write, batch_line("/v1/embeddings", input="hi", encoding_format="float"))
    assert (line.prompt, line.raw, line.sampling) == ("hi", True, {"embedding": True})


def test_a_completions_line_counts_its_alternatives(write: Write) -> None:
    line = one(write, batch_line("/v1/completions", prompt="hi", logprobs=3))
    assert line.sampling == {"logprobs": True, "top_logprobs": 3}


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_completions_line_is_a_raw_prompt(write: Write, prompt: Any) -> None:
    line = one(write, batch_line("/v1/completions", prompt=prompt))
    assert (line.prompt, line.raw, line.messages) == ("hi", True, None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "GET"}, "method is not POST"),
        ({"url": "/v1/responses"}, "url is none of"),
        ({"url": ["/v1/completions"]}, "url is none of"),
        ({"custom_id": 5}, "custom_id is a number, not a text"),
        ({"custom_id": ""}, "the id is empty"),
        ({"method": None}, "missing 'method'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"meta": 1}, "'meta' is a number, not an object"),
    ],
)
def test_a_batch_line_has_the_four_keys_and_no_others(write: Write, changes: dict[str, Any], problem: str) -> None:
    (_, line) = read(write("a.jsonl", jsonl(batch_line(), {**batch_line(), "custom_id": "b", **changes})))
    assert line.error is not None
    assert problem in line.error


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"tools": [{}]}, "'tools' must be a list of"),
        ({"n": 0}, "'n' must be a whole number of 1 or more"),
        ({"n": True}, "'n' must be a whole number of 1 or more"),
        ({"stream": True}, "unsupported parameter 'body.stream'"),
        ({"store": True}, "unsupported parameter 'body.store'"),
        ({"logprobs": True, "top_logprobs": 21}, "'top_logprobs' must be a whole number of at most 20"),
        ({"response_format": {"type": "xml"}}, "'response_format.type' must be"),
        ({"response_format": {"type": "json_schema"}}, "'response_format.json_schema.schema' must be"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}},
            "a JSON schema that can be enforced; of this one: Invalid type: objct",
        ),
        ({"presence_penalty": 2.5}, "'presence_penalty' must be a number from -2 to 2"),
        ({"logit_bias": {"x": 1}}, "'logit_bias' must be an object of token ids"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"stop": [""]}, "'stop' must be"),
        ({"timeout_s": -1}, "'timeout_s' must be"),
        ({"choices": ["a", "a"]}, "different texts"),
        ({"thinking": "maybe"}, "'thinking' must be on, off, or a budget in tokens"),
        ({"temperatur": 1}, "unsupported parameter 'body.temperatur'. Did you mean temperature?"),
        ({"temperature": 2.5}, "'temperature' must be a number from 0 to 2"),
        ({"max_tokens": 0}, "'max_tokens' must be"),
        ({"model": 5}, "'body.model' is not a text"),
        ({"messages": []}, "at least one message"),
        ({"messages": None}, "at least one message"),
    ],
)
def test_what_would_change_a_batch_answer_is_refused_by_name(write: Write, body: dict[str, Any], problem: str) -> None:
    assert problem in error(write, batch_line(**body))


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1, 2]], 5, "", None])
def test_a_prompt_of_tokens_or_of_several_texts_is_refused(write: Write, prompt: Any) -> None:
    assert "rompt" in error(write, batch_line("/v1/completions", prompt=prompt))


# ---- CSV and TSV


def test_csv_without_a_template_has_a_prompt_column_and_meta(write: Write) -> None:
    (line,) = read(write("a.csv", 'id,prompt,lang,max_tokens,stop\n5,"a, ""b""",en,12,END\n'))
    assert line == DatasetLine(2, "5", 'a, "b"', meta={"lang": "en"}, sampling={"max_tokens": 12, "stop": ("END",)})


def test_csv_with_a_template_gives_it_every_column_but_id_and_labels(write: Write) -> None:
    lines = read(
        write("a.tsv", "custom_id\tcomment\tis_ad\tmeta\na\tc\ttrue\tm\n\td\t\tn\n"),
        has_template=True,
        expected={"ad": "is_ad"},
    )
    assert [(line.custom_id, line.fields, line.expected) for line in lines] == [
        ("a", {"comment": "c", "meta": "m"}, {"ad": "true"}),
        ("row-1", {"comment": "d", "meta": "n"}, None),
    ]


def test_a_record_over_several_lines_is_named_by_its_first(write: Write) -> None:
    lines = read(write("a.csv", 'prompt,x\r\n"a\r\n\r\nb",1\r\n\r\nc\r\nd,2\r\n'))
    assert [(line.line, line.prompt) for line in lines] == [(2, "a\n\nb"), (6, None), (7, "d")]
    assert lines[1].error == "1 fields, the header has 2"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("a,1,2", "3 fields, the header has 2"),
        (",1", "the prompt is empty"),
        ('"a"b,1', "broken CSV"),
        ("a\0,1", "a NUL character"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(write: Write, record: str, problem: str) -> None:
    lines = read(write("a.csv", f"prompt,x\n{record}\nlast,1\n"))
    assert problem in str(lines[0].error)
    assert [line.prompt for line in lines] == [None, "last"]


def test_a_wrong_parameter_in_a_column_says_why(write: Write) -> None:
    lines = read(write("a.csv", "prompt,temperature\np,hot\np,\np,1\n"))
    assert [line.error for line in lines] == ["'temperature' must be a number from 0 to 100", None, None]
    assert [line.sampling for line in lines[1:]] == [{}, {"temperature": 1.0}]


def test_bytes_that_are_not_utf8_spoil_their_record_only(write: Write) -> None:
    lines = read(write("a.csv", b'prompt\n"a\xff\nb"\nlast\n'))
    assert [(line.line, line.error) for line in lines] == [(2, "not UTF-8 at byte 9 of the file"), (4, None)]


QUOTE = "broken CSV: the quote that opens in line {} is not closed where its field ends"


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ('"a\nb\n', [(2, QUOTE.format(2)), (3, "b")]),
        ('"a\n"b"\nc', [(2, QUOTE.format(2)), (3, "b"), (4, "c")]),
        ('a\n"b""\nc ""d\n"e"\n', [(2, "a"), (3, QUOTE.format(3)), (4, 'c ""d'), (5, "e")]),
        ('"a\nb"\n"c\n\nd\n', [(2, "a\nb"), (4, QUOTE.format(4)), (6, "d")]),
        ('"a\n"b\n"c\nd\n', [(2, QUOTE.format(2)), (3, QUOTE.format(3)), (4, QUOTE.format(4)), (5, "d")]),
        ('"a"b\nc\n', [(2, "broken CSV: ',' expected after '\"'"), (3, "c")]),
        ('"a"', [(2, "a")]),
        ('"a', [(2, QUOTE.format(2))]),
    ],
)  # fmt: skip
def test_a_quote_that_is_not_closed_spoils_its_own_record_only(
    write: Write, records: str, found: list[tuple[int, str]]
) -> None:
    lines = read(write("a.csv", "prompt\n" + records))
    assert [(line.line, line.error or line.prompt) for line in lines] == found


def test_the_quote_of_a_later_field_is_named_by_its_own_line(write: Write) -> None:
    lines = read(write("a.csv", 'prompt,x\n"a\nb","c\nd,1\n'))
    assert [(line.line, line.error or line.prompt) for line in lines] == [(2, QUOTE.format(3)), (4, "d")]


def test_two_csv_files_in_one_are_told_where_the_second_begins(write: Write) -> None:
    lines = read(write("a.csv", "\ufeffprompt\na\n\ufeffprompt\nb\n"))
    assert [line.prompt for line in lines] == ["a", None, "b"]
    assert (lines[1].line, "are these two files" in str(lines[1].error)) == (3, True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n'),
        ("a.txt", "\ufeffa\n\ufeffb\n"),
        ("a.ndjson.gz", '\ufeff{"prompt": "a"}\r\n\ufeff\r\n\ufeff{"prompt": "b"}'),
    ],
)
def test_byte_order_marks_of_files_put_together_are_no_text(write: Write, name: str, content: str) -> None:
    data = content.encode()
    lines = read(write(name, gzip.compress(data) if name.endswith("gz") else data))
    assert [line.prompt for line in lines if not line.error] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "prompt\ra\rb"), ("a.txt", "a\rb\r"), ("a.jsonl", '{"prompt": "a"}\r{"prompt": "b"}\r'),
     ("a.tsv", "prompt\tx\ra\t1\r\rb\t2\r"), ("a.json", '[{"prompt": "a"},\r{"prompt": "b"}]')],
)  # fmt: skip
def test_lines_that_end_in_a_carriage_return_alone_are_lines(write: Write, name: str, content: str) -> None:
    assert [line.prompt for line in read(write(name, content))] == ["a", "b"]


@pytest.mark.parametrize("header", ["prompt,x", '"prompt",x', 'prompt,"x\ny"', 'prompt,"a ""b"""'])
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("inside", ["\n", "\r\n", "\n\n"])
def test_a_line_end_in_a_cell_is_none_of_the_table(write: Write, header: str, end: str, inside: str) -> None:
    rows = [header, f'"a{inside}b",1', "c,2", f'd,"{inside}"', ""]
    lines = read(write("a.csv", end.join(rows)))
    assert [line.error for line in lines] == [None, None, None]
    text = inside.replace("\r\n", "\n")
    assert [line.prompt for line in lines] == [f"a{text}b", "c", "d"]
    assert [(line.meta or {})[named] for line in lines for named in line.meta or {}] == ["1", "2", text]


def test_a_tab_in_a_cell_makes_no_table_of_tabs(write: Write) -> None:
    assert [line.prompt for line in read(write("a.csv", 'prompt\r"a\tb\nc"\r'))] == ["a\tb\nc"]


def test_a_carriage_return_inside_a_line_of_text_stays(write: Write) -> None:
    assert [line.prompt for line in read(write("a.txt", "a\rb\nc\n"))] == ["a\rb", "c"]


RECORDS = '{"prompt": "a"}\n{"prompt": "b"}\n'
LIST = '[{"prompt": "a"},\n {"prompt": "b"}]'
SPREAD = '[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n'
ONE_LINE = '[{"prompt": "a"}, {"prompt": "b"}]'


@pytest.mark.parametrize(
    ("name", "content", "format_"),
    [
        ("a.json", RECORDS, "jsonl"), ("a.json", "\n" + RECORDS, "jsonl"), ("a.jsonl", LIST, "json"),
        ("a.jsonl", SPREAD, "json"), ("a.ndjson", ONE_LINE, "json"), ("a.json", SPREAD, "json"),
        ("a.json", '{"rows": ' + ONE_LINE + "}", "json"), ("a.jsonl", '{\n"rows": ' + SPREAD + "}", "json"),
        ("a.json", '{\n"rows":\n' + SPREAD + "}", "json"),
        ("a.csv", RECORDS, "jsonl"), ("a.csv", "prompt\tx\na\t1\nb\t2\n", "tsv"),
        ("a.tsv", "prompt,x\na,1\nb,2\n", "csv"), ("a.csv", "prompt\na\nb\n", "csv"), ("a.txt", "a\nb\n", "text"),
    ],
)  # fmt: skip
def test_the_content_tells_the_format_where_the_name_is_wrong(
    write: Write, name: str, content: str, format_: str
) -> None:
    with open_dataset(write(name, content)) as dataset:
        assert dataset.format == format_
        assert [line.prompt for line in dataset.lines()] == ["a", "b"]


def test_a_json_file_of_one_record_is_a_line_of_jsonl(write: Write) -> None:
    (line,) = read(write("a.json", '{"prompt": "a"}'))
    assert line.prompt == "a"


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_a_compressed_file_without_its_ending_is_read(write: Write, packing: str) -> None:
    (line,) = read(write("a.txt", PACKERS[packing](b"p")))
    assert line.prompt == "p"


@pytest.mark.parametrize("first", ["{broken", '{"custom_id": "x", "body": {"model": "us', "[1]", "text", "{}"])
def test_a_broken_first_line_does_not_tell_the_format(write: Write, first: str) -> None:
    path = write("a.jsonl", f"{first}\n" + jsonl(batch_line()))
    with open_dataset(path) as dataset:
        assert dataset.format == "openai_batch"
        if first != "{}":
            assert [line.error is None for line in dataset.lines()] == [False, True]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("question\nq\n", r"a.csv: the header has no column 'prompt' \(it has: question\)"),
        ("prompt,prompt\na,b\n", "empty or repeated names"),
        ("prompt,\na,b\n", "empty or repeated names"),
        ("prompt\n", "a header and no records"),
        ("prompt\n\n\n", "a header and no records"),
        (b"pro\xffmpt\na\n", "a.csv:1: the header cannot be read: not UTF-8 at byte 3"),
    ],
)
def test_a_wrong_header_is_an_error_of_the_file(write: Write, content: str | bytes, problem: str) -> None:
    with pytest.raises(DatasetError, match=problem):
        read(write("a.csv", content))


# ---- plain text


def test_plain_text_is_a_prompt_a_line(write: Write) -> None:
    lines = read(write("a.txt", " one\n\n二\u2028still two\n"))
    assert [(line.line, line.prompt) for line in lines] == [(1, " one"), (3, "二\u2028still two")]


def test_a_line_of_text_is_the_field_prompt_of_a_template(write: Write) -> None:
    (line,) = read(write("a.txt", "hi"), has_template=True)
    assert line.fields == {"prompt": "hi"}


# ---- real files


@pytest.mark.shared
@pytest.mark.parametrize("name", ["prompts_500_zh.txt", "youtube_comments_test.jsonl", "youtube_comments_train.jsonl"])
def test_real_files_are_read_to_their_last_line(shared: Path, name: str) -> None:
    path = shared / "data" / name
    found = read(path, has_template=name.endswith("jsonl"), expected={"is_ad": "is_ad"})
    assert [line.error for line in found if line.error] == []
    assert len(found) == sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    if name.endswith("jsonl"):
        assert all(isinstance(line.expected["is_ad"], bool) for line in found if line.expected)
        assert not any("is_ad" in (line.fields or {}) for line in found)


def test_a_line_that_is_no_call_does_not_tell_the_format(write: Write) -> None:
    lines = [b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}', json.dumps(batch_line()).encode()]
    with open_dataset(write("a.jsonl", b"\n".join(lines))) as dataset:
        assert dataset.format == "openai_batch"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "Hi", "stop": ["x"]},
        {"prompt": "Hi", "expected": ["a"]},
    ],
)
def test_one_record_in_a_json_file_is_that_record(write: Write, record: dict[str, Any]) -> None:
    [line] = read(write("a.json", json.dumps(record).encode()))
    assert line.error is None
    assert line.prompt == record.get("prompt")


@pytest.mark.parametrize("path", ["input.answer", "answer"])
def test_an_expected_field_of_the_input_object_is_in_no_prompt(write: Write, path: str) -> None:
    record = {"input": {"q": "why", "answer": "SECRET"}}
    layout = {"has_template": True, "expected": {"answer": path}}
    [line] = read(write("a.jsonl", json.dumps(record).encode()), **layout)
    assert line.fields == {"q": "why"}
    assert line.expected == {"answer": "SECRET"}


def test_a_column_may_have_the_other_name_of_a_parameter(write: Write) -> None:
    [line] = read(write("a.csv", "prompt,max_completion_tokens\nHi,2\n"))
    assert (line.sampling, line.meta) == ({"max_tokens": 2}, None)


@pytest.mark.parametrize("name", sorted({*PARAMETERS, *ALIASES} - set(CONSTRAINTS)))
@pytest.mark.parametrize("value", ["", [], {}, None], ids=repr)
def test_a_parameter_with_nothing_in_it_is_not_set(write: Write, name: str, value: Any) -> None:
    assert one(write, {"prompt": "p", name: value}).sampling == {}
    given = resolve_sampling({"stop": ["x"], "seed": 5, "max_tokens": 3}, {ALIASES.get(name, name): value})
    assert (given.stop, given.seed, given.max_tokens) == (("x",), 5, 3)
    assert one(write, batch_line(**{name: value})).sampling == {}


@pytest.mark.parametrize("name", ["choices", "continuations", "regex", "json_schema"])
def test_an_answer_that_was_to_be_bound_never_goes_free(write: Write, name: str) -> None:
    nothing: Any = [] if name in ("choices", "continuations") else ""
    assert f"'{name}' must be" in error(write, {"prompt": "p", name: nothing})
    assert one(write, {"prompt": "p", "json_schema": {}}).sampling == {"json_schema": "{}"}


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [], "tool_choice": None}, {"tools": [], "tool_choice": ""}, {"functions": [], "function_call": None},
        {"stop": [], "logit_bias": {}}, {"reasoning_effort": "", "modalities": [], "audio": None}, {"stream": None},
        {"temperature": None, "user": "", "metadata": {}}, {"response_format": None, "best_of": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_client_writes_for_not_set_changes_nothing(write: Write, body: dict[str, Any]) -> None:
    line = one(write, batch_line(**body))
    assert (line.error, line.sampling) == (None, {})
    assert translate(body, CHAT, ANSWERED) == {}


def test_an_empty_object_that_asks_for_something_is_refused(write: Write) -> None:
    assert "unsupported parameter 'body.web_search_options'" in error(write, batch_line(web_search_options={}))
    assert "'response_format.type' must be" in error(write, batch_line(response_format={}))


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments_is_one_with_none(write: Write, arguments: Any) -> None:
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [], "tool_calls": [call]}]
    line = one(write, {"messages": turns})
    assert line.messages is not None
    assert json.loads(line.messages[1].extra or "")["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("meta", [None, "", []])
def test_a_meta_with_nothing_in_it_is_absent(write: Write, meta: Any) -> None:
    assert one(write, {"prompt": "p", "meta": meta}) == one(write, {"prompt": "p"})


INPUTS = [True, False, 5, 2.5]


@pytest.mark.parametrize("value", INPUTS, ids=repr)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_value_called_input_is_shown_as_any_other_field_of_its_format(
    tmp_path: Path, ending: str, value: Any
) -> None:
    path = tmp_path / f"a.{ending}"
    record = {"input": value, "plain": value}
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    elif ending in ("csv", "tsv"):
        cells = [list(record), [str(each) for each in record.values()]]
        path.write_text("".join(("," if ending == "csv" else "\t").join(row) + "\n" for row in cells), encoding="utf-8")
    else:
        path.write_text(json.dumps([record] if ending == "json" else record), encoding="utf-8")
    (line,) = read(path, has_template=True)
    assert line.fields is not None
    (alone,) = Template("{{ input }}").render(line.fields, None)
    (named,) = Template("{{ input.input }}").render(line.fields, None)
    (other,) = Template("{{ plain }}").render(line.fields, None)
    assert alone == named == other == Message("user", str(value))


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": ""},
        {"reasoning_details": []},
        {"audio": None, "function_call": None},
        {"provider_specific_fields": {}},
        {"reasoning_content": ""},
    ],
)
def test_keys_of_a_message_with_nothing_in_them_are_as_if_absent(write: Write, more: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"} | more]
    line = one(write, {"messages": [*turns, {"role": "user", "content": "Again"}]})
    assert line.error is None
    assert line.messages is not None
    assert line.messages[1] == Message("assistant", "Ho")
