"""The end of a study on this machine: which runs are merged, and which errors are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.signals import Interrupted
from launcher import study_launch
from launcher.closing import Ended
from launcher.study_file import Member, Study
from tests.unit.conftest import KeptLog


class Closings:
    """Commands that would close runs: only their runs are recorded."""

    def __init__(self, on_end: object) -> None:
        self.run_ids: list[str] = []
        self.finished: list[str] = []

    def add(self, run_id: str, command: object) -> None:
        self.run_ids.append(run_id)

    def poll(self) -> None:
        pass

    def finish(self) -> None:
        self.finished = list(self.run_ids)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        yield


class Launch:
    """The launch of a study of the runs s-a, s-b and s-done, of which the last is trained."""

    def __init__(self, folder: Path) -> None:
        self.finished = {"s-a": [0], "s-b": [], "s-done": [0, 1]}
        self.foreign = set[str]()  # runs whose predictions can't be used
        runs = [self._make_run(RunPaths(folder / "20260102" / run_id)) for run_id in self.finished]
        members = tuple(Member(run_id, f"20260102/{run_id}", "c.yaml", 1, 2, {}, 2) for run_id in self.finished)
        study_folder = folder / "studies" / "s"
        study_folder.mkdir(parents=True)
        self.log = KeptLog()
        self.launch: Any = study_launch._StudyLaunch(study_folder, Study("s", "again", members), runs, self.log)

    def _make_run(self, paths: RunPaths) -> Any:
        config = SimpleNamespace(data=SimpleNamespace(valid_fold="all", list_wanted=lambda: [0, 1]))

        def find_finished() -> list[int]:
            if paths.run_id in self.foreign:
                raise UserError("it was started with another config")
            return self.finished[paths.run_id]

        experiment = SimpleNamespace(paths=paths, config=config, find_finished=find_finished)
        missing = tuple(fold for fold in (0, 1) if fold not in self.finished[paths.run_id])
        return SimpleNamespace(paths=paths, experiment=experiment, missing=missing)

    def train(self) -> list[str]:
        """Return the runs that are merged by the end."""
        try:
            self.launch.train(None, None, blend=False)
        finally:
            self.merged = self.launch._closings.finished
        return list(self.merged)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setattr(study_launch, "Closings", Closings)
    monkeypatch.setattr(study_launch, "_list_jobs", lambda runs: [])
    return Launch(tmp_path)


def fake_training(monkeypatch: pytest.MonkeyPatch, event: Callable[..., None]) -> None:
    """Let `event(runs, on_finished)` happen in place of the training."""
    monkeypatch.setattr(
        study_launch, "train_queue", lambda runs, jobs, options, log, on_finished, *others: event(runs, on_finished)
    )


def test_run_that_another_process_completes_is_merged(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch, lambda runs, on_finished: launch.finished["s-a"].append(1))
    assert launch.train() == ["s-done", "s-a"]


def test_run_that_another_process_completes_is_merged_although_folds_of_others_fail(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(runs: object, on_finished: object) -> None:
        launch.finished["s-a"].append(1)
        raise UserError("1 fold failed")

    fake_training(monkeypatch, fail)
    with pytest.raises(UserError, match="1 fold failed"):
        launch.train()
    assert launch.merged == ["s-done", "s-a"]


def test_run_that_this_launch_completes_is_merged_once(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(runs: Any, on_finished: Callable[[object], None]) -> None:
        launch.finished["s-a"].append(1)
        on_finished(runs[0])

    fake_training(monkeypatch, complete)
    assert launch.train() == ["s-done", "s-a"]


def test_after_a_stop_no_further_run_is_merged(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(runs: object, on_finished: object) -> None:
        launch.finished["s-a"].append(1)
        monkeypatch.setattr(study_launch, "stop_requested", lambda: 15)
        raise Interrupted(15)

    fake_training(monkeypatch, stop)
    with pytest.raises(Interrupted):
        launch.train()
    assert launch.merged == ["s-done"]


def test_error_of_one_run_hides_no_other_and_keeps_no_run_from_its_merge(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(runs: object, on_finished: object) -> None:
        launch.foreign.add("s-a")
        launch.finished["s-b"] += [0, 1]
        raise UserError("1 fold failed")

    fake_training(monkeypatch, fail)
    with pytest.raises(UserError, match="1 fold failed"):
        launch.train()
    assert launch.merged == ["s-done", "s-b"]
    assert "[WARNING] run s-a: it was started with another config" in launch.log.lines
    assert any(line.startswith("[STUDY] -> ") for line in launch.log.lines)


def test_report_that_can_not_be_written_fails_no_study(launch: Launch) -> None:
    launch.launch._report_closing(Ended("s-a", 1, "no space left", is_report=True))
    launch.launch._report_closing(Ended("s-b", 1, "no predictions"))
    assert launch.log.lines == ["[WARNING] run s-a: no report: no space left", "[WARNING] run s-b: no predictions"]
    assert launch.launch._problems == {"s-b": "no predictions"}
