"""The short form of the fault table; `make soak` runs the long one."""

from collections.abc import Callable

import pytest
from fault_cases import CASES, Case, MountError, Whole, is_as_expected, run_case
from tiny_runs import Trainer

SHORT = (
    ("SIGKILL", "rename of a state"), ("SIGKILL", "between best weights and part"), ("SIGKILL", "merge"),
    ("SIGSTOP, then SIGKILL", "mid-epoch"), ("SIGTERM", "first step"), ("SIGTERM", "validation"),
    ("SIGTERM three times", "mid-epoch"), ("disk full", "mid-epoch"), ("disk full", "merge"),
    ("truncated", "newest state"), ("foreign", "both states"), ("one bit flipped", "best weights so far"),
    ("empty", "part of a finished fold"), ("foreign", "part of a finished fold"), ("truncated", "ledger"),
    ("truncated", "a fold's metrics"),
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case.what, case.where) in SHORT], ids=lambda case: case.name
)
def test_a_fault_costs_steps_and_no_bytes(
    trainer: Trainer, whole: Whole, case: Case, need: Callable[[str, bool, str], None]
) -> None:
    try:
        result = run_case(trainer, whole, case)
    except MountError as error:
        need("small disk", False, str(error))
        return
    assert is_as_expected(case, result), result


def test_the_short_form_is_of_the_tables_cases() -> None:
    assert {(case.what, case.where) for case in CASES} >= set(SHORT)
