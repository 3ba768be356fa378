"""JUnit XML of the test boot."""

from xml.etree import ElementTree

from image_factory.base.events import BootCheck, BootTested
from image_factory.told import junit

CHECKS = (
    BootCheck("boot", "passed"),
    BootCheck("units", "failed", 'a<b>&"\x00\x1b\udcff\ufffe failed'),
    BootCheck("login", "skipped", "no sshd"),
)


def test_document() -> None:
    boots = [
        BootTested("x-2026-01-01.qcow2", "bios", 61.5, CHECKS),
        BootTested("x-2026-01-01.qcow2", "uefi", 1, CHECKS),
    ]
    suites = ElementTree.fromstring(junit.document("x", boots, "Linux \x1b[0m\nlogin:"))
    (suite,) = suites
    assert suite.attrib == {
        "name": "x", "tests": "6", "failures": "2", "errors": "0", "skipped": "2", "time": "62.500",
    }  # fmt: skip
    cases = suite.findall("testcase")
    assert [case.get("classname") for case in cases] == ["x-2026-01-01.qcow2.1-bios"] * 3 + [
        "x-2026-01-01.qcow2.2-uefi"
    ] * 3
    assert [case.get("time") for case in cases[:2]] == ["61.500", "0.000"]
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message") == 'a<b>&"???? failed'
    assert cases[2].find("skipped") is not None
    assert suite.findtext("system-out") == "Linux ?[0m\nlogin:"


def test_nothing_was_booted() -> None:
    assert ElementTree.fromstring(junit.document("x", []))[0].get("tests") == "0"
