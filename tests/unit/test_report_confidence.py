"""The most probable classes of each row, block by block."""

from __future__ import annotations

import numpy as np
import pytest

from doccls.oof import metrics
from doccls.oof.merge import MergedOof
from doccls.report.confidence import bin_confidences, calibrate_rows, find_top


@pytest.mark.parametrize("block_rows", [3, 1000])
@pytest.mark.parametrize("values", [2, 4, 100_000])  # few values give many ties
def test_most_probable_classes_are_those_of_a_stable_sort(
    block_rows: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", block_rows * 7)
    rng = np.random.default_rng(values)
    logits_NC = rng.integers(0, values, (40, 7)).astype(np.float32) / values
    logits_NC[:2] = 0.5
    merged = MergedOof(
        logits_NC, rng.integers(0, 7, 40), np.arange(40) % 4, tuple(map(str, range(40))), tuple("abcdefg"), (5, 9), "f"
    )
    calibrated = calibrate_rows(merged, logits_NC)
    assert calibrated.used_M.tolist() == [row for row in range(40) if row not in (5, 9)]
    classes_MK, probs_MK = find_top(calibrated, 3)
    expected = np.argsort(-logits_NC[calibrated.used_M], axis=1, kind="stable")[:, :3]
    assert np.array_equal(classes_MK, expected)
    tempered = logits_NC[calibrated.used_M].astype(np.float64) / calibrated.temperature_M[:, None]
    shares = np.exp(tempered) / np.exp(tempered).sum(axis=1, keepdims=True)
    assert probs_MK == pytest.approx(np.take_along_axis(shares, expected, axis=1))
    assert find_top(calibrated, 20)[0].shape == (38, 7), "no more classes than there are"


def test_bins_hold_their_upper_ends() -> None:
    bins = bin_confidences(np.array([0.2, 2 / 15, 1.0]), np.array([True, False, True]))
    assert bins.count_B.tolist() == [1, 1, 1] and bins.accuracy_B.tolist() == [0, 1, 1]
