"""The `need` fixture: a skip that says what is missing, or a failure where the suite is required."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Need = Callable[[str, bool, str], None]


def test_what_is_available_goes_on(need: Need, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCCLS_REQUIRE", "suite-4711")
    need("suite-4711", True, "no matter")


@pytest.mark.parametrize("required", [None, "", "other", "suite-47110", "suite"])
def test_what_is_missing_is_skipped_with_its_reason(
    need: Need, monkeypatch: pytest.MonkeyPatch, required: str | None
) -> None:
    if required is None:
        monkeypatch.delenv("DOCCLS_REQUIRE", raising=False)
    else:
        monkeypatch.setenv("DOCCLS_REQUIRE", required)
    with pytest.raises(pytest.skip.Exception, match="suite 'suite-4711': no such folder"):
        need("suite-4711", False, "no such folder")


@pytest.mark.parametrize("required", ["suite-4711", "other,suite-4711", "suite-4711,other"])
def test_what_is_missing_fails_where_it_is_required(need: Need, monkeypatch: pytest.MonkeyPatch, required: str) -> None:
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
@pytest.mark.parametrize("words", [[], ["-n", "1"]])
def test_the_end_of_the_run_says_what_was_not_tested(tmp_path: Path, words: list[str]) -> None:
    """Also where the skip was met by another process."""
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}", *words],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if "NOT TESTED" in line]
    assert told == ["NOT TESTED: suite 'suite-4711': no such folder"], done.stdout + done.stderr
