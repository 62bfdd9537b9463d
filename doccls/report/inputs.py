"""What a report is made from: the files of a merged run, or of a blend."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doccls.config.paths import describe_error, is_file
from doccls.config.snapshot import read_snapshot
from doccls.errors import UserError
from doccls.oof.blend_record import BlendMember, read_record
from doccls.oof.merge import MergedOof, merge_predictions, read_finished, summarize_folds
from doccls.oof.metrics import macro_f1
from doccls.oof.predictions import is_merged
from doccls.oof.summary import Summary, read_summary
from doccls.run.fingerprint import digest_json, read_provenance
from doccls.run.metrics_log import EpochMetrics, read_metrics
from doccls.run.paths import RunPaths

_ROUNDING = 1e-9  # of a score, on another machine


@dataclass(frozen=True)
class ReportInputs:
    """The results of a run or a blend, and what is known about how it was made."""

    paths: RunPaths
    merged: MergedOof
    summary: Summary
    epochs: tuple[EpochMetrics, ...]  # of all folds; none of a blend
    snapshot: dict[str, Any] | None  # config.yaml; None for a blend, and with output.snapshots: false
    members: tuple[BlendMember, ...]  # of a blend; none of a run
    missing_folds: tuple[int, ...] = ()  # folds of a run that are not finished

    @property
    def image_snapshot(self) -> Path:
        """The config that says where the images are: the run's own, or the first that a member of the blend has."""
        if not self.members:
            return self.paths.snapshot
        found = [RunPaths((self.paths.root / member.path).resolve()).snapshot for member in self.members]
        return next(filter(is_file, found), found[0])


def read_inputs(paths: RunPaths) -> ReportInputs:
    """Read the results of a run's finished folds, or of a blend.

    Raises:
        UserError: no fold is finished, or a file is missing or damaged.
    """
    if is_file(paths.blend):
        members = read_record(paths).members
        blended, summary = _read_blend(paths, members), read_summary(paths.summary)
        _check_summary(paths, summary, blended)
        return ReportInputs(paths, blended, summary, (), None, members)
    merged, summary, missing = _read_folds(paths)
    try:
        epochs, _ = read_metrics(paths)  # the merge reports damaged lines
    except OSError as error:
        raise UserError(describe_error(error, Path(error.filename or paths.metrics_dir), "file")) from error
    finished = set(merged.folds_N.tolist())
    shown = tuple(row for row in epochs if row.fold in finished)
    snapshot = read_snapshot(paths.snapshot) if is_file(paths.snapshot) else None
    return ReportInputs(paths, merged, summary, shown, snapshot, (), missing)


def _read_folds(paths: RunPaths) -> tuple[MergedOof, Summary, tuple[int, ...]]:
    """Return the predictions of the finished folds, their scores, and the folds that are missing."""
    try:
        has_summary, predictions = is_merged(paths), read_finished(paths)
    except OSError as error:
        raise UserError(describe_error(error, paths.predictions_dir, "folder")) from error
    merged = merge_predictions(predictions, finished_only=True)
    missing = sorted(set(range(predictions[0].info.num_folds)) - {item.info.fold for item in predictions})
    if has_summary and not missing:
        summary = read_summary(paths.summary)
        _check_summary(paths, summary, merged)
        return merged, summary, ()
    return merged, summarize_folds(merged, predictions), tuple(missing)


def _check_summary(paths: RunPaths, summary: Summary, merged: MergedOof) -> None:
    """Check that summary.json is about these predictions, not about others that were there before."""
    used = np.setdiff1d(np.arange(len(merged.ids)), merged.skipped)
    labels = tuple(row.label for row in summary.classes)
    is_same = (summary.num_samples, labels) == (len(used), merged.classes)
    if not is_same or abs(macro_f1(merged.targets_N[used], merged.logits_NC[used]) - summary.macro_f1) > _ROUNDING:
        raise UserError(f"{paths.summary}: it is about other predictions: merge the run, or blend its members, again")


def _read_blend(paths: RunPaths, members: tuple[BlendMember, ...]) -> MergedOof:
    try:
        with paths.oof_csv.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        logits_NC, targets_N = np.load(paths.oof_logits), np.load(paths.oof_targets)
        damaged_NC = np.load(paths.oof_logits_damaged) if is_file(paths.oof_logits_damaged) else None
        classes = tuple(name.removeprefix("prob_") for name in header[4:])
        merged = MergedOof(
            logits_NC=logits_NC,
            targets_N=targets_N,
            folds_N=np.array([int(row[1]) for row in rows], dtype=np.int64),
            ids=tuple(row[0] for row in rows),
            classes=classes,
            skipped=tuple(np.flatnonzero(np.isnan(logits_NC).any(axis=1)).tolist()),
            fingerprint=digest_json([member.fingerprint for member in members]),
            damaged_logits_NC=damaged_NC,
        )
    except OSError as error:
        raise UserError(describe_error(error, paths.root / "oof", "folder")) from error
    except (csv.Error, ValueError, IndexError, EOFError) as error:
        raise UserError(f"{paths.root / 'oof'}: damaged: blend the members again ({error})") from error
    shape = (len(merged.ids), len(merged.classes))
    others = (logits_NC.shape, shape if damaged_NC is None else damaged_NC.shape, (len(targets_N), len(classes)))
    if any(other != shape for other in others):
        raise UserError(f"{paths.root / 'oof'}: its files differ in rows or classes: blend the members again")
    return merged


def read_damage_version(inputs: ReportInputs) -> str | None:
    """Return the version of the damage of the run, or of the blend's first member; None if that isn't known."""
    try:
        provenance = read_provenance(RunPaths(inputs.image_snapshot.parent))
    except UserError:  # of an earlier version, or damaged
        return None
    return None if provenance is None else provenance["damage_version"]
