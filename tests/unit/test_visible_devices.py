"""Which GPUs a process may use, with the listing of a driver's tool that stands on PATH for the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill_workers.devices import Device, cuda_devices

LISTING = "".join(f"GPU {n}: NVIDIA H200 (UUID: GPU-{n}{n}{n}{n}aaaa-1)\n" for n in range(4))


@pytest.fixture(autouse=True)
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1, 2, 3]), ("2,3", [2, 3]), ("GPU-1111", [1]), ("GPU-0000aaaa-1, 3", [0, 3]), ("", []), ("-1", [])],
)
def test_what_a_scheduler_hid_stays_hidden(
    visible: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices() == expected


def test_a_host_sees_its_gpu_only() -> None:
    assert Device("cuda:2").environment({"CUDA_VISIBLE_DEVICES": "2,3"})["CUDA_VISIBLE_DEVICES"] == "2"
