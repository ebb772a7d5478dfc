"""Processes with limits, in which texts of others are evaluated: templates, schemas, patterns, task files, datasets.

A text may ask for endless work or all memory. What it asks for is done in a child; one that goes beyond its limits is
killed, and who called gets one clear error. Children are started once and used again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil

from promptmill.errors import PromptmillError

R = TypeVar("R")

#: Idle children that are kept.
KEPT = 2

#: MiB of a child that is not used again: what it remembers would count against the next call.
TIRED_MB = 256

#: Seconds between looks at a child's memory where the system sets no limit to it (macOS).
LOOK_S = 0.05

MIB = 2**20

#: How much less than others a child of a pool is served by the system, where all cores are busy.
NICE = 5

#: Not ``-m promptmill.core.child_processes``: what is pickled in a main module is not found by others.
START = "from promptmill.core.child_processes import main; main()"

#: Libraries that start a thread for each core would each take memory for it.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """What one call may use: seconds by the clock, and MiB of memory of its own."""

    seconds: float = 10.0
    megabytes: int = 512


class OverLimit(PromptmillError):
    """A call needed more than it may use."""


class ChildBroke(RuntimeError):
    """A bug in what was called; the traceback is in the log of this process."""


class ChildPool:
    """Children that wait for work. Any number of threads may call; each call has a child of its own."""

    def __init__(self) -> None:
        self._idle: list[Child] = []
        self._busy: set[Child] = set()
        self._lock = threading.Lock()

    def call(self, limits: ChildLimits, function: Callable[..., R], *arguments: Any) -> R:
        """``function(*arguments)`` in a child. The function is one of a module, its arguments and result are pickled.

        Raises OverLimit, ChildBroke, or what the function raises.
        """
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is None:
            child = Child(NICE)
        self._busy.add(child)
        try:
            raised, value = child.call(limits, function, arguments)
            is_tired = child.is_tired
        except BaseException:
            child.end()
            raise
        finally:
            self._busy.discard(child)
        with self._lock:
            is_kept = not is_tired and len(self._idle) < KEPT
            if is_kept:
                self._idle.append(child)
        if not is_kept:
            child.end()
        if raised:
            raise value
        result: R = value
        return result

    def close(self) -> None:
        """End the children that wait, and those at work: their calls raise OverLimit."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()
        for child in list(self._busy):
            child.kill()


class Child:
    """One process, for calls one after another. It ends with the one that started it, whatever that died of."""

    def __init__(self, nice: int = 0) -> None:
        self._pipe, theirs = Pipe()
        # Nothing is ever written here: its end is the end of the parent.
        watched, self._life = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno()), str(watched), str(nice)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(), watched),
                env=os.environ | ONE_THREAD, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._life)
            raise
        finally:
            theirs.close()
            os.close(watched)
        self._seen = psutil.Process(self._process.pid)
        # ``self._pipe.poll`` would make one for each call.
        self._answered = select.poll()
        self._answered.register(self._pipe, select.POLLIN)

    def call(self, limits: ChildLimits, function: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether it raised, and its value or error."""
        try:
            # ``self._pipe.send`` takes twice as long.
            self._pipe.send_bytes(pickle.dumps((limits.megabytes, function, arguments)))
            if not self._answers(limits):
                raise OverLimit(f"it takes more than {limits.seconds:g} s", hint="Is there an endless loop in it?")
            answer: tuple[bool, Any] = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise _too_much(limits.megabytes) from None
        return answer

    def _answers(self, limits: ChildLimits) -> bool:
        if sys.platform != "darwin":
            return bool(self._answered.poll(1000 * limits.seconds))
        deadline = time.monotonic() + limits.seconds
        while not self._pipe.poll(LOOK_S):
            with contextlib.suppress(psutil.Error):
                if self._seen.memory_info().rss > limits.megabytes * MIB:
                    raise _too_much(limits.megabytes)
            if time.monotonic() > deadline:
                return False
        return True

    @property
    def is_tired(self) -> bool:
        """Whether it had better not be used again."""
        try:
            # What it holds now. The peak that the system counts begins with that of the parent.
            return bool(self._seen.memory_info().rss > TIRED_MB * MIB)
        except psutil.Error:
            return True

    def __del__(self) -> None:
        # The last reference is gone: no call can come.
        self.end()

    def kill(self) -> None:
        """Let a call that another thread waits for end."""
        self._process.kill()

    def end(self) -> None:
        """Kill it; once more is nothing."""
        if self._pipe.closed:
            return
        self.kill()
        self._process.wait()
        self._pipe.close()
        os.close(self._life)


def _too_much(megabytes: int) -> OverLimit:
    return OverLimit(f"it needs more than {megabytes:,} MiB of memory", hint="Is there an endless text in it?")


_shared = ChildPool()


def call(limits: ChildLimits, function: Callable[..., R], *arguments: Any) -> R:
    """``function(*arguments)`` in a child of this process' own pool. Raises as :meth:`Pool.call` does."""
    return _shared.call(limits, function, *arguments)


# --- inside a child --------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point of a child: calls from the pipe, one after another."""
    pipe, watched = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    # Interactive answers of the parent go first.
    os.nice(int(sys.argv[3]))
    limited = None
    while True:
        try:
            megabytes, function, arguments = pipe.recv()
            if megabytes != limited:
                _limit_memory(megabytes)
                limited = megabytes
            answer = pickle.dumps((False, function(*arguments)))
        except EOFError:
            return
        except MemoryError:
            # Nothing can be relied on any more; the parent sees the end.
            os._exit(1)
        except Exception as problem:
            answer = _failed(problem)
        pipe.send_bytes(answer)


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)
    os._exit(0)


def _limit_memory(megabytes: int) -> None:
    """Limit the memory that is written to: mapped files, such as a model's, do not count."""
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = megabytes * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))


def _failed(problem: Exception) -> bytes:
    """The error as the parent raises it; a bug is told here, without its message, which may hold what was evaluated."""
    if not isinstance(problem, PromptmillError) and not hasattr(problem, "status"):
        where = "".join(traceback.format_tb(problem.__traceback__))
        sys.stderr.write(f"{type(problem).__name__} in a child\n{where}")
        problem = ChildBroke(type(problem).__name__)
    return pickle.dumps((True, _Raised(problem)))


class _Raised:
    """Pickles an error by what it has, and not by calling its class again, which may want other arguments."""

    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    def __reduce__(self) -> Any:
        return _made_again, (type(self._problem), self._problem.args, vars(self._problem))


def _made_again(kind: type[Exception], arguments: tuple[Any, ...], parts: dict[str, Any]) -> Exception:
    made = kind.__new__(kind, *arguments)
    made.__dict__.update(parts)
    return made
