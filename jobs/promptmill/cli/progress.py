"""The progress bar of running jobs, on stderr."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from promptmill.cli.common import stderr_console

if TYPE_CHECKING:
    from promptmill.ledger import Progress
    from promptmill.service.preflight import Preflight

#: Seconds over which rates are measured.
WINDOW_S = 10.0

#: Seconds between lines where stderr is no terminal.
LINE_EVERY_S = 10.0


class ProgressView:
    """Shows done/total, errors, requests/s, output tok/s and time left: as a bar, or as lines in a log."""

    def __init__(self) -> None:
        self._console = stderr_console()
        self._bar: Any = None
        self._task: Any = None
        self._seen: deque[tuple[float, int, int]] = deque()
        self._last_line = float("-inf")
        self._said = -1

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show new counts."""
        now = time.monotonic()
        if self._seen and progress.done < self._seen[-1][1]:
            # The next run of a sweep: its rates are its own.
            self._seen.clear()
            self._said = -1
        self._seen.append((now, progress.done, progress.output_tokens))
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        rates = self._rates()
        if self._console.is_terminal:
            self._draw(progress, *rates)
        elif progress.done == progress.rows:
            # The end is reported more than once: counts are written before the job is closed.
            self._say(_line(progress, *rates), progress.done)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._say(_line(progress, *rates), progress.done)

    def _say(self, line: str, done: int) -> None:
        if done != self._said:
            self._said = done
            self._console.print(line, soft_wrap=True)

    def _rates(self) -> tuple[float, float]:
        """Requests and output tokens per second over the window."""
        (start, done, tokens), (end, done_now, tokens_now) = self._seen[0], self._seen[-1]
        seconds = max(end - start, 1e-6)
        return (done_now - done) / seconds, (tokens_now - tokens) / seconds

    def _draw(self, progress: Progress, requests_s: float, tokens_s: float) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=progress.rows)
            self._bar.start()
        self._bar.update(self._task, completed=progress.done, description=_rest(progress, requests_s, tokens_s))


def _line(progress: Progress, requests_s: float, tokens_s: float) -> str:
    return f"{progress.done}/{progress.rows}  {_rest(progress, requests_s, tokens_s)}"


def _rest(progress: Progress, requests_s: float, tokens_s: float) -> str:
    left = (progress.rows - progress.done) / requests_s if requests_s > 0 else None
    eta = "" if left is None or progress.done == progress.rows else f"  {duration(left)} left"
    return f"{progress.errors} errors  {requests_s:.1f} requests/s  {tokens_s:,.0f} tok/s{eta}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def preflight_line(found: Preflight) -> str:
    """The findings of the preflight in one sentence."""
    sampled = "" if found.measured >= found.rows - found.too_long else f" ({found.measured:,} measured)"
    cut = f"; {found.cut:,} may be cut at the context of {found.context_tokens:,} tokens" if found.cut else ""
    twice = f"; {found.two_starts:,} begin with the token of a beginning (BOS) twice" if found.two_starts else ""
    return (
        f"{_rows(found.rows)}; prompt tokens min {found.tokens_min:,}, p50 {found.tokens_p50:,}, "
        f"p99 {found.tokens_p99:,}, max {found.tokens_max:,}{sampled}; about {found.prompt_tokens:,} to read, at most "
        f"{found.max_output_tokens:,} to write; {found.too_long:,} do not fit"
        f"{cut}{twice}"
    )


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows ``done/of what`` on a terminal; says nothing elsewhere."""
    console = stderr_console()
    with console.status("") if console.is_terminal else nullcontext() as status:
        yield lambda done, of: status.update(f"{done}/{of} {what}") if status is not None else None
