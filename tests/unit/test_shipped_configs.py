"""The configs in `configs/` spell out the recipes of their modes."""

from pathlib import Path

import pytest
import yaml

import doccls.config
from doccls.config.load import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODES = Path(doccls.config.__file__).parent / "modes"
OWN_SECTIONS = {"mode", "project", "data", "output"}
"""What a config says beside its recipe."""


@pytest.mark.parametrize(("name", "mode"), [("train.yaml", "basic"), ("train_highperf.yaml", "highperf")])
def test_recipe_equals_that_of_the_mode(name: str, mode: str) -> None:
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert config["mode"] == mode
    assert {key: config[key] for key in config.keys() - OWN_SECTIONS} == yaml.safe_load(
        (MODES / f"{mode}.yaml").read_text()
    )


@pytest.mark.parametrize(("name", "mode"), [("train.yaml", "basic"), ("train_highperf.yaml", "highperf")])
def test_shipped_config_resolves_to_the_mode_alone(name: str, mode: str, tmp_path: Path) -> None:
    """Spelling out the recipe changes no value, whether stated as a number or as text such as 5e-4."""
    bare = tmp_path / name
    bare.write_text(f"mode: {mode}\ndata: {{train_csv: a.csv, image_dir_train: a}}\n")
    for section in ("model", "train", "valid", "augment", "tracking"):
        assert getattr(load_config(CONFIGS / name), section) == getattr(load_config(bare), section)
