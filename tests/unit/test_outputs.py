"""What a command may write to: what is refused before any work, and what stays when the writing fails."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmill.core.outputs import appearing, holds_something, refuse, writing
from promptmill.errors import OutputFailed, PromptmillError


def write(output: Path | str, text: str = "new") -> None:
    with writing(str(output)) as stream:
        stream.write(text)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), writing(str(path)) as stream:
        stream.writelines(line for line in _broken_off())
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out.txt"]


def _broken_off() -> Iterator[str]:
    yield "half"
    raise ValueError("half")


def test_the_mode_of_a_file_is_kept_and_a_new_one_has_the_umasks(tmp_path: Path) -> None:
    path, before = tmp_path / "out.txt", os.umask(0o027)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_goes_on_leading_to_its_file(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    link.symlink_to("target.txt")
    write(link, "first")
    write(link, "second")
    assert link.is_symlink()
    assert target.read_text() == "second"


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_written_through_and_stays(tmp_path: Path, through_a_link: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    output = tmp_path / "link" if through_a_link else pipe
    if through_a_link:
        output.symlink_to(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert not holds_something(str(output))
    refuse([str(output)], [])
    write(output)
    reader.join()
    assert read == ["new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_through_and_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    link = tmp_path / "link.parquet"
    link.symlink_to("null")
    for output in (device, link):
        refuse([str(output)], [])
        try:
            write(output)
        except OutputFailed:
            pytest.skip("devices cannot be opened in this folder")
        with appearing(str(output)) as path:
            path.write_bytes(b"bytes")
        assert stat.S_ISCHR(device.stat().st_mode)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.parquet", "null"]


def test_what_is_open_elsewhere_is_not_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with log.open("a") as file:
        output = f"/dev/fd/{file.fileno()}"
        assert not holds_something(output)
        write(output)
    assert log.read_text() == "before\nnew"


def test_a_full_disk_is_one_clear_error() -> None:
    with pytest.raises(OutputFailed, match="cannot write /dev/full: No space left on device"):
        write("/dev/full")


def refused(output: Path, *inputs: Path | str) -> str:
    with pytest.raises(PromptmillError) as problem:
        refuse([str(output)], inputs)
    return problem.value.message


def test_an_input_is_never_written_over_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    hard, soft = tmp_path / "hard.jsonl", tmp_path / "soft.jsonl"
    hard.hardlink_to(data)
    soft.symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for output in (data, hard, soft, Path("data.jsonl"), tmp_path / ".." / tmp_path.name / "data.jsonl"):
        for read in (data, soft, "data.jsonl", str(tmp_path), "*.jsonl", "."):
            assert "this command reads it" in refused(output, read)
    refuse([str(tmp_path / "other.jsonl")], [data, "*.jsonl", str(tmp_path)])


def test_what_stdin_reads_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    with data.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert "this command reads it, as stdin" in refused(data)


def test_one_file_is_not_two_outputs(tmp_path: Path) -> None:
    with pytest.raises(PromptmillError, match="given twice"):
        refuse([str(tmp_path / "x"), None, str(tmp_path / "." / "x")], [])
    refuse(["/dev/null", "/dev/null", "-"], [])


def test_a_folder_and_what_has_none_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "there is no folder" in refused(tmp_path / "no" / "x")
