"""The task that finishes last merges the run once, even if two finish at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from doccls.config import Config
from doccls.experiment import Experiment, open_run
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, is_merged, write_predictions
from doccls.run.paths import RunPaths
from launcher import task as task_module
from launcher.task import close_share
from tests.unit.conftest import KeptLog


@pytest.fixture
def experiment(tmp_path: Path, make_config: Callable[..., Config], make_data: Callable[..., Path]) -> Experiment:
    """An experiment of two folds."""
    ids = [f"p{row}.png" for row in range(4)]
    make_data(ids, ["a", "b", "a", "b"], files=ids)
    config, log, paths = make_config(data={"folds": 2}), KeptLog(), RunPaths(tmp_path / "20260101" / "r")
    return open_run(config, paths, datetime(2026, 1, 1), {}, log).experiment


def finish(experiment: Experiment, fold: int) -> None:
    rows = experiment.data.assignment.list_valid(fold)
    info = PredictionsInfo(
        fingerprint=experiment.fingerprint, fold=fold, num_folds=2, num_samples=4, classes=("a", "b"),
        ids=tuple(f"p{row}.png" for row in rows), skipped=(), best_epoch=1, macro_f1=0.5,
    )  # fmt: skip
    targets = np.array([row % 2 for row in rows], dtype=np.int64)
    write_predictions(
        experiment.paths.predictions(fold), FoldPredictions(info, rows, np.zeros((len(rows), 2), np.float32), targets)
    )


def close(experiment: Experiment) -> tuple[tuple[int, ...], KeptLog]:
    log = KeptLog()
    return close_share(experiment, log), log


def test_missing_folds_are_reported_before_the_last_task(experiment: Experiment) -> None:
    finish(experiment, 1)
    missing, log = close(experiment)
    assert missing == (0,) and "- fold 0: missing" in log.lines and not is_merged(experiment.paths)
    assert log.ending == "INCOMPLETE missing=0"


def test_last_task_merges_and_later_task_logs_the_same_scores(experiment: Experiment) -> None:
    for fold in range(2):
        finish(experiment, fold)
    (first, log), before = close(experiment), experiment.paths.summary.stat().st_mtime_ns
    second, later_log = close(experiment)
    assert first == second == () and is_merged(experiment.paths)
    assert log.ending == later_log.ending == "TRAINING SUCCESS"
    lines, later = log.lines, later_log.lines
    assert any(line.startswith("[OOF] ->") for line in lines)
    assert any(line.startswith("[OOF] already merged: ") for line in later)
    assert [line for line in lines if "macro_f1=" in line] == [line for line in later if "macro_f1=" in line] != []
    assert experiment.paths.summary.stat().st_mtime_ns == before


def test_share_of_a_single_fold_is_not_merged(experiment: Experiment) -> None:
    """As for other ways to train, and as the description of `data.valid_fold` says."""
    data = experiment.config.data.model_copy(update={"valid_fold": 1})
    single = replace(experiment, config=experiment.config.model_copy(update={"data": data}))
    finish(experiment, 0)
    missing, log = close(single)
    assert missing == (1,) and log.ending == "INCOMPLETE missing=1"
    finish(experiment, 1)
    missing, log = close(single)
    assert missing == () and log.ending == "TRAINING SUCCESS" and not is_merged(experiment.paths)
    assert f"[OOF] all 2 folds are finished; merge them: doccls-launch merge {experiment.paths.root}" in log.lines


def test_only_one_of_two_simultaneous_tasks_merges(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    for fold in range(2):
        finish(experiment, fold)
    merges, within, merge = [], threading.Event(), task_module.merge

    def merge_slowly(*others: object) -> None:
        merges.append(threading.get_ident())
        within.set()
        second.start()
        second.join(1.0)  # it waits for this one
        assert second.is_alive()
        merge(*others)

    monkeypatch.setattr(task_module, "merge", merge_slowly)
    second = threading.Thread(target=close, args=(experiment,))
    close(experiment)
    second.join(60)
    assert within.is_set() and not second.is_alive() and len(merges) == 1
