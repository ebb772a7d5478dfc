"""Modules of ours that run as processes. A JSON line on stdin says what to do; the end of stdin is the parent's end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any


def start(module: str, order: Mapping[str, Any], **options: Any) -> subprocess.Popen[bytes]:
    """Run ``module`` with this interpreter and hand it ``order``. ``options``: of :class:`subprocess.Popen`.

    Keep the process: its stdin stays open for as long as this process lives.
    """
    process = subprocess.Popen([sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    return process


def read_order() -> Any:
    """The order of the process that started this one."""
    return json.loads(sys.stdin.readline())


def when_parent_ends(act: Callable[[], None]) -> None:
    """Call ``act`` from a thread of its own as soon as the parent has ended, whatever it died of."""

    def wait() -> None:
        sys.stdin.read()
        act()

    threading.Thread(target=wait, daemon=True).start()
