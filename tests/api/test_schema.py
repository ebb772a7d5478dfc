"""schemathesis against the OpenAPI document: no 5xx, and no status that is not documented."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.api.conftest import Server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import status_code_conformance

CHECKS = [not_a_server_error, status_code_conformance]

#: Calls of each operation and mode.
EXAMPLES = 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_call_breaks_the_server(served: Server, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    problems: list[str] = []
    calls = 0
    for found in document.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        # It goes on as long as its job.
        if operation.path.endswith("/events"):
            continue

        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None,
            phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case: Any) -> None:
            nonlocal calls
            calls += 1
            case.call_and_validate(checks=CHECKS, timeout=30)

        try:
            call()
        except Exception as problem:
            # An operation without a body and a query has nothing that could be wrong about it.
            if "Unsatisfiable" not in type(problem).__name__:
                problems.append(f"{operation.method} {operation.path}: {problem!s:.600}")
    assert problems == []
    assert calls > 10 * EXAMPLES
