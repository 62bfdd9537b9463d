"""Launches on file systems that lack a call: the same bytes, whatever the file system answers.

`python tests/faults/file_system_table.py` runs five folds with every call and answer.
"""

from pathlib import Path

import pytest
from launches import LAST, Launch, assert_same_bytes, launch
from refusals import ANSWERS, REFUSED
from tiny_runs import PLAIN, Trainer

# Each checkpoint replaces an earlier one.
SETS = (*PLAIN, "train.checkpoint_interval_s=0.001", "train.batch_size=6")
USED = ("sync of a folder", "rename over a file", "mmap")  # the others are not called at all


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Launch:
    return launch(trainer, SETS, "--slots", "2")


@pytest.mark.parametrize("call", ANSWERS)
def test_file_system_without_a_call_gives_the_same_bytes(trainer: Trainer, undisturbed: Launch, call: str) -> None:
    launched = launch(trainer, SETS, "--slots", "2", refusal=f"{call}: {ANSWERS[call][0]}")
    assert (undisturbed.code, launched.code) == (0, 0), launched.out + launched.err
    assert_same_bytes(undisturbed.run, launched.run)
    assert list_leftovers(launched.run.folder) == []
    assert (launched.run.folder / REFUSED).exists() == (call in USED)
    assert "[WARNING]" not in "".join(file.read_text() for file in launched.run.folder.glob("logs/*.log"))


def test_folder_without_locks_where_processes_would_meet_is_an_error_before_training(trainer: Trainer) -> None:
    launched = launch(trainer, (*SETS, "train.num_processes=2"), refusal="flock: ENOLCK")
    assert launched.code == 1
    assert (
        "can't meet in /" in launched.err
        and "(No locks available): set the environment variable TMPDIR" in launched.err
    )
    assert launched.log[-2:] == ["[EXIT] TRAINING ERROR code=1", LAST]
    assert not list(launched.run.root.glob("ckpt/*")) and list_leftovers(launched.run.folder) == []


def list_leftovers(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.name.endswith((".tmp", ".lock", ".next"))]
