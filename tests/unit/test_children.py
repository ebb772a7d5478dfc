"""What is evaluated in a child ends within its limits, and the next call is served."""

from __future__ import annotations

import json
import operator
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from promptmill.core.child_processes import ChildBroke, ChildLimits, ChildPool, OverLimit
from promptmill.errors import TaskFileError
from promptmill.tasks.task_file import parse_task
from promptmill.tasks.templates import Template, TemplateMistake

SHORT = ChildLimits(1.0, 512)

#: For calls that are to end well, on however slow a machine.
LONG = ChildLimits(60.0, 512)

#: Python's own functions do what any would: each with its argument.
BEYOND: dict[str, tuple[Any, Any]] = {
    "an endless loop": (exec, "while True: pass"),
    "one large text": (eval, "'a' * 4_000_000_000"),
    "many small ones": (exec, "kept = []\nwhile True: kept.append('a' * 1_000_000)"),
    "a crash": (os._exit, 3),
}


@pytest.fixture
def pool() -> Iterator[ChildPool]:
    made = ChildPool()
    yield made
    made.close()


def test_a_child_is_used_again(pool: ChildPool) -> None:
    assert pool.call(LONG, os.getpid) == pool.call(LONG, os.getpid)


@pytest.mark.parametrize("name", BEYOND)
def test_a_call_beyond_its_limits_is_one_clear_error_and_the_next_is_served(pool: ChildPool, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(OverLimit, match=r"takes more than 1 s|needs more than 512 MiB"):
        pool.call(SHORT, *BEYOND[name])
    assert time.monotonic() - started < 60
    assert pool.call(LONG, operator.add, 1, 2) == 3


def test_each_call_of_a_child_has_its_own_limit_of_memory(pool: ChildPool) -> None:
    much = (eval, "len(bytearray(600_000_000))")
    child = pool.call(LONG, os.getpid)
    for _ in range(2):
        assert pool.call(ChildLimits(60, 1024), *much) == 600_000_000
        assert pool.call(LONG, os.getpid) == child
    with pytest.raises(OverLimit, match="needs more than 512 MiB"):
        pool.call(LONG, *much)


def test_a_pool_that_is_closed_ends_the_calls_that_run() -> None:
    pool = ChildPool()
    threading.Timer(0.5, pool.close).start()
    started = time.monotonic()
    with pytest.raises(OverLimit):
        pool.call(ChildLimits(200), exec, "while True: pass")
    assert time.monotonic() - started < 100


def test_an_error_comes_back_as_it_was(pool: ChildPool) -> None:
    with pytest.raises(TaskFileError, match=r"^t:1:1: the key 'prompt' is missing"):
        pool.call(LONG, parse_task, "task: a", "t")
    with pytest.raises(TemplateMistake) as caught:
        pool.call(LONG, Template, "{{ a\n{{")
    assert (caught.value.part, caught.value.line) == ("user", 2)


def test_a_bug_is_told_without_what_was_evaluated(pool: ChildPool) -> None:
    with pytest.raises(ChildBroke, match=r"^ValueError$"):
        pool.call(LONG, int, "a secret text")


@pytest.mark.parametrize(
    "user",
    [
        "{{ 'a'|center(1500000000) }}",
        "{{ '%01500000000d'|format(1) }}",
        "{{ '%01500000000d' % 1 }}",
        "{{ 'a'.ljust(1500000000) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
        "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    ],
)
def test_a_template_computes_nothing_until_it_is_filled(user: str) -> None:
    started = time.process_time()
    task = parse_task(json.dumps({"task": "t", "prompt": {"user": user}}), "t")
    assert task.name == "t"
    assert time.process_time() - started < 2


def test_few_shot_examples_that_never_end_are_refused_by_a_child(pool: ChildPool) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    task = f'task: t\nprompt: {{user: "{endless}", examples: [{{input: {{}}, output: x}}]}}'
    # The child has started then, and has imported what it needs.
    with pytest.raises(TaskFileError):
        pool.call(LONG, parse_task, "task: a", "t")
    with pytest.raises(OverLimit, match=r"takes more than 0\.5 s"):
        pool.call(ChildLimits(0.5), parse_task, task, "t")
