"""Models: any timm name, errors that name the config key, and weight files that are never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from doccls.config.schema import ModelConfig
from doccls.errors import UserError
from doccls.model.build import build_model, check_img_size, count_parameters, get_normalization, list_poolings
from doccls.model.pooling import GeneralizedMeanPool2d

SIZE = 64


def config(name: str, **keys: Any) -> ModelConfig:
    return ModelConfig(**{"name": name, "pretrained": False, **keys})


def reject(name: str, img_size: int = SIZE, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_model(config(name, **keys), 3, img_size)
    return str(caught.value)


def save_weights(path: Path, name: str = "test_resnet", num_classes: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(99)
    model = timm.create_model(name, num_classes=num_classes)
    weights: dict[str, torch.Tensor] = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return weights


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnt50", "resnet50"), ("efficientnet_b33", "efficientnet_b3"), ("swin_base_patch4_window12", "swin_base"),
     ("ResNet18", "resnet18"), ("convnext_tiny.in22k_typo", "convnext_tiny.in12k_ft_in1k")],
)  # fmt: skip
def test_unknown_name_is_rejected_with_closest_names(name: str, near: str) -> None:
    message = reject(name)
    assert f"model.name = {name!r}" in message and near in message


@pytest.mark.parametrize("name", ["resnet50.typo", "resnet50.a1_in1k_typo"])
def test_unknown_tag_is_rejected_with_known_tags(name: str) -> None:
    assert "resnet50." in reject(name).split("closest", 1)[1]


def test_name_without_close_match_refers_to_list() -> None:
    assert "timm.list_models()" in reject("zzzz9999qqqq")


@pytest.mark.parametrize("name", ["local-dir:/no/such/folder", "bad-scheme:x"])
def test_name_with_missing_source_is_rejected(name: str) -> None:
    assert name in reject(name)


def test_model_has_classes_and_is_in_training_mode() -> None:
    model = build_model(config("test_resnet"), 5, SIZE)
    assert model.training
    assert model(torch.rand(2, 3, SIZE, SIZE)).shape == (2, 5)


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_model_with_fixed_input_size_is_built_for_img_size(name: str) -> None:
    assert build_model(config(name), 3, 96).eval()(torch.rand(1, 3, 96, 96)).shape == (1, 3)


def test_unsupported_option_is_reported() -> None:
    message = reject("vgg11", drop_path_rate=0.1)
    assert "vgg11" in message and "model.drop_path_rate = 0.1" in message


def test_drop_rate_is_passed_on() -> None:
    model = build_model(config("test_resnet", drop_rate=0.4), 3, SIZE)
    assert model.drop_rate == 0.4


def test_initial_weights_come_from_global_generator() -> None:
    def build(seed: int) -> bytes:
        torch.manual_seed(seed)
        return build_model(config("test_resnet"), 3, SIZE).state_dict()["conv1.0.weight"].numpy().tobytes()

    assert build(1) == build(1) != build(2)


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "supported", "unsupported"),
    [
        ("test_resnet", {"avg", "max", "avgmax", "catavgmax", "gem"}, {"token", "map"}),
        ("test_vit", {"avg", "max", "token", "map"}, {"gem", "catavgmax"}),
        ("test_convnext", {"avg", "max", "avgmax", "gem"}, {"token"}),
        ("test_efficientnet", {"avg", "gem"}, {"token"}),
    ],
)
def test_unsupported_pooling_is_rejected_with_supported_ones(
    name: str, supported: set[str], unsupported: set[str]
) -> None:
    for pooling in [*sorted(unsupported), "fast", ""]:
        message = reject(name, pooling=pooling)
        assert f"model.pooling = {pooling!r}: {name} supports " in message and "null" in message
        listed = set(message.split(" supports ")[1].split(", or null")[0].split(", "))
        assert supported <= listed and not unsupported & listed
        assert "Pooling can only be disabled" not in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_every_listed_pooling_builds_and_trains(name: str) -> None:
    for pooling in list_poolings(name, SIZE):
        model = build_model(config(name, pooling=pooling), 3, SIZE)
        output = model(torch.rand(2, 3, SIZE, SIZE))
        assert output.shape == (2, 3)
        output.sum().backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad), pooling


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_gem_replaces_pooling_and_its_power_is_learned(name: str) -> None:
    model = build_model(config(name, pooling="gem"), 3, SIZE)
    pools = [module for module in model.modules() if isinstance(module, GeneralizedMeanPool2d)]
    assert len(pools) == 1
    model(torch.rand(2, 3, SIZE, SIZE)).square().sum().backward()
    assert pools[0].gem_power.grad is not None and pools[0].gem_power.grad.abs() > 0


def test_list_poolings_does_not_draw_from_global_generator() -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    list_poolings("test_resnet", SIZE)
    assert torch.rand(1) == expected


# --- weights from a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_file_is_loaded_except_classifier(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    saved = save_weights(path, name)
    torch.manual_seed(1)
    initial = build_model(config(name), 3, 160).state_dict()
    torch.manual_seed(1)
    loaded = build_model(config(name, weights=path), 3, 160).state_dict()
    classifier = timm.create_model(name).pretrained_cfg["classifier"]
    for key, value in loaded.items():
        source = initial if key.startswith(f"{classifier}.") else saved
        assert torch.equal(value, source[key]), key
    assert not all(torch.equal(initial[key], saved[key]) for key in saved if not key.startswith(classifier))


def test_classifier_is_new_even_if_file_has_same_number_of_classes(tmp_path: Path) -> None:
    saved = save_weights(tmp_path / "w.pth", num_classes=3)
    loaded = build_model(config("test_resnet", weights=tmp_path / "w.pth"), 3, SIZE).state_dict()
    assert not torch.equal(loaded["fc.weight"], saved["fc.weight"])


def test_weights_in_training_checkpoint_are_found(tmp_path: Path) -> None:
    saved = save_weights(tmp_path / "w.pth")
    torch.save({"state_dict": saved, "epoch": 3}, tmp_path / "c.pth")
    loaded = build_model(config("test_resnet", weights=tmp_path / "c.pth"), 3, SIZE).state_dict()
    assert torch.equal(loaded["conv1.0.weight"], saved["conv1.0.weight"])


def test_weights_file_wins_over_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_weights(tmp_path / "w.pth")
    monkeypatch.setattr("doccls.model.build._fetch_pretrained", lambda *_: pytest.fail("the hub was contacted"))
    loaded = build_model(config("test_resnet", pretrained=True, weights=tmp_path / "w.pth"), 3, SIZE).state_dict()
    assert torch.equal(loaded["conv1.0.weight"], saved["conv1.0.weight"])


def test_no_weights_are_fetched_if_fetch_is_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doccls.model.build._fetch_pretrained", lambda *_: pytest.fail("the hub was contacted"))
    build_model(config("test_resnet", pretrained=True, weights=Path("/gone.pth")), 3, SIZE, fetch=False)


def test_weights_fit_model_with_gem(tmp_path: Path) -> None:
    saved = save_weights(tmp_path / "w.pth")
    model = build_model(config("test_resnet", weights=tmp_path / "w.pth", pooling="gem"), 3, SIZE)
    assert torch.equal(model.state_dict()["conv1.0.weight"], saved["conv1.0.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_other_architecture_are_rejected(tmp_path: Path, suffix: str) -> None:
    save_weights(tmp_path / f"w{suffix}", "test_vit")
    message = reject("test_resnet", weights=tmp_path / f"w{suffix}")
    assert str(tmp_path / f"w{suffix}") in message and "does not fit the model" in message
    assert "are missing, such as bn1.bias, " in message


def test_missing_weights_file_is_reported_with_key_path_and_rule(tmp_path: Path) -> None:
    message = reject("test_resnet", weights=tmp_path / "gone.pth")
    assert f"model.weights: no such file: {tmp_path / 'gone.pth'}" in message
    assert "relative to the config file" in message


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["pickle", "zip", "old", "inside", "named .safetensors", "named .bin"])
def test_code_in_weights_file_is_rejected_and_not_run(tmp_path: Path, form: str) -> None:
    target = tmp_path / "made"
    path = tmp_path / {"named .safetensors": "w.safetensors", "named .bin": "w.bin"}.get(form, "w.pth")
    if form in ("pickle", "named .safetensors"):
        path.write_bytes(pickle.dumps(Trap(target), protocol=2))
    else:
        content: Any = {"state_dict": {"a": Trap(target)}} if form == "inside" else Trap(target)
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    message = reject("test_resnet", weights=path)
    assert str(path) in message
    assert not target.exists()
    pickle.loads(pickle.dumps(Trap(target)))  # noqa: S301 (proves that the trap works)
    assert target.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.txt"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02.", b"\0" * 100, b"PK\x03\x04 torn"])
def test_file_without_weights_is_rejected(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in reject("test_resnet", weights=tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3), {}, None])
def test_content_that_is_no_state_dict_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in reject("test_resnet", weights=tmp_path / "w.pth")


def test_truncated_weights_file_is_rejected(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        save_weights(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert str(tmp_path / name) in reject("test_resnet", weights=tmp_path / name)


# --- weights from the hub --------------------------------------------------------------------------------------------


def test_failure_that_is_no_network_failure_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            raise RuntimeError("tensors of another shape\nlong story")
        model: torch.nn.Module = real(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    message = reject("test_resnet", pretrained=True)
    assert "'test_resnet' could not be fetched from the hub (tensors of another shape)" in message
    assert "model.weights" in message


def test_model_without_pretrained_weights_is_reported() -> None:
    bare = next(
        name for name in timm.list_models("resnet*") + timm.list_models("efficientnet*")
        if not timm.models.is_model_pretrained(name)
    )  # fmt: skip
    message = reject(bare, pretrained=True)
    assert f"no pretrained weights for {bare!r}" in message
    assert "model.pretrained: false" in message and "model.weights" in message


def test_hub_weights_are_those_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    hub = timm.create_model("test_resnet")
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **o: hub if pretrained else real(name, **o)
    )
    model = build_model(config("test_resnet", pretrained=True), 3, SIZE)
    assert torch.equal(model.state_dict()["conv1.0.weight"], hub.state_dict()["conv1.0.weight"])
    assert model.state_dict()["fc.weight"].shape[0] == 3


# --- properties of a model -------------------------------------------------------------------------------------------


def test_normalization_is_that_of_pretraining_unless_configured() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    pretrained = timm.data.resolve_model_data_config(model)
    expected = (tuple(pretrained["mean"]), tuple(pretrained["std"]))
    assert get_normalization(config("vit_tiny_patch16_224"), model) == expected
    stated = config("vit_tiny_patch16_224", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert get_normalization(stated, model) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    black = config("vit_tiny_patch16_224", mean=(0.0, 0.0, 0.0))
    assert get_normalization(black, model)[0] == (0.0, 0.0, 0.0)


def test_count_parameters_counts_all_and_trainable() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    assert count_parameters(model) == (26, 14)
    assert count_parameters(model)[0] == int(np.sum([weight.numel() for weight in model.parameters()]))


@pytest.mark.parametrize("pooling", ["avg", "map"])
def test_weights_fit_model_whose_pooling_has_weights(tmp_path: Path, pooling: str) -> None:
    stored = {name: torch.rand_like(value) for name, value in timm.create_model("test_vit").state_dict().items()}
    save_file(stored, tmp_path / "w.safetensors")
    config = ModelConfig(name="test_vit", pooling=pooling, weights=tmp_path / "w.safetensors")
    loaded = build_model(config, 3, 160).state_dict()
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])
    if pooling == "avg":  # timm's fc_norm is the same norm after the pooling
        assert torch.equal(loaded["fc_norm.weight"], stored["norm.weight"])


def test_unsupported_image_size_is_reported_with_key() -> None:
    with pytest.raises(UserError, match=r"train\.img_size = 100"):
        check_img_size(config("test_vit"), 100)
    check_img_size(config("test_vit"), 96)


def test_image_size_that_can_not_be_checked_is_no_error() -> None:
    """As where an operation has no form without data, or the hub that the model comes from does not answer."""
    for error in (NotImplementedError("aten::x on meta"), ConnectionError("no network")):
        with patch.object(timm, "create_model", side_effect=error) as create:
            check_img_size(config("test_vit"), 100)
        create.assert_called_once()
