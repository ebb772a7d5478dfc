"""Pages that are made from the program are current, and every example in them runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import sqlalchemy as sa

from promptmill.database.views import VIEWS
from promptmill.store.queries import querying
from tests.conftest import ROOT

EXAMPLES = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "queries.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("tool", ["metrics_page.py", "commands_page.py"])
def test_a_page_that_is_made_from_the_program_is_current(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_each_view_has_an_example() -> None:
    for name in ("v_results", *VIEWS):
        assert any(f"FROM {name}" in text for text in EXAMPLES), name


@pytest.mark.parametrize("text", EXAMPLES, ids=[text.split(":")[0].removeprefix("-- ") for text in EXAMPLES])
def test_each_example_runs(database: sa.Engine, text: str) -> None:
    # A comment comes first: people paste it with the query.
    with querying(database, text, 30) as (columns, rows):
        assert columns
        list(rows)
