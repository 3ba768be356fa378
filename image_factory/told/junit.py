"""Results as JUnit XML, for Jenkins and others that show tests."""

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..base import files
from ..base.errors import BuildError
from ..base.events import BootCheck, BootTested, TaskEnded
from ..base.log import masked
from ..model import Plan

# Characters that XML 1.0 doesn't have.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# What JUnit calls the outcomes of a check that it has an element for.
_KINDS = {"failed": "failure", "skipped": "skipped"}


def document(image: str, boots: Sequence[BootTested], output: str = "", tasks: Sequence[TaskEnded] = ()) -> bytes:
    """Return the document of the *tasks* of *image*, a suite of their own, and of its test *boots*.

    *output* is what the guest of the last boot printed.
    """
    root = ElementTree.Element("testsuites")
    if tasks:
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(f"{image} tasks"))
        for task in tasks:
            # One that may fail is no failure of the build.
            outcome = {"passed": "passed", "failed": "failed", "allowed": "skipped"}[task.outcome]
            _add(suite, f"{_clean(image)}.tasks", task.name, task.seconds, outcome, task.message)
        _count(suite, [task.seconds for task in tasks])
    if boots or not tasks:
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(image))
        for number, boot in enumerate(boots, 1):
            for check in boot.checks:
                # The time of a boot is told with its first check: what shows it adds them up.
                seconds = boot.seconds if check is boot.checks[0] else 0.0
                name = f"{_clean(boot.artifact)}.{'-'.join((str(number), boot.firmware, *boot.devices))}"
                _add(suite, name, check.name, seconds, check.outcome, check.message)
        _count(suite, [boot.seconds for boot in boots])
        if output:
            ElementTree.SubElement(suite, "system-out").text = _clean(output)
    return _text(root)


def document_of_checks(name: str, group: str, checks: Sequence[BootCheck], seconds: float, output: str = "") -> bytes:
    """Return the document of the suite *name* of *checks*, which took *seconds*, with *output* as its text."""
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", name=_clean(name))
    for check in checks:
        _add(suite, _clean(group), check.name, seconds if check is checks[0] else 0.0, check.outcome, check.message)
    _count(suite, [seconds])
    if output:
        ElementTree.SubElement(suite, "system-out").text = _clean(output)
    return _text(root)


def _text(root: ElementTree.Element) -> bytes:
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def write(
    plan: Plan, directory: Path, boots: Sequence[BootTested], output: str = "", tasks: Sequence[TaskEnded] = ()
) -> None:
    """Write the document where *plan* has it, by way of *directory*; BuildError where a directory is in its place."""
    # A directory elsewhere may be on another filesystem.
    way = directory if directory.parent == plan.output_dir else None
    put(plan, document(plan.image, boots, output, tasks), way)


def put(plan: Plan, data: bytes, directory: Path | None = None) -> None:
    """Write the document *data* where *plan* has it, by way of *directory* if there is one; see ``write``."""
    try:
        files.replace(plan.junit_path, data, directory=directory)
    except OSError as error:
        if error.errno != errno.EISDIR:
            raise
        raise BuildError(f"The results can't be written: {plan.junit_path} is a directory.") from error


def _add(suite: ElementTree.Element, group: str, name: str, seconds: float, outcome: str, message: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=group, name=_clean(name), time=f"{seconds:.3f}")
    if outcome != "passed":
        ElementTree.SubElement(case, _KINDS[outcome], message=_clean(message))


def _count(suite: ElementTree.Element, seconds: Sequence[float]) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("time", f"{sum(seconds):.3f}")


def _clean(text: str) -> str:
    return _NO_XML.sub("?", masked(text))
