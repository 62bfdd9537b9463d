"""`doccls-launch merge RUN`: merge folds that were trained apart."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from doccls.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doccls-launch`."""
    parser = argparse.ArgumentParser(prog="doccls-launch", description="Bring together the folds of one run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    merge = commands.add_parser("merge", help="merge the folds' OOF parts and metrics, wherever they were trained")
    merge.add_argument("run", type=Path, metavar="RUN", help="folder of the run: <exp_dir>/YYYYMMDD/<run_id>")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return _merge(arguments.run)
    except UserError as error:
        print(f"doccls-launch {arguments.command}: {error}", file=sys.stderr)
        return 1


def _merge(run: Path) -> int:
    from doccls.oof.merge import merge_run  # scikit-learn takes a second to import: not for --help
    from doccls.run.history import write_metrics
    from doccls.run.paths import RunError, RunPaths

    paths = RunPaths(run.resolve())
    if not paths.root.is_dir():
        raise RunError(f"no such run folder: {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")
    merged = merge_run(paths)
    write_metrics(paths)
    for fold, score in enumerate(merged.fold_scores):
        print(f"[OOF] fold={fold} macro_f1={score:.5f}")
    print(f"[OOF] all folds macro_f1={merged.macro_f1:.5f} rows={len(merged.ids)} -> {paths.oof_logits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
