"""`doccls-launch status --watch` and the status of a study."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from terminals import show
from test_footer import Terminal
from test_live_files import begin, paths, study
from test_status import LEDGER

from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
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


def test_damaged_ledger_of_a_run_hides_no_other_run_of_its_study(
    paths: RunPaths, study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(RunPaths(paths.root.with_name("s-later")))
    write_text(paths.ledger(), "{")
    problem = f"{paths.ledger()}: damaged ("
    assert main(["status", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[STATUS] study s: 1 of 8 folds done, 1 lost, 2 missing, 4 unknown"
    assert [line.split()[:3] for line in lines[2:10]] == [
        *(["r", str(fold), "unknown"] for fold in range(4)),
        ["later", "0", "done"], ["later", "1", "lost"], ["later", "2", "missing"], ["later", "3", "missing"],
    ]  # fmt: skip
    assert all(problem in line for line in lines[2:6])
    assert main(["status", str(study), "--json"]) == 0
    damaged, other = json.loads(capsys.readouterr().out)["runs"]
    assert all(problem in fold["remark"] for fold in damaged["folds"]) and other["folds"][0]["state"] == "done"

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupt)  # what is unknown may still run
    assert main(["status", str(study), "--watch"]) == 130
    assert "[STATUS] later fold 0: done macro_f1=0.75000" in capsys.readouterr().out.splitlines()


def test_damaged_ledger_of_a_single_run_is_an_error(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    begin(paths)
    write_text(paths.ledger(), "{")
    assert main(["status", str(paths.root), "--watch"]) == 1
    assert f"{paths.ledger()}: damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("is_for_long", [False, True])
def test_watch_goes_on_unless_the_files_can_not_be_read_for_a_minute(
    is_for_long: bool, paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(paths)
    now_s, intact = [100.0], paths.ledger().read_text()

    def damage_or_repair(seconds: float) -> None:
        now_s[0] += 25.0
        is_damaged = is_for_long or now_s[0] < 160.0 or 200.0 < now_s[0] < 260.0  # never for a minute
        write_text(paths.ledger(), "{" if is_damaged else intact)
        if now_s[0] > 300.0:
            held.close()

    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=damage_or_repair))
    with ExitStack() as held:
        held.enter_context(hold_lock(paths.launch_lock(), "run s-r is being launched"))
        assert main(["status", str(paths.root), "--watch"]) == is_for_long
    assert (f"{paths.ledger()}: damaged (" in capsys.readouterr().err) == is_for_long
    assert (now_s[0] > 300.0) != is_for_long


@pytest.mark.parametrize("words", [("--watch",), ("RUN", "--watch", "--json")])
def test_watch_needs_a_run_and_is_no_json(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *words]) == 1
    assert "--watch: takes the folder of a run or a study, and not --json" in capsys.readouterr().err
