"""What the tests cost by file, in seconds of CPU, child processes included: ``bash scripts/test.sh -p tests.costs``.

Seconds of CPU say the same on a busy machine, where a test's duration says how long it waited for its turn.
"""

import os
from collections import Counter

import pytest

_since = 0.0


def pytest_collection_finish() -> None:
    global _since
    _since = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Note with each set-up, call and teardown what came since the last one."""
    global _since
    report = yield
    now = sum(os.times()[:4])
    report.user_properties.append(("cpu_seconds", now - _since))
    _since = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a table of files, the most expensive first."""
    costs = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        costs[report.nodeid.split("::")[0]] += dict(getattr(report, "user_properties", ())).get("cpu_seconds", 0)
    terminalreporter.section("seconds of CPU by file")
    for file, seconds in [("all", costs.total()), *costs.most_common()]:
        terminalreporter.write_line(f"{seconds:7.1f} {file}")
