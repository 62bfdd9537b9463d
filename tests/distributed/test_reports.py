"""The report at the end of a run: on the finished folds, once, and never at the run's expense."""

import subprocess
import sys
from pathlib import Path

import pytest
from rank_launcher import clean_environment
from tiny_runs import PLAIN, Run, Trainer

_REPORTED = (*PLAIN, "train.epochs=1", "output.report=true")


def list_reports(run: Run) -> list[str]:
    return [line for line in run.lines if line.startswith("[REPORT]")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_ends_with_the_report_that_the_command_makes(trainer: Trainer, world_size: int, tmp_path: Path) -> None:
    run = trainer.train(*_REPORTED, world_size=world_size)
    report, again = run.root / "report.html", tmp_path / "again.html"
    assert list_reports(run) == [f"[REPORT] {report}"] and '"thumbnails":{"' in report.read_text()
    command = [sys.executable, "-m", "doccls", "report", str(run.root), "--output", str(again)]
    subprocess.run(command, env=clean_environment(), timeout=120, check=True, stdout=subprocess.DEVNULL)
    assert again.read_bytes() == report.read_bytes()


def test_report_of_a_single_fold_says_that_others_are_missing(trainer: Trainer) -> None:
    run = trainer.train(*_REPORTED, "data.valid_fold=1")
    assert "Not finished: folds 0, 2 of 3." in (run.root / "report.html").read_text()


def test_page_of_another_kind_is_kept_and_the_run_succeeds(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    run = trainer.train(*_REPORTED, "data.valid_fold=0", folder=folder, run_id="r")
    page = run.root / "report.html"
    page.write_text("mine")
    run = trainer.train(*_REPORTED, "data.valid_fold=1", folder=folder, run_id="r")
    assert page.read_text() == "mine" and list_reports(run) == []
    assert [line for line in run.lines if line.startswith("[WARNING] no report: ") and "not an earlier report" in line]
