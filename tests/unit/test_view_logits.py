"""Stored logits of views: they are read in the wanted order, and only if they are of these weights and pages."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doccls.oof.metrics import mean_probabilities, probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo
from doccls.oof.view_logits import (
    FoldViews,
    ViewsInfo,
    average_logits,
    average_stored,
    average_views,
    describe_views,
    find_views,
    read_views,
    write_views,
)
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError

NAMES, ROWS, SKIPPED = ("id", "hflip", "rot90"), np.array([1, 3, 4, 7]), 3
RNG = np.random.default_rng(0)
LOGITS, DAMAGED = RNG.normal(0, 3, (2, 3, 4, 2)).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "20260101" / "v001-abc")
    paths.best_checkpoint(1).parent.mkdir(parents=True)
    paths.best_checkpoint(1).write_bytes(b"weights")
    return paths


def make_predictions(**changes: Any) -> FoldPredictions:
    """Return predictions of four rows, of which one has no usable image."""
    info = PredictionsInfo(
        "print", 1, 2, 9, ("a", "b"), tuple("wxyz"), (SKIPPED,), 1, 0.5, damage="scan", macro_f1_damaged=0.5
    )
    logits, damaged = LOGITS[0].copy(), DAMAGED[0].copy()
    logits[ROWS == SKIPPED] = damaged[ROWS == SKIPPED] = np.nan
    return FoldPredictions(dataclasses.replace(info, **changes), ROWS, logits, np.array([0, 1, 1, 0]), damaged)


def make_views(**changes: Any) -> FoldViews:
    info = ViewsInfo("print", 1, hashlib.sha256(b"weights").hexdigest(), NAMES)
    usable = ROWS != SKIPPED
    views = FoldViews(info, ROWS[usable], LOGITS[:, usable], DAMAGED[:, usable])
    return dataclasses.replace(views, **changes)


def test_stored_views_are_found_in_the_wanted_order(run: RunPaths) -> None:
    assert find_views(run, make_predictions(), NAMES) is None
    write_views(run.views(1), make_views())
    read = read_views(run.views(1))
    assert read.info == make_views().info == describe_views(run, make_predictions(), NAMES)
    found, usable = find_views(run, make_predictions(), ("rot90", "id")), ROWS != SKIPPED
    assert found is not None and found.damaged_logits_VNC is not None
    assert found.info.views == ("rot90", "id") and np.array_equal(found.indices_N, ROWS[usable])
    assert np.array_equal(found.logits_VNC, LOGITS[[2, 0]][:, usable])
    assert np.array_equal(found.damaged_logits_VNC, DAMAGED[[2, 0]][:, usable])


def test_views_of_other_weights_or_pages_are_not_found(run: RunPaths) -> None:
    info = make_views().info
    others: list[dict[str, Any]] = [
        {"info": dataclasses.replace(info, fingerprint="other")},
        {"info": dataclasses.replace(info, fold=0)},
        {"info": dataclasses.replace(info, checkpoint="other")},
        {"info": dataclasses.replace(info, views=("id", "hflip", "vflip"))},
        {"indices_N": np.array([1, 4, 8])},
        {"damaged_logits_VNC": None},
    ]
    for changes in others:
        write_views(run.views(1), make_views(**changes))
        assert find_views(run, make_predictions(), NAMES) is None, changes
    write_views(run.views(1), make_views())
    assert find_views(run, make_predictions(), NAMES) is not None
    run.views(1).write_bytes(run.views(1).read_bytes()[:-1])
    assert find_views(run, make_predictions(), NAMES) is None
    write_views(run.views(1), make_views())
    run.best_checkpoint(1).unlink()
    assert find_views(run, make_predictions(), NAMES) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_VNC": LOGITS.astype(np.float64)[:, :3]}, "wrong dtype or shape"),
        ({"logits_VNC": LOGITS[:2, :3]}, "wrong dtype or shape"),
        ({"damaged_logits_VNC": LOGITS[:, :3, :1]}, "wrong dtype or shape"),
        ({"indices_N": np.array([1, 7, 4])}, "rows are not ascending"),
        ({"logits_VNC": np.full_like(LOGITS[:, :3], np.inf)}, "page itself are not finite"),
        ({"damaged_logits_VNC": np.full_like(LOGITS[:, :3], np.nan)}, "page itself are not finite"),
    ],
)
def test_malformed_views_are_neither_written_nor_read(run: RunPaths, changes: Any, message: str) -> None:
    with pytest.raises(TensorFileError, match=message):
        write_views(run.views(1), make_views(**changes))
    assert not run.views(1).exists()


def test_non_finite_logits_of_another_view_are_stored_but_not_averaged(run: RunPaths) -> None:
    clean, damaged = LOGITS[:, :3].copy(), DAMAGED[:, :3].copy()
    clean[1, 0, 0], damaged[2, 1, 1] = np.nan, np.inf
    write_views(run.views(1), make_views(logits_VNC=clean, damaged_logits_VNC=damaged))
    predictions = make_predictions()
    found = find_views(run, predictions, NAMES)
    assert found is not None and found.damaged_logits_VNC is not None and found.list_finite() == ("id",)
    assert np.array_equal(found.logits_VNC, clean, equal_nan=True)
    assert np.array_equal(found.damaged_logits_VNC, damaged)
    assert found.take(("rot90", "id")).info.views == ("rot90", "id")
    assert make_views().list_finite() == NAMES
    for views, lacking in ((("id", "hflip"), [1]), (("rot90", "id"), [1]), (("id",), [])):
        averaged, own_lacking = average_stored(run, [predictions], views)
        assert own_lacking == lacking and len(averaged) == 1 - len(lacking)


def test_average_is_of_probabilities_and_keeps_skipped_rows(run: RunPaths) -> None:
    averaged = average_views(make_predictions(), make_views())
    assert averaged.damaged_logits_NC is not None
    usable = ROWS != SKIPPED
    for own, expected in ((averaged.logits_NC, LOGITS), (averaged.damaged_logits_NC, DAMAGED)):
        np.testing.assert_allclose(probabilities(own[usable]), mean_probabilities(expected[:, usable]), rtol=1e-5)
        assert own.dtype == np.float32 and np.isnan(own[~usable]).all()
    assert average_stored(run, [make_predictions()], NAMES) == ([], [1])


def test_logarithms_of_vanishing_probabilities_are_finite() -> None:
    """Probabilities below 1e-308 would be 0 in float64, and their logarithm infinite."""
    logits = np.array([[[0, -2000]], [[0, -3000]]], dtype=np.float32)
    np.testing.assert_allclose(average_logits(logits), [[0, -2000 - np.log(2)]])
