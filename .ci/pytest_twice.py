"""Run pytest, and each failed test once more, alone: one that then passes is reported as flaky and does not count.

Takes pytest's arguments. Exit code: 0 if each failed test passes the second time, otherwise that of pytest.
"""

import subprocess
import sys

import pytest

_TEST_TIMEOUT_S = 300  # set-up plus the test's 120 s; a longer second run hangs


class Failures:
    """Plugin that collects the failed tests and their reports."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.texts.setdefault(report.nodeid, f"{report.when}: {report.longreprtext}")


def passes_alone(test: str) -> bool:
    """Run one test in a process of its own, with its output on the console."""
    command = [sys.executable, "-m", "pytest", test]
    try:
        return subprocess.run(command, timeout=_TEST_TIMEOUT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(arguments: list[str]) -> int:
    failures = Failures()
    code = int(pytest.main(arguments, plugins=[failures]))
    if code != pytest.ExitCode.TESTS_FAILED or not failures.texts:
        return code  # all passed, or pytest failed for another reason
    flaky = {test: text for test, text in failures.texts.items() if passes_alone(test)}
    for test, text in flaky.items():
        print(f"FLAKY {test} passed when it ran once more, alone; before:\n{text}")
    for test in failures.texts.keys() - flaky.keys():
        print(f"FAILED {test} twice")
    return 0 if len(flaky) == len(failures.texts) else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
