"""`doccls predict RUN`, also `python -m doccls.predict`: a run's checkpoints -> labels of test images or of a folder.

RUN may be a blend (`doccls blend`), whose members' probabilities are averaged by weight; a run is a blend of one.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from doccls.config import Config
from doccls.config.paths import (
    PathKind,
    find_output_problem,
    find_problem,
    is_file,
    leave_deleted_folder,
    resolve_option,
)
from doccls.data.table import read_table, require_columns
from doccls.errors import UserError
from doccls.oof.adjust import Adjustment, adjust, learn_adjustment, read_own_predictions
from doccls.oof.blend_record import read_record
from doccls.oof.view_logits import average_stored
from doccls.oof.views import PLAIN, Setting
from doccls.prediction.candidates import Candidates, parse_candidates
from doccls.prediction.results import Predictions, Source, check_predictions, write_predictions
from doccls.prediction.submission import (
    Coverage,
    check_columns,
    check_replacement,
    render_submission,
    write_submission,
)
from doccls.reporting.command import run_command
from doccls.reporting.console import guarding_console
from doccls.run.paths import ResultPaths, RunPaths, find_run
from doccls.system.atomic_files import restore_files
from doccls.system.rank import rank_by_environment
from doccls.system.user import complete_user
from doccls.system.variables import drop_empty_variables

if TYPE_CHECKING:  # torch takes seconds to import
    from doccls.prediction.members import Member
    from doccls.prediction.pages import TestPages


@dataclass(frozen=True)
class Task:
    """What to predict, and where the results go."""

    paths: RunPaths
    results: ResultPaths
    images: Path | None  # a folder of images to predict instead of the rows of the sample submission
    candidates: Candidates  # how the models may be applied
    with_probabilities: bool  # in predictions.csv
    min_confidence: float | None  # below which a page is listed for review


# --- command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls predict`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a blend: <exp_dir>/YYYYMMDD/<run_id>")
    parser.add_argument("--sample-csv", type=Path, metavar="FILE", help="replaces the run's data.sample_csv")
    parser.add_argument("--image-dir", type=Path, metavar="DIR", help="replaces the run's data.image_dir_test")
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="predict all images in this folder and its subfolders, without a sample submission",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder of the results (default: RUN; with --images: RUN/predictions/<name of its folder>)",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities", action="store_true", help="also write each class's probability to predictions.csv"
    )
    parser.add_argument(
        "--min-confidence", type=_parse_probability, metavar="P",
        help="list the pages whose label has a probability below P (0 to 1) in review.csv, for a person to look at",
    )  # fmt: skip
    parser.add_argument(
        "--num-workers", type=int, choices=range(65), metavar="N", help="data-loading workers (0 to 64)"
    )
    parser.add_argument(
        "--on-bad-image", choices=("error", "skip"), default="error",
        help="missing or bad images: fail (default), or give their rows the training class frequencies (of --images: "
        "no prediction)",
    )  # fmt: skip
    parser.add_argument(
        "--views", default="none", metavar="VIEWS",
        help="mirrored, turned and scaled copies of each page, whose probabilities are averaged: none (default), "
        "auto (those that gain on the OOF predictions; needs the training data once), or a comma-separated list, such "
        "as id,hflip,rot180,rot90+hflip,scale0.9",
    )  # fmt: skip
    parser.add_argument(
        "--adapt-bn", default="off", metavar="N",
        help="mix the BatchNorm statistics of the pages into those of the training, which count as N pages: off "
        "(default), auto (where it gains on damaged OOF predictions; needs the training data once), or a number, such "
        "as 256",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m doccls.predict` and return its exit code."""
    with guarding_console():
        drop_empty_variables(os.environ)
        complete_user(os.environ)
        parser = argparse.ArgumentParser(
            prog="python -m doccls.predict",
            description="Predict images with all folds of a run or a blend.",
            epilog="Several devices: accelerate launch --config_file accelerate_configs/FILE -m doccls.predict RUN ...",
        )
        add_arguments(parser)
        arguments = parser.parse_args(argv)
        return run_command("doccls predict", lambda: predict(arguments), rank_by_environment())


def predict(arguments: argparse.Namespace) -> int:
    """Predict the test images of a run or a blend, or a folder. All ranks must call; the main process writes files.

    Raises:
        UserError: no such run, no checkpoint, checkpoints of different runs, members of a blend that were moved or
            changed, or images that can't be used.
    """
    task = _parse_task(arguments)
    restore_files(task.paths.root)
    leave_deleted_folder()
    from doccls.prediction.folds import predict_members
    from doccls.prediction.members import ConfigChanges, choose_precision, list_members, unify_data
    from doccls.prediction.oof_views import choose_run_setting
    from doccls.training.distributed import can_compute_in, on_main, start_processes

    changes = ConfigChanges(arguments.sample_csv, arguments.image_dir, arguments.num_workers, arguments.on_bad_image)
    members = unify_data(list_members(task.paths, changes), has_sample=task.images is None)
    config, precision = members[0].config, choose_precision(members)
    accelerator = start_processes(_with_precision(config, precision if can_compute_in(precision) else "no"))
    try:
        pages, coverage = on_main(accelerator, lambda: _check_inputs(task, members))
        setting = choose_run_setting(members[0], task.candidates, coverage.num_predicted, accelerator)
        adjustment = on_main(accelerator, lambda: _read_adjustment(task.paths, members, setting))
        if accelerator.is_main_process and setting != PLAIN:
            print(f"[PREDICT] predicting with {setting.text}", flush=True)
        if accelerator.is_main_process and accelerator.mixed_precision != precision:
            print(f"[WARNING] validated in {precision}, which this device does not support: predicting in float32")
        probs = predict_members(members, pages, accelerator, setting)
        coverage = replace(coverage, views=setting.views, adapt_bn=setting.prior)
        on_main(accelerator, lambda: _write_results(task, members, pages[0], *probs, coverage, adjustment))
    except UserError:
        accelerator.end_training()  # every rank reaches this
        raise
    accelerator.end_training()
    return 0


def _parse_probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability: it must be a number from 0 to 1")
    return value


def _parse_task(arguments: argparse.Namespace) -> Task:
    """Return the task, and make the paths of the other options absolute, in place.

    Raises:
        UserError: there is no such run or views, a path can't be read or written, or options exclude each other.
    """
    candidates = parse_candidates(arguments.views, arguments.adapt_bn)
    paths = find_run(arguments.run)
    if not (candidates.is_single and candidates.plain == PLAIN) and is_file(paths.blend):
        raise UserError(
            f"--views {arguments.views} --adapt-bn {arguments.adapt_bn}: {paths.root} is a blend, and these options "
            "are for single runs: predict it without them, or predict one of its members"
        )
    kinds: dict[str, PathKind] = {"sample_csv": "file", "image_dir": "folder", "images": "folder"}
    for name, kind in kinds.items():
        option, given = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if given is None:
            continue
        if arguments.images is not None and name != "images":
            raise UserError(f"--images predicts all images of its folder, so {option} can't be used with it")
        path = resolve_option(given, option)
        if (problem := find_problem(path, kind)) is not None:
            raise UserError(f"{option}: {problem}")
        setattr(arguments, name, path)
    results = paths.results if arguments.images is None else paths.folder_results(arguments.images.name or "images")
    if arguments.output is not None:
        results = ResultPaths(resolve_option(arguments.output, "--output"))
    if (problem := find_output_problem(results.root)) is not None:
        raise UserError(f"{'RUN' if arguments.output is None else '--output'}: {problem}")
    return Task(paths, results, arguments.images, candidates, arguments.probabilities, arguments.min_confidence)


def _with_precision(config: Config, precision: str) -> Config:
    train = config.train.model_copy(update={"amp": False if precision == "no" else precision})
    return config.model_copy(update={"train": train})


# --- before the passes -----------------------------------------------------------------------------------------------


def _check_inputs(task: Task, members: "Sequence[Member]") -> tuple[tuple["TestPages", ...], Coverage]:
    """Check the checkpoints, one at a time, and the pages, and print a summary. Only the main process may call.

    Returns:
        The pages, decoded for each member's image size, and what will be predicted.
    """
    from doccls.prediction.members import check_checkpoints, choose_member_store
    from doccls.prediction.oof_views import check_batch_norm
    from doccls.prediction.pages import read_folder_pages, read_sample_pages

    folds, warnings = [], []
    for member in members:
        own_folds, own_warnings = check_checkpoints(member)
        folds += own_folds
        warnings += own_warnings
    if len({member.precision for member in members}) > 1:
        listed = ", ".join(f"{member.label}{member.precision}" for member in members)
        warnings.append(f"the runs were validated in different precisions ({listed}): predicting in float32")
    by_size: dict[int, TestPages] = {}
    for member in members:
        config, store = member.config, choose_member_store(member)
        if config.page_px not in by_size:
            by_size[config.page_px] = (
                read_sample_pages(config, store)
                if task.images is None
                else read_folder_pages(task.images, config, store)
            )
    pages = tuple(by_size[member.config.page_px] for member in members)
    first, id_col = pages[0], members[0].config.data.id_col
    coverage = Coverage(tuple(folds), len(first.ids), len(first.ids) - len(first.paths.find_missing()))
    check_predictions(task.results, _describe_source(task, members), coverage)
    if first.columns is not None:
        check_columns(first.columns, id_col, members[0].classes)
        check_replacement(task.results, coverage, id_col, first.ids)
    for warning in (*warnings, *first.problems):
        print(f"[WARNING] {warning}")
    if task.candidates.priors[0] is not None:
        check_batch_norm(members[0], coverage.num_predicted)
    of_runs = "" if len(members) == 1 else f" of {len(members)} runs"
    what = "test images" if task.images is None else f"images of {task.images}"
    print(f"[PREDICT] {len(first.ids)} {what} x {len(folds)} folds{of_runs}", flush=True)
    return pages, coverage


def _describe_source(task: Task, members: "Sequence[Member]") -> Source:
    return Source(tuple(member.fingerprint for member in members), task.images)


def _read_adjustment(paths: RunPaths, members: "Sequence[Member]", setting: Setting) -> Adjustment | None:
    """Learn from the OOF predictions, and print what follows for the files. Only the main process may call."""
    num_folds = members[0].config.data.folds
    adjustment: Adjustment | None
    problems: tuple[str, ...] = ()
    is_plain = setting == PLAIN
    if is_file(paths.blend):
        adjustment = read_record(paths).adjustment
    else:
        fold_predictions, problems = read_own_predictions(paths, members[0].fingerprint, num_folds)
        if not is_plain:
            fold_predictions, lacking = average_stored(paths, fold_predictions, setting.views, setting.prior)
            problems += tuple(
                f"fold {fold} has no finite OOF logits of {setting.text} ({_name_source(setting)} stores some)"
                for fold in lacking
            )
        adjustment = learn_adjustment(fold_predictions)
    for problem in problems:
        print(f"[WARNING] not used for calibration: {problem}")
    if adjustment is None:
        what = "predictions" if is_plain else f"OOF predictions of {setting.text}"
        print(f"[WARNING] probabilities are not calibrated: no finished fold has {what} to learn from")
        return None
    folds = ", ".join(map(str, adjustment.folds))
    print(
        f"[PREDICT] temperature={adjustment.temperature:.3f} calibrates the probabilities and changes no label "
        f"(from OOF predictions of {adjustment.learned_from} pages, folds {folds} of {num_folds})"
    )
    thresholds = adjustment.thresholds
    if thresholds.offsets is not None:
        print(
            "[PREDICT] labels are chosen by per-class thresholds on each fold's probabilities (cross-fitted gain in "
            f"macro_f1 {thresholds.gain:+.4f}, {thresholds.gain_level:.0%} interval [{thresholds.gain_low:+.3f}, "
            f"{thresholds.gain_high:+.3f}]): "
            "some are not the most probable class"
        )
    return adjustment


def _name_source(setting: Setting) -> str:
    """Return the options that store OOF logits of candidate views with these statistics."""
    return "--views auto" if setting.prior is None else f"--views auto --adapt-bn {setting.prior}"


# --- results ---------------------------------------------------------------------------------------------------------


def _write_results(
    task: Task,
    members: "Sequence[Member]",
    pages: "TestPages",
    probs_NC: np.ndarray,
    fold_probs: Sequence[np.ndarray],
    coverage: Coverage,
    adjustment: Adjustment | None,
) -> None:
    """Write the calibrated probabilities, the labels and, if there is a sample, the submission.

    Only the main process may call.
    """
    member = members[0]  # whose training data and classes stand for all
    missing = pages.paths.find_missing()
    has_image_N = np.ones(len(pages.ids), dtype=bool)
    has_image_N[missing] = False
    chosen_N = np.zeros(len(pages.ids), dtype=np.int64)
    own = [fold_NC[has_image_N] for fold_NC in fold_probs]
    probs_NC[has_image_N], chosen_N[has_image_N] = adjust(probs_NC[has_image_N], own, adjustment)
    if len(missing) and pages.columns is not None:
        probs_NC[missing] = _read_class_frequencies(member.config, member.classes)
        chosen_N[missing] = probs_NC[missing].argmax(axis=1)
    results, predictions = task.results, Predictions(pages.ids, member.classes, probs_NC, chosen_N, has_image_N)
    source = _describe_source(task, members)
    write_predictions(results, predictions, source, coverage, task.with_probabilities, task.min_confidence)
    if task.min_confidence is not None:
        count = len(predictions.list_uncertain(task.min_confidence))
        print(
            f"[PREDICT] {results.review}: {count} of {len(pages.ids)} pages to review, with a confidence below "
            f"{task.min_confidence:g} or without a usable image"
        )
    print(f"[PREDICT] {results.predictions}")
    if pages.columns is None:
        return
    id_col = member.config.data.id_col
    text = render_submission(pages.columns, id_col, pages.ids, member.classes, probs_NC, chosen_N)
    write_submission(results, text, probs_NC, coverage)
    print(f"[PREDICT] {results.submission}\n[PREDICT] {results.test_probabilities} {probs_NC.shape}")


def _read_class_frequencies(config: Config, classes: Sequence[str]) -> np.ndarray:
    """Return the relative class frequencies in train.csv: the prior for a page that can't be read."""
    column = config.data.target_col
    table = read_table(config.data.train_csv, "data.train_csv", [column])
    require_columns(table, config.data.train_csv, {"data.target_col": column})
    counts = Counter(label.strip() for label in table.cells[column])
    return np.asarray([counts[label] for label in classes], dtype=np.float64) / len(table)


if __name__ == "__main__":
    sys.exit(main())
