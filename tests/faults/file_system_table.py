"""Launch five folds on file systems that lack a call, for each call and answer; exit code 1 if a result differs.

Usage: `python tests/faults/file_system_table.py [--only TEXT]`
"""

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), *(str(REPOSITORY / "tests" / suite) for suite in ("distributed", "launcher"))]

from launches import assert_same_bytes, launch  # noqa: E402
from refusals import ANSWERS, REFUSED  # noqa: E402
from tiny_runs import PLAIN, Trainer, write_pages  # noqa: E402

FOLDS = 5
SETS = (*PLAIN, "data.train_csv=train.csv", f"data.folds={FOLDS}", "train.checkpoint_interval_s=0.001")


def main() -> int:
    parser = argparse.ArgumentParser(description="Refuse each call with each answer, and compare the bytes.")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose names contain this text")
    arguments = parser.parse_args()
    cases = [f"{call}: {answer}" for call, answers in ANSWERS.items() for answer in answers]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="doccls-file-systems-") as workspace:
        trainer = Trainer(write_pages(Path(workspace) / "data"), Path(workspace))
        undisturbed = launch(trainer, SETS, "--slots", "2")
        assert undisturbed.code == 0, undisturbed.err
        print("| refused call: answer | refused | exit code | result |")
        print("| --- | --- | --- | --- |")
        for case in cases:
            if arguments.only not in case:
                continue
            launched = launch(trainer, SETS, "--slots", "2", refusal=case)
            refused = launched.run.folder / REFUSED
            count = len(refused.read_text().splitlines()) if refused.exists() else 0
            try:
                assert_same_bytes(undisturbed.run, launched.run, FOLDS)
                result = "the same bytes"
            except (AssertionError, OSError, ValueError) as error:
                failed += 1
                result = f"WRONG: {str(error).splitlines()[0]}; {launched.err[-300:]}"
            print(f"| {case} | {count} | {launched.code} | {result} |", flush=True)
    print(f"\n{failed} cases failed" if failed else "\nall cases give the same bytes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
