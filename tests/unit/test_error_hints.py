"""Hints about config keys for torch errors, and the test of BatchNorm with one image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from doccls.config import Config
from doccls.data.sampler import BatchPlan
from doccls.errors import UserError
from doccls.model.build import synchronize_batchnorm
from doccls.run.heartbeat import Cause, find_cause
from doccls.training.error_hints import advise_on_batchnorm, check_smallest_micro_batch, translate_error
from tests.unit.conftest import MakeConfig


def make_accelerator(device: str = "cpu", num_processes: int = 1) -> Accelerator:
    """Return a stand-in with the attributes that the hints read."""
    return SimpleNamespace(device=torch.device(device), num_processes=num_processes)  # type: ignore[return-value]


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(train={"batch_size": 1})


def test_batchnorm_error_with_one_image_names_the_batch_keys(config: Config) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value") as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    translated = translate_error(caught.value, config.train, make_accelerator())
    assert isinstance(translated, UserError)
    keys = "train.batch_size (now 1, for all processes together) or train.micro_batch_size (now None)"
    assert keys in str(translated)


def test_missing_deterministic_kernel_names_the_key(config: Config) -> None:
    error = RuntimeError("adaptive_max_pool2d_backward_cuda does not have a deterministic implementation")
    translated = translate_error(error, config.train, make_accelerator())
    assert isinstance(translated, UserError)
    message = "train.deterministic: this model has no deterministic implementation here; set it to false"
    assert message in str(translated)


@pytest.mark.parametrize(
    ("ranks", "train", "expected"),
    [
        ("8 cuda", {}, "over 4 images at a time; consider fewer processes per fold, with folds side by side "
                "(doccls-launch run), a larger train.batch_size (now 32) with train.lr_scaling, train.sync_bn"),
        ("4 cpu", {}, "over 8 images at a time; consider fewer processes per fold, with folds side by side "
                "(doccls-launch run), a larger train.batch_size (now 32) with train.lr_scaling"),
        ("1 cuda", {"micro_batch_size": 8},
         "over 8 images at a time; consider a larger train.micro_batch_size (now 8)"),
        ("2 cuda", {}, None),
        ("1 cuda", {"batch_size": 4}, None),  # the user wants no more images in a step
    ],
)  # fmt: skip
def test_batchnorm_over_few_images_gives_advice(
    make_config: MakeConfig, ranks: str, train: dict[str, int], expected: str | None
) -> None:
    count, device = ranks.split()
    accelerator = make_accelerator(device, int(count))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    train_config = make_config(train={"batch_size": 32, **train}).train
    advice = advise_on_batchnorm(model, train_config, accelerator)
    assert advice is None if expected is None else advice == f"BatchNorm normalises {expected}"
    assert advise_on_batchnorm(synchronize_batchnorm(model), train_config, accelerator) is None
    assert advise_on_batchnorm(torch.nn.Linear(2, 2), train_config, accelerator) is None


def test_other_errors_are_not_translated(config: Config) -> None:
    assert translate_error(RuntimeError("peer is gone"), config.train, make_accelerator()) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_full_gpu_is_reported_with_numbers_and_keys(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 80 * 2**30))
    config = make_config(train={"batch_size": 48, "img_size": 384})
    translated = translate_error(error, config.train, make_accelerator("cuda:1", 2))
    assert translated is not None and find_cause(translated) is Cause.OUT_OF_MEMORY, (
        "the launcher halves the micro-batch"
    )
    message = str(translated)
    assert message.startswith("CUDA out of memory on cuda:1: ") and "0.50 GiB free of 80.00 GiB" in message
    assert ("requested 2.00 GiB" in message) == isinstance(error, torch.OutOfMemoryError)
    keys = "train.micro_batch_size below 24 (the batch size stays), train.img_size below 384, or train.amp (now True)"
    assert f"set {keys}" in message


def test_memory_held_by_others_is_reported_as_another_cause(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 80 * 2**30))
    for own, cause in (("39.00 GiB", Cause.MEMORY_TAKEN), ("79.00 GiB", Cause.OUT_OF_MEMORY)):
        error = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 512.00 "
            f"MiB is free. Process 7 has 40.50 GiB memory in use. Including non-PyTorch memory, this process has {own} "
            "memory in use. Of the allocated memory 38.00 GiB is allocated by PyTorch"
        )
        translated = translate_error(error, make_config().train, make_accelerator("cuda:1"))
        assert translated is not None
        translated.__cause__ = error
        assert find_cause(translated) is find_cause(error) is cause
        full = torch.OutOfMemoryError(str(error).replace("512.00 MiB is free", "0 bytes is free"))
        assert find_cause(full) is cause
        assert ("40.50 GiB held by other processes" in str(translated)) == (cause is Cause.MEMORY_TAKEN)


class Normalized(torch.nn.Module):
    """BatchNorm over a feature map of 1 x 1 or 2 x 2."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(side), torch.nn.BatchNorm2d(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.layers(images)
        return maps


@pytest.mark.parametrize(
    ("batch_size", "world_size", "micro", "side", "rejected"),
    [(3, 2, None, 1, True), (3, 2, None, 2, False), (4, 2, None, 1, False), (5, 1, 2, 1, True), (5, 1, 3, 1, False)],
)
def test_micro_batch_of_one_image_is_tested_before_training(
    make_config: MakeConfig, batch_size: int, world_size: int, micro: int | None, side: int, rejected: bool
) -> None:
    train = make_config(train={"batch_size": batch_size, "micro_batch_size": micro, "img_size": 32}).train
    model = Normalized(side)
    model.register_parameter("any", torch.nn.Parameter(torch.zeros(1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = BatchPlan(1, 0, np.arange(20), batch_size, 1)
    if rejected:
        with pytest.raises(UserError, match=r"train\.batch_size \(now"):
            check_smallest_micro_batch(model, plan, train, world_size)
    else:
        check_smallest_micro_batch(model, plan, train, world_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
