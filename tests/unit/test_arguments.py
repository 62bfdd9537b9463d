"""The config arguments that all commands share, and their precedence."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from doccls.config import Config
from doccls.config.arguments import add_config_arguments, load_arguments
from doccls.errors import UserError

DATA = "data: {train_csv: a.csv, image_dir_train: images, num_workers: 3}\n"


def load(folder: Path, *args: str) -> Config:
    (folder / "c.yaml").write_text(DATA + "train: {batch_size: 7}\n")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_arguments(parser.parse_args(["--config", str(folder / "c.yaml"), *args]))


def test_file_alone_is_the_config(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.train.batch_size, config.data.num_workers, config.mode) == (7, 3, "basic")


def test_each_argument_overrides_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path, "--mode", "highperf", "--set", "train.epochs=2", "--set", "train.lr=0.5", "--num-workers", "1"
    )
    assert (config.mode, config.train.epochs, config.train.lr, config.data.num_workers) == ("highperf", 2, 0.5, 1)


def test_zero_workers_override_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "--num-workers", "0").data.num_workers == 0


def test_num_workers_flag_takes_precedence_over_set(tmp_path: Path) -> None:
    assert load(tmp_path, "--num-workers", "1", "--set", "data.num_workers=2").data.num_workers == 1


def test_error_of_wrong_value_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num-workers"):
        load(tmp_path, "--num-workers", "-1")
    with pytest.raises(UserError, match="--set"):
        load(tmp_path, "--set", "train.epochs=none")


def test_unknown_mode_is_rejected_by_argparse(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        load(tmp_path, "--mode", "fancy")


def test_config_is_optional_if_not_required() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, required=False)
    assert parser.parse_args([]).config is None
    with pytest.raises(SystemExit):
        add_config_arguments(strict := argparse.ArgumentParser())
        strict.parse_args([])
