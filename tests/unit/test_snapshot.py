"""The snapshot of a run as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from doccls.config import Config, load_config, render_snapshot
from doccls.config.snapshot import flatten_settings, read_snapshot
from doccls.errors import UserError


def test_settings_have_dotted_keys() -> None:
    snapshot = {"mode": "basic", "train": {"amp": True, "mean": [0.5, None]}, "provenance": {"packages": {"x": "1"}}}
    assert flatten_settings(snapshot) == (
        ("mode", "basic"), ("train.amp", "true"), ("train.mean", "0.5, null"), ("provenance.packages.x", "1"),
    )  # fmt: skip


def test_snapshot_is_read_as_yaml_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = Config.model_validate(
        {"data": {"train_csv": "a&b.csv", "image_dir_train": "c"}}, context={"base": tmp_path}
    )
    path.write_text(render_snapshot(config, {"run_id": "r&d"}), encoding="utf-8")
    assert read_snapshot(path) == yaml.safe_load(path.read_text())
    assert load_config(path).data.train_csv.name == "a&b.csv"


@pytest.mark.parametrize(
    "text",
    [
        "mode: basic",
        "[provenance]",
        "provenance: {a: [}",
        "provenance: {}\na: &a [1]\nb: *a",
        "provenance: &a {b: *a}",
        "provenance: {}\na: " + "[" * 5000,
    ],
)
def test_other_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: damaged, or not a snapshot"):
        read_snapshot(path)


def test_missing_snapshot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_snapshot(tmp_path / "config.yaml")
