"""A launch whose console is lost: its folds are trained, its log has everything, and its exit code is theirs."""

import subprocess
import sys

import pytest
from launches import LAST, LAUNCH_S, assert_same_bytes, finish, start_command
from rank_launcher import clean_environment
from tiny_runs import PLAIN, Run, Trainer

SHORT = (*PLAIN, "train.epochs=1")
NOTICE = "[WARNING] stdout: {}; continuing: this file has everything"


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    return trainer.train(*SHORT)


@pytest.mark.parametrize(
    ("console", "problem"), [("broken pipe", "Broken pipe"), ("full disk", "No space left on device")]
)
def test_launch_continues_without_its_console(trainer: Trainer, undisturbed: Run, console: str, problem: str) -> None:
    folder = trainer.new_folder()
    words = ("launcher", "run", *trainer.arguments(SHORT, folder), "--run-id", "tiny")
    process = start_command(
        folder, "doccls.train:main", *words, starter="console_programs:launch", DOCCLS_TEST_CONSOLE=console
    )
    launched = finish(process, folder)
    assert launched.code == 0
    assert launched.log[-2:] == ["[EXIT] TRAINING SUCCESS code=0", LAST]
    assert launched.log.count(NOTICE.format(problem)) == 1
    assert_same_bytes(undisturbed, launched.run)


def test_launcher_started_without_descriptors_trains(trainer: Trainer, undisturbed: Run) -> None:
    """As a user starts it: a rank's console must not get the number of a standard stream."""
    folder = trainer.new_folder()
    folder.mkdir()
    arguments = trainer.arguments((*SHORT, "data.valid_fold=0"), folder)
    command = [sys.executable, "-m", "launcher", "run", *arguments, "--on-end", "sh -c 'echo $2 && echo $2 >ended' sh"]
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    done = subprocess.run(closed, env=clean_environment(), cwd=folder, timeout=LAUNCH_S, check=False)
    assert done.returncode == 0
    run = Run([], folder)
    assert (run.predictions(0).logits_NC == undisturbed.predictions(0).logits_NC).all()
    (log,) = (path for path in folder.glob("logs/*.log") if "_fold" not in path.name)
    assert log.read_text(encoding="utf-8").splitlines()[-1] == LAST
    assert (folder / "ended").read_text().strip() in ("incomplete", "success")
    (console,) = run.root.glob("console/*")
    assert console.read_text(encoding="utf-8").endswith("(see logs/* for details)\n")
