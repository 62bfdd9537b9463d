"""Distribution of tests by xdist: tests that share runs or a cluster stay in one process."""

import pytest

from tests.conftest import find_scope, find_suite


@pytest.mark.parametrize(
    ("test", "suite", "scope"),
    [
        ("tests/slurm/test_slurm_runs.py::test_x[a/unit]", "slurm", "slurm"),
        ("tests/launcher/test_launch_runs.py::test_x", "launcher", "tests/launcher/test_launch_runs.py"),
        ("tests/unit/test_folds.py::test_x[1::2]", "unit", "tests/unit/test_folds.py::test_x[1::2]"),
        ("tests/browser/test_report.py::test_x", "browser", "browser"),
        ("test_elsewhere.py::test_x", "unit", "test_elsewhere.py::test_x"),
    ],
)
def test_suite_and_scope_of_a_test(test: str, suite: str, scope: str) -> None:
    assert (find_suite(test), find_scope(test)) == (suite, scope)
