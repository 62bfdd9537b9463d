"""Merging: each row comes from exactly one fold's predictions, or an error names and counts what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.oof import merge as merge_module
from doccls.oof.merge import load_merged, merge_predictions, merge_run, render_csv
from doccls.oof.metrics import macro_f1, probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, find_finished_folds, write_predictions
from doccls.run.paths import RunPaths
from doccls.system import lock
from doccls.system.lock import hold_lock
from launcher.cli import main as launch

COUNT, FOLDS, CLASSES = 11, 3, ("cat, big", 'do"g', "fish")
IDS = tuple(f'id,"{row}"' if row % 4 == 0 else f"{row:03d}" for row in range(COUNT))
FOLD_OF = np.array([2, 0, 1, 0, 2, 1, 1, 0, 2, 0, 1])
TARGETS = np.arange(COUNT) % 3
LOGITS = np.random.default_rng(0).normal(0, 2, (COUNT, 3)).astype(np.float32)

DAMAGED = np.random.default_rng(1).normal(0, 2, (COUNT, 3)).astype(np.float32)


def make_predictions(fold: int, **changes: Any) -> FoldPredictions:
    rows = np.flatnonzero(fold == FOLD_OF)
    info = PredictionsInfo(
        "fingerprint-0123456789", fold, FOLDS, COUNT, CLASSES, tuple(IDS[row] for row in rows), (), 1, fold / 10
    )
    return FoldPredictions(dataclasses.replace(info, **changes), rows, LOGITS[rows], TARGETS[rows])


def add_damage(predictions: FoldPredictions) -> FoldPredictions:
    info = dataclasses.replace(predictions.info, damage="scan", macro_f1_damaged=0.25, selected_by="damaged")
    return dataclasses.replace(predictions, info=info, damaged_logits_NC=DAMAGED[predictions.indices_N])


def refuse(*fold_predictions: FoldPredictions) -> str:
    with pytest.raises(UserError) as caught:
        merge_predictions(fold_predictions)
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "20260101" / "v001-abc")
    for fold in range(FOLDS):
        write_predictions(paths.predictions(fold), make_predictions(fold))
    return paths


def list_outputs(paths: RunPaths) -> list[Path]:
    return [path for path in (paths.oof_logits, paths.oof_targets, paths.oof_csv, paths.summary) if path.exists()]


# --- what is merged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_rows_follow_the_csv_whatever_the_order_of_the_folds(order: tuple[int, ...]) -> None:
    merged = merge_predictions([make_predictions(fold) for fold in order])
    assert np.array_equal(merged.logits_NC, LOGITS) and merged.logits_NC.dtype == np.float32
    assert np.array_equal(merged.targets_N, TARGETS) and merged.targets_N.dtype == np.int64
    assert np.array_equal(merged.folds_N, FOLD_OF)
    assert merged.ids == IDS and merged.classes == CLASSES


def test_merge_writes_logits_and_targets(run: RunPaths) -> None:
    merge_run(run)
    logits, targets = np.load(run.oof_logits), np.load(run.oof_targets)
    assert np.array_equal(logits, LOGITS) and logits.dtype == np.float32
    assert np.array_equal(targets, TARGETS) and targets.dtype == np.int64


def test_merge_writes_damaged_logits_in_rows_of_the_csv(run: RunPaths) -> None:
    merge_run(run)
    plain = {path: path.read_bytes() for path in list_outputs(run)}
    assert not run.oof_logits_damaged.exists() and "damaged" not in json.loads(run.summary.read_text())
    for fold in range(FOLDS):
        write_predictions(run.predictions(fold), add_damage(make_predictions(fold)))
    summary = merge_run(run)
    damaged = np.load(run.oof_logits_damaged)
    assert np.array_equal(damaged, DAMAGED) and damaged.dtype == np.float32
    for path in (run.oof_logits, run.oof_targets, run.oof_csv):
        assert path.read_bytes() == plain[path]
    assert summary.damaged is not None and summary.damaged.macro_f1 == macro_f1(TARGETS, DAMAGED)
    assert json.loads(run.summary.read_text())["damaged"]["macro_f1"] == summary.damaged.macro_f1
    assert "selected by its score on damaged copies" in summary.selection


def test_merging_twice_gives_the_same_bytes(run: RunPaths) -> None:
    merge_run(run)
    first = [path.read_bytes() for path in list_outputs(run)]
    merge_run(run)
    assert len(first) == 4 and [path.read_bytes() for path in list_outputs(run)] == first


def test_merge_removes_resume_checkpoints_of_folds_killed_after_writing_their_predictions(run: RunPaths) -> None:
    foreign = run.root / "ckpt" / "last_fold7_0.safetensors"
    for path in (*run.resume_checkpoints(1), foreign, run.root / "ckpt" / ".last_fold2_1.safetensors.0a1b.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    half_written = run.root / ".metrics.jsonl.fold1-0a1b.tmp"
    half_written.touch()
    merge_run(run)
    assert list((run.root / "ckpt").iterdir()) == [foreign] and not half_written.exists()


def test_csv_holds_ids_labels_and_probabilities(run: RunPaths) -> None:
    merge_run(run)
    with run.oof_csv.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["ID", "fold", "target", "prediction", *(f"prob_{label}" for label in CLASSES)]
    assert len(rows) == COUNT + 1
    for row, cells in enumerate(rows[1:]):
        assert cells[:4] == [IDS[row], str(FOLD_OF[row]), CLASSES[TARGETS[row]], CLASSES[LOGITS[row].argmax()]]
        np.testing.assert_allclose([float(cell) for cell in cells[4:]], probabilities(LOGITS)[row], atol=6e-7)


def test_skipped_rows_are_nan_in_the_logits_empty_in_the_csv_and_excluded_from_metrics(run: RunPaths) -> None:
    predictions = make_predictions(1)
    logits = predictions.logits_NC.copy()
    logits[1] = np.nan
    row = int(predictions.indices_N[1])
    info = dataclasses.replace(predictions.info, skipped=(row,))
    predictions = FoldPredictions(info, predictions.indices_N, logits, predictions.targets_N)
    merged = merge_predictions([make_predictions(0), predictions, make_predictions(2)])
    assert merged.skipped == (row,) and np.isnan(merged.logits_NC[row]).all()
    others = np.arange(COUNT) != row
    write_predictions(run.predictions(1), predictions)
    summary = merge_run(run)
    assert summary.macro_f1 == macro_f1(TARGETS[others], LOGITS[others])
    assert (summary.num_samples, summary.num_skipped) == (COUNT - 1, 1)
    written = np.load(run.oof_logits)
    assert np.isnan(written[row]).all() and np.array_equal(written[others], LOGITS[others])
    cells = list(csv.reader(render_csv(merged).splitlines()))[row + 1]
    assert cells == [IDS[row], "1", CLASSES[TARGETS[row]], "", "", "", ""]


# --- what is rejected ------------------------------------------------------------------------------------------------


def test_missing_folds_are_named_and_counted() -> None:
    assert "2 of 3 folds have no predictions: 0, 2" in refuse(make_predictions(1))


def test_repeated_folds_are_named() -> None:
    message = refuse(make_predictions(0), make_predictions(1), make_predictions(1), make_predictions(2))
    assert "folds with more than one predictions file: 1" in message


def test_folds_outside_the_run_are_named() -> None:
    unknown = dataclasses.replace(make_predictions(2), info=dataclasses.replace(make_predictions(2).info, fold=7))
    message = refuse(make_predictions(0), make_predictions(1), unknown)
    assert "folds outside 0 to 2: 7" in message and "1 of 3 folds have no predictions: 2" in message


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"fingerprint": "other-9876543210"}, "the run's fingerprint"),
        ({"classes": (CLASSES[1], CLASSES[0], CLASSES[2])}, "the class order"),
        ({"num_folds": 4}, "the number of folds"),
        ({"num_samples": 12}, "the number of rows"),
    ],
)
def test_incompatible_folds_are_listed_with_what_differs(changes: dict[str, Any], difference: str) -> None:
    message = refuse(make_predictions(0), make_predictions(1, **changes), make_predictions(2))
    assert f"the folds differ in {difference}" in message
    assert "folds [0, 2]" in message and "folds [1]" in message


def test_folds_with_and_without_damaged_pages_are_named() -> None:
    message = refuse(add_damage(make_predictions(0)), make_predictions(1), add_damage(make_predictions(2)))
    assert "folds [0, 2] were validated on damaged copies of their pages too (valid.damage), folds [1] not" in message


def test_all_problems_are_reported_at_once() -> None:
    message = refuse(make_predictions(0), make_predictions(1, fingerprint="other"))
    assert "the run's fingerprint" in message and "1 of 3 folds have no predictions: 2" in message


def test_missing_and_repeated_rows_are_counted() -> None:
    predictions = make_predictions(1)
    rows = predictions.indices_N.copy()
    rows[0] = 0  # row 0 is fold 2's, and now no fold has row 2
    message = refuse(
        make_predictions(0),
        FoldPredictions(predictions.info, rows, predictions.logits_NC, predictions.targets_N),
        make_predictions(2),
    )
    assert "1 rows missing [2]" in message and "1 rows repeated [0]" in message


def test_rejected_merge_writes_nothing(run: RunPaths) -> None:
    run.predictions(1).unlink()
    with pytest.raises(UserError, match="1 of 3 folds have no predictions: 1"):
        merge_run(run)
    assert not list_outputs(run)


def test_every_damaged_file_is_named(run: RunPaths) -> None:
    for fold in (0, 2):
        run.predictions(fold).write_bytes(run.predictions(fold).read_bytes()[:-3])
    with pytest.raises(UserError) as caught:
        merge_run(run)
    assert str(run.predictions(0)) in str(caught.value) and str(run.predictions(2)) in str(caught.value)
    assert not list_outputs(run)


def test_rejected_merge_keeps_earlier_merged_files(run: RunPaths) -> None:
    merge_run(run)
    before = [path.read_bytes() for path in list_outputs(run)]
    run.predictions(1).write_bytes(b"torn")
    with pytest.raises(UserError):
        merge_run(run)
    assert [path.read_bytes() for path in list_outputs(run)] == before


def test_run_without_finished_folds_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no fold of this run has finished"):
        merge_run(RunPaths(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_rows_whose_image_was_trained_on_are_noted(run: RunPaths) -> None:
    assert load_merged(run)[1].notes == ()
    write_predictions(run.predictions(2), make_predictions(2, num_split=3))
    (note,) = load_merged(run)[1].notes
    assert note.startswith("3 rows were validated by a model that trained on their image")
    assert "data.on_duplicate: allow; fold 2: 3" in note
    merge_run(run)
    assert "data.on_duplicate: allow" in run.summary.read_text()


def test_different_micro_batch_sizes_are_noted(run: RunPaths) -> None:
    assert merge_run(run).notes == ()
    write_predictions(run.predictions(1), make_predictions(1, micro_batch_size=3))
    (note,) = merge_run(run).notes
    assert "train.micro_batch_size, fold 0: per-rank batch, fold 1: 3, fold 2: per-rank batch" in note
    assert json.loads(run.summary.read_text())["notes"] == [note]
    for fold in range(FOLDS):
        write_predictions(run.predictions(fold), make_predictions(fold, micro_batch_size=3))
    assert merge_run(run).notes == (), "equal sizes need no note"


# --- which folds are done --------------------------------------------------------------------------------------------


def test_folds_with_valid_predictions_are_finished_and_damaged_ones_are_not(run: RunPaths) -> None:
    assert find_finished_folds(run, "fingerprint-0123456789", FOLDS) == [0, 1, 2]
    run.predictions(1).write_bytes(b"torn")
    run.predictions(2).unlink()
    assert find_finished_folds(run, "fingerprint-0123456789", FOLDS) == [0]


def test_predictions_of_another_fingerprint_stop_the_run(run: RunPaths) -> None:
    with pytest.raises(UserError) as caught:
        find_finished_folds(run, "another-0123456789", FOLDS)
    assert (
        "fingerprint-" in str(caught.value) and "another-0123" in str(caught.value) and "--run-id" in str(caught.value)
    )


# --- the command -----------------------------------------------------------------------------------------------------


def test_launcher_merges_a_run(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["merge", str(run.root)]) == 0
    assert len(list_outputs(run)) == 4
    out = capsys.readouterr().out
    assert "[OOF] fold=2 macro_f1=" in out and f"rows={COUNT}" in out


@pytest.mark.parametrize("fault", ["no run", "no predictions"])
def test_launcher_reports_failed_merge_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    assert launch(["merge", str(tmp_path / "gone" if fault == "no run" else tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_merges_of_one_run_take_turns(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    events, write_merged, sleep = SimpleQueue[str](), merge_module.write_merged, time.sleep
    second = threading.Thread(target=merge_run, args=(run,), daemon=True)

    def sleep_and_tell(seconds: float) -> None:
        if threading.current_thread() is second:
            events.put("the second one waits")
        sleep(0.01)

    def write_slowly(*arguments: Any) -> None:
        if threading.current_thread() is second:
            events.put("the second one writes")
        else:
            second.start()
            assert events.get(timeout=60) == "the second one waits"
        write_merged(*arguments)

    monkeypatch.setattr(lock.time, "sleep", sleep_and_tell)
    monkeypatch.setattr(merge_module, "write_merged", write_slowly)
    assert launch(["merge", str(run.root)]) == 0
    second.join(60)
    assert not second.is_alive() and len(list_outputs(run)) == 4 and list(run.live.iterdir()) == []


def test_command_says_for_whom_it_waits(
    run: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as held:
        held.enter_context(hold_lock(run.merge_lock, "run v001-abc is being merged"))
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: held.close())
        assert launch(["merge", str(run.root)]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("[OOF] run v001-abc is being merged by process ") and first.endswith(" has merged it")
    assert second == f"[OOF] -> {run.oof_logits}"


def test_command_gives_up_if_the_other_merge_does_not_end(
    run: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    with hold_lock(run.merge_lock, "run v001-abc is being merged"):
        monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: now_s.append(now_s.pop() + seconds))
        assert launch(["merge", str(run.root)]) == 1
        monkeypatch.undo()
    message = capsys.readouterr().err
    assert "run v001-abc is being merged by process " in message and "stop it there, or wait" in message
    assert not list_outputs(run)


def test_suspended_process_that_lost_the_lock_writes_nothing(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_lock(paths: RunPaths) -> Any:
        paths.merge_lock.unlink()
        return load_merged(paths)

    monkeypatch.setattr(merge_module, "load_merged", lose_lock)
    with pytest.raises(UserError, match=r"merge\.lock was removed while this process held it"):
        merge_run(run)
    assert not list_outputs(run)


def test_folds_of_different_precisions_do_not_merge() -> None:
    message = refuse(*(make_predictions(fold, precision="bf16" if fold == 1 else "no") for fold in range(FOLDS)))
    assert "the folds differ in the precision: folds [0, 2" in message and "folds [1]: bf16" in message
