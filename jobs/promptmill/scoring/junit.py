"""Gates as JUnit XML, the form in which CI systems show tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from promptmill.core.outputs import writing


def write(path: str, job_id: str, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """A test case for each gate, in a file or on stdout. Raises PromptmillError where it cannot be written.

    ``verdicts``: as :meth:`promptmill.scoring.gates.GateVerdict.to_json` gives them.
    """
    failed = sum(not verdict["passed"] for verdict in verdicts)
    suite = ET.Element("testsuite", name=f"promptmill {job_id}", tests=str(len(verdicts)), failures=str(failed))
    for verdict in verdicts:
        case = ET.SubElement(
            suite, "testcase", classname="promptmill.gates", name=f"{verdict['name']} {verdict['demand']}"
        )
        if not verdict["passed"]:
            ET.SubElement(case, "failure", message=verdict["text"])
    with writing(path) as stream:
        stream.write(ET.tostring(suite, encoding="unicode", xml_declaration=True))
