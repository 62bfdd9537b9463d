"""Fold predictions on disk: deterministic bytes, verified when read, errors that name the file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from doccls.errors import UserError
from doccls.oof.predictions import (
    FoldPredictions,
    PredictionsInfo,
    find_finished_folds,
    is_merged,
    read_predictions,
    write_predictions,
)
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError, write_tensor_file

DAMAGED = -np.arange(6, dtype=np.float32).reshape(3, 2)


def make_predictions(**changes: Any) -> FoldPredictions:
    """Rows 1, 4, 6 of 8; `changes` replace fields of the info or arrays, by name."""
    arrays = {
        "indices_N": np.array([1, 4, 6]),
        "logits_NC": np.arange(6, dtype=np.float32).reshape(3, 2),
        "targets_N": np.array([0, 1, 0]),
    }
    info = {
        "fingerprint": "abc", "fold": 1, "num_folds": 3, "num_samples": 8, "classes": ("x", "y"),
        "ids": ("i1", 'i,"4', "ü6"), "skipped": (), "best_epoch": 2, "macro_f1": 0.5, "groups": ("a", "b", "a"),
    }  # fmt: skip
    optional = {"damaged_logits_NC": changes["damaged_logits_NC"]} if "damaged_logits_NC" in changes else {}
    more = {name: changes[name] for name in ("damage", "macro_f1_damaged", "selected_by") if name in changes}
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    info |= {name: value for name, value in changes.items() if name in info}
    return FoldPredictions(PredictionsInfo(**info, **more), **arrays, **optional)


def refuse(path: Path) -> str:
    with pytest.raises(TensorFileError) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_predictions_survive_a_round_trip(tmp_path: Path) -> None:
    predictions = make_predictions()
    write_predictions(tmp_path / "deep" / "fold1.safetensors", predictions)
    restored = read_predictions(tmp_path / "deep" / "fold1.safetensors")
    assert restored.info == predictions.info
    for name in ("indices_N", "logits_NC", "targets_N"):
        assert np.array_equal(getattr(restored, name), getattr(predictions, name))
        assert getattr(restored, name).dtype == getattr(predictions, name).dtype


def test_damaged_logits_survive_a_round_trip(tmp_path: Path) -> None:
    predictions = make_predictions(
        damaged_logits_NC=DAMAGED, damage="light", macro_f1_damaged=0.25, selected_by="damaged"
    )
    write_predictions(tmp_path / "p", predictions)
    restored = read_predictions(tmp_path / "p")
    assert restored.info == predictions.info and restored.damaged_logits_NC is not None
    assert np.array_equal(restored.damaged_logits_NC, DAMAGED) and restored.damaged_logits_NC.dtype == np.float32
    write_predictions(tmp_path / "p", make_predictions())
    assert read_predictions(tmp_path / "p").damaged_logits_NC is None


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    def write(predictions: FoldPredictions) -> bytes:
        write_predictions(tmp_path / "p", predictions)
        return (tmp_path / "p").read_bytes()

    plain = write(make_predictions())
    assert write(make_predictions()) == plain
    view = np.asfortranarray(make_predictions().logits_NC)
    assert write(make_predictions(logits_NC=view)) == plain
    changed = np.arange(6, dtype=np.float32).reshape(3, 2) + np.float32(1e-6)
    assert write(make_predictions(logits_NC=changed)) != plain
    assert write(make_predictions(best_epoch=3)) != plain


def test_fold_without_rows_can_be_stored(tmp_path: Path) -> None:
    empty = make_predictions(
        indices_N=np.empty(0, np.int64),
        logits_NC=np.empty((0, 2), np.float32),
        targets_N=np.empty(0, np.int64),
        ids=(),
        groups=(),
    )
    write_predictions(tmp_path / "p", empty)
    assert len(read_predictions(tmp_path / "p").indices_N) == 0


def test_missing_file_is_reported(tmp_path: Path) -> None:
    assert "can't be read" in refuse(tmp_path / "fold0.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 30, 0.3, 0.7, 0.99])
def test_truncated_file_is_rejected(tmp_path: Path, keep: float) -> None:
    write_predictions(tmp_path / "p", make_predictions())
    data = (tmp_path / "p").read_bytes()
    (tmp_path / "p").write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refuse(tmp_path / "p")


def test_flipped_bit_anywhere_is_rejected(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p", make_predictions())
    data = (tmp_path / "p").read_bytes()
    unnoticed = []
    for offset in range(len(data)):
        (tmp_path / "p").write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        try:
            restored = read_predictions(tmp_path / "p")
        except TensorFileError:
            continue
        unnoticed.append((offset, restored.info == make_predictions().info))
    assert all(same for _, same in unnoticed), "a changed byte may pass only where it changes nothing (padding)"
    assert len(unnoticed) <= 8


ARRAYS = {
    "indices": make_predictions().indices_N,
    "logits": make_predictions().logits_NC,
    "targets": make_predictions().targets_N,
}
FORMAT, INFO = "doccls-fold-predictions-6", dataclasses.asdict(make_predictions().info)


@pytest.mark.parametrize("content", ["text", "foreign", "other format", "missing array", "no info"])
def test_file_of_another_kind_is_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fold0.safetensors"
    if content == "text":
        path.write_text("hello")
    elif content == "foreign":
        save_file(ARRAYS, path)
    elif content == "other format":
        write_tensor_file(path, "doccls-oof-part-2", INFO, ARRAYS)
        assert "its format is doccls-oof-part-2; this version reads doccls-fold-predictions-6" in refuse(path)
    elif content == "missing array":
        write_tensor_file(path, FORMAT, INFO, {"logits": ARRAYS["logits"]})
    else:
        save_file(ARRAYS, path, {"doccls": json.dumps({"format": FORMAT})})
    refuse(path)


def test_finished_folds_of_another_version_are_never_overwritten(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_tensor_file(paths.predictions(1), "doccls-oof-part-2", INFO, ARRAYS)
    with pytest.raises(UserError, match=r"has finished folds that this version can't read: .*Take another --run-id"):
        find_finished_folds(paths, "abc", 3)


@pytest.mark.parametrize(
    "info",
    [{}, INFO | {"classes": 3}, INFO | {"more": 1}, {"fold": 1}, INFO | {"fold": "1"}, INFO | {"skipped": [[1]]}],
)
def test_damaged_description_is_rejected(tmp_path: Path, info: dict[str, Any]) -> None:
    path = tmp_path / "p"
    write_tensor_file(path, FORMAT, info, ARRAYS)
    assert "its description is damaged" in refuse(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"indices_N": np.array([1, 6, 4])},
        {"indices_N": np.array([1, 1, 4])},
        {"indices_N": np.array([-1, 4, 6])},
        {"indices_N": np.array([1, 4, 8])},
        {"indices_N": np.array([1, 4, 6], dtype=np.int32)},
        {"logits_NC": np.zeros((3, 2))},
        {"logits_NC": np.zeros((3, 3), np.float32)},
        {"logits_NC": np.zeros((2, 2), np.float32)},
        {"targets_N": np.array([0, 1])},
        {"ids": ("a", "b")},
        {"groups": ("a", "b")},
        {"logits_NC": np.array([[0, 1], [np.nan, 0], [1, 2]], np.float32)},
        {"logits_NC": np.array([[0, 1], [np.inf, 0], [1, 2]], np.float32)},
        {"logits_NC": np.array([[0, 1], [np.nan, 0], [1, 2]], np.float32), "skipped": (1,)},
        {"damaged_logits_NC": DAMAGED},
        {"macro_f1_damaged": 0.25},
        {"damage": "scan"},
        {"damaged_logits_NC": DAMAGED, "macro_f1_damaged": 0.25},
        {"damaged_logits_NC": DAMAGED, "damage": "scan"},
        {"damaged_logits_NC": DAMAGED.astype(np.float64), "macro_f1_damaged": 0.25, "damage": "scan"},
        {"damaged_logits_NC": DAMAGED[:2], "macro_f1_damaged": 0.25, "damage": "scan"},
        {"damaged_logits_NC": DAMAGED * np.float32(np.nan), "macro_f1_damaged": 0.25, "damage": "scan"},
        {"targets_N": np.array([0, 1, 2])},
        {"targets_N": np.array([0, 1, -1])},
        {"fold": 3},
    ],
)
def test_invalid_predictions_are_never_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TensorFileError):
        write_predictions(tmp_path / "p", make_predictions(**changes))
    assert not list(tmp_path.iterdir())


def test_nan_is_allowed_in_skipped_rows(tmp_path: Path) -> None:
    predictions = make_predictions(logits_NC=np.array([[0, 1], [np.nan, np.nan], [1, 2]], np.float32), skipped=(4,))
    write_predictions(tmp_path / "p", predictions)
    assert np.isnan(read_predictions(tmp_path / "p").logits_NC[1]).all()


def test_non_finite_damaged_rows_are_named_unless_skipped(tmp_path: Path) -> None:
    damaged = DAMAGED.copy()
    damaged[1] = np.nan
    changes: dict[str, Any] = {"damaged_logits_NC": damaged, "macro_f1_damaged": 0.25, "damage": "scan"}
    with pytest.raises(TensorFileError, match="1 rows have non-finite damaged logits, such as row 4"):
        write_predictions(tmp_path / "p", make_predictions(**changes))
    write_predictions(tmp_path / "p", make_predictions(**changes, skipped=(4,)))


def test_non_finite_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="2 rows have non-finite logits, such as row 1"):
        write_predictions(
            tmp_path / "p", make_predictions(logits_NC=np.array([[np.nan, 1], [0, 0], [1, np.inf]], np.float32))
        )


def test_run_is_merged_while_no_predictions_are_newer_than_the_merge(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert not is_merged(paths)
    write_predictions(paths.predictions(0), make_predictions())
    assert not is_merged(paths)
    paths.summary.write_text("{}")
    os.utime(paths.summary, ns=(5, 5))
    os.utime(paths.predictions(0), ns=(5, 5))
    assert is_merged(paths)
    os.utime(paths.predictions(0), ns=(6, 6))
    assert not is_merged(paths)
