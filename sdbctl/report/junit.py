"""JUnit XML: one test case per gate."""

from __future__ import annotations

from collections.abc import Sequence

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from sdbctl.errors import UsageError
from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import clean


def junit(report: Report, gates: Sequence[GateResult]) -> str:
    """The gates as JUnit XML.

    Raises:
        UsageError: There are no gates, and no tests would read as success.
    """
    if not gates:
        raise UsageError("JUnit XML lists gates, and there are none", "give --gate")
    suite = TestSuite(clean(report.title))
    suite.timestamp = clean(report.created)
    for gate in gates:
        case = TestCase(clean(gate.rule), classname="sdbctl.gates")
        if gate.passed:
            case.system_out = clean(gate.reason)
        else:
            case.result = [Failure(clean(gate.reason), "gate")]
        suite.add_testcase(case)
    xml = JUnitXml("sdbctl")
    xml.add_testsuite(suite)
    text: bytes | str = xml.tostring()
    return text.decode() if isinstance(text, bytes) else text
