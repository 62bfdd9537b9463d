"""The end of a study on this machine: what is merged, and which errors are reported."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from launcher import study_launch
from launcher.study_file import Member, Study


class Log:
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def make_run(paths: RunPaths, problem: str | None) -> Any:
    def find_finished() -> list[int]:
        if problem is not None:
            raise UserError(problem)
        return [0, 1]

    data = SimpleNamespace(list_wanted=lambda: [0, 1])
    config = SimpleNamespace(data=data)
    experiment = SimpleNamespace(config=config, find_finished=find_finished, paths=paths)
    return SimpleNamespace(experiment=experiment, paths=paths, missing=(1,))


def test_error_of_one_run_hides_no_other_and_keeps_no_run_from_its_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("1 fold failed")

    monkeypatch.setattr(study_launch, "train_queue", fail)
    monkeypatch.setattr(study_launch, "_list_jobs", lambda runs: [])
    closed: list[str] = []
    monkeypatch.setattr(study_launch, "list_command", lambda experiment: closed.append(experiment.paths.run_id))
    roots = [tmp_path / "20260102" / name for name in ("s-a", "s-b")]
    members = tuple(Member(root.name, f"20260102/{root.name}", "c.yaml", 1, 2, {}, 2) for root in roots)
    folder, log = tmp_path / "studies" / "s", Log()
    folder.mkdir(parents=True)
    runs = [make_run(RunPaths(root), problem) for root, problem in zip(roots, ("other folds", None), strict=True)]
    launch: Any = study_launch._StudyLaunch(folder, Study("s", "again", members), runs, log)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 fold failed"):
        launch.train(None, None, blend=False)
    assert closed == ["s-b"]
    assert "[WARNING] run s-a: other folds" in log.lines
    assert any(line.startswith("[STUDY] -> ") for line in log.lines)
