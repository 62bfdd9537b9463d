"""An array task that trains the folds of several runs, one run after the other: entire tasks, with a fake loop."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from doccls.config import Config
from doccls.errors import UserError
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.system.signals import Interrupted
from launcher import task as task_module
from launcher.cli import main
from launcher.queued_run import Job

RUNS = ("s-tiny-s1", "s-tiny-s2")


@pytest.fixture
def words(tmp_path: Path, make_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The arguments of the only task of a study of two runs with two folds each."""
    ids = [f"p{row}.png" for row in range(4)]
    make_data(ids, ["a", "b", "a", "b"], files=ids)
    config = {
        "data": {"train_csv": "train.csv", "image_dir_train": "train", "folds": 2},
        "model": {"pretrained": False},
        "output": {"exp_dir": "exp", "logs_dir": "logs", "report": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    own = ("--config", "tiny.yaml", "--seeds", "1,2", "--study", "s", "--task", "0/1", "--start", "fresh")
    return ("task", *own)


def finish(job: Job) -> None:
    experiment = job.run.experiment
    rows = experiment.data.assignment.list_valid(job.fold)
    info = PredictionsInfo(
        fingerprint=experiment.fingerprint, fold=job.fold, num_folds=2, num_samples=4, classes=("a", "b"),
        ids=tuple(f"p{row}.png" for row in rows), skipped=(), best_epoch=1, macro_f1=0.5,
    )  # fmt: skip
    targets = np.array([row % 2 for row in rows], dtype=np.int64)
    predictions = FoldPredictions(info, rows, np.zeros((len(rows), 2), np.float32), targets)
    write_predictions(experiment.paths.predictions(job.fold), predictions)


class Loop:
    """Finishes the folds of the first run, and meets the job's time limit before the second one saves anything."""

    def __init__(self, runs: Sequence[object], jobs: Sequence[Job], *others: object) -> None:
        self._jobs, self.has_advanced = jobs, False

    def run(self) -> None:
        for job in self._jobs:
            if job.run.paths.run_id != RUNS[0]:
                raise Interrupted(signal.SIGUSR1)
            finish(job)
            self.has_advanced = True


def test_task_that_advances_no_run_is_not_requeued(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run counts only while it is trained, not once it is complete: the task would be requeued for ever."""
    monkeypatch.setattr(task_module, "FoldLoop", Loop)
    requeue = ("--requeue-code", "85")
    assert main([*words, *requeue]) == 85
    assert "exit code 85: the task can resume" in capsys.readouterr().out
    assert len(list(tmp_path.glob(f"exp/*/{RUNS[0]}/oof/parts/*"))) == 2
    assert main([*words, *requeue]) == 128 + signal.SIGUSR1
    out = capsys.readouterr().out
    assert "reached its time limit before a step was saved" in out and "can resume" not in out


def test_task_whose_first_run_fails_after_a_fold_is_requeued(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FailingLoop(Loop):
        def run(self) -> None:
            if self._jobs[0].run.paths.run_id != RUNS[0]:
                raise Interrupted(signal.SIGUSR1)
            finish(self._jobs[0])
            self.has_advanced = True
            raise UserError("1 fold failed")

    monkeypatch.setattr(task_module, "FoldLoop", FailingLoop)
    assert main([*words, "--requeue-code", "85"]) == 85
    assert "exit code 85: the task can resume" in capsys.readouterr().out


def test_study_names_the_folder_of_a_run_that_another_task_began_after_midnight(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_folders() -> list[str]:
        study = json.loads((tmp_path / "exp" / "studies" / "s" / "study.json").read_text())
        return [run["folder"] for run in study["runs"]]

    before = list[list[str]]()

    def train(config: Config, run_id: str, *others: object) -> tuple[int, ...]:
        before.append(read_folders())
        (tmp_path / "exp" / "20990101" / run_id).mkdir(parents=True)
        return ()

    monkeypatch.setattr(task_module, "run_task", train)
    assert main(list(words)) == 0
    assert len(before) == 2 and all("2099" not in folder for folder in before[0])
    assert read_folders() == [f"20990101/{run_id}" for run_id in RUNS]
