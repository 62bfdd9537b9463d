"""Suites that the machine can't run are skipped and reported; DOCCLS_REQUIRE=distributed,texdoc17 makes them fail."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
# In the order in which xdist starts them: long suites that run in a single process come first.
SUITES = ("slurm", "distributed", "launcher", "faults", "gpu", "texdoc17", "browser", "golden", "unit")
# Suites whose tests share runs or a cluster, and so run in a single process.
TOGETHER = ("slurm", "distributed", "faults", "gpu", "browser", "golden")
settings.register_profile("fast", deadline=None, max_examples=20)
settings.register_profile("short", deadline=None, max_examples=200)
settings.register_profile("soak", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("DOCCLS_HYPOTHESIS", "short"))
_skipped: dict[str, str] = {}
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also in processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="device of the gpu suite")


@pytest.fixture(scope="session")
def need() -> Callable[[str, bool, str], None]:
    """Return `need(suite, available, reason)`: unless available, skip, or fail if DOCCLS_REQUIRE names the suite."""

    def check(suite: str, available: bool, reason: str) -> None:
        if available:
            return
        if suite in os.environ.get("DOCCLS_REQUIRE", "").split(","):
            pytest.fail(f"suite {suite!r} is required (DOCCLS_REQUIRE) but {reason}")
        pytest.skip(f"suite {suite!r}: {reason}")

    return check


@pytest.fixture
def small_disk(tmp_path: Path, need: Callable[[str, bool, str], None]) -> Iterator[Path]:
    """Yield a folder on a file system of 3 MiB, which only root can mount."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    need("small disk", shutil.which("mount") is not None, "the command `mount` is missing")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    need("small disk", mounted.returncode == 0, f"a tmpfs can't be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by the order of SUITES."""
    items.sort(key=lambda item: SUITES.index(find_suite(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run each suite of TOGETHER, and each file of the launcher suite, in one process of xdist.

    xdist's own groups (--dist loadgroup) have no effect from pytest 9.2 on (pytest-xdist issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class SuiteScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return find_scope(nodeid)

    return SuiteScheduling(config, log)


def find_suite(nodeid: str) -> str:
    """Return the test's folder under tests/; `unit` for any other, such as those that test_require.py writes."""
    return next((name for name in nodeid.partition("::")[0].split("/") if name in SUITES), "unit")


def find_scope(nodeid: str) -> str:
    """Return the unit of work that one process of xdist runs: the test, its file, or its suite."""
    suite = find_suite(nodeid)
    if suite == "launcher":
        return nodeid.partition("::")[0]
    return suite if suite in TOGETHER else nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect skipped suites from reports, which also arrive from the processes of xdist."""
    if report.skipped and isinstance(report.longrepr, tuple):
        match = re.fullmatch(r"Skipped: suite '([^']*)': (.*)", report.longrepr[2], re.DOTALL)
        if match:
            _skipped[match[1]] = match[2]


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Report at the end which suites were not tested."""
    for suite, reason in _skipped.items():
        terminalreporter.write_line(f"NOT TESTED: suite {suite!r}: {reason}", yellow=True)
