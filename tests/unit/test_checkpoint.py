"""Best weights on disk: verified when read, run no code, and suffice for prediction."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from doccls.config import Config
from doccls.system.tensor_file import TensorFileError
from doccls.training.checkpoint import BestWeights, parse_config, read_best, write_best

MakeConfig = Callable[..., Config]


@pytest.fixture
def best(make_config: MakeConfig) -> BestWeights:
    state_dict = {
        "a.weight": torch.randn(3, 4), "a.half": torch.randn(5).half(), "a.bf16": torch.randn(2, 2).bfloat16(),
        "n": torch.tensor(7), "none": torch.empty(0, 3),
        "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    }  # fmt: skip
    return BestWeights(
        state_dict=state_dict,
        fingerprint="abc",
        fold=2,
        epoch=4,
        macro_f1=0.625,
        weights="ema",
        classes=("x", "ü", "1"),
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        precision="bf16",
        config=make_config(train={"epochs": 7}, data={"valid_fold": 2}).model_dump(mode="json", exclude={"provenance"}),
    )


def refuse(path: Path) -> str:
    with pytest.raises(TensorFileError) as caught:
        read_best(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_weights_survive_a_round_trip(tmp_path: Path, best: BestWeights) -> None:
    write_best(tmp_path / "ckpt" / "b.pth", best)
    restored_best = read_best(tmp_path / "ckpt" / "b.pth")
    for name in (field.name for field in dataclasses.fields(best)):
        saved, restored = getattr(best, name), getattr(restored_best, name)
        if name == "state_dict":
            assert saved.keys() == restored.keys()
            for key, tensor in saved.items():
                assert torch.equal(tensor, restored[key]) and tensor.dtype == restored[key].dtype
        else:
            assert saved == restored


def test_config_survives_a_round_trip(tmp_path: Path, best: BestWeights, make_config: MakeConfig) -> None:
    write_best(tmp_path / "b.pth", best)
    assert parse_config(read_best(tmp_path / "b.pth")) == make_config(train={"epochs": 7}, data={"valid_fold": 2})


@pytest.mark.parametrize("mode", ["basic", "highperf"])
def test_config_of_every_mode_survives_a_round_trip(make_config: MakeConfig, best: BestWeights, mode: str) -> None:
    config = make_config(mode=mode, model={"mean": (0.5, 0.5, 0.5)}, train={"amp": "bf16", "ema_decay": 0.9})
    dumped = config.model_dump(mode="json", exclude={"provenance"})
    assert parse_config(dataclasses.replace(best, config=dumped)) == config


def test_timm_reads_the_file(tmp_path: Path, best: BestWeights) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    write_best(tmp_path / "b.pth", dataclasses.replace(best, state_dict=model.state_dict()))
    other = timm.create_model("test_resnet", num_classes=3)
    timm.models.load_checkpoint(other, str(tmp_path / "b.pth"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_missing_file_is_reported(tmp_path: Path) -> None:
    assert "no checkpoint" in refuse(tmp_path / "gone.pth")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_file_is_rejected(tmp_path: Path, best: BestWeights, share: float) -> None:
    write_best(tmp_path / "b.pth", best)
    data = (tmp_path / "b.pth").read_bytes()
    (tmp_path / "b.pth").write_bytes(data[: int(share * len(data))])
    refuse(tmp_path / "b.pth")


def test_changed_weight_is_rejected(tmp_path: Path, best: BestWeights) -> None:
    write_best(tmp_path / "b.pth", best)
    data = (tmp_path / "b.pth").read_bytes()
    offset = data.index(best.state_dict["a.weight"].numpy().tobytes())
    (tmp_path / "b.pth").write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    refuse(tmp_path / "b.pth")


def test_changed_metadata_and_swapped_tensors_are_rejected(tmp_path: Path, best: BestWeights) -> None:
    write_best(tmp_path / "b.pth", best)
    content = torch.load(tmp_path / "b.pth", weights_only=True)
    for changed in (
        content | {"meta": content["meta"].replace('"fold": 2', '"fold": 1')},
        content | {"state_dict": content["state_dict"] | {"a.weight": torch.zeros(3, 4)}},
        content | {"digest": "0" * 64},
    ):
        torch.save(changed, tmp_path / "c.pth")
        assert "does not match its digest" in refuse(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], None, {"state_dict": {}}, torch.zeros(2), {"a": 1},
        {"state_dict": {}, "meta": "[]", "digest": "x"},
        {"state_dict": {}, "meta": "3", "digest": "x"},
        {"state_dict": {}, "meta": "{}", "digest": "x"},
        {"state_dict": [], "meta": '{"format": "doccls-best-4"}', "digest": "x"},
    ],
)  # fmt: skip
def test_file_of_another_kind_is_rejected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "b.pth")
    refuse(tmp_path / "b.pth")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02.", b"PK\x03\x04"])
def test_foreign_bytes_are_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.pth").write_bytes(content)
    refuse(tmp_path / "b.pth")


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "made")}, tmp_path / "b.pth")
    refuse(tmp_path / "b.pth")
    assert not (tmp_path / "made").exists()
