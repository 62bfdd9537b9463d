"""Warnings about keys that the user stated and that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from doccls.config import parse_override
from doccls.config.load import MODES, load_with_warnings
from doccls.config.schema import SECTIONS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DATA = "data: {train_csv: a.csv, image_dir_train: images}\n"


def warn(folder: Path, text: str = "", *overrides: str, mode: str | None = None) -> tuple[str, ...]:
    (folder / "c.yaml").write_text(DATA + text)
    return load_with_warnings(folder / "c.yaml", mode, [parse_override(override) for override in overrides]).warnings


IDLE = [
    (["model.pretrained=true", "model.weights=w.pth"], ["model.pretrained"], "model.weights is set"),
    (["train.mix_prob=0.5"], ["train.mix_prob"], "train.mixup_alpha and train.cutmix_alpha are 0"),
    (["train.unmixed_epochs=2"], ["train.unmixed_epochs"], "train.mixup_alpha and train.cutmix_alpha are 0"),
    (["train.mixup_alpha=0.4", "train.mix_prob=0.9", "train.unmixed_epochs=10", "train.epochs=8"],
     ["train.mixup_alpha", "train.mix_prob"], "the last train.unmixed_epochs = 10 of 8 epochs are not mixed"),
    (["train.cutmix_alpha=0.4", "train.unmixed_epochs=8", "train.epochs=8"],
     ["train.cutmix_alpha"], "the last train.unmixed_epochs = 8 of 8 epochs are not mixed"),
    (["train.mixup_alpha=0.4", "train.mix_prob=0"], ["train.mixup_alpha"], "train.mix_prob is 0"),
    (["train.cutmix_alpha=0.4", "train.mix_prob=0"], ["train.cutmix_alpha"], "train.mix_prob is 0"),
    (["train.decay_epochs=2"], ["train.decay_epochs"], "train.scheduler is cosine"),
    (["train.decay_epochs=2", "train.scheduler=poly"], ["train.decay_epochs"], "train.scheduler is poly"),
    (["train.decay_rate=0.5", "train.scheduler=tanh"], ["train.decay_rate"], "train.scheduler is tanh"),
    (["train.decay_rate=0.5", "train.scheduler=constant"], ["train.decay_rate"], "train.scheduler is constant"),
    (["train.scheduler=step", "train.epochs=5", "train.decay_epochs=5", "train.decay_rate=0.5"],
     ["train.decay_epochs", "train.decay_rate"], "training ends before the first decay"),
    (["train.scheduler=step", "train.decay_epochs=2", "train.min_lr=1e-6", "train.warmup_epochs=0"],
     ["train.min_lr"], "train.scheduler is step, without a warm-up"),
    (["train.scheduler=constant", "train.min_lr=1e-6", "train.warmup_epochs=0"],
     ["train.min_lr"], "train.scheduler is constant, without a warm-up"),
    (["valid.select=clean"], ["valid.select"], "valid.damage is none"),
    (["augment.rotate_prob=0.5", "augment.rotate_deg=0"], ["augment.rotate_prob"], "augment.rotate_deg is 0"),
    (["augment.rotate_prob=0", "augment.rotate_deg=5"], ["augment.rotate_deg"], "augment.rotate_prob is 0"),
    (["augment.strength=0", "augment.blur_prob=0.5"], ["augment.blur_prob"], "augment.strength is 0"),
    (["augment.strength=0.5", "augment.rotate_prob=0", "augment.scale=0", "augment.shift=0", "augment.brightness=0"],
     ["augment.strength"], "there is no augmentation that it could scale"),
    (["augment.damage_prob=1", "augment.rotate_deg=5", "augment.rotate_prob=0.5"],
     ["augment.rotate_deg", "augment.rotate_prob"], "augment.damage_prob is 1: every page is damaged instead"),
    (["augment.strength=0", "augment.damage_prob=0.5"], ["augment.damage_prob"], "augment.strength is 0"),
    (["augment.strength=0.5", "augment.rotate_deg=0", "augment.scale=0", "augment.shift=0", "augment.brightness=0"],
     ["augment.strength"], "there is no augmentation that it could scale"),
    (["augment.damage_prob=1", "augment.hflip_prob=0.5"],
     ["augment.hflip_prob"], "augment.damage_prob is 1: every page is damaged instead"),
    (["tracking.project=x"], ["tracking.project"], "tracking.wandb is false"),
    (["tracking.entity=x", "tracking.wandb=false"], ["tracking.entity"], "tracking.wandb is false"),
]  # fmt: skip
USED = [
    ["model.pretrained=false", "model.weights=w.pth"],
    ["train.mix_prob=0.5", "train.cutmix_alpha=1"],
    ["train.mixup_alpha=0.5", "train.unmixed_epochs=3", "train.epochs=4"],
    ["train.mixup_alpha=0", "train.cutmix_alpha=0", "train.mix_prob=0", "train.unmixed_epochs=0"],
    ["train.mixup_alpha=0", "train.cutmix_alpha=0"],
    ["train.mix_prob=0", "train.mixup_alpha=0.4", "train.mixup_alpha=0", "train.cutmix_alpha=1", "train.mix_prob=1"],
    ["train.decay_rate=0.5", "train.scheduler=poly"],
    ["train.scheduler=step", "train.epochs=5", "train.decay_epochs=4.9", "train.decay_rate=0.5"],
    ["train.scheduler=step", "train.decay_epochs=2", "train.min_lr=1e-6", "train.warmup_epochs=1"],
    ["train.min_lr=1e-6"],
    ["valid.damage=light", "valid.select=clean"],
    ["valid.select=null"],
    ["augment.rotate_prob=0.5", "augment.rotate_deg=5"],
    ["augment.rotate_deg=0"],
    ["augment.strength=0"],
    ["augment.strength=0.5", "augment.damage_prob=1", "augment.hflip_prob=0.5"],
    ["augment.damage_prob=0.9", "augment.hflip_prob=0.5"],
    ["tracking.project=x", "tracking.entity=y", "tracking.wandb=true"],
    ["tracking.project=null"],
]


@pytest.mark.parametrize(("overrides", "keys", "reason"), IDLE)
def test_idle_keys_are_reported_with_value_source_and_reason(
    tmp_path: Path, overrides: list[str], keys: list[str], reason: str
) -> None:
    values = dict(override.split("=") for override in overrides)
    lines = warn(tmp_path, "", *overrides)
    assert [line.split(" = ")[0] for line in lines] == keys
    for key, line in zip(keys, lines, strict=True):
        assert line.startswith(f"{key} = ") and f"(--set {key}) has no effect, since " in line and reason in line
        assert line.split(" = ")[1].split(" (")[0] == values[key].replace("e-6", "e-06")


@pytest.mark.parametrize("overrides", USED)
def test_keys_with_effect_are_not_reported(tmp_path: Path, overrides: list[str]) -> None:
    assert warn(tmp_path, "", *overrides) == ()


def test_idle_key_of_file_is_reported_with_its_line(tmp_path: Path) -> None:
    (line,) = warn(tmp_path, "train:\n  epochs: 3\n  decay_rate: 0.5\n")
    assert f"train.decay_rate = 0.5 ({tmp_path / 'c.yaml'}:4) has no effect" in line


def test_idle_keys_of_modes_and_defaults_are_not_reported(tmp_path: Path) -> None:
    off = ("train.mixup_alpha=0", "train.cutmix_alpha=0", "augment.rotate_deg=0")
    assert warn(tmp_path, "mode: highperf\n", *off) == ()


@pytest.mark.parametrize("name", ["train.yaml", "train_highperf.yaml"])
def test_shipped_config_gives_no_warning(name: str) -> None:
    mode = yaml.safe_load((CONFIGS / name).read_text())["mode"]
    assert load_with_warnings(CONFIGS / name).warnings == ()
    assert load_with_warnings(CONFIGS / name, mode).warnings == ()


@pytest.mark.parametrize("mode", MODES)
def test_mode_gives_no_warning(tmp_path: Path, mode: str) -> None:
    assert warn(tmp_path, mode=mode) == warn(tmp_path, f"mode: {mode}\n") == ()


def test_snapshot_of_run_gives_no_warning_except_about_command_line(tmp_path: Path) -> None:
    every = {
        name: {key: field.default for key, field in section.model_fields.items()}
        for name, section in SECTIONS.items() if name in ("train", "augment")
    }  # fmt: skip
    text = yaml.safe_dump(every | {"provenance": {"run_id": "a"}})
    assert warn(tmp_path, text) == ()
    (line,) = warn(tmp_path, text, "train.decay_rate=0.5")
    assert line.startswith("train.decay_rate")


# --- a mode of the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{"mode": "highperf"}, {"override": "mode=highperf"}])
def test_keys_of_file_that_override_mode_of_command_line_are_listed(tmp_path: Path, chosen: dict[str, str]) -> None:
    overrides = [chosen["override"]] if "override" in chosen else []
    text = "mode: basic\ntrain: {img_size: 300, weight_decay: 0.05, epochs: 20, log_interval: 5}\n"
    (line,) = warn(tmp_path, text, *overrides, mode=chosen.get("mode"))
    assert line.endswith(": train.img_size") and "mode" in line and "highperf" in line


def test_plain_recipe_under_other_mode_is_one_line() -> None:
    lines = load_with_warnings(CONFIGS / "train.yaml", "highperf").warnings
    assert len(lines) == 1
    kept = lines[0].rpartition(": ")[2].split(", ")
    assert {"model.name", "train.img_size", "augment.rotate_deg"} <= set(kept)
    assert "train.batch_size" not in kept and "train.optimizer" not in kept  # the same in both


def test_values_of_command_line_are_no_clash_with_mode(tmp_path: Path) -> None:
    assert warn(tmp_path, "", "train.img_size=300", mode="highperf") == ()
    assert warn(tmp_path, "mode: highperf\ntrain: {img_size: 300}\n", mode="highperf") == ()
