"""A selection of the fault table's cases; `make soak` runs all."""

from collections.abc import Callable

import pytest
from fault_cases import CASES, Case, MountError, Reference, is_as_expected, run_case
from tiny_runs import Trainer

SELECTED = (
    ("SIGKILL", "rename of a resume checkpoint"), ("SIGKILL", "between best weights and predictions"),
    ("SIGKILL", "merge"), ("SIGSTOP, then SIGKILL", "mid-epoch"), ("SIGTERM", "first step"),
    ("SIGTERM", "validation"), ("SIGTERM three times", "mid-epoch"), ("disk full", "mid-epoch"), ("disk full", "merge"),
    ("truncated", "newest resume checkpoint"), ("foreign", "both resume checkpoints"),
    ("one bit flipped", "best weights so far"), ("empty", "predictions of a finished fold"),
    ("foreign", "predictions of a finished fold"), ("truncated", "ledger"), ("truncated", "a fold's metrics"),
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case.what, case.where) in SELECTED], ids=lambda case: case.name
)
def test_run_with_fault_resumes_to_the_same_bytes(
    trainer: Trainer, reference: Reference, case: Case, need: Callable[[str, bool, str], None]
) -> None:
    try:
        result = run_case(trainer, reference, case)
    except MountError as error:
        need("small disk", False, str(error))
        return
    assert is_as_expected(case, result), result


def test_selected_cases_exist() -> None:
    assert {(case.what, case.where) for case in CASES} >= set(SELECTED)
