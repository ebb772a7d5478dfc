"""The rates of the progress line."""

from __future__ import annotations

import pytest

from promptmill.cli.progress import ProgressView
from promptmill.ledger import Progress
from promptmill.types import JobState
from tests.conftest import Clock


def test_each_run_of_a_sweep_has_rates_of_its_own(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmill.cli.progress.time.monotonic", clock)
    with ProgressView() as view:
        for _ in range(2):
            for done in (0, 30):
                clock.advance(2.0)
                view.update(Progress(JobState.RUNNING, 30, done, 0, 10 * done, None))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "-" in line] == []
    assert [line for line in lines if line.startswith("30/30")] == ["30/30  0 errors  15.0 requests/s  150 tok/s"] * 2
