"""`python tests/faults/fault_table.py [--processes 2]`: every case, as a table; exit code 1 if one went wrong."""

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "distributed"), str(Path(__file__).parent)]

from fault_cases import CASES, MountError, is_as_expected, run_case, train_whole  # noqa: E402
from tiny_runs import Trainer, write_pages  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Meet every fault at every place, go on, and compare the bytes.")
    parser.add_argument(
        "--processes", type=int, default=1, help="of the fold; damages to files are of one (default: 1)"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose names hold these words")
    arguments = parser.parse_args()
    world_size = arguments.processes
    cases = [case for case in CASES if arguments.only in case.name and (world_size == 1 or not case.is_damage)]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="doccls-faults-") as workplace:
        trainer = Trainer(write_pages(Path(workplace) / "data"), Path(workplace))
        whole = train_whole(trainer, world_size)
        print("| fault or damage | where | it ends, or is told | gone on | steps done again |")
        print("| --- | --- | --- | --- | --- |")
        for case in cases:
            try:
                result = run_case(trainer, whole, case, world_size)
            except MountError as error:
                print(f"| {case.what} | {case.where} | not run: {error} | | |", flush=True)
                continue
            right = is_as_expected(case, result)
            wrong += not right
            told = f"{result.outcome}{'' if right else ' (WRONG)'}"
            print(f"| {case.what} | {case.where} | {result.ended} | {told} | {result.steps_again} |", flush=True)
    print(f"\n{wrong} went wrong" if wrong else "\nall as docs/reliability.md says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
