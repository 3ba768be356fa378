"""Show the table of the faults at the end of the tests."""

import os
from pathlib import Path

from _pytest.terminal import TerminalReporter

from .test_faults import TABLE, shown_table


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("faults")
    terminalreporter.write(shown_table())
    if target := os.environ.get("FAULT_TABLE"):
        Path(target).write_text(shown_table())
