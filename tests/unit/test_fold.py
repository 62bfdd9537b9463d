"""What one fold says of errors that torch words for itself, and what it does not hand on to the next."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from doccls.config import Config
from doccls.training.fold import _explain, release_memory
from doccls.training.loop import TrainingError
from tests.unit.conftest import MakeConfig


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(train={"batch_size": 1})


def test_batch_norm_with_one_image_names_the_batch_keys(config: Config) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value") as met:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    explained = _explain(met.value, config)
    assert isinstance(explained, TrainingError)
    assert "train.batch_size (now 1)" in str(explained) and "train.micro_batch_size (now None)" in str(explained)


def test_a_step_without_deterministic_kernel_names_the_key(config: Config) -> None:
    error = RuntimeError("adaptive_max_pool2d_backward_cuda does not have a deterministic implementation")
    explained = _explain(error, config)
    assert explained is not None and "train.deterministic = True" in str(explained)


def test_other_errors_stay_what_they_are(config: Config) -> None:
    assert _explain(RuntimeError("out of memory"), config) is None


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_finished_fold_leaves_no_model_in_memory(accelerator: Accelerator) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    alive = weakref.ref(model)
    gc.disable()  # only what is under test may collect
    try:
        del model, optimizer
        assert alive() is not None
        release_memory(accelerator)
        assert alive() is None
    finally:
        gc.enable()
