"""Initial weights from old files and from other trainers: found exactly, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from doccls.config.schema import ModelConfig
from doccls.errors import UserError
from doccls.model.build import build_model

SIZE = 64
State = dict[str, torch.Tensor]


def make_state(name: str = "test_resnet", seed: int = 99) -> State:
    """Return the weights of a model with 7 classes, with statistics that no new model has."""
    torch.manual_seed(seed)
    state = timm.create_model(name, num_classes=7).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value + 5 for key, value in state.items()}


def load(path: Path, name: str = "test_resnet", img_size: int = SIZE) -> State:
    model = build_model(ModelConfig(name=name, pretrained=False, weights=path), 3, img_size)
    state: State = model.state_dict()
    return state


def load_content(tmp_path: Path, content: Any, name: str = "test_resnet") -> State:
    torch.save(content, tmp_path / "w.pth")
    return load(tmp_path / "w.pth", name)


def reject(path: Path, name: str = "test_resnet") -> str:
    with pytest.raises(UserError) as caught:
        load(path, name)
    return str(caught.value)


def assert_loaded(loaded: State, saved: State) -> None:
    for key, value in loaded.items():
        if not key.startswith(("fc.", "head.")) and value.is_floating_point():
            assert torch.equal(value, saved[key].to(value.dtype)), key


def with_prefix(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


# --- tensors that a file may lack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_counters_of_batches_may_be_missing(tmp_path: Path, suffix: str) -> None:
    saved = make_state()
    old = {key: value for key, value in saved.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(saved)
    path = tmp_path / f"old{suffix}"
    save_file(old, path) if suffix == ".safetensors" else torch.save(old, path)
    assert_loaded(load(path), saved)


def test_indices_that_constructor_computes_may_be_missing_or_of_another_resolution(tmp_path: Path) -> None:
    saved = make_state("efficientformer_l1")
    indices = [key for key, value in saved.items() if key.endswith("attention_bias_idxs")]
    assert indices
    computed = timm.create_model("efficientformer_l1").state_dict()
    without = {key: value for key, value in saved.items() if key not in indices}
    for stored in (without, without | {key: torch.zeros(1, 2, dtype=torch.long) for key in indices}):
        torch.save(stored, tmp_path / "w.pth")
        loaded = load(tmp_path / "w.pth", "efficientformer_l1", img_size=224)
        assert torch.equal(loaded["stem.conv1.weight"], saved["stem.conv1.weight"])
        assert all(torch.equal(loaded[key], computed[key]) for key in indices)


@pytest.mark.parametrize("ending", ["running_mean", "running_var", "conv1.0.weight", "bn1.bias"])
def test_weights_and_statistics_may_not_be_missing(tmp_path: Path, ending: str) -> None:
    torch.save({key: value for key, value in make_state().items() if not key.endswith(ending)}, tmp_path / "w.pth")
    message = reject(tmp_path / "w.pth")
    assert f"model.weights = {tmp_path / 'w.pth'} does not fit the model" in message
    assert "are missing, such as" in message and ending in message


def test_other_shapes_are_reported_with_tensor_and_both_shapes(tmp_path: Path) -> None:
    saved = make_state()
    shape = list(saved["conv1.0.weight"].shape)
    torch.save(saved | {"conv1.0.weight": saved["conv1.0.weight"][:, :1]}, tmp_path / "w.pth")
    message = reject(tmp_path / "w.pth")
    assert f"conv1.0.weight (float32 {[shape[0], 1, *shape[2:]]} instead of float32 {shape})" in message


def test_other_shape_under_prefix_is_reported_instead_of_missing_tensors(tmp_path: Path) -> None:
    saved = make_state()
    saved["bn1.bias"] = torch.rand(3)
    torch.save({"state_dict": with_prefix(saved, "model.")}, tmp_path / "w.pth")
    message = reject(tmp_path / "w.pth")
    assert "(tensors under state_dict.model.) does not fit" in message and "missing" not in message
    assert "1 have another shape or type, such as bn1.bias (float32 [3] instead of float32 [" in message


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_weights_of_deeper_model_are_refused(tmp_path: Path, prefix: str) -> None:
    deeper = timm.create_model("resnet34", num_classes=7).state_dict()
    torch.save({f"{prefix}{key}": value for key, value in deeper.items()}, tmp_path / "deep.pth")
    config = ModelConfig(name="resnet18", weights=tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"is of a larger model: 96 tensors have no place in this one"):
        build_model(config, 2, SIZE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = make_state()
    damaged = next(iter(state))
    state[damaged].view(-1)[0] = value
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=rf"is damaged: 1 tensors hold NaN or infinity, such as {damaged}"):
        build_model(ModelConfig(name="test_resnet", weights=tmp_path / "damaged.pth"), 2, SIZE)


def test_heads_for_other_tasks_are_ignored(tmp_path: Path) -> None:
    state = make_state() | {"projector.0.weight": torch.zeros(3), "aux_head.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "more.pth")
    model = build_model(ModelConfig(name="test_resnet", weights=tmp_path / "more.pth"), 2, SIZE)
    first = next(iter(state))
    assert torch.equal(model.state_dict()[first], state[first])


def test_quantized_integers_are_no_weights(tmp_path: Path) -> None:
    saved = make_state()
    torch.save(saved | {"conv1.0.weight": saved["conv1.0.weight"].to(torch.int8)}, tmp_path / "w.pth")
    assert "conv1.0.weight (int8 " in reject(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_precision_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {key: value.to(dtype) if value.is_floating_point() else value for key, value in make_state().items()}
    loaded = load_content(tmp_path, saved)
    assert loaded["conv1.0.weight"].dtype == torch.float32
    assert_loaded(loaded, saved)


# --- where other trainers put the tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: with_prefix(state, "module."),
        lambda state: with_prefix(state, "_orig_mod.module."),
        lambda state: with_prefix(state, "model."),
        lambda state: with_prefix(state, "backbone.net."),
        lambda state: {"state_dict": with_prefix(state, "model."), "epoch": 3, "pytorch-lightning_version": "2.0"},
        lambda state: {"state_dict": with_prefix(state, "net._orig_mod.") | {"criterion.weight": torch.ones(3)}},
        lambda state: {"model": with_prefix(state, "module."), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"ema": {"module": state, "updates": 5}},
        lambda state: {"net": state, "acc": 93.1, "epoch": 7},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model": state, "model_ema": None},
    ],
)
def test_weights_of_other_trainers_are_found(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    saved = make_state()
    assert_loaded(load_content(tmp_path, wrap(saved)), saved)


def test_averaged_weights_are_preferred_as_by_timm(tmp_path: Path) -> None:
    raw, averaged = make_state(), make_state(seed=5)
    assert_loaded(load_content(tmp_path, {"state_dict": raw, "state_dict_ema": averaged}), averaged)


@pytest.mark.parametrize("names", [("student.", "teacher."), ("model_a.", "model_b.")])
def test_several_fitting_sets_of_tensors_are_refused_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    torch.save(with_prefix(make_state(), names[0]) | with_prefix(make_state(seed=5), names[1]), tmp_path / "w.pth")
    message = reject(tmp_path / "w.pth")
    assert "several sets of tensors" in message and f"{names[0]}, {names[1]}" in message


def test_mapping_within_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"a": torch.zeros(1)}
    loop["loop"] = loop
    torch.save(loop, tmp_path / "w.pth")
    assert "are missing" in reject(tmp_path / "w.pth")


# --- files that hold no weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"<html><body>Sign in</body></html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    ],
)
def test_file_without_weights_is_described(tmp_path: Path, suffix: str, content: bytes, reason: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert reason in reject(tmp_path / f"w{suffix}")


def test_folder_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "w.pth").mkdir()
    assert f"model.weights: not a file: {tmp_path / 'w.pth'}" in reject(tmp_path / "w.pth")


def test_python_objects_in_file_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": make_state(), "trainer": Path("x")}, tmp_path / "w.pth")
    message = reject(tmp_path / "w.pth")
    assert "pathlib" in message and "torch.save(model.state_dict(), FILE)" in message


# --- file systems that can't map files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError("No such device (os error 19)"), RuntimeError("unable to mmap 4 bytes from file: No such device (19)")],
    ids=repr,
)
def test_weights_are_read_where_files_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(path: Path) -> None:
        raise error

    state = make_state()
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    assert_loaded(load(tmp_path / "w.safetensors"), state)
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    assert "not a .safetensors or .pth file of plain tensors" in reject(tmp_path / "w.safetensors")
