"""Gates as JUnit XML, the form in which CI systems show tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from promptmill.errors import PromptmillError
from promptmill.gates import Verdict


def write(path: str, job_id: str, verdicts: Sequence[Verdict]) -> None:
    """A test case for each gate. Raises PromptmillError for a file that cannot be written."""
    failed = sum(not verdict.passed for verdict in verdicts)
    suite = ET.Element("testsuite", name=f"promptmill {job_id}", tests=str(len(verdicts)), failures=str(failed))
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname="promptmill.gates", name=f"{verdict.name} {verdict.demand}")
        if not verdict.passed:
            ET.SubElement(case, "failure", message=str(verdict))
    try:
        Path(path).write_bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))
    except OSError as problem:
        raise PromptmillError(f"--junit {path}: {problem.strerror}") from None
