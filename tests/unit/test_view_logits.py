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
        "print", 1, 2, 9, ("a", "b"), tuple("wxyz"), (SKIPPED,), 1, 0.5,
        damage="scan", macro_f1_damaged=0.5, selected_by="damaged",
    )  # fmt: skip
    logits, damaged = LOGITS[0].copy(), DAMAGED[0].copy()
    logits[ROWS == SKIPPED] = damaged[ROWS == SKIPPED] = np.nan
    return FoldPredictions(dataclasses.replace(info, **changes), ROWS, logits, np.array([0, 1, 1, 0]), damaged)


def make_views(**changes: Any) -> FoldViews:
    info = ViewsInfo("print", 1, hashlib.sha256(b"weights").hexdigest(), "damaged", None, NAMES)
    usable = ROWS != SKIPPED
    views = FoldViews(info, ROWS[usable], DAMAGED[:, usable])
    return dataclasses.replace(views, **changes)


def test_stored_views_are_found_in_the_wanted_order(run: RunPaths) -> None:
    assert find_views(run, make_predictions(), NAMES) is None
    write_views(run.views(1), make_views())
    read = read_views(run.views(1))
    assert read.info == make_views().info == describe_views(run, make_predictions(), NAMES)
    found, usable = find_views(run, make_predictions(), ("rot90", "id")), ROWS != SKIPPED
    assert found is not None
    assert found.info.views == ("rot90", "id") and np.array_equal(found.indices_N, ROWS[usable])
    assert np.array_equal(found.logits_VNC, DAMAGED[[2, 0]][:, usable])


def test_logits_with_other_statistics_are_kept_apart(run: RunPaths) -> None:
    write_views(run.views(1), make_views())
    adapted = make_views(info=dataclasses.replace(make_views().info, prior=64), logits_VNC=LOGITS[:, :3])
    write_views(run.views(1, 64), adapted)
    for prior, expected in ((None, make_views().logits_VNC), (64, LOGITS[:, :3])):
        found = find_views(run, make_predictions(), NAMES, prior)
        assert found is not None and found.info.prior == prior and np.array_equal(found.logits_VNC, expected)
    assert find_views(run, make_predictions(), NAMES, 256) is None
    assert average_stored(run, [make_predictions()], NAMES, 256) == ([], [1])


def test_views_of_other_weights_or_pages_are_not_found(run: RunPaths) -> None:
    info = make_views().info
    others: list[dict[str, Any]] = [
        {"info": dataclasses.replace(info, fingerprint="other")},
        {"info": dataclasses.replace(info, fold=0)},
        {"info": dataclasses.replace(info, checkpoint="other")},
        {"info": dataclasses.replace(info, views=("id", "hflip", "vflip"))},
        {"indices_N": np.array([1, 4, 8])},
        {"info": dataclasses.replace(info, pages="clean")},
        {"info": dataclasses.replace(info, prior=64)},
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
        ({"indices_N": np.array([1, 7, 4])}, "rows are not ascending"),
        ({"logits_VNC": np.full_like(LOGITS[:, :3], np.inf)}, "page itself are not finite"),
        ({"logits_VNC": np.full_like(LOGITS[:, :3], np.nan)}, "page itself are not finite"),
    ],
)
def test_malformed_views_are_neither_written_nor_read(run: RunPaths, changes: Any, message: str) -> None:
    with pytest.raises(TensorFileError, match=message):
        write_views(run.views(1), make_views(**changes))
    assert not run.views(1).exists()


def test_non_finite_logits_of_another_view_are_stored_but_not_averaged(run: RunPaths) -> None:
    damaged = DAMAGED[:, :3].copy()
    damaged[1, 0, 0], damaged[2, 1, 1] = np.nan, np.inf
    write_views(run.views(1), make_views(logits_VNC=damaged))
    predictions = make_predictions()
    found = find_views(run, predictions, NAMES)
    assert found is not None and found.list_finite() == ("id",)
    assert np.array_equal(found.logits_VNC, damaged, equal_nan=True)
    assert found.take(("rot90", "id")).info.views == ("rot90", "id")
    assert make_views().list_finite() == NAMES
    for views, lacking in ((("id", "hflip"), [1]), (("rot90", "id"), [1]), (("id",), [])):
        averaged, own_lacking = average_stored(run, [predictions], views)
        assert own_lacking == lacking and len(averaged) == 1 - len(lacking)


def test_average_is_of_probabilities_and_keeps_skipped_rows(run: RunPaths) -> None:
    usable = ROWS != SKIPPED
    for pages in ("clean", "damaged"):
        views = make_views(info=dataclasses.replace(make_views().info, pages=pages))
        predictions = make_predictions(selected_by=pages)
        averaged = average_views(predictions, views)
        own = averaged.selecting_logits_NC
        np.testing.assert_allclose(probabilities(own[usable]), mean_probabilities(DAMAGED[:, usable]), rtol=1e-5)
        assert own.dtype == np.float32 and np.isnan(own[~usable]).all()
        kept = dataclasses.replace(averaged.info, selected_by="clean" if pages == "damaged" else "damaged")
        others = [dataclasses.replace(each, info=kept).selecting_logits_NC for each in (averaged, predictions)]
        assert others[0] is others[1]
    assert average_stored(run, [make_predictions()], NAMES) == ([], [1])


def test_logarithms_of_vanishing_probabilities_are_finite() -> None:
    """Probabilities below 1e-308 would be 0 in float64, and their logarithm infinite."""
    logits = np.array([[[0, -2000]], [[0, -3000]]], dtype=np.float32)
    np.testing.assert_allclose(average_logits(logits), [[0, -2000 - np.log(2)]])
