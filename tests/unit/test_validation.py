"""Validation of an epoch: which weights count, by which score, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from doccls.config.schema import ValidConfig
from doccls.errors import UserError
from doccls.oof.metrics import cross_entropy, macro_f1
from doccls.training import validation

ROWS, TARGETS = np.array([2, 3, 5, 8]), np.array([0, 1, 0, 1])
RIGHT = np.eye(2, dtype=np.float32)[TARGETS]
HALF = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
WRONG = np.eye(2, dtype=np.float32)[1 - TARGETS]


def validate(monkeypatch: pytest.MonkeyPatch, valid: ValidConfig, *logits_MNC: list[np.ndarray]) -> Any:
    """Validate epoch 3; each of `logits_MNC` is what one prediction returns for the averaged and the raw weights."""
    answers = iter(logits_MNC)
    monkeypatch.setattr(validation, "predict_logits", lambda *_: (ROWS, np.stack(next(answers))))
    monkeypatch.setattr(validation, "list_evaluation", lambda *_: [])
    targets = np.full(9, -1)
    targets[ROWS] = TARGETS
    manifest = SimpleNamespace(targets_N=targets, ids=[f"i{row}" for row in range(9)])
    data = SimpleNamespace(manifest=manifest, list_valid=lambda _: ROWS)
    engine: Any = SimpleNamespace(
        modules={"ema": None, "raw": None}, plan=SimpleNamespace(fold=1), division=None, normalize=None, num_classes=2,
        accelerator=SimpleNamespace(process_index=0), heartbeat=SimpleNamespace(watch=lambda items, _: items),
    )  # fmt: skip
    experiment: Any = SimpleNamespace(config=SimpleNamespace(valid=valid), data=data)
    batches: Any = iter(())
    result = validation.validate_epoch(experiment, engine, batches, 2)
    assert next(answers, None) is None
    return result


def test_without_damage_pages_alone_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    best, loss = validate(monkeypatch, ValidConfig(), [HALF, RIGHT])
    assert (best.epoch, best.weights, best.macro_f1, best.selection_f1) == (3, "raw", 1.0, 1.0)
    assert np.array_equal(best.indices_N, ROWS) and np.array_equal(best.logits_NC, RIGHT)
    assert best.macro_f1_damaged is best.damaged_logits_NC is None and loss == cross_entropy(TARGETS, RIGHT)


@pytest.mark.parametrize(("select", "weights"), [(None, "ema"), ("damaged", "ema"), ("clean", "raw")])
def test_same_weights_count_for_pages_and_their_copies(
    monkeypatch: pytest.MonkeyPatch, select: Any, weights: str
) -> None:
    """The averaged weights are better on the copies, the raw ones on the pages."""
    clean, damaged = {"ema": HALF, "raw": RIGHT}, {"ema": HALF * 2, "raw": WRONG}
    valid = ValidConfig(damage="light", select=select)
    best, loss = validate(monkeypatch, valid, list(clean.values()), list(damaged.values()))
    assert best.weights == weights
    assert np.array_equal(best.logits_NC, clean[weights]) and np.array_equal(best.damaged_logits_NC, damaged[weights])
    assert best.macro_f1 == macro_f1(TARGETS, clean[weights])
    assert best.macro_f1_damaged == macro_f1(TARGETS, damaged[weights])
    assert best.selection_f1 == (best.macro_f1 if select == "clean" else best.macro_f1_damaged)
    assert loss == cross_entropy(TARGETS, clean[weights])


@pytest.mark.parametrize("is_damaged", [False, True])
def test_samples_with_non_finite_logits_are_named_with_their_copies(
    monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    broken = RIGHT.copy()
    broken[2, 1] = np.nan
    predicted = [[RIGHT, RIGHT], [broken, RIGHT]] if is_damaged else [[RIGHT, broken]]
    with pytest.raises(UserError) as caught:
        validate(monkeypatch, ValidConfig(damage="scan"), *predicted)
    copies = " on damaged copies of their pages (valid.damage)" if is_damaged else ""
    assert str(caught.value) == f"fold 1 epoch 3: 1 samples have non-finite logits{copies}, such as ['i5']"
