"""Names of models: former names of timm, and folders in the layout of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from doccls.config.schema import ModelConfig
from doccls.errors import UserError
from doccls.model.build import build_model, fetch_pretrained, get_normalization
from doccls.model.source import check_model_name, has_fixed_input_size, resolve_alias
from doccls.run.fingerprint import digest_weights


def save_model(folder: Path, name: str = "test_vit", weights: str = "model.safetensors", **keys: Any) -> Path:
    """Write a model in the hub's layout, whose input was normalized as no other model's."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(99)
    state = timm.create_model(name, num_classes=7).state_dict()
    content = {"architecture": name, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "fixed_input_size": True, **keys}}
    (folder / "config.json").write_text(json.dumps(content))
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    elif weights:
        torch.save(state, folder / weights)
    return folder


# --- former names ----------------------------------------------------------------------------------------------------


def test_former_names_stand_for_current_ones_with_tag() -> None:
    assert resolve_alias("vit_tiny_patch16_224_in21k") == "vit_tiny_patch16_224.augreg_in21k"
    assert resolve_alias("tf_efficientnet_b3_ns") == "tf_efficientnet_b3.ns_jft_in1k"
    assert resolve_alias("resnet18") == "resnet18"


def test_model_of_former_name_is_built_for_its_image_size_and_normalization() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224_in21k", pretrained=False)
    check_model_name(config.name)
    model = build_model(config, 3, 96)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 3)
    tagged = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=3)
    assert get_normalization(config, model) == get_normalization(config, tagged)


def test_weights_of_former_name_are_fetched_by_current_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fetched = timm.create_model, []

    def create(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            fetched.append(name)
        model: torch.nn.Module = real(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    build_model(ModelConfig(name="vit_tiny_patch16_224_in21k"), 3, 96)
    assert fetched == ["vit_tiny_patch16_224.augreg_in21k"]


@pytest.mark.parametrize(
    "content", [b'{"architecture": "test_vit", "pretrained_cfg": null}', b'{"architecture": "test_vit"}']
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_config_of_folder_needs_only_an_architecture(tmp_path: Path, content: bytes, mark: bytes) -> None:
    (tmp_path / "config.json").write_bytes(mark + content)
    check_model_name(f"local-dir:{tmp_path}")
    assert has_fixed_input_size(f"local-dir:{tmp_path}") == has_fixed_input_size("test_vit")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model.pth", "best.pth"])
def test_model_in_folder_is_built_for_image_size_with_its_weights(tmp_path: Path, weights: str) -> None:
    folder = save_model(tmp_path / "m", weights=weights)
    config = ModelConfig(name=f"local-dir:{folder}")
    assert has_fixed_input_size(config.name)
    model = build_model(config, 3, 96)
    stored = timm.models.load_state_dict(str(folder / weights))
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 3)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])
    assert get_normalization(config, model)[0] == (0.1, 0.2, 0.3)
    assert fetch_pretrained(config, 96) is None


def test_architecture_tells_input_size_that_folder_does_not(tmp_path: Path) -> None:
    for name, fixed in (("test_vit", True), ("test_resnet", False)):
        folder = save_model(tmp_path / name, name)
        (folder / "config.json").write_text(json.dumps({"architecture": name}))
        assert has_fixed_input_size(f"local-dir:{folder}") is fixed


def test_pooling_of_model_in_folder_is_checked(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    with pytest.raises(UserError, match=r"model\.pooling = 'gem': .* supports avg, max, avgmax, token, map, or null"):
        build_model(ModelConfig(name=f"local-dir:{folder}", pooling="gem"), 3, 96)


def test_trained_model_is_built_without_weights_of_folder(tmp_path: Path) -> None:
    folder = save_model(tmp_path, weights="")
    assert build_model(ModelConfig(name=f"local-dir:{folder}"), 3, 96, fetch=False)(torch.rand(1, 3, 96, 96)).shape


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("", "not the JSON file"), ("[1]", "not the JSON file"), ("{}", "not the JSON file"),
     ('{"architecture": 3}', "not the JSON file"), ('{"architecture": "test_vitt"}', "the closest are test_vit")],
)  # fmt: skip
def test_folder_without_model_is_rejected_with_key_and_path(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        check_model_name(f"local-dir:{tmp_path}")
    assert f"model.name = 'local-dir:{tmp_path}'" in str(caught.value) and reason in str(caught.value)


def test_missing_or_several_weights_are_reported(tmp_path: Path) -> None:
    folder = save_model(tmp_path, weights="")
    config = ModelConfig(name=f"local-dir:{folder}")
    with pytest.raises(UserError, match=r"has no weights .*model\.pretrained: false"):
        digest_weights(config)
    save_model(tmp_path, weights="a.pth")
    save_model(tmp_path, weights="b.pth")
    with pytest.raises(UserError, match=r"several weights \(a\.pth, b\.pth\): set model\.weights"):
        digest_weights(config)


# --- the digest of what a model starts from --------------------------------------------------------------------------


def test_digest_depends_on_content_of_folder_not_on_its_path(tmp_path: Path) -> None:
    config = ModelConfig(name=f"local-dir:{save_model(tmp_path / 'a')}")
    moved = ModelConfig(name=f"local-dir:{save_model(tmp_path / 'b')}")
    assert digest_weights(config) == digest_weights(moved)
    (tmp_path / "b/README.md").write_text("not used")
    assert digest_weights(config) == digest_weights(moved)
    save_file({"x": torch.ones(1)}, tmp_path / "b/model.safetensors")
    assert digest_weights(config) != digest_weights(moved)


def test_digest_depends_on_config_of_folder(tmp_path: Path) -> None:
    config = ModelConfig(name=f"local-dir:{save_model(tmp_path)}")
    before = digest_weights(config)
    save_model(tmp_path, crop_pct=0.5)
    assert digest_weights(config) != before


def test_digest_ignores_weights_of_folder_that_are_not_used(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    other = tmp_path / "w.safetensors"
    save_file({"x": torch.ones(1)}, other)
    unused = [
        ModelConfig(name=f"local-dir:{folder}", pretrained=False),
        ModelConfig(name=f"local-dir:{folder}", weights=other),
    ]
    before = [digest_weights(config) for config in unused]
    (folder / "model.safetensors").unlink()
    assert [digest_weights(config) for config in unused] == before
    assert len(set(before)) == 2
