"""Whatever happens to the console, training continues, and the log file has everything up to the exit marker."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
from rank_launcher import clean_environment
from tiny_runs import LABELS, PLAIN, Run, Trainer

from doccls.__main__ import main as doccls
from launcher.cli import main as launcher

KOREAN = dict(zip(LABELS, ("명함", "신청서", "편지", "표"), strict=True))
SHORT = (*PLAIN, "data.train_csv=korean.csv", "train.epochs=1")
END = ["[EXIT] TRAINING SUCCESS code=0", ">> Stopping logger and restoring stdio"]
NOTICE = "[WARNING] stdout: {}; continuing: this file has everything"
END_S = 100


@pytest.fixture(scope="module", autouse=True)
def _korean(trainer: Trainer) -> None:
    """Give the classes Korean names."""
    text = (trainer.config.parent / "folds.csv").read_text(encoding="utf-8")
    for label, name in KOREAN.items():
        text = text.replace(f",{label},", f",{name},")
    (trainer.config.parent / "korean.csv").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, _korean: None) -> Run:
    return trainer.train(*SHORT)


def train_on(trainer: Trainer, console: str, *sets: str, world_size: int = 1) -> Run:
    """Train with a console of `console_programs`."""
    disturbed = replace(trainer, environment={"DOCCLS_TEST_CONSOLE": console})
    return disturbed.train(*sets, world_size=world_size, program="console_programs:train")


def assert_same_run(run: Run, undisturbed: Run, problem: str | None) -> None:
    assert run.read_oof() == undisturbed.read_oof()
    assert run.lines[-2:] == END
    notices = [line for line in run.lines if line.endswith("continuing: this file has everything")]
    assert notices[:1] == ([] if problem is None else [NOTICE.format(problem)]) and len(notices) <= 2
    tags = [line.partition(" ")[0] for line in run.lines if line not in notices]
    assert tags == [line.partition(" ")[0] for line in undisturbed.lines]


@pytest.mark.parametrize(
    ("console", "problem"),
    [
        ("closed", None),
        ("full disk", "No space left on device"),
        ("broken pipe", "Broken pipe"),
        ("stuck pipe", "nobody reads it"),
        ("ascii", None),
    ],
)
def test_run_continues_without_its_console(
    trainer: Trainer, undisturbed: Run, console: str, problem: str | None
) -> None:
    run = train_on(trainer, console, *SHORT)
    assert_same_run(run, undisturbed, problem)
    assert any("명함" in line for line in run.lines)
    if console == "ascii":
        assert r"\uba85\ud568" in run.ranks[0].stdout and run.ranks[0].stdout.count("[EXIT]") == 2


def test_two_ranks_continue_without_their_console(trainer: Trainer) -> None:
    undisturbed = trainer.train(*SHORT, world_size=2)
    assert_same_run(train_on(trainer, "broken pipe", *SHORT, world_size=2), undisturbed, "Broken pipe")


def test_program_started_without_descriptors_trains(trainer: Trainer, undisturbed: Run) -> None:
    """As a user starts it; none of the run's files may get the number of a standard stream."""
    folder = trainer.new_folder()
    folder.mkdir()
    command = [sys.executable, "-m", "doccls.train", *trainer.arguments(SHORT, folder)]
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    done = subprocess.run(closed, env=clean_environment(), cwd=folder, timeout=END_S, check=False)
    assert done.returncode == 0
    assert_same_run(Run([], folder), undisturbed, None)


# --- commands --------------------------------------------------------------------------------------------------------

PRINTING: dict[str, tuple[Callable[[Sequence[str]], int], Sequence[str]]] = {
    "check --keys": (doccls, ["check", "--keys"]),
    "check --schema": (doccls, ["check", "--schema"]),
    "check --config": (doccls, ["check", "--config", "{config}"]),
    "runs": (doccls, ["runs", "{experiments}"]),
    "store info": (doccls, ["store", "info", "{experiments}"]),
    "plan": (launcher, ["plan", "--config", "{config}"]),
    "plan --json": (launcher, ["plan", "--config", "{config}", "--json"]),
    "status": (launcher, ["status", "{run}"]),
    "status --json": (launcher, ["status", "{run}", "--json"]),
    "--help": (doccls, ["--help"]),
    "launch --help": (launcher, ["run", "--help"]),
}
WORKING: dict[str, tuple[Callable[[Sequence[str]], int], Sequence[str]]] = {
    "predict": (doccls, ["predict", "{run}", "--output", "{output}"]),
    "preview": (doccls, ["preview", "--config", "{config}", "--output", "{output}.png"]),
    "report": (doccls, ["report", "{run}", "--output", "{output}.html"]),
    "merge": (launcher, ["merge", "{run}"]),
}


@pytest.fixture
def reader_gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """Replace stdout by a pipe without a reader."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield stream


def fill_in(words: Sequence[str], trainer: Trainer, run: Run, folder: Path) -> list[str]:
    paths = {"config": trainer.config, "experiments": run.folder / "experiments", "run": run.root,
             "output": folder / "out"}  # fmt: skip
    return [word.format_map(paths) for word in words]


def call(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else 1


@pytest.mark.parametrize("name", PRINTING)
def test_command_that_only_prints_ends_quietly_without_a_reader(
    name: str,
    trainer: Trainer,
    undisturbed: Run,
    tmp_path: Path,
    reader_gone: TextIO,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, words = PRINTING[name]
    sys.stdout = reader_gone  # capsys has replaced it
    assert call(main, fill_in(words, trainer, undisturbed, tmp_path)) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", WORKING)
def test_other_command_does_its_work_without_a_reader(
    name: str,
    trainer: Trainer,
    undisturbed: Run,
    tmp_path: Path,
    reader_gone: TextIO,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, words = WORKING[name]
    sys.stdout = reader_gone
    code = call(main, fill_in(words, trainer, undisturbed, tmp_path))
    assert code == 0, capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err


def test_program_that_prints_has_its_code_after_the_interpreter_has_ended(reader_gone: TextIO) -> None:
    command = [sys.executable, "-m", "doccls", "check", "--keys"]
    done = subprocess.run(
        command, env=clean_environment(), stdout=reader_gone, stderr=subprocess.PIPE, timeout=END_S, check=False
    )
    assert (done.returncode, done.stderr) == (141, b"")
