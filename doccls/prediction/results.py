"""`predictions.csv` and `review.csv`: each page's label and its certainty, and the pages a person should look at."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doccls.config.paths import is_absent, is_file
from doccls.errors import UserError
from doccls.prediction.submission import Coverage, list_values
from doccls.run.fingerprint import digest_file
from doccls.run.paths import ResultPaths
from doccls.system.atomic_files import write_text

_FORMAT = "doccls-predictions-1"


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predicted pages, in order."""

    ids: Sequence[str]
    classes: tuple[str, ...]
    probs_NC: np.ndarray  # (n, classes) calibrated probabilities; of no meaning for rows without an image
    chosen_N: np.ndarray  # (n,) int64: each page's class, which thresholds may choose instead of the most probable one
    has_image_N: np.ndarray  # (n,) bool

    @property
    def confidence_N(self) -> np.ndarray:
        """The probability (n,) of each page's label."""
        confidence_N: np.ndarray = self.probs_NC[np.arange(len(self.chosen_N)), self.chosen_N]
        return confidence_N

    def list_uncertain(self, min_confidence: float) -> np.ndarray:
        """Return the rows (m,) without an image, then those with a lower confidence, the least certain first."""
        is_uncertain = self.has_image_N & ~(self.confidence_N >= min_confidence)
        uncertain = np.flatnonzero(is_uncertain)
        by_confidence = np.argsort(self.confidence_N[uncertain], kind="stable")
        return np.concatenate([np.flatnonzero(~self.has_image_N), uncertain[by_confidence]])


def render_predictions(predictions: Predictions, with_probabilities: bool) -> str:
    """Render predictions.csv; only the ID is given for a page without a usable image."""
    header = ["ID", "prediction", "confidence"]
    if with_probabilities:
        header += [f"prob_{label}" for label in predictions.classes]
    confidence_N, empty = predictions.confidence_N, [""] * (len(header) - 1)

    def render_row(row: int) -> list[str]:
        if not predictions.has_image_N[row]:
            return empty
        cells = [predictions.classes[predictions.chosen_N[row]], _format(confidence_N[row])]
        return [*cells, *map(_format, predictions.probs_NC[row])] if with_probabilities else cells

    return _render_csv(header, ([sample_id, *render_row(row)] for row, sample_id in enumerate(predictions.ids)))


def render_review(predictions: Predictions, min_confidence: float) -> str:
    """Render review.csv: the uncertain pages, with the label and the most probable other class."""
    header = ["ID", "prediction", "confidence", "alternative", "alternative_confidence"]
    confidence_N = predictions.confidence_N

    def render_row(row: int) -> list[str]:
        chosen = int(predictions.chosen_N[row])
        if not predictions.has_image_N[row]:
            return [predictions.ids[row], "", "", "", ""]
        others_C = predictions.probs_NC[row].copy()
        others_C[chosen] = -1
        other = int(others_C.argmax())
        cells = [predictions.ids[row], predictions.classes[chosen], _format(confidence_N[row])]
        return [*cells, predictions.classes[other], _format(others_C[other])]

    return _render_csv(header, map(render_row, predictions.list_uncertain(min_confidence).tolist()))


@dataclass(frozen=True)
class Source:
    """What predictions come from."""

    runs: tuple[str, ...]  # fingerprints of the runs whose models predict
    images: Path | None  # the folder that was predicted; None for the rows of a sample submission


def write_predictions(
    paths: ResultPaths,
    predictions: Predictions,
    source: Source,
    coverage: Coverage,
    with_probabilities: bool,
    min_confidence: float | None,
) -> None:
    """Write predictions.csv, with `min_confidence` review.csv, and before both their record.

    An earlier review.csv doesn't remain. The record holds the digests of the files, new and old, so that they are known
    as ours even if the process is killed in between.
    """
    texts = {paths.predictions: render_predictions(predictions, with_probabilities)}
    if min_confidence is not None:
        texts[paths.review] = render_review(predictions, min_confidence)
    digests = {path: {hashlib.sha256(text.encode()).hexdigest()} for path, text in texts.items()}
    for path in (paths.predictions, paths.review):
        if is_file(path):
            digests.setdefault(path, set()).add(digest_file(path))
    record = {
        "format": _FORMAT,
        "runs": source.runs,
        "images": None if source.images is None else str(source.images),
        **list_values(coverage),
        "files": {path.name: sorted(own) for path, own in digests.items()},
    }
    write_text(paths.predictions_record, json.dumps(record, indent=2) + "\n")
    for path, text in texts.items():
        write_text(path, text)
    if min_confidence is None:
        paths.review.unlink(missing_ok=True)


def check_predictions(paths: ResultPaths, source: Source, coverage: Coverage) -> None:
    """Check that new predictions would replace only those of the same runs and images, as doccls wrote them.

    Raises:
        UserError: they would replace other or changed files, or those of more folds; or no image can be used.
    """
    if not coverage.num_predicted:
        raise UserError(f"none of the {coverage.num_rows} images can be used: there is nothing to predict")
    if source.images is not None and is_file(paths.submission):
        raise UserError(f"{paths.root} has the submission of a run: choose another folder by --output")
    existing = [path for path in (paths.predictions, paths.review) if not is_absent(path)]
    if not existing and not is_file(paths.predictions_record):
        return
    remedy = "choose another folder by --output, or rename or delete it"
    try:
        record = json.loads(paths.predictions_record.read_text(encoding="utf-8"))
        runs, images, num_folds = tuple(record["runs"]), record["images"], len(record["folds"])
        known = record["format"] == _FORMAT
        digests = {str(name): set(own) for name, own in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        found = existing[0] if existing else paths.predictions_record
        raise UserError(f"{found}: {paths.predictions_record.name} doesn't say that doccls wrote it: {remedy}")
    if images != (None if source.images is None else str(source.images)):
        what = "a sample submission" if images is None else images
        raise UserError(f"{paths.root} has the predictions of {what}: {remedy}")
    if runs != source.runs:
        raise UserError(f"{paths.root} has the predictions of another run: {remedy}")
    if source.images is not None and num_folds > len(coverage.folds):
        raise UserError(f"{paths.root} was predicted by {num_folds} folds, not by {len(coverage.folds)}: {remedy}")
    for path in existing:
        if not is_file(path) or digest_file(path) not in digests.get(path.name, set()):
            raise UserError(f"{path} has changed since doccls wrote it: rename or delete it, so that it is not lost")


def _render_csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _format(prob: float) -> str:
    return f"{prob:.6f}"
