"""The progress of runs from their files; a file that has not changed is not read again, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_status import FAILED, LEDGER, OPEN, finish

from doccls.errors import UserError
from doccls.run.heartbeat import Heartbeat, read_beat
from doccls.run.metrics_log import EpochMetrics, write_fold_metrics
from doccls.run.paths import RunPaths
from doccls.system.lock import hold_lock
from launcher import live_files
from launcher.leaderboard import Standing
from launcher.ledger import write_ledger
from launcher.live_files import LiveReader, find_watched, read_or_keep
from launcher.progress import Progress
from launcher.status import State
from launcher.study_file import Member, Study, write_study

ROW = EpochMetrics(1, 1, 0.1, 0.1, 0.5, 1e-3, 9.0, 1.0, images_per_s=4.0)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "experiments" / "20260102" / "s-r")
    paths.live.mkdir(parents=True)
    return paths


@pytest.fixture
def study(paths: RunPaths) -> Path:
    """A study of the run and of one that has not begun."""
    folder = paths.exp_dir / "studies" / "s"
    folder.mkdir(parents=True)
    names = (("s-r", 4), ("s-later", 3))
    members = tuple(Member(name, f"20260102/{name}", "c.yaml", 1, folds, {}, folds) for name, folds in names)
    standings = [Standing(name, 0, folds, None, {}, None, folds) for name, folds in names]
    write_study(folder, Study("s", "resume", members), standings)
    return folder


def begin(paths: RunPaths) -> None:
    """Write the files of a run whose fold 0 is done, while fold 1 runs."""
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(replace(OPEN, fold=0, number=1), OPEN)))
    paths.snapshot.write_text("train:\n  epochs: 5\nprovenance: {}\n")
    finish(paths, 0)
    write_fold_metrics(paths, [ROW])
    heartbeat = Heartbeat()
    heartbeat.write_to(paths.heartbeat(1, 0))
    heartbeat.beat(phase="train", fold=1, epoch=2, step=14, epochs=5, steps_per_epoch=7, batch_size=2)


def test_progress_of_a_run(paths: RunPaths) -> None:
    begin(paths)
    with hold_lock(paths.launch_lock(), "run s-r is being launched"):
        progress = LiveReader(find_watched(paths.root)).read()
    assert progress.title == "run s-r" and progress.is_active
    assert [fold.state for fold in progress.folds] == [State.DONE, State.RUNNING, State.WAITING, State.MISSING]
    done, running = progress.folds[:2]
    assert (done.best, done.epochs) == (0.75, 5)
    assert (running.epoch, running.epochs, running.step, running.steps, running.scores) == (2, 5, 14, 35, (0.5,))
    assert running.left_s is not None


def test_progress_of_a_study_with_a_run_that_has_not_begun(paths: RunPaths, study: Path) -> None:
    begin(paths)
    watched = find_watched(study)
    progress = LiveReader(watched).read()
    assert progress.title == "study s" and not progress.is_active
    states = [(fold.run, str(fold.state)) for fold in progress.folds]
    assert states == [
        ("r", "done"), ("r", "lost"), ("r", "missing"), ("r", "missing"), *[("later", "missing")] * 3,
    ]  # fmt: skip
    (paths.root.with_name("s-later") / "live").mkdir(parents=True)  # it is being opened
    assert LiveReader(watched).read() == progress
    with hold_lock(study / "study.lock", "study s is being launched"):
        assert LiveReader(watched).read().is_active


def test_unchanged_files_are_read_once_and_nothing_is_written(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(paths)
    reads: list[str] = []

    def record(name: str) -> Callable[..., Any]:
        original = getattr(live_files, name)

        def read(path: Path) -> Any:
            reads.append(path.name)
            return original(path)

        return read

    for name in ("read_fold_metrics", "_read_num_epochs", "read_beat"):
        monkeypatch.setattr(live_files, name, record(name))
    reader = LiveReader(find_watched(paths.root))
    before = sorted(paths.root.rglob("*"))
    assert reader.read() == reader.read() == reader.read()
    assert sorted(paths.root.rglob("*")) == before
    assert len(reads) == len(set(reads)) > 4
    write_fold_metrics(paths, [ROW, replace(ROW, epoch=2)])
    assert len(reader.read().folds[1].scores) == 2
    assert reads.count("fold1.jsonl") == 2 and reads.count("config.yaml") == 1


def test_slurm_is_asked_at_most_every_15_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("launcher.status_files.read_queue", lambda clusters: asked.append(tuple(clusters)))
    now_s = [100.0]
    monkeypatch.setattr(live_files.time, "monotonic", lambda: now_s[0])
    source = live_files._KeepingSource()
    for at_s in (100.0, 114.9, 115.1):
        now_s[0] = at_s
        source.ask_queue(["a"])
    source.ask_queue([])
    assert asked == [("a",), ("a",), ()]


def test_what_is_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        LiveReader(find_watched(tmp_path)).read()
    with pytest.raises(UserError, match="RUN"):
        find_watched(tmp_path / "missing")


@pytest.mark.parametrize("error", [OSError(116, os.strerror(116)), UserError("damaged")])
def test_progress_is_kept_while_it_can_not_be_read(error: Exception) -> None:
    kept = Progress("run r", ())

    def fail() -> Progress:
        raise error

    assert read_or_keep(fail, kept) is kept
    assert read_or_keep(lambda: Progress("new", ()), kept).title == "new"


def test_failed_fold_has_its_reason(paths: RunPaths) -> None:
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(FAILED,)))
    fold = LiveReader(find_watched(paths.root)).read().folds[1]
    assert (fold.state, fold.remark, fold.restarts) == (State.FAILED, "rank 1 was killed", 0)
    assert read_beat(paths.heartbeat(1, 0)) is None
