"""Gates as JUnit XML, the form in which CI systems show tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from promptmill.core.outputs import writing
from promptmill.tasks.gates import GateVerdict


def write(path: str, job_id: str, verdicts: Sequence[GateVerdict]) -> None:
    """A test case for each gate, in a file or on stdout. Raises PromptmillError where it cannot be written."""
    failed = sum(not verdict.passed for verdict in verdicts)
    suite = ET.Element("testsuite", name=f"promptmill {job_id}", tests=str(len(verdicts)), failures=str(failed))
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname="promptmill.gates", name=f"{verdict.name} {verdict.demand}")
        if not verdict.passed:
            ET.SubElement(case, "failure", message=str(verdict))
    with writing(path) as stream:
        stream.write(ET.tostring(suite, encoding="unicode", xml_declaration=True))
