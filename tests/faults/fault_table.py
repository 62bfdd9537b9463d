"""Run every case and print a table; exit code 1 if a case failed.

Usage: `python tests/faults/fault_table.py [--processes 2]`
"""

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "distributed"), str(Path(__file__).parent)]

from fault_cases import CASES, MountError, is_as_expected, run_case, train_reference  # noqa: E402
from tiny_runs import Trainer, write_pages  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject each fault at each point, resume, and compare the bytes.")
    parser.add_argument(
        "--processes", type=int, default=1, help="per fold; more than one skips the damaged files (default: 1)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose names contain this text")
    arguments = parser.parse_args()
    world_size = arguments.processes
    cases = [case for case in CASES if arguments.only in case.name and (world_size == 1 or not case.is_damage)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="doccls-faults-") as workspace:
        trainer = Trainer(write_pages(Path(workspace) / "data"), Path(workspace))
        reference = train_reference(trainer, world_size)
        print("| fault or damage | where | exit or message | after resuming | repeated steps |")
        print("| --- | --- | --- | --- | --- |")
        for case in cases:
            try:
                result = run_case(trainer, reference, case, world_size)
            except MountError as error:
                print(f"| {case.what} | {case.where} | not run: {error} | | |", flush=True)
                continue
            is_right = is_as_expected(case, result)
            failed += not is_right
            outcome = result.outcome if is_right else f"{result.outcome} (WRONG)"
            cells = (case.what, case.where, result.observed, outcome, str(result.repeated_steps))
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{failed} cases failed" if failed else "\nall cases went as docs/reliability.md says")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
