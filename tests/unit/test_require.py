"""The `need` fixture: skip with the reason, or fail if the suite is required."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Need = Callable[[str, bool, str], None]


def test_available_suite_runs(need: Need, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCCLS_REQUIRE", "suite-4711")
    need("suite-4711", True, "irrelevant")


@pytest.mark.parametrize("required", [None, "", "other", "suite-47110", "suite"])
def test_missing_requirement_skips_with_reason(
    need: Need, monkeypatch: pytest.MonkeyPatch, required: str | None
) -> None:
    if required is None:
        monkeypatch.delenv("DOCCLS_REQUIRE", raising=False)
    else:
        monkeypatch.setenv("DOCCLS_REQUIRE", required)
    with pytest.raises(pytest.skip.Exception, match="suite 'suite-4711': no such folder"):
        need("suite-4711", False, "no such folder")


@pytest.mark.parametrize("required", ["suite-4711", "other,suite-4711", "suite-4711,other"])
def test_missing_requirement_fails_required_suite(need: Need, monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    monkeypatch.setenv("DOCCLS_REQUIRE", required)
    with pytest.raises(pytest.fail.Exception, match=r"'suite-4711' is required \(DOCCLS_REQUIRE\) but no such folder"):
        need("suite-4711", False, "no such folder")


SKIPS = """
import pytest

def test_a(need):
    need("suite-4711", False, "no such folder")

def test_b():
    pytest.skip("not today")
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-n", "1"]])
def test_summary_lists_skipped_suites(tmp_path: Path, options: list[str]) -> None:
    """Also if another process skipped the test."""
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", tmp_path, *options],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    notices = [line for line in done.stdout.splitlines() if "NOT TESTED" in line]
    assert notices == ["NOT TESTED: suite 'suite-4711': no such folder"], done.stdout + done.stderr
