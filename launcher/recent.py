"""`doccls-launch status` without a run: the newest runs of an experiments folder, each in a line."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from doccls.config.paths import describe_error, find_problem, format_path, resolve_option
from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.runs.read import RunFacts, read_run
from doccls.runs.scan import list_run_folders
from doccls.runs.table import average_folds, derive_state, order_runs
from launcher.ledger import format_duration

COUNT = 20  # runs; `doccls runs` lists all


def read_recent(exp_dir: Path, now: datetime) -> list[RunFacts]:
    """Return the newest runs, the newest first. Only their files are read, however many runs there are.

    Raises:
        UserError: there is no such folder, or it can't be listed.
    """
    root = resolve_option(exp_dir, "--exp-dir")
    problem = find_problem(root, "folder")
    if problem is not None:
        raise UserError(f"--exp-dir: {problem}; name the folder of a run, or the folder of all runs with --exp-dir")
    try:
        folders = list_run_folders(root).folders
    except OSError as error:
        raise UserError(f"--exp-dir: {describe_error(error, root, 'folder')}") from error
    newest = sorted(folders, key=_find_age, reverse=True)[:COUNT]
    return order_runs(run for folder in newest if (run := read_run(folder, now)) is not None)


def _find_age(folder: Path) -> tuple[str, float]:
    """Return what newer runs have more of: the day, and the time of the snapshot, which is written once."""
    try:
        return folder.parent.name, RunPaths(folder).snapshot.stat().st_mtime
    except OSError:
        return folder.parent.name, 0.0


def render_recent(exp_dir: Path, runs: Sequence[RunFacts], now: datetime) -> str:
    """Render the runs in the order given; `now` is in local time, without a time zone."""
    if not runs:
        return f"[STATUS] no runs in {format_path(exp_dir)} (runs are in <exp_dir>/YYYYMMDD/<run_id>)"
    rows = [("run", "state", "folds", "macro_f1", "started"), *(_render_run(run, now) for run in runs)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if any(row[3].startswith("~") for row in rows):
        lines.append("~: mean of the finished folds")
    return "\n".join([f"[STATUS] newest runs in {format_path(exp_dir)}", *lines])


def describe_recent(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return the runs as JSON values."""
    return [
        {
            "run": run.name,
            "state": _derive_word(run),
            "folds_done": _count_done(run),
            "num_folds": run.num_folds,
            "macro_f1": None if (scores := run.merged_scores or average_folds(run)) is None else scores.clean,
            "merged": run.merged_scores is not None,
            "started": run.started.isoformat(timespec="seconds"),
        }
        for run in runs
    ]


def _render_run(run: RunFacts, now: datetime) -> tuple[str, ...]:
    scores = run.merged_scores or average_folds(run)
    mark = "" if run.merged_scores else "~"
    return (
        format_path(Path(run.name)),
        _derive_word(run),
        "" if run.num_folds is None else f"{_count_done(run)}/{run.num_folds}",
        "" if scores is None else f"{mark}{scores.clean:.4f}",
        f"{_format_age((now - run.started).total_seconds())} ago",
    )


def _format_age(age_s: float) -> str:
    days = int(age_s // 86400)
    return f"{days} days" if days > 1 else format_duration(max(0.0, age_s))


def _count_done(run: RunFacts) -> int:
    return run.merged_folds or len(run.folds)


def _derive_word(run: RunFacts) -> str:
    return derive_state(run).removesuffix(f" {_count_done(run)}/{run.num_folds} folds")
