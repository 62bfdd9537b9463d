"""CI's second run of failed tests: a flaky test is reported and accepted, a failing one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "pytest_twice.py"
FLAKY = """
from pathlib import Path

def test_once():
    seen = Path(__file__).with_name("seen")
    first = not seen.exists()
    seen.touch()
    assert not first, "only the first time"
"""
FAULTY = "def test_never():\n    assert 1 == 2\n"
GOOD = "def test_always():\n    pass\n"
BROKEN = "import nothing_of_that_name\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "code", "message", "options"),
    [
        (GOOD, 0, None, []),
        (FLAKY, 0, "FLAKY test_it.py::test_once passed when it ran once more, alone", []),
        (FLAKY, 0, "FLAKY test_it.py::test_once passed when it ran once more, alone", ["-n", "1"]),
        (FAULTY, 1, "FAILED test_it.py::test_never twice", []),
        (FLAKY + FAULTY, 1, "FLAKY test_it.py::test_once", []),
        (BROKEN, 2, None, []),
    ],
)
def test_failed_test_runs_once_more(
    tmp_path: Path, source: str, code: int, message: str | None, options: list[str]
) -> None:
    (tmp_path / "test_it.py").write_text(source)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "-p", "no:cacheprovider", "-p", "xdist", *options],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take seconds to import
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert message is None or message in done.stdout
    assert ("FLAKY" in done.stdout) == (message is not None and "FLAKY" in message)
    if message is not None and "FLAKY" in message:
        assert "only the first time" in done.stdout.partition("FLAKY ")[2], "the text of the first failure"
