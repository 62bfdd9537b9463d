"""`doccls demo`: the full pipeline on drawn pages, offline, up to merged out-of-fold predictions."""

import argparse
import secrets
import sys
from datetime import datetime
from pathlib import Path

from doccls.config.paths import find_output_problem, resolve_option
from doccls.errors import UserError
from doccls.run.paths import RunPaths, locate_run
from doccls.system.atomic_files import write_text

CONFIG = """\
# Written by `doccls demo`: a small network, trained from scratch on drawn pages. Retrain it with
#   python -m doccls.train --config THIS_FILE
project: {version: demo}
data:
  train_csv: ../data/raw/train.csv
  sample_csv: ../data/raw/sample_submission.csv
  image_dir_train: ../data/raw/train
  image_dir_test: ../data/raw/test
  folds: 3
model: {name: resnet10t, pretrained: false, mean: [0.8, 0.8, 0.8], std: [0.25, 0.25, 0.25]}
train:
  img_size: 96
  batch_size: 16
  epochs: 10
  lr: 3e-3
  weight_decay: 0.05
  warmup_epochs: 2
  label_smoothing: 0.05
augment: {rotate_deg: 0, scale: 0, shift: 0, brightness: 0}
output: {logs_dir: ../logs, exp_dir: ../experiments}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls demo`."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("demo"), metavar="DIR", help="output folder (default: demo)"
    )
    parser.add_argument("--draw-only", action="store_true", help="write the data and the config, but do not train")


def demo(arguments: argparse.Namespace) -> int:
    """Draw the data, write the config, train the folds and return the exit code of the training."""
    from doccls.demo.dataset import write_demo

    folder = resolve_option(arguments.folder, "DIR")
    problem = find_output_problem(folder)
    if problem is not None:
        raise UserError(f"DIR: {problem}")
    config = folder / "configs" / "demo.yaml"
    write_demo(folder)
    write_text(config, CONFIG)
    print(f"[DEMO] pages {folder / 'data' / 'raw'}\n[DEMO] config {config}", flush=True)
    if arguments.draw_only:
        return 0
    from doccls.train import main as train

    run_id = f"demo-{secrets.token_hex(3)}"
    code = train(["--config", str(config), "--run-id", run_id])
    if code == 0:
        _report_results(locate_run(folder / "experiments", run_id, datetime.now()), folder / "logs")
    return code


def _report_results(paths: RunPaths, logs: Path) -> None:
    from doccls.oof.merge import merge_run

    summary = merge_run(paths)
    print()
    for fold in summary.folds:
        print(f"[DEMO] fold {fold.fold}: macro-F1 {fold.macro_f1:.3f}")
    print(f"[DEMO] all folds together: OOF macro-F1 {summary.macro_f1:.3f} over {summary.num_samples} pages")
    for what, path in (
        ("run", paths.root),
        ("predictions (CSV)", paths.oof_csv),
        ("metrics per epoch", paths.metrics),
        ("checkpoints", paths.best_checkpoint(0).parent),
        ("logs", logs),
    ):
        print(f"[DEMO] {what}: {path}")
    print(f"[DEMO] next: {Path(sys.executable).with_name('doccls')} predict {paths.root}")
