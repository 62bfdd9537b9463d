"""`doccls verify-resume`: its output when resumed bytes match, when they differ, and when the run itself fails."""

import re
from pathlib import Path

import pytest
import yaml
from launches import Launch, assert_none_left, finish, start_command
from tiny_runs import PLAIN, RICH, Trainer

from doccls.run.heartbeat import Beat
from launcher.verify import Trial, render_trial


def verify(
    trainer: Trainer,
    sets: tuple[str, ...],
    *words: str,
    folder: Path | None = None,
    program: str = "doccls.train:main",
) -> Launch:
    """Run `doccls verify-resume`, by default in a new folder; the ranks run `program`."""
    folder = folder or trainer.new_folder()
    command = ("doccls", "verify-resume", *trainer.arguments(sets, folder), *words)
    done = finish(start_command(folder, program, *command), folder)
    assert_none_left(folder)
    return done


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_ranks_resume_to_same_bytes_and_leave_no_files(trainer: Trainer, ranks: int) -> None:
    sets = (*RICH, f"train.num_processes={ranks}", "train.checkpoint_interval_s=0.001", "train.log_interval=1")
    long_run = yaml.safe_load(trainer.config.read_text(encoding="utf-8"))
    long_run["train"] |= {"epochs": 10, "unmixed_epochs": 3}
    config = trainer.config.with_name("long_run.yaml")
    config.write_text(yaml.safe_dump(long_run), encoding="utf-8")
    words = ("--slots", str(ranks), "--kills", "1", "--set", "data.valid_fold=2", "--config", str(config))
    done = verify(trainer, sets, *words)
    assert done.code == 0, done.out + done.err
    scanned, filled, first, undisturbed, heading, row, last = done.out.splitlines()
    assert scanned.startswith("[DATA] 48 images to ") and filled.endswith(" holds 48, of which 48 were decoded now")
    cpus = ",".join(map(str, range(ranks)))
    assert first.startswith(f"[VERIFY] fold 2 on cpu {cpus}, trained 3 times, with train.epochs=2 ")
    assert " train.warmup_epochs=0.0 " in first and " train.unmixed_epochs=1 " in first
    assert "train.checkpoint_interval_s=0.001; files: " in first
    assert re.fullmatch(r"\[VERIFY\] undisturbed: \d+ steps in [0-9.]+ s", undisturbed)
    assert heading.split("  ")[0] == "kill" and re.match(r"   1  (train|validate) step \d+, epoch [12]  ", row)
    assert row.endswith("  the same")
    assert last == "[VERIFY] 1 of 1 killed runs match the undisturbed run byte for byte"
    (folder,) = re.findall(r"files: (\S+)", first)
    assert not list(trainer.workspace.rglob(folder.rpartition("/")[2]))


def test_unusable_store_is_an_error_only_if_config_names_it(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    folder.mkdir()
    blocked = folder / "page_store"
    blocked.write_text("a file")
    sets, words = (*PLAIN, "train.epochs=12", "data.valid_fold=1", "data.store=auto"), ("--slots", "1", "--kills", "1")
    done = verify(trainer, sets, *words, folder=folder)
    assert done.code == 0, done.out + done.err
    assert re.search(r"^\[WARNING\] not a folder: .*page_store .*: pages are decoded in each epoch", done.out, re.M)
    assert done.out.endswith("1 of 1 killed runs match the undisturbed run byte for byte\n")
    done = verify(trainer, (*sets, f"data.store={blocked}"), *words, folder=folder)
    assert done.code == 1 and "[VERIFY]" not in done.out
    assert re.match(r"doccls verify-resume: .*not a folder: .*page_store ", done.err)


def test_resume_that_changes_weight_is_detected(trainer: Trainer) -> None:
    sets = (*PLAIN, "train.epochs=12", "train.checkpoint_interval_s=0.001", "data.valid_fold=1")
    words = ("--slots", "1", "--kills", "1", "--seed", "3")  # early
    done = verify(trainer, sets, *words, program="fault_train:train_with_changed_weight")
    assert done.code == 1, done.out + done.err
    assert re.search(
        r"  differ: .*metrics\.jsonl\n", done.out
    )  # predictions and best weights may date from before the kill
    last = done.out.splitlines()[-1]
    assert last.startswith("[VERIFY] 0 of 1 killed runs match the undisturbed run byte for byte; files of")
    kept = Path(last.rpartition(": ")[2])
    assert {"undisturbed", "killed1"} <= {path.name for path in kept.iterdir()}


def test_failing_run_is_reported_with_its_last_lines(trainer: Trainer) -> None:
    done = verify(trainer, (*PLAIN, "model.name=nope"), "--slots", "1")
    assert done.code == 1
    assert done.err.startswith("doccls verify-resume: rank 0 unexpectedly ended with exit code 1; files: ")
    assert "model.name = 'nope': timm has no such model" in done.err


@pytest.mark.parametrize(
    ("phase", "step", "resume_step", "differing", "row"),
    [
        ("train", 7, 5, (), "   3  train step 7, epoch 2         step 5                    2  the same"),
        ("validate", 8, 8, (), "   3  validate step 8, epoch 2      step 8                    0  the same"),
        ("train", 2, 0, ("a", "b"), "   3  train step 2, epoch 2         the start                 2  differ: a, b"),
        ("validate", 9, None, (), "   3  validate step 9, epoch 2      the end                   0  the same"),
        ("train", 4, 5, (), "   3  train step 4, epoch 2         step 5                    0  the same"),
    ],
)
def test_trial_row(phase: str, step: int, resume_step: int | None, differing: tuple[str, ...], row: str) -> None:
    killed = Beat("here", 1, phase, 0, 2, step)  # type: ignore[arg-type]
    assert render_trial(3, Trial(killed, resume_step, differing)) == row
