"""pytest, but a test that fails runs once more, alone: what then passes is a flake, told aloud, and not a fault.

The arguments are pytest's. Exit code: 0 if each failed test passed the second time, else pytest's own.
"""

import subprocess
import sys

import pytest

_ONE_TEST_S = 300
"""Its set-up and its 120 s; beyond that the second run has hung."""


class Failures:
    """Collects what failed, and how."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.texts.setdefault(report.nodeid, f"{report.when}: {report.longreprtext}")


def passes_alone(test: str) -> bool:
    """Run one test in a process of its own; what it says goes to the console."""
    command = [sys.executable, "-m", "pytest", test]
    try:
        return subprocess.run(command, timeout=_ONE_TEST_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(arguments: list[str]) -> int:
    failures = Failures()
    code = int(pytest.main(arguments, plugins=[failures]))
    if code != pytest.ExitCode.TESTS_FAILED or not failures.texts:
        return code  # all passed, or it was not the tests that failed
    flakes = {test: text for test, text in failures.texts.items() if passes_alone(test)}
    for test, text in flakes.items():
        print(f"FLAKY {test} passed when it ran once more, alone; before:\n{text}")
    for test in failures.texts.keys() - flakes.keys():
        print(f"FAILED {test} twice")
    return 0 if len(flakes) == len(failures.texts) else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
