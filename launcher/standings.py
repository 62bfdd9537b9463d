"""How each run of a study did, from its files."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from doccls.errors import UserError
from doccls.oof.predictions import is_merged, read_predictions
from doccls.oof.summary import Summary, read_summary
from doccls.run.metrics_log import read_metrics
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError
from launcher.leaderboard import Standing
from launcher.ledger import read_ledgers
from launcher.study_file import Member, Study, locate_member


def measure_runs(folder: Path, study: Study, problems: Mapping[str, str]) -> list[Standing]:
    """Measure how each run of the study did; `problems` has the errors of merges, by run id."""
    return [_measure(locate_member(folder, member), member, problems.get(member.run_id)) for member in study.members]


def _measure(paths: RunPaths, member: Member, problem: str | None) -> Standing:
    summary: Summary | None = None
    device_hours = None
    try:
        summary = read_summary(paths.summary) if is_merged(paths) else None
        device_hours = _measure_device_hours(paths)
    except (UserError, OSError) as error:
        problem = problem or str(error)
    # The summary has all that the leaderboard shows: predictions, which can be large, are read only without one.
    scores = [] if summary is not None else _read_scores(paths, member.num_folds)
    damaged = [score for _, score in scores if score is not None]
    return Standing(
        run_id=member.run_id,
        finished=len(scores) if summary is None else member.num_folds,
        num_folds=member.num_folds,
        device_hours=device_hours,
        settings=member.settings,
        summary=summary,
        wanted=member.wanted,
        mean=fmean(score for score, _ in scores) if scores else None,
        mean_damaged=fmean(damaged) if damaged and len(damaged) == len(scores) else None,
        problem=problem,
    )


def _read_scores(paths: RunPaths, num_folds: int) -> list[tuple[float, float | None]]:
    """Return macro-F1 of each finished fold, and that on damaged copies; other files than predictions are left out."""
    scores = []
    for fold in range(num_folds):
        with suppress(TensorFileError):  # not finished
            info = read_predictions(paths.predictions(fold)).info
            scores.append((info.macro_f1, info.macro_f1_damaged))
    return scores


def _measure_device_hours(paths: RunPaths) -> float | None:
    epochs, _ = read_metrics(paths)
    devices = [len(attempt.devices) for ledger in read_ledgers(paths) for attempt in ledger.attempts]
    return sum(row.time_s for row in epochs) * max(devices, default=1) / 3600 if epochs else None
