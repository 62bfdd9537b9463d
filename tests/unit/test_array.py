"""Array tasks of each batch system; each fold is trained once, whatever index the array starts at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doccls.errors import UserError
from launcher.array import ArrayTask, describe_share, parse_array_task, pick_folds


def make_slurm(first: int, last: int, count: int, index: int) -> dict[str, str]:
    variables = {"JOB_ID": 12, "TASK_ID": index, "TASK_MIN": first, "TASK_MAX": last, "TASK_COUNT": count}
    return {"SLURM_JOB_ID": "17"} | {f"SLURM_ARRAY_{name}": str(value) for name, value in variables.items()}


def make_sge(first: int, last: int, step: int, index: int) -> dict[str, str]:
    variables = {"ID": index, "FIRST": first, "LAST": last, "STEPSIZE": step}
    return {"JOB_ID": "12"} | {f"SGE_TASK_{name}": str(value) for name, value in variables.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_ID": "31"}, ArrayTask("31", "31")),
        (make_slurm(0, 4, 5, 3), ArrayTask("12_3", "12", 3, 0, 5)),
        (make_slurm(1, 5, 5, 3), ArrayTask("12_3", "12", 3, 1, 5)),
        (make_slurm(0, 0, 1, 0), ArrayTask("12_0", "12", 0)),
        (make_slurm(1, 3, 2, 3), ArrayTask("12_3", "12", 3)),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, ArrayTask("12_3", "12", 3)),
        ({"PBS_JOBID": "12.host"}, ArrayTask("12", "12")),
        ({"PBS_JOBID": "12[3].host", "PBS_ARRAY_INDEX": "3"}, ArrayTask("12_3", "12", 3)),
        ({"PBS_JOBID": "12[3].host", "PBS_ARRAYID": "3"}, ArrayTask("12_3", "12", 3)),
        ({"LSB_JOBID": "12", "LSB_JOBINDEX": "0"}, ArrayTask("12", "12")),
        ({"LSB_JOBID": "12", "LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "5"}, ArrayTask("12_3", "12", 3, 1, 5)),
        (
            {"LSB_JOBID": "12", "LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "5", "LSB_JOBINDEX_STEP": "2"},
            ArrayTask("12_3", "12", 3),
        ),
        ({"JOB_ID": "12", "SGE_TASK_ID": "undefined"}, ArrayTask("12", "12")),
        (make_sge(1, 5, 1, 2), ArrayTask("12_2", "12", 2, 1, 5)),
        (make_sge(1, 5, 2, 3), ArrayTask("12_3", "12", 3)),
        ({"SGE_TASK_ID": "3"}, ArrayTask("index 3", None, 3)),
        ({"LSB_JOBID": "12", "LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "3"}, ArrayTask("12_3", "12", 3)),
        ({"JOB_COMPLETION_INDEX": "2"}, ArrayTask("index 2", None, 2)),
    ],
)
def test_task_is_parsed_from_each_batch_system(environment: dict[str, str], expected: ArrayTask) -> None:
    assert replace(parse_array_task(environment, 5), variable="INDEX") == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("0/5", ArrayTask("index 2", None, 0, 0, 5)),
        ("4/5", ArrayTask("index 2", None, 4, 0, 5)),
        ("5/1-5", ArrayTask("index 2", None, 5, 1, 5)),
        ("0/1", ArrayTask("index 2", None, 0, 0, 1)),
    ],
)
def test_task_option_takes_precedence(stated: str, expected: ArrayTask) -> None:
    task = parse_array_task({"JOB_COMPLETION_INDEX": "2"}, 5, stated)
    assert replace(task, variable="INDEX") == expected


@pytest.mark.parametrize("stated", ["5/5", "0/1-5", "6/1-5", "0/0", "1", "a/b", "-1/5", "1/5/5"])
def test_impossible_task_option_is_rejected(stated: str) -> None:
    with pytest.raises(UserError, match="--task"):
        parse_array_task({}, 5, stated)


def test_error_outside_a_job_names_the_batch_systems() -> None:
    with pytest.raises(UserError, match=r"sbatch slurm/kfold\.sh CONFIG.*--task INDEX/COUNT"):
        parse_array_task({"SLURM_CONF": "/etc/slurm.conf"}, 5)


def test_variable_that_is_not_a_number_is_rejected_by_name() -> None:
    with pytest.raises(UserError, match="JOB_COMPLETION_INDEX='two'"):
        parse_array_task({"JOB_COMPLETION_INDEX": "two"}, 5)


@pytest.mark.parametrize(
    ("first", "tasks", "folds"),
    [(first, tasks, folds) for first in (0, 1) for tasks in range(2, 9) for folds in (2, 3, 5, 8)
     if first == 0 or tasks >= folds],
)  # fmt: skip
def test_tasks_that_divide_the_folds_train_each_fold_once(first: int, tasks: int, folds: int) -> None:
    last = first + tasks - 1
    shares = [
        pick_folds(parse_array_task(make_slurm(first, last, tasks, index), folds), range(folds), folds)
        for index in range(first, last + 1)
    ]
    assert sorted(fold for share in shares for fold in share) == list(range(folds))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("first", "last", "count", "index"),
    [(0, 0, 1, 0), (2, 2, 1, 2), (1, 3, 2, 3), (0, 4, 3, 4), (2, 4, 3, 2), (1, 2, 2, 1)],
)
def test_index_is_the_fold_in_any_other_array(first: int, last: int, count: int, index: int) -> None:
    task = parse_array_task(make_slurm(first, last, count, index), 5)
    assert pick_folds(task, range(5), 5) == (index,)
    assert pick_folds(task, [index + 1], 5) == ()


def test_index_is_fold_option_disables_division() -> None:
    task = parse_array_task(make_slurm(0, 1, 2, 1), 5, index_is_fold=True)
    assert pick_folds(task, range(5), 5) == (1,)
    assert pick_folds(task, [0], 5) == ()


def test_job_without_array_trains_all_folds() -> None:
    assert pick_folds(parse_array_task({"SLURM_JOB_ID": "31"}, 5), [0, 2], 5) == (0, 2)


def test_error_of_index_without_fold_explains_numbering() -> None:
    task = parse_array_task({"PBS_JOBID": "12[5].host", "PBS_ARRAY_INDEX": "5"}, 5)
    with pytest.raises(UserError, match=r"folds are numbered 0 to 4 .*from 0 to 4; .*--task \$PBS_ARRAY_INDEX/1-5"):
        pick_folds(task, range(5), 5)


def test_share_is_described() -> None:
    share = parse_array_task(make_slurm(1, 5, 5, 5), 5)
    assert describe_share(share, (4,), 5) == "task 12_5 of 1 to 5: fold 4 (folds are numbered 0 to 4)"
    beyond = parse_array_task(make_slurm(0, 4, 5, 3), 3)
    assert describe_share(beyond, (), 3) == "task 12_3 of 0 to 4: no fold is left for it (folds are numbered 0 to 2)"
    assert describe_share(parse_array_task({"SLURM_JOB_ID": "31"}, 5), (0, 1), 2) == "job 31: folds 0, 1"
