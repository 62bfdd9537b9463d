"""What a report says: the predictions and scores of a run as values for the page; pure."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doccls.config.snapshot import flatten_settings
from doccls.oof.merge import MergedOof
from doccls.oof.summary import ClassMetrics, FoldMetrics, Summary, describe_thresholds
from doccls.report.confidence import CalibratedRows, Reliability, calibrate_rows, find_top, measure_reliability
from doccls.report.inputs import ReportInputs
from doccls.run.metrics_log import EpochMetrics

MAX_MISTAKES = 24
_NUM_TOP = 3


@dataclass(frozen=True)
class PageResult:
    """A page of train.csv with its out-of-fold prediction. Classes are indices."""

    row: int  # of train.csv
    sample_id: str
    fold: int
    target: int
    top: tuple[tuple[int, float], ...]  # the most probable classes, with their calibrated probabilities

    @property
    def prediction(self) -> int:
        """The most probable class."""
        return self.top[0][0]

    @property
    def confidence(self) -> float:
        """The calibrated probability of the predicted class."""
        return self.top[0][1]

    @property
    def is_mistake(self) -> bool:
        """Whether the prediction is not the label."""
        return self.prediction != self.target


@dataclass(frozen=True)
class ClassRow:
    """The scores of one class, and the class it is most often mistaken for."""

    metrics: ClassMetrics
    mistaken_for: str | None  # None if all of its pages are right, or it has none
    times: int


@dataclass(frozen=True)
class FoldRow:
    """The scores of one fold."""

    clean: FoldMetrics
    damaged: FoldMetrics | None  # on damaged copies of its pages


@dataclass(frozen=True)
class Command:
    """A command to type next."""

    purpose: str
    text: str


@dataclass(frozen=True)
class ReportContent:
    """Everything that the page shows, except for pictures of pages."""

    run_id: str
    num_folds: int  # of the run or blend, finished or not
    missing_folds: tuple[int, ...]  # those that are not finished
    facts: tuple[tuple[str, str], ...]  # name and value
    fingerprint: str
    classes: tuple[str, ...]
    summary: Summary
    folds: tuple[FoldRow, ...]
    confusion_CC: tuple[tuple[int, ...], ...]  # number of pages; rows are labels, columns predictions
    pages: tuple[PageResult, ...]  # those with a prediction; within a cell of `confusion_CC` the least certain first
    mistakes: tuple[PageResult, ...]  # the most confident ones, the most confident first
    class_rows: tuple[ClassRow, ...]
    reliability: tuple[Reliability, ...]
    epochs: tuple[EpochMetrics, ...]
    members: tuple[tuple[str, float, float, float | None], ...]  # of a blend: run, weight, macro-F1 clean and damaged
    settings: tuple[tuple[str, str], ...]  # key and value of the config
    provenance: tuple[tuple[str, str], ...]  # how and with which versions the run was made, likewise
    thresholds: str  # what per-class thresholds gain, and whether they are used
    commands: tuple[Command, ...]

    @property
    def num_mistakes(self) -> int:
        """The number of pages whose prediction is not their label."""
        return sum(page.is_mistake for page in self.pages)


def derive_content(inputs: ReportInputs) -> ReportContent:
    """Derive the content of the page from the files of a run."""
    merged, summary = inputs.merged, inputs.summary
    snapshot = dict(inputs.snapshot or {})
    provenance = snapshot.pop("provenance", {})
    clean = calibrate_rows(merged, merged.logits_NC)
    reliability = [measure_reliability("clean", clean, summary)]
    pages = list_pages(merged, clean)
    if merged.damaged_logits_NC is not None and "damaged" in summary.calibration:
        damaged = calibrate_rows(merged, merged.damaged_logits_NC)
        reliability.append(measure_reliability("damaged", damaged, summary))
    confusion = count_confusion(pages, len(merged.classes))
    return ReportContent(
        run_id=inputs.paths.run_id,
        num_folds=len(summary.folds) + len(inputs.missing_folds),
        missing_folds=inputs.missing_folds,
        facts=_list_facts(inputs),
        fingerprint=merged.fingerprint,
        classes=merged.classes,
        summary=summary,
        folds=_pair_folds(summary),
        confusion_CC=confusion,
        pages=pages,
        mistakes=find_confident_mistakes(pages, MAX_MISTAKES),
        class_rows=_list_classes(summary, confusion),
        reliability=tuple(reliability),
        epochs=inputs.epochs,
        members=tuple(
            (Path(member.path).name, member.weight, member.macro_f1, member.macro_f1_damaged)
            for member in inputs.members
        ),
        settings=flatten_settings(snapshot),
        provenance=flatten_settings(provenance),
        thresholds=describe_thresholds(summary.thresholds),
        commands=_list_commands(inputs),
    )


# --- pages -----------------------------------------------------------------------------------------------------------


def list_pages(merged: MergedOof, calibrated: CalibratedRows) -> tuple[PageResult, ...]:
    """List the pages that have a prediction by label, prediction, and confidence, the least certain first."""
    classes_MK, probs_MK = find_top(calibrated, _NUM_TOP)
    columns = zip(
        calibrated.used_M.tolist(),
        merged.folds_N[calibrated.used_M].tolist(),
        merged.targets_N[calibrated.used_M].tolist(),
        classes_MK.tolist(),
        probs_MK.tolist(),
        strict=True,
    )
    pages = [
        PageResult(row, merged.ids[row], fold, target, tuple(zip(classes, probs, strict=True)))
        for row, fold, target, classes, probs in columns
    ]
    return tuple(sorted(pages, key=lambda page: (page.target, page.prediction, page.confidence, page.row)))


def count_confusion(pages: Sequence[PageResult], num_classes: int) -> tuple[tuple[int, ...], ...]:
    """Count the pages of each label (row) and prediction (column)."""
    counts_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
    for page in pages:
        counts_CC[page.target, page.prediction] += 1
    return tuple(map(tuple, counts_CC.tolist()))


def find_confident_mistakes(pages: Sequence[PageResult], count: int) -> tuple[PageResult, ...]:
    """Return the mistakes of the highest confidence: where a label is wrong, the model is often sure of another."""
    mistakes = [page for page in pages if page.is_mistake]
    return tuple(sorted(mistakes, key=lambda page: (-page.confidence, page.row))[:count])


def order_for_thumbnails(pages: Sequence[PageResult], first: Sequence[PageResult]) -> list[PageResult]:
    """Order the pages by how much they need a picture: `first`, then mistakes, then pages that are right.

    Both kinds take turns over the cells of the confusion matrix, so that each cell shows its least certain pages before
    another one shows all of its pages.
    """
    turns: Counter[tuple[int, int]] = Counter()
    keyed = []
    for page in pages:
        cell = (page.target, page.prediction)
        keyed.append(((not page.is_mistake, turns[cell], cell), page))
        turns[cell] += 1
    keyed.sort(key=lambda pair: pair[0])
    return list({page.row: page for page in (*first, *(page for _, page in keyed))}.values())


# --- scores ----------------------------------------------------------------------------------------------------------


def _pair_folds(summary: Summary) -> tuple[FoldRow, ...]:
    damaged = {} if summary.damaged is None else {row.fold: row for row in summary.damaged.folds}
    return tuple(FoldRow(row, damaged.get(row.fold)) for row in summary.folds)


def _list_classes(summary: Summary, confusion_CC: Sequence[Sequence[int]]) -> tuple[ClassRow, ...]:
    rows = []
    for target, metrics in enumerate(summary.classes):
        times = [0 if column == target else count for column, count in enumerate(confusion_CC[target])]
        most = max(times)
        rows.append(ClassRow(metrics, summary.classes[times.index(most)].label if most else None, most))
    return tuple(rows)


# --- the run ---------------------------------------------------------------------------------------------------------


def _list_facts(inputs: ReportInputs) -> tuple[tuple[str, str], ...]:
    summary, skipped, missing = inputs.summary, inputs.summary.num_skipped, inputs.missing_folds
    facts = [
        ("Pages", f"{summary.num_samples:,}" + (f" and {skipped:,} skipped" if skipped else "")),
        ("Classes", str(len(summary.classes))),
        (
            "Folds",
            f"{len(summary.folds)} of {len(summary.folds) + len(missing)}" if missing else str(len(summary.folds)),
        ),
    ]
    if inputs.members:
        return (("Blend of", f"{len(inputs.members)} runs"), *facts)
    if inputs.snapshot is None:
        return tuple(facts)
    settings = dict(flatten_settings(inputs.snapshot))
    made = [
        ("Model", settings.get("model.name", "")),
        ("Image size", f"{settings['train.img_size']} px" if "train.img_size" in settings else ""),
        ("Started", settings.get("provenance.started", "").replace("T", " ")),
    ]
    return tuple((name, value) for name, value in (*made[:2], *facts, *made[2:]) if value)


def _list_commands(inputs: ReportInputs) -> tuple[Command, ...]:
    run, snapshot = shlex.quote(str(inputs.paths.root)), shlex.quote(str(inputs.paths.snapshot))
    if inputs.missing_folds and inputs.snapshot is not None:
        sets = f"--run-id {shlex.quote(inputs.paths.run_id)} --set data.valid_fold=all"
        return (Command("Train the missing folds", f"python -m doccls.train --config {snapshot} {sets}"),)
    commands = [
        Command("Predict the test images", f"doccls predict {run}"),
        Command(
            "Predict any folder, and list the pages that a person should check",
            f"doccls predict {run} --images DIR --min-confidence 0.8",
        ),
    ]
    if not inputs.members:
        commands += [
            Command("Try mirrored, turned and scaled views of each page", f"doccls predict {run} --views auto"),
            Command("Blend with another run on the same data and folds", f"doccls blend {run} OTHER_RUN"),
        ]
    if inputs.snapshot is not None:
        commands.append(Command("See the pages as the model does", f"doccls preview --config {snapshot}"))
    return tuple(commands)
