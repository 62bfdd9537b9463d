"""File names of a run follow the contract, and run ids are valid folder names."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from doccls.errors import UserError
from doccls.run.paths import RunPaths, check_run_id, locate_run, name_log

NOW = datetime(2026, 3, 7, 9, 5, 59)


def test_file_names_follow_the_contract() -> None:
    paths = RunPaths(Path("/e/20260307/v087-8c206e"))
    assert paths.run_id == "v087-8c206e"
    found = [
        paths.snapshot, paths.metrics, paths.best_checkpoint(0), paths.best_checkpoint(11), paths.oof_logits,
        paths.oof_targets, paths.oof_csv, paths.results.submission, paths.results.test_probabilities,
        paths.oof_logits_damaged,
    ]  # fmt: skip
    assert [str(path.relative_to(paths.root)) for path in found] == [
        "config.yaml", "metrics.jsonl", "ckpt/best_fold0.pth", "ckpt/best_fold11.pth", "oof/oof_logits.npy",
        "oof/oof_targets.npy", "oof/oof.csv", "submission.csv", "test_probabilities.npy",
        "oof/oof_logits_damaged.npy",
    ]  # fmt: skip
    assert paths.predictions(3).parent == paths.predictions_dir and paths.fold_metrics(3).parent == paths.metrics_dir
    assert paths.predictions(1) != paths.predictions(11)


def test_log_name_has_minute_and_run_id() -> None:
    assert name_log(Path("/l"), "v087-8c206e", NOW) == Path("/l/run_20260307-0905_v087-8c206e.log")
    assert name_log(Path("/l"), "v087-8c206e", NOW, "task3") == Path("/l/run_20260307-0905_v087-8c206e_task3.log")


def test_each_launch_has_its_own_lock_and_ledger(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.live.mkdir()
    for task in (None, 0, 12):
        paths.ledger(task).touch()
        paths.launch_lock(task).touch()
        assert paths.ledger(task).stem == paths.launch_lock(task).stem
    paths.opening_lock.touch()
    paths.merge_lock.touch()
    assert len({paths.ledger(), paths.ledger(0), paths.ledger(12)}) == len(paths.list_ledgers()) == 3
    assert sorted(map(str, paths.list_launch_locks())) == sorted(str(paths.launch_lock(task)) for task in (None, 0, 12))


def test_new_run_is_under_today_and_existing_run_is_found_under_its_date(tmp_path: Path) -> None:
    assert locate_run(tmp_path, "v1-a", NOW).root == tmp_path / "20260307" / "v1-a"
    (tmp_path / "20251231" / "v1-a").mkdir(parents=True)
    (tmp_path / "20260307" / "v1-ab").mkdir(parents=True)
    assert locate_run(tmp_path, "v1-a", NOW).root == tmp_path / "20251231" / "v1-a"


def test_run_id_in_another_case_is_refused_where_case_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "20251231" / "v1-A").mkdir(parents=True)
    assert locate_run(tmp_path, "V1-a", NOW).root.parent.name == "20260307", "these are two runs"

    def is_folder(path: Path) -> bool:
        return path.name.lower() in {entry.name.lower() for entry in path.parent.iterdir()}

    monkeypatch.setattr("doccls.run.paths.is_folder", is_folder)
    assert locate_run(tmp_path, "v1-A", NOW).root == tmp_path / "20251231" / "v1-A"
    with pytest.raises(UserError, match=r"run id 'V1-a': .*20251231, and run 'v1-A' exists: .*--run-id v1-A, or"):
        locate_run(tmp_path, "V1-a", NOW)


@pytest.mark.parametrize("run_id", ["v087-8c206e", "a", "A.b_c-9", "x" * 80])
def test_valid_run_ids_are_accepted(run_id: str) -> None:
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "a/b", "../x", "-x", ".hidden", "a b", "x" * 81, "a\n", "ü", "*", "a\0"]
)
def test_invalid_run_ids_are_rejected(run_id: str) -> None:
    with pytest.raises(UserError, match="run id"):
        check_run_id(run_id)
