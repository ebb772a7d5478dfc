"""The alert rules, evaluated on what ``/metrics`` says: an alert fires when it must, and not when all is well."""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa
import yaml
from prometheus_client.parser import text_string_to_metric_families

from promptmill.api import prometheus
from promptmill.api.dependencies import Services
from promptmill.core.settings import Settings
from promptmill.database.engine import database_now, writing
from promptmill.database.tables import jobs, worker_samples, workers
from tests.unit.test_counting import add_worker
from tests.unit.test_ledger import add_job

RULES = Path(__file__).parents[2] / "docs" / "monitoring" / "alerts.yml"

Vector = dict[frozenset[tuple[str, str]], float]

COMPARISONS = {ast.Eq: operator.eq, ast.Lt: operator.lt, ast.Gt: operator.gt}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ALONE: frozenset[tuple[str, str]] = frozenset()


class PromQL:
    """Evaluates instant expressions of PromQL: Python's parser gives operators the same precedence."""

    def __init__(self, series: dict[str, Vector], now: float) -> None:
        self.series = series
        self.now = now

    def fires(self, expression: str) -> Vector:
        # PromQL has no "not": it stands for "match whatever the labels are".
        found = self.value(ast.parse(expression.replace("and on()", "and not"), mode="eval").body)
        assert isinstance(found, dict)
        return found

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return self.series.get(name, {})
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self.call(name, [self.value(each) for each in arguments])
            case ast.BoolOp(op=operation, values=[first, *rest]):
                left = self.value(first)
                for each in rest:
                    left = self.joined(operation, left, each)
                return left
            case ast.BinOp(left=left, op=operation, right=right):
                return applied(ARITHMETIC[type(operation)], self.value(left), self.value(right))
            case ast.Compare(left=left, ops=[operation], comparators=[right]):
                return kept(COMPARISONS[type(operation)], self.value(left), self.value(right))
        raise AssertionError(f"not evaluated here: {ast.unparse(node)}")

    def call(self, name: str, arguments: list[Any]) -> Any:
        match name, arguments:
            case "time", []:
                return self.now
            case "vector", [number]:
                return {ALONE: number}
            case "sum", [vector]:
                return {ALONE: sum(vector.values())} if vector else {}
            case "abs", [vector]:
                return {labels: abs(each) for labels, each in vector.items()}
        raise AssertionError(f"not evaluated here: {name}")

    def joined(self, operation: ast.boolop, left: Vector, node: ast.expr) -> Vector:
        if isinstance(node, ast.UnaryOp):
            return left if self.value(node.operand) else {}
        right = self.value(node)
        if isinstance(operation, ast.Or):
            both: Vector = right | left
            return both
        return {labels: each for labels, each in left.items() if labels in right}


def applied(operation: Any, left: Any, right: Any) -> Any:
    match left, right:
        case dict(), dict():
            return {labels: operation(left[labels], right[labels]) for labels in left.keys() & right.keys()}
        case dict(), _:
            return {labels: operation(each, right) for labels, each in left.items()}
        case _, dict():
            return {labels: operation(left, each) for labels, each in right.items()}
    result: Vector = operation(left, right)
    return result


def kept(operation: Any, left: Vector, right: Any) -> Vector:
    """A comparison keeps the values of the left side for which it holds."""
    holds = applied(operation, left, right)
    shown = left if isinstance(left, dict) else right
    return {labels: shown[labels] for labels, each in holds.items() if each}


def firing(db: sa.Engine, redis_url: str) -> set[tuple[str, str]]:
    """Name and worker of each alert that a scrape at this moment speaks for, among the rules without a range."""
    services = cast(Services, SimpleNamespace(db=db, settings=Settings(redis_url=redis_url)))
    text = prometheus.text_of(prometheus._from_rows(services)).decode()
    series: dict[str, Vector] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    evaluated = PromQL(series, database_now(db))
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return {
        (rule["alert"], dict(labels).get("worker", ""))
        for rule in rules
        if "[" not in rule["expr"]
        for labels in evaluated.fires(rule["expr"])
    }


def set_state(db: sa.Engine, worker: str, state: str) -> None:
    with writing(db) as connection:
        connection.execute(sa.update(workers).where(workers.c.id == worker).values(state=state))


@pytest.fixture
def waiting(database: sa.Engine) -> sa.Engine:
    """A database in which requests of a young job wait."""
    add_job(database, 3, 3, submitted_at=database_now(database))
    return database


def test_no_alert_fires_while_a_worker_is_alive(waiting: sa.Engine, redis_url: str) -> None:
    add_worker(waiting, "w1", 1.0)
    assert firing(waiting, redis_url) == set()


def test_nothing_waits_and_nobody_works_is_no_alert(database: sa.Engine, redis_url: str) -> None:
    assert firing(database, redis_url) == set()


def test_requests_wait_and_there_never_was_a_worker(waiting: sa.Engine, redis_url: str) -> None:
    assert firing(waiting, redis_url) == {("PromptmillNoWorker", "")}


def test_a_paused_job_waits_for_no_worker(waiting: sa.Engine, redis_url: str) -> None:
    with waiting.begin() as db:
        db.execute(sa.update(jobs).values(state="paused"))
    assert firing(waiting, redis_url) == set()


@pytest.mark.parametrize("age_s", [600.0, 7200.0, 2 * 86_400.0])
def test_requests_wait_and_the_last_worker_is_dead(waiting: sa.Engine, redis_url: str, age_s: float) -> None:
    add_worker(waiting, "w1", age_s)
    gone = {("PromptmillWorkerGone", "w1")} if age_s < 3600 else set()
    assert firing(waiting, redis_url) == {("PromptmillNoWorker", "")} | gone


def test_a_worker_that_was_stopped_on_purpose_is_not_gone(waiting: sa.Engine, redis_url: str) -> None:
    add_worker(waiting, "w1", 1.0)
    add_worker(waiting, "w2", 60.0)
    set_state(waiting, "w2", "stopped")
    assert firing(waiting, redis_url) == set()
    set_state(waiting, "w1", "stopped")
    assert firing(waiting, redis_url) == {("PromptmillNoWorker", "")}


def test_an_idle_device_is_that_of_a_worker_that_lives(waiting: sa.Engine, redis_url: str) -> None:
    for name, age_s in (("idle", 1.0), ("dead", 7200.0), ("stopped", 10.0), ("busy", 1.0)):
        add_worker(waiting, name, age_s, age_s)
    set_state(waiting, "stopped", "stopped")
    with writing(waiting) as connection:
        connection.execute(sa.update(worker_samples).values(device_use_ratio=0.1))
        is_busy = worker_samples.c.worker_id == "busy"
        connection.execute(sa.update(worker_samples).where(is_busy).values(device_use_ratio=0.9))
    assert firing(waiting, redis_url) == {("PromptmillDeviceIdle", "idle")}


def test_a_clock_that_is_off_is_told(waiting: sa.Engine, redis_url: str) -> None:
    add_worker(waiting, "w1", 1.0)
    with writing(waiting) as connection:
        connection.execute(sa.update(workers).values(clock_offset_s=-2.0))
    assert firing(waiting, redis_url) == {("PromptmillClockOff", "w1")}
