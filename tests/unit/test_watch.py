"""`doccls-launch status --watch` and the status of a study."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from terminals import show
from test_footer import Terminal
from test_live_files import begin, paths, study
from test_status import LEDGER

from doccls.run.paths import RunPaths
from doccls.system.lock import hold_lock
from launcher import watch as watch_module
from launcher.cli import main
from launcher.ledger import write_ledger

__all__ = ["paths", "study"]  # fixtures


def test_watch_of_a_run_that_does_not_run_ends_at_once(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    begin(paths)
    assert main(["status", str(paths.root), "--watch"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[STATUS] fold 0: done macro_f1=0.75000",
        "[STATUS] fold 1: lost",
        "[STATUS] fold 2: missing",
        "[STATUS] fold 3: missing",
        "[STATUS] run s-r: 1 of 4 folds done, 1 lost, 2 missing",
    ]


def test_watch_ends_with_the_run(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(paths)
    lock = hold_lock(paths.launch_lock(), "run s-r is being launched")

    def end_run(seconds: float) -> None:
        write_ledger(paths.ledger(), replace(LEDGER, folds=()))
        lock.__exit__(None, None, None)

    monkeypatch.setattr(watch_module.time, "sleep", end_run)
    lock.__enter__()
    assert main(["status", str(paths.root), "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "[STATUS] fold 1: running on gpu 0" and "[STATUS] fold 1: missing" in lines[4:]
    assert lines[-1] == "[STATUS] run s-r: 1 of 4 folds done, 3 missing"


def test_interrupted_watch(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(paths)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupt)
    with hold_lock(paths.launch_lock(), "run s-r is being launched"):
        assert main(["status", str(paths.root), "--watch"]) == 130


def test_watch_on_a_terminal_shows_a_table(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(paths)
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["status", str(paths.root), "--watch"]) == 0
    lines = show(terminal.getvalue())
    assert lines[0] == "run s-r: 1 of 4 folds done, 1 lost, 2 missing"
    assert lines[2].split() == ["0", "done", "gpu", "0", "0/5", "0.7500"] and len(lines) == 7


def test_status_of_a_study(paths: RunPaths, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(paths)
    assert main(["status", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[STATUS] study s: 1 of 7 folds done, 1 lost, 5 missing"
    assert len(lines) == 10 and lines[-1] == f"[STATUS] to train the missing folds: {LEDGER.resume_command}"
    assert main(["status", "--json", str(study / "study.json")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["title"] == "study s"
    assert [len(run["folds"]) for run in described["runs"]] == [4, 3]


@pytest.mark.parametrize("words", [("--watch",), ("RUN", "--watch", "--json")])
def test_watch_needs_a_run_and_is_no_json(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *words]) == 1
    assert "--watch: takes the folder of a run or a study, and not --json" in capsys.readouterr().err
