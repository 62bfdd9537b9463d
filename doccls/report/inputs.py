"""What a report is made from: the files of a merged run, or of a blend."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from doccls.config.paths import describe_error, is_file
from doccls.errors import UserError
from doccls.oof.blend_record import BlendMember, read_record
from doccls.oof.merge import MergedOof, merge_predictions
from doccls.oof.predictions import is_merged, read_predictions
from doccls.oof.summary import Summary, read_summary
from doccls.run.fingerprint import digest_json, read_provenance
from doccls.run.metrics_log import EpochMetrics, read_metrics
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError


@dataclass(frozen=True)
class ReportInputs:
    """The results of a run or a blend, and what is known about how it was made."""

    paths: RunPaths
    merged: MergedOof
    summary: Summary
    epochs: tuple[EpochMetrics, ...]  # of all folds; none of a blend
    snapshot: dict[str, Any] | None  # config.yaml; None for a blend, and with output.snapshots: false
    members: tuple[BlendMember, ...]  # of a blend; none of a run

    @property
    def image_snapshot(self) -> Path:
        """The config that says where the images are: the run's own, or that of the blend's first member."""
        if not self.members:
            return self.paths.snapshot
        return RunPaths((self.paths.root / self.members[0].path).resolve()).snapshot


def read_inputs(paths: RunPaths) -> ReportInputs:
    """Read the results of a merged run or a blend.

    Raises:
        UserError: the run is not merged, or a file of it is missing or damaged.
    """
    if is_file(paths.blend):
        members = read_record(paths).members
        return ReportInputs(paths, _read_blend(paths, members), read_summary(paths.summary), (), None, members)
    if not is_merged(paths) or not paths.list_predictions():
        raise UserError(
            f"RUN {paths.root} is not merged yet: a report needs the results of all folds. "
            f"Once they are finished: doccls-launch merge {paths.root}"
        )
    try:
        merged = merge_predictions([read_predictions(path) for path in paths.list_predictions()])
    except TensorFileError as error:
        raise UserError(str(error)) from error
    epochs, _ = read_metrics(paths)  # the merge has reported damaged lines
    return ReportInputs(paths, merged, read_summary(paths.summary), tuple(epochs), read_snapshot(paths.snapshot), ())


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
    """Return the version of the damage of the run, or of the blend's first member; None without a snapshot.

    Raises:
        UserError: the snapshot can't be read.
    """
    provenance = read_provenance(RunPaths(inputs.image_snapshot.parent))
    return None if provenance is None else provenance["damage_version"]


def read_snapshot(path: Path) -> dict[str, Any] | None:
    """Return the values of config.yaml; None if there is no such file.

    Raises:
        UserError: it can't be read, or it is damaged.
    """
    if not is_file(path):
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("provenance"), dict):
            raise ValueError("no provenance")
    except OSError as error:
        raise UserError(describe_error(error, path, "file")) from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged, or not a snapshot of a run") from error
    return values
