"""`doccls-launch status` without a run: the newest runs of the experiments folder."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from doccls.run.paths import RunPaths
from doccls.runs.read import FoldFacts, RunFacts, Scores
from launcher import recent
from launcher.cli import main
from launcher.recent import COUNT, describe_recent, read_recent, render_recent

NOW = datetime(2026, 1, 5, 12, 0)


def make_run(exp_dir: Path, day: str, run_id: str, started: str) -> Path:
    paths = RunPaths(exp_dir / day / run_id)
    paths.root.mkdir(parents=True)
    paths.snapshot.write_text(f"data:\n  folds: 5\nprovenance:\n  started: '{started}'\n")
    seconds = datetime.fromisoformat(started).timestamp()
    os.utime(paths.snapshot, (seconds, seconds))
    return paths.root


def test_newest_runs_first_and_no_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(COUNT + 5):
        make_run(tmp_path, "20260103", f"a{number:02}", f"2026-01-03T00:{number:02}:00")
    make_run(tmp_path, "20260104", "first", "2026-01-04T00:00:00")
    for folder in (tmp_path / "20260103").iterdir():  # whose time changes with any file in it
        os.utime(folder, (0, 0))
    reads: list[str] = []

    def read(folder: Path, now: datetime) -> RunFacts | None:
        reads.append(folder.name)
        return original(folder, now)

    original = recent.read_run
    monkeypatch.setattr(recent, "read_run", read)
    names = [run.name for run in read_recent(tmp_path, NOW)]
    assert names[:3] == ["20260104/first", "20260103/a24", "20260103/a23"]
    assert len(names) == len(reads) == COUNT


def test_table() -> None:
    folds = (FoldFacts(0, 5, Scores(0.5)), FoldFacts(3, 5, Scores(0.7)))
    runs = [
        RunFacts("20260105/b", datetime(2026, 1, 5, 11, 58), 1, num_folds=5, folds=folds, activity="training"),
        RunFacts("20260101/a", datetime(2026, 1, 1, 8), 1, num_folds=5, merged_scores=Scores(0.912345), merged_folds=5),
        RunFacts("20260101/z", datetime(2026, 1, 1, 7), 1, failure="out of memory"),
    ]
    assert render_recent(Path("exp"), runs, NOW).splitlines() == [
        "[STATUS] newest runs in exp",
        "run         state     folds  macro_f1  started",
        "20260105/b  training  2/5    ~0.6000   2 min ago",
        "20260101/a  merged    5/5    0.9123    4 days ago",
        "20260101/z  failed                     4 days ago",
        "~: mean of the finished folds",
    ]
    assert describe_recent(runs)[0] == {
        "run": "20260105/b", "state": "training", "folds_done": 2, "num_folds": 5, "macro_f1": 0.6, "merged": False,
        "started": "2026-01-05T11:58:00",
    }  # fmt: skip


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 1
    assert "--exp-dir" in capsys.readouterr().err
    (tmp_path / "experiments").mkdir()
    assert main(["status"]) == 0
    assert "no runs in experiments" in capsys.readouterr().out
    make_run(tmp_path / "experiments", "20260104", "first", "2026-01-04T00:00:00")
    assert main(["status"]) == 0
    assert "20260104/first  stopped  0/5" in capsys.readouterr().out
    assert main(["status", "--json", "--exp-dir", str(tmp_path / "experiments")]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == ["20260104/first"]
