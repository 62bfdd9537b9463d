"""The process group: its size, its precision, and what the main process does for all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from doccls.config import Config
from doccls.errors import UserError
from doccls.system.rank import rank_by_environment
from doccls.training import distributed as processes
from doccls.training.distributed import (
    ProcessError,
    can_compute_in,
    check_world_size,
    choose_precision,
    on_main,
    start_processes,
)

MakeConfig = Callable[..., Config]


def set_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device != "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: device == "new gpu")


@pytest.mark.parametrize(
    ("device", "amp", "launched", "precision"),
    [
        ("cpu", True, None, "no"), ("cpu", False, None, "no"), ("cpu", "bf16", None, "bf16"),
        ("cpu", True, "bf16", "bf16"), ("cpu", True, "no", "no"), ("cpu", False, "bf16", "no"),
        ("cpu", "bf16", "fp16", "bf16"), ("cpu", False, "fp16", "no"),
        ("new gpu", True, None, "bf16"), ("new gpu", True, "fp16", "fp16"), ("new gpu", True, "no", "bf16"),
        ("new gpu", "fp16", None, "fp16"), ("new gpu", "fp16", "bf16", "fp16"), ("new gpu", False, "bf16", "no"),
        ("old gpu", True, None, "fp16"), ("old gpu", True, "fp16", "fp16"), ("old gpu", False, "bf16", "no"),
    ],
)  # fmt: skip
def test_precision_comes_from_config_then_launch_then_device(
    monkeypatch: pytest.MonkeyPatch, device: str, amp: bool | str, launched: str | None, precision: str
) -> None:
    set_device(monkeypatch, device)
    assert choose_precision(amp, {} if launched is None else {"ACCELERATE_MIXED_PRECISION": launched}) == precision


@pytest.mark.parametrize(("amp", "launched"), [("fp16", "no"), (True, "fp16")])
def test_fp16_on_cpu_is_rejected_with_alternatives(
    monkeypatch: pytest.MonkeyPatch, amp: bool | str, launched: str
) -> None:
    set_device(monkeypatch, "cpu")
    with pytest.raises(ProcessError, match=r"fp16 needs a GPU.*bf16 or false"):
        choose_precision(amp, {"ACCELERATE_MIXED_PRECISION": launched})


@pytest.mark.parametrize(("amp", "launched"), [("bf16", "no"), (True, "bf16")])
def test_bf16_on_gpu_without_support_is_rejected_with_alternatives(
    monkeypatch: pytest.MonkeyPatch, amp: bool | str, launched: str
) -> None:
    set_device(monkeypatch, "old gpu")
    with pytest.raises(ProcessError, match=r"bf16 needs a GPU of compute capability 8\.0.*fp16 or false"):
        choose_precision(amp, {"ACCELERATE_MIXED_PRECISION": launched})


@pytest.mark.parametrize(
    ("device", "precisions"),
    [("cpu", ["no", "bf16"]), ("old gpu", ["no", "fp16"]), ("new gpu", ["no", "fp16", "bf16"])],
)
def test_precisions_that_a_device_supports(monkeypatch: pytest.MonkeyPatch, device: str, precisions: list[str]) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    set_device(monkeypatch, device)
    assert [precision for precision in ("no", "fp16", "bf16") if can_compute_in(precision)] == precisions


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
def test_requested_cpu_is_used_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    set_device(monkeypatch, "new gpu")
    assert choose_precision(True, {"ACCELERATE_USE_CPU": value}) == "no"
    with pytest.raises(ProcessError):
        choose_precision("fp16", {"ACCELERATE_USE_CPU": value})
    assert choose_precision(True, {"ACCELERATE_USE_CPU": "false"}) == "bf16"


def test_launch_that_silently_starts_one_process_is_rejected(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    """The variables are those that `accelerate launch --cpu --num_processes 2` sets for its one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(processes, "Accelerator", lambda **_: pytest.fail("the process group was formed"))
    with pytest.raises(ProcessError) as caught:
        start_processes(make_config())
    assert "accelerate_configs/cpu_2.yaml" in str(caught.value) and "--multi_gpu" in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_CPU": "True"},
        {"MASTER_ADDR": "h"},
        {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "h", "WORLD_SIZE": "2"},
    ],
)
def test_other_launches_are_accepted(environment: dict[str, str]) -> None:
    processes._check_launch(environment)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_rank_are_rejected(name: str) -> None:
    """With `srun -n 8 python -m doccls.train`, or mpirun, each of eight processes would train everything."""
    with pytest.raises(ProcessError, match=rf"{name}=8\) without a rank.*sbatch slurm/kfold\.sh CONFIG"):
        processes._check_launch({name: "8"})
    processes._check_launch({name: "8", "RANK": "3", "WORLD_SIZE": "8"})
    processes._check_launch({name: "1"})
    processes._check_launch({name: "", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # in a batch script


def test_rank_that_sees_only_one_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ProcessError, match="LOCAL_RANK=2, but this process sees only one GPU"):
        processes._check_launch({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"})
    processes._check_launch({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"})
    processes._check_launch({"RANK": "2", "LOCAL_RANK": "2", "ACCELERATE_USE_CPU": "true"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    processes._check_launch({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"})


@pytest.mark.parametrize(("started", "world_size"), [(2, 1), (1, 2), (4, 2)])
def test_group_of_another_size_than_started_is_rejected(make_config: MakeConfig, started: int, world_size: int) -> None:
    with pytest.raises(ProcessError, match=f"{started} processes were started.*group of {world_size}"):
        check_world_size(world_size, started, make_config())


def test_other_number_than_the_config_expects_is_rejected(make_config: MakeConfig) -> None:
    config = make_config(train={"num_processes": 4})
    check_world_size(4, 4, config)
    with pytest.raises(ProcessError, match=r"train.num_processes = 4, but 1 were started"):
        check_world_size(1, 1, config)


def test_more_processes_than_samples_in_a_batch_are_rejected(make_config: MakeConfig) -> None:
    config = make_config(train={"batch_size": 3})
    check_world_size(3, 3, config)
    with pytest.raises(ProcessError, match=r"train\.batch_size = 3"):
        check_world_size(4, 4, config)


def test_rank_comes_from_the_environment() -> None:
    assert rank_by_environment({}) == 0
    assert rank_by_environment({"RANK": "3"}) == 3


# --- on_main ---------------------------------------------------------------------------------------------------------


def make_accelerator(count: int, main: bool) -> Any:
    return SimpleNamespace(num_processes=count, is_main_process=main)


def test_single_process_calls_the_function_itself() -> None:
    assert on_main(make_accelerator(1, True), lambda: 7) == 7
    with pytest.raises(RuntimeError, match="as it is"):
        on_main(make_accelerator(1, True), lambda: (_ for _ in ()).throw(RuntimeError("as it is")))


def broadcast(monkeypatch: pytest.MonkeyPatch, sent: object) -> list[object]:
    """Replace the broadcast by one that records what it sends or, if `sent` is given, receives that."""
    boxes: list[object] = []

    def fake(box: list[object], **others: object) -> None:
        if sent is not None:
            box[0] = sent
        boxes.append(box[0])

    monkeypatch.setattr(dist, "broadcast_object_list", fake)
    return boxes


def test_main_process_calls_the_function_and_others_get_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = broadcast(monkeypatch, None)
    assert on_main(make_accelerator(2, True), lambda: "result") == "result"
    assert boxes == ["result"]
    broadcast(monkeypatch, "result")
    assert on_main(make_accelerator(2, False), lambda: pytest.fail("not the main process")) == "result"


def test_user_error_reaches_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ProcessError("fix this")

    boxes = broadcast(monkeypatch, None)
    with pytest.raises(ProcessError, match="fix this"):
        on_main(make_accelerator(2, True), fail)
    assert len(boxes) == 1, "without a broadcast the others would wait forever"
    broadcast(monkeypatch, boxes[0])
    with pytest.raises(UserError, match="fix this"):
        on_main(make_accelerator(2, False), fail)


def test_config_sets_threads_and_seed(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        accelerator = start_processes(make_config(train={"cpu_threads": 3, "amp": False}, project={"seed": 5}))
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
        assert accelerator.num_processes == 1 and accelerator.mixed_precision == "no"
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.rand(1) == drawn
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "dynamo"),
    ],
)
def test_accelerate_options_that_change_results_are_rejected(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, name: str, value: str, expected: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(name, value)
    try:
        with pytest.raises(ProcessError, match=expected):
            start_processes(make_config(train={"deterministic": False}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
