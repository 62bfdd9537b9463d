"""`doccls predict RUN`: a run's checkpoints -> test probabilities -> a submission in the format of the sample.

RUN may be a blend (`doccls blend`), whose members' probabilities are averaged by weight; a run is a blend of one.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from doccls.config import Config
from doccls.config.paths import (
    PathKind,
    check_paths,
    find_output_problem,
    find_problem,
    is_file,
    leave_deleted_folder,
    resolve_option,
)
from doccls.data.image_names import resolve_images
from doccls.data.messages import format_examples
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.data.table import read_table, require_columns
from doccls.data.views import IDENTITY, View, parse_views, render_views
from doccls.errors import UserError
from doccls.oof.adjust import Adjustment, adjust, learn_adjustment, read_own_predictions
from doccls.oof.blend_record import BlendMember, read_record
from doccls.oof.metrics import mean_probabilities
from doccls.oof.view_logits import average_stored
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ConsoleReporter
from doccls.run.paths import RunPaths, find_run
from doccls.submission import Coverage, check_columns, check_replacement, render_submission, write_submission

if TYPE_CHECKING:
    from accelerate import Accelerator

    from doccls.data.dataset import Batch
    from doccls.data.store import StoreChoice, StoredPages
    from doccls.training.checkpoint import BestWeights


@dataclass(frozen=True)
class TestPages:
    """The rows of the sample submission and their images."""

    columns: tuple[str, ...]  # of the sample submission
    ids: PackedTexts
    paths: PackedPaths  # None for a missing or bad image (if --on-bad-image is `skip`)
    problems: tuple[str, ...]
    stored: "StoredPages | None" = None  # their decoded pages, if there is a store


@dataclass(frozen=True)
class Member:
    """A run whose folds are averaged, as a member of a blend or by itself."""

    paths: RunPaths
    files: tuple[Path, ...]  # the checkpoints of its folds
    config: Config  # of its training, with the arguments of the command
    fingerprint: str
    classes: tuple[str, ...]
    precision: str  # in which it was validated: no (float32), fp16 or bf16
    recorded: BlendMember | None = None  # in the blend; None for a run by itself

    @property
    def weight(self) -> float:
        """The weight of its probabilities."""
        return 1.0 if self.recorded is None else self.recorded.weight

    @property
    def label(self) -> str:
        """What messages about it start with."""
        return "" if self.recorded is None else f"{self.paths.run_id}: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls predict`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a blend: <exp_dir>/YYYYMMDD/<run_id>")
    parser.add_argument("--sample-csv", type=Path, metavar="FILE", help="replaces the run's data.sample_csv")
    parser.add_argument("--image-dir", type=Path, metavar="DIR", help="replaces the run's data.image_dir_test")
    parser.add_argument(
        "--num-workers", type=int, choices=range(65), metavar="N", help="data-loading workers (0 to 64)"
    )
    parser.add_argument(
        "--on-bad-image", choices=("error", "skip"), default="error",
        help="missing or bad test images: fail (default), or give their rows the training class frequencies",
    )  # fmt: skip
    parser.add_argument(
        "--views", default="none", metavar="VIEWS",
        help="mirrored, turned and scaled copies of each page, whose probabilities are averaged: none (default), "
        "auto (those that gain on the OOF predictions; needs the training data once), or a comma-separated list, such "
        "as id,hflip,rot180,rot90+hflip,scale0.9",
    )  # fmt: skip


def predict(arguments: argparse.Namespace) -> int:
    """Predict the test images of a run or a blend. All ranks must call; the main process checks and writes files.

    Raises:
        UserError: no such run, no checkpoint, checkpoints of different runs, members of a blend that were moved or
            changed, or test data that can't be used.
    """
    stated = _parse_views(arguments.views)
    paths = find_run(arguments.run)
    if stated != (IDENTITY,) and is_file(paths.blend):
        raise UserError(
            f"--views {arguments.views}: {paths.root} is a blend, and views are for single runs: predict it without "
            "--views, or predict one of its members"
        )
    _resolve_inputs(arguments)
    leave_deleted_folder()
    from doccls.training.distributed import can_compute_in, on_main, start_processes

    members = _list_members(paths, arguments)
    config, precision = members[0].config, _choose_precision(members)
    accelerator = start_processes(_with_precision(config, precision if can_compute_in(precision) else "no"))
    try:
        pages, coverage = on_main(accelerator, lambda: _check_inputs(paths, members))
        views = _choose_views(members[0], accelerator) if stated is None else stated
        coverage = replace(coverage, views=tuple(view.name for view in views))
        adjustment = on_main(accelerator, lambda: _read_adjustment(paths, members, views))
        if accelerator.is_main_process and views != (IDENTITY,):
            print(f"[PREDICT] mean over {len(views)} views: {render_views(views)}", flush=True)
        if accelerator.is_main_process and accelerator.mixed_precision != precision:
            print(f"[WARNING] validated in {precision}, which this device does not support: predicting in float32")
        probs = _predict_members(members, pages, accelerator, views)
        classes = members[0].classes
        on_main(accelerator, lambda: _write_results(paths, config, classes, pages[0], *probs, coverage, adjustment))
    except UserError:
        accelerator.end_training()  # every rank reaches this
        raise
    accelerator.end_training()
    return 0


def _parse_views(text: str) -> tuple[View, ...] | None:
    """Return the views of --views: None for `auto`, the page itself for `none`."""
    if text == "auto":
        return None
    return (IDENTITY,) if text == "none" else parse_views(text)


def _resolve_inputs(arguments: argparse.Namespace) -> None:
    """Make the paths of --sample-csv and --image-dir absolute, in place.

    Raises:
        UserError: one can't be read; the message names the option.
    """
    options: tuple[tuple[str, str, PathKind], ...] = (
        ("sample_csv", "--sample-csv", "file"),
        ("image_dir", "--image-dir", "folder"),
    )
    for name, option, kind in options:
        if (stated := getattr(arguments, name)) is not None:
            path = resolve_option(stated, option)
            if (problem := find_problem(path, kind)) is not None:
                raise UserError(f"{option}: {problem}")
            setattr(arguments, name, path)


def _list_members(paths: RunPaths, arguments: argparse.Namespace) -> list[Member]:
    """Return the run, or the members of a blend that have weight; all members predict the images of the first.

    Raises:
        UserError: a member is not where the blend recorded it, or has no checkpoint; or the members' configs state
            different test images, and the arguments state none.
    """
    if not is_file(paths.blend):
        return [_open_member(paths, arguments, None)]
    members = []
    for recorded in read_record(paths).members:
        root = Path(os.path.normpath(paths.root / recorded.path))
        if recorded.weight == 0:
            continue
        problem = find_problem(root, "run folder")
        if problem is not None:
            raise UserError(
                f"{paths.blend}: member {recorded.path}: {problem}. If it was moved, move it back (members are found "
                "relative to the blend), or blend the runs again"
            )
        members.append(_open_member(RunPaths(root), arguments, recorded))
    for key, option in (("sample_csv", "--sample-csv"), ("image_dir_test", "--image-dir")):
        stated = {member.paths.run_id: getattr(member.config.data, key) for member in members}
        if len(set(stated.values())) > 1:
            listed = ", ".join(f"{run_id}: {path}" for run_id, path in stated.items())
            raise UserError(f"the members of the blend differ in data.{key} ({listed}): state it by {option}")
    data = members[0].config.data
    return [replace(member, config=member.config.model_copy(update={"data": data})) for member in members]


def _open_member(paths: RunPaths, arguments: argparse.Namespace, recorded: BlendMember | None) -> Member:
    from doccls.training.checkpoint import parse_config, read_best

    files = _list_checkpoints(paths)
    first = read_best(files[0])
    config = _with_arguments(parse_config(first), arguments)
    return Member(paths, tuple(files), config, first.fingerprint, first.classes, first.precision, recorded)


def _choose_precision(members: Sequence[Member]) -> str:
    """Return the precision of all members; float32 if they differ, since a process computes in one."""
    precisions = {member.precision for member in members}
    return precisions.pop() if len(precisions) == 1 else "no"


def _list_checkpoints(paths: RunPaths) -> list[Path]:
    files = paths.list_best_checkpoints()
    if not files:
        raise UserError(f"{paths.root}: no checkpoint ckpt/best_fold*.pth: no fold has finished an epoch")
    return files


def _check_inputs(paths: RunPaths, members: Sequence[Member]) -> tuple[tuple[TestPages, ...], Coverage]:
    """Check the checkpoints, one at a time, and the test pages, and print a summary. Only the main process may call.

    Returns:
        The test pages, decoded for each member's image size, and what will be predicted.
    """
    folds, warnings = [], []
    for member in members:
        own_folds, own_warnings = _check_checkpoints(member)
        folds += own_folds
        warnings += own_warnings
    if len({member.precision for member in members}) > 1:
        listed = ", ".join(f"{member.label}{member.precision}" for member in members)
        warnings.append(f"the runs were validated in different precisions ({listed}): predicting in float32")
    problem = find_output_problem(paths.root)
    if problem is not None:
        raise UserError(f"RUN: {problem}")
    config = members[0].config
    by_size = {}
    for member in members:
        if member.config.page_px not in by_size:
            by_size[member.config.page_px] = read_test_pages(member.config, _choose_store(member.paths, member.config))
    pages = by_size[config.page_px]
    check_columns(pages.columns, config.data.id_col, members[0].classes)
    num_predicted = len(pages.ids) - len(pages.paths.find_missing())
    coverage = Coverage(tuple(folds), len(pages.ids), num_predicted)
    check_replacement(paths, coverage, config.data.id_col, pages.ids)
    for warning in (*warnings, *pages.problems):
        print(f"[WARNING] {warning}")
    of_runs = "" if len(members) == 1 else f" of {len(members)} runs"
    print(f"[PREDICT] {len(pages.ids)} test images x {len(folds)} folds{of_runs}", flush=True)
    return tuple(by_size[member.config.page_px] for member in members), coverage


def _check_checkpoints(member: Member) -> tuple[list[int], list[str]]:
    """Return the folds of a member's checkpoints, and warnings.

    Raises:
        UserError: they belong to different runs, or to another than the blend was made of.
    """
    from doccls.training.checkpoint import read_best

    fingerprints, unfinished = {}, []
    for file in member.files:
        best = read_best(file)
        fingerprints[best.fold] = best.fingerprint
        if not is_file(member.paths.predictions(best.fold)):
            unfinished.append(best.fold)
    if len(set(fingerprints.values())) > 1:
        listed = ", ".join(f"fold {fold}: {fingerprint[:12]}" for fold, fingerprint in fingerprints.items())
        raise UserError(
            f"{member.label}the checkpoints belong to different runs ({listed}): probabilities can't be averaged"
        )
    found = next(iter(fingerprints.values()))
    if member.recorded is not None and found != member.recorded.fingerprint:
        raise UserError(
            f"{member.paths.root} is another run than the one that was blended (fingerprint {found[:12]} instead of "
            f"{member.recorded.fingerprint[:12]}): its weight means nothing for this one; blend the runs again"
        )
    num_files, num_folds = len(member.files), member.config.data.folds
    warnings = []
    if num_files < num_folds:
        warnings.append(f"{member.label}{num_files} of {num_folds} folds have a checkpoint; averaging over those")
    warnings += [f"{member.label}fold {fold} is not finished: using its best epoch so far" for fold in unfinished]
    return list(fingerprints), warnings


def _choose_views(member: Member, accelerator: "Accelerator") -> tuple[View, ...]:
    """Return the views that the run's OOF predictions recommend. All ranks must call."""
    from doccls.training.oof_views import choose_run_views

    paths, config = member.paths, member.config
    return choose_run_views(paths, config, member.fingerprint, _choose_store(paths, config), accelerator)


def _read_adjustment(paths: RunPaths, members: Sequence[Member], views: Sequence[View]) -> Adjustment | None:
    """Learn from the OOF predictions, and print what follows for the files. Only the main process may call."""
    num_folds = members[0].config.data.folds
    adjustment: Adjustment | None
    problems: tuple[str, ...] = ()
    names = tuple(view.name for view in views)
    if is_file(paths.blend):
        adjustment = read_record(paths).adjustment
    else:
        fold_predictions, problems = read_own_predictions(paths, members[0].fingerprint, num_folds)
        if views != (IDENTITY,):
            fold_predictions, lacking = average_stored(paths, fold_predictions, names)
            problems += tuple(
                f"fold {fold} has no OOF logits of these views (--views auto stores some)" for fold in lacking
            )
        adjustment = learn_adjustment(fold_predictions)
    for problem in problems:
        print(f"[WARNING] not used for calibration: {problem}")
    if adjustment is None:
        what = "predictions" if views == (IDENTITY,) else "OOF predictions of these views"
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
            f"macro_f1 {thresholds.gain:+.4f} [{thresholds.gain_low:+.3f}, {thresholds.gain_high:+.3f}]): "
            "some are not the most probable class"
        )
    return adjustment


def _write_results(
    paths: RunPaths,
    config: Config,
    classes: Sequence[str],
    pages: TestPages,
    probs: np.ndarray,
    fold_probs: Sequence[np.ndarray],
    coverage: Coverage,
    adjustment: Adjustment | None,
) -> None:
    """Write the calibrated probabilities and the submission. Only the main process may call."""
    missing = pages.paths.find_missing()
    predicted = np.setdiff1d(np.arange(len(pages.ids)), missing)
    chosen = np.zeros(len(pages.ids), dtype=np.int64)
    own = [fold_NC[predicted] for fold_NC in fold_probs]
    probs[predicted], chosen[predicted] = adjust(probs[predicted], own, adjustment)
    if len(missing):
        probs[missing] = _read_class_frequencies(config, classes)
        chosen[missing] = probs[missing].argmax(axis=1)
    text = render_submission(pages.columns, config.data.id_col, pages.ids, classes, probs, chosen)
    write_submission(paths, text, probs, coverage)
    print(f"[PREDICT] {paths.submission}\n[PREDICT] {paths.test_probabilities} {probs.shape}")


def _choose_store(paths: RunPaths, config: Config) -> "StoreChoice | None":
    """Choose the training's store; `auto` is beside the run, even if it was moved. A named folder may be missing."""
    from doccls.data.store import choose_store

    output = config.output.model_copy(update={"exp_dir": paths.exp_dir})
    choice = choose_store(config.model_copy(update={"output": output}))
    return None if choice is None else replace(choice, required=False)


def read_test_pages(config: Config, store: "StoreChoice | None" = None) -> TestPages:
    """Read the rows of the sample submission, in its order, and scan their images, which the store then keeps.

    Raises:
        UserError: no sample or folder, no ID column, or (unless data.on_bad_image is `skip`) images missing or bad.
    """
    from doccls.data.scan import scan_rows

    data = config.data
    check_paths({"data.sample_csv": (data.sample_csv, "file"), "data.image_dir_test": (data.image_dir_test, "folder")})
    assert data.sample_csv is not None and data.image_dir_test is not None
    table = read_table(data.sample_csv, "data.sample_csv", [data.id_col])
    require_columns(table, data.sample_csv, {"data.id_col": data.id_col})
    ids = table.cells[data.id_col]
    images = resolve_images(ids, table.lines_N.tolist(), data.image_dir_test, data.image_ext)
    if images.refused is not None:
        raise UserError(images.refused)
    resolved = PackedPaths(data.image_dir_test, images.names)
    rows = scan_rows(resolved, config, {}, store, ConsoleReporter())
    problems = []
    if images.missing:
        problems.append(format_examples(f"test images missing in {data.image_dir_test}", images.missing))
    if rows.bad:
        bad = sorted({(images.names[row], f"{resolved[row]}: {why}") for row, why in rows.bad.items()})
        problems.append(format_examples("test images that can't be used", [line for _, line in bad]))
    if problems and data.on_bad_image == "error":
        raise UserError("\n".join([*problems, "(--on-bad-image skip gives their rows the class frequencies)"]))
    usable = (None if scan is None else name for name, scan in zip(images.names, rows.usable, strict=True))
    paths = PackedPaths(data.image_dir_test, usable)
    return TestPages(table.columns, PackedTexts(ids), paths, (*table.warnings, *problems), rows.stored)


def _predict_members(
    members: Sequence[Member], pages: Sequence[TestPages], accelerator: "Accelerator", views: Sequence[View]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return probabilities (n, classes) float64, the weighted mean over members, and those of each fold.

    `pages` are those of each member: the same, in its image size. Of a blend, whose labels don't need them, the folds'
    probabilities are not kept. All ranks must call.
    """
    total, fold_probs = np.zeros((len(pages[0].ids), len(members[0].classes))), []
    for member, own_pages in zip(members, pages, strict=True):
        if member.recorded is not None and accelerator.is_main_process:
            print(f"[PREDICT] run={member.paths.run_id} weight={member.weight:.2f}", flush=True)
        own = _predict_folds(member.files, member.config, own_pages, accelerator, views)
        total += member.weight * np.mean(own, axis=0)
        if member.recorded is None:
            fold_probs = own
    return total, fold_probs


def _predict_folds(
    files: Sequence[Path], config: Config, pages: TestPages, accelerator: "Accelerator", views: Sequence[View]
) -> list[np.ndarray]:
    """Return each fold's probabilities (n, classes) float64; rows without an image are 0. All ranks must call.

    Those of a fold are the mean over the views. Only one fold's weights are loaded at a time; one set of workers loads
    the pages for all folds.
    """
    from doccls.data.dataset import DocClsDataset, Pages
    from doccls.data.sampler import BatchDivision, BatchPlace, list_evaluation
    from doccls.training.checkpoint import read_best
    from doccls.training.prediction import load_batches

    rows = np.setdiff1d(np.arange(len(pages.ids)), pages.paths.find_missing())
    division = BatchDivision.derive(config.train, accelerator.num_processes)
    requests = list_evaluation(BatchPlace("predict", 0), rows, division, accelerator.process_index)
    unlabelled = np.full(len(pages.ids), -1)
    unlabelled_pages = Pages(
        pages.ids,
        pages.paths,
        unlabelled,
        config.train.img_size,
        config.page_px,
        config.data.max_image_pixels,
        pages.stored,
    )
    probs = []
    all_requests = (request for _ in files for request in requests)
    dataset, is_stored = DocClsDataset(unlabelled_pages), pages.stored is not None
    reporter = ConsoleReporter() if accelerator.is_main_process else RunLog(None)
    with load_batches(dataset, all_requests, config, is_stored, accelerator, reporter) as batches:
        for file in files:
            best = read_best(file)
            with reporter.progress(f"fold {best.fold}", len(requests)) as bar:
                fold_batches = bar.watch(islice(batches, len(requests)))
                probs.append(_predict_fold(best, config, fold_batches, len(pages.ids), accelerator, views))
                reporter.line(f"[PREDICT] fold={best.fold} best epoch={best.epoch} macro_f1={best.macro_f1:.5f}")
    return probs


def _predict_fold(
    best: "BestWeights",
    config: Config,
    batches: "Iterable[Batch]",
    count: int,
    accelerator: "Accelerator",
    views: Sequence[View],
) -> np.ndarray:
    """Return probabilities (count, classes) float64 of one fold's model; rows without an image are 0."""
    from doccls.training.prediction import load_model, predict_views

    model = load_model(best, config, accelerator)
    indices, logits_VNC = predict_views(model, best, batches, accelerator, views)
    probs = np.zeros((count, len(best.classes)))
    probs[indices] = mean_probabilities(logits_VNC)
    return probs


def _read_class_frequencies(config: Config, classes: Sequence[str]) -> np.ndarray:
    """Return the relative class frequencies in train.csv: the prior for a page that can't be read."""
    column = config.data.target_col
    table = read_table(config.data.train_csv, "data.train_csv", [column])
    require_columns(table, config.data.train_csv, {"data.target_col": column})
    counts = Counter(label.strip() for label in table.cells[column])
    return np.asarray([counts[label] for label in classes], dtype=np.float64) / len(table)


def _with_precision(config: Config, precision: str) -> Config:
    train = config.train.model_copy(update={"amp": False if precision == "no" else precision})
    return config.model_copy(update={"train": train})


def _with_arguments(config: Config, arguments: argparse.Namespace) -> Config:
    overrides = {
        "sample_csv": arguments.sample_csv,
        "image_dir_test": arguments.image_dir,
        "num_workers": arguments.num_workers,
        "on_bad_image": arguments.on_bad_image,
    }
    data = config.data.model_copy(update={key: value for key, value in overrides.items() if value is not None})
    # The training's num_processes says nothing about this machine.
    train = config.train.model_copy(update={"num_processes": None})
    return config.model_copy(update={"data": data, "train": train})
