"""The files for Prometheus and Grafana ask for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import promptmill.api

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"


def exposed() -> str:
    return "".join(path.read_text() for path in Path(promptmill.api.__file__).parent.glob("prometheus.py"))


def expressions() -> list[str]:
    alerts = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    return rules + [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_asked_for_is_exposed(expression: str) -> None:
    source = exposed()
    for name in re.findall(r"promptmill_(\w+)", expression):
        stem = re.sub(r"_(bucket|total|sum|count)$", "", name)
        assert stem in source, name
