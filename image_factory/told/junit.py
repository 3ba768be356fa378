"""Results as JUnit XML, for Jenkins and others that show tests."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from ..base.events import BootTested
from ..base.log import masked

# Characters that XML 1.0 doesn't have.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(image: str, boots: Sequence[BootTested], output: str = "") -> bytes:
    """Return the document of the test *boots* of *image*; *output* is what the guest of the last one printed."""
    suite = ElementTree.Element("testsuite", name=_clean(image))
    counted = {"failed": 0, "skipped": 0}
    tests = 0
    for number, boot in enumerate(boots, 1):
        for check in boot.checks:
            tests += 1
            # The time of a boot is told with its first check: what shows it adds them up.
            seconds = boot.seconds if check is boot.checks[0] else 0.0
            name = f"{_clean(boot.artifact)}.{number}-{boot.firmware}"
            case = ElementTree.SubElement(suite, "testcase", classname=name, name=check.name, time=f"{seconds:.3f}")
            if check.outcome != "passed":
                counted[check.outcome] += 1
                kind = {"failed": "failure", "skipped": "skipped"}[check.outcome]
                ElementTree.SubElement(case, kind, message=_clean(check.message))
    suite.set("tests", str(tests))
    suite.set("failures", str(counted["failed"]))
    suite.set("errors", "0")
    suite.set("skipped", str(counted["skipped"]))
    suite.set("time", f"{sum(boot.seconds for boot in boots):.3f}")
    if output:
        ElementTree.SubElement(suite, "system-out").text = _clean(output)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _clean(text: str) -> str:
    return _NO_XML.sub("?", masked(text))
