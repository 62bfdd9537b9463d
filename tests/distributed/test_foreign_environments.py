"""Runs in the environments of other people: long temporary folders, empty variables, calls from a thread."""

from pathlib import Path

import pytest
from rank_launcher import launch_ranks
from tiny_runs import PLAIN, Run, Trainer

SHORT = (*PLAIN, "data.valid_fold=0", "train.epochs=1")


def _run(trainer: Trainer, program: str, *overrides: str, **variables: str) -> Run:
    folder = trainer.new_folder()
    arguments = trainer.arguments([*SHORT, *overrides], folder)
    return Run(launch_ranks(program, arguments, folder / "console", environment=variables), folder)


def test_workers_of_a_run_with_a_long_temporary_folder(trainer: Trainer, tmp_path: Path) -> None:
    scratch = tmp_path / ("scratch of the job #%20" + "x" * 100)
    scratch.mkdir()
    program = "rank_programs:train_with_default_temporary_folder"
    run = _run(trainer, program, "data.num_workers=1", "data.store=off", TMPDIR=str(scratch))
    assert run.codes == [0], run.stderr
    assert list(scratch.iterdir()) == []


def test_empty_variables_of_a_job_template(trainer: Trainer) -> None:
    empty = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "")
    run = _run(trainer, "doccls.train:main", **empty, ACCELERATE_USE_CPU="", OMP_NUM_THREADS="")
    assert run.codes == [0], run.stderr


def test_group_of_one_without_an_address(trainer: Trainer) -> None:
    run = _run(trainer, "doccls.train:main", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert run.codes == [0], run.stderr


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_variable_that_is_no_number_is_refused(trainer: Trainer, name: str) -> None:
    run = _run(trainer, "doccls.train:main", **{name: "node-3"})
    assert run.codes == [1] and "Traceback" not in run.stderr
    assert f"training failed: the environment variable {name}='node-3' must be a whole number" in run.stderr


def test_training_in_a_thread(trainer: Trainer) -> None:
    run = _run(trainer, "rank_programs:train_in_thread", "data.num_workers=1", "data.store=off")
    assert run.codes == [0], run.stderr
    assert run.stderr.count("signals stay with the caller") == 1
    assert run.lines[-2:] == ["[EXIT] TRAINING SUCCESS code=0", ">> Stopping logger and restoring stdio"]
