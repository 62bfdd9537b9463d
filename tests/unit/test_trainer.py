"""A finished fold leaves nothing behind for the next."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from doccls.training.trainer import release_memory


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_finished_fold_leaves_no_model_in_memory(accelerator: Accelerator) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    alive = weakref.ref(model)
    gc.disable()  # only the function under test may collect
    try:
        del model, optimizer
        assert alive() is not None
        release_memory(accelerator)
        assert alive() is None
    finally:
        gc.enable()
