"""Which divisions of a batch let Mixup and CutMix mix it: others are refused, or reported."""

from __future__ import annotations

from typing import Any

import pytest

from doccls.config.schema import TrainConfig
from doccls.data.mixing import check_mixing
from doccls.errors import UserError


def check(batch_size: int, world_size: int = 1, **keys: Any) -> str | None:
    return check_mixing(TrainConfig(**{"batch_size": batch_size, "mixup_alpha": 0.4, **keys}), batch_size, world_size)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "keys"),
    [(8, 1, {"micro_batch_size": 1}), (8, 1, {"micro_batch_size": 1, "mixup_alpha": 0.0, "cutmix_alpha": 1.0}),
     (1, 1, {}), (8, 8, {}), (8, 2, {"micro_batch_size": 1}), (4, 3, {})],
)  # fmt: skip
def test_images_one_by_one_are_refused_with_keys(batch_size: int, world_size: int, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check(batch_size, world_size, **keys)
    for key in ("train.mixup_alpha", "train.cutmix_alpha", "train.micro_batch_size", "train.batch_size"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "keys", "unmixed"),
    [(5, 1, {}, 1), (6, 2, {}, 2), (10, 1, {"micro_batch_size": 3}, 2), (6, 1, {"micro_batch_size": 3}, 2),
     (3, 1, {"micro_batch_size": 2}, 1)],
)  # fmt: skip
def test_odd_images_are_counted(batch_size: int, world_size: int, keys: dict[str, Any], unmixed: int) -> None:
    warning = check(batch_size, world_size, **keys)
    assert warning is not None and f"{unmixed} of the {batch_size} images of each batch stay unmixed" in warning


@pytest.mark.parametrize(
    ("batch_size", "world_size", "keys"),
    [(8, 1, {}), (8, 2, {}), (8, 1, {"micro_batch_size": 2}), (12, 3, {"micro_batch_size": 2}),
     (1, 1, {"mixup_alpha": 0.0}), (8, 8, {"mix_prob": 0.0}), (5, 1, {"mixup_alpha": 0.0}),
     (5, 1, {"unmixed_epochs": 10})],
)  # fmt: skip
def test_even_images_and_batches_without_mixing_pass(batch_size: int, world_size: int, keys: dict[str, Any]) -> None:
    assert check(batch_size, world_size, **keys) is None
