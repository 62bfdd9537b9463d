"""Checks of the real pages beside the checkout before training; skipped with a notice where they are missing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from doccls.config import Config, Override, load_config
from doccls.data.images import decode_image, decode_reduced, scale_page
from doccls.data.prepare import PreparedData, prepare_data
from doccls.model.build import build_model
from tests.conftest import SHARED

PAGES = SHARED / "texdoc17"
WEIGHTS = SHARED / "weights" / "efficientnet_lite0_timm.safetensors"


@pytest.fixture(scope="module")
def config_of(
    need: Callable[[str, bool, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    need("texdoc17", PAGES.is_dir() and WEIGHTS.is_file(), f"{PAGES} or {WEIGHTS} does not exist")
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    path.write_text(f"data:\n  train_csv: {PAGES}/train.csv\n  image_dir_train: {PAGES}/train\n")

    def load(**values: object) -> Config:
        return load_config(path, overrides=[Override(f"data.{key}", value, "test") for key, value in values.items()])

    return load


@pytest.fixture(scope="module")
def prepared(config_of: Callable[..., Config]) -> PreparedData:
    return prepare_data(config_of())


def test_each_page_is_usable_and_in_one_fold(prepared: PreparedData) -> None:
    assert len(prepared.manifest) == 1353
    assert prepared.manifest.classes == tuple(str(label) for label in range(17))
    assert not prepared.skipped
    assert sorted(prepared.assignment.count().values()) == [270, 270, 270, 271, 272]


def test_page_with_two_labels_is_named_and_kept_in_one_fold(prepared: PreparedData) -> None:
    warning, _ = prepared.warnings
    assert "lines 166 and 167" in warning and "labels differ: ['3', '8']" in warning
    assert prepared.assignment.fold_of_N[164] == prepared.assignment.fold_of_N[165]


def test_duplicate_page_is_named_and_kept_in_one_fold(prepared: PreparedData) -> None:
    _, warning = prepared.warnings
    assert "lines 636 and 796" in warning and "labels differ: ['12', '14']" in warning
    assert prepared.assignment.fold_of_N[634] == prepared.assignment.fold_of_N[794]


@pytest.mark.parametrize(("size_px", "reduced"), [(56, 4), (64, 2), (112, 2)])
def test_jpeg_decoded_at_reduced_size_shows_no_loss(
    config_of: Callable[..., Config], size_px: int, reduced: int
) -> None:
    """The full page scaled by an area filter is the reference; a bilinear filter differs from it by more."""
    config_of()
    losses, bilinear_losses = [], []
    for path in sorted((PAGES / "train").glob("*.jpg"))[::20]:
        data = path.read_bytes()
        near, page = decode_reduced(data, 10**8, size_px), decode_image(data, 10**8)
        assert near.reduced == reduced
        area = scale_page(page, size_px).astype(int)
        bilinear = Image.fromarray(page).resize((area.shape[1], area.shape[0]), Image.Resampling.BILINEAR)
        losses.append(np.abs(near.scale(size_px) - area).mean())
        bilinear_losses.append(np.abs(np.asarray(bilinear) - area).mean())
    assert len(losses) > 60
    loss, bilinear_loss = np.mean(losses), np.mean(bilinear_losses)
    assert loss < bilinear_loss and loss < 2.0, (loss, bilinear_loss)


def test_ids_without_extension_give_the_same_data_and_folds(
    prepared: PreparedData, config_of: Callable[..., Config]
) -> None:
    mixed = prepare_data(config_of(train_csv=str(PAGES / "train_mixed_ids.csv")))
    assert list(mixed.manifest.ids) != list(prepared.manifest.ids)
    assert (mixed.digest, mixed.assignment.digest()) == (prepared.digest, prepared.assignment.digest())


def test_groups_keep_pages_of_one_pdf_in_one_fold(config_of: Callable[..., Config], tmp_path: Path) -> None:
    labels, groups = ((PAGES / name).read_text().splitlines() for name in ("train.csv", "groups.csv"))
    table = tmp_path / "grouped.csv"
    table.write_text(
        "\n".join(f"{row},{group.split(',', 1)[1]}" for row, group in zip(labels, groups, strict=True)) + "\n"
    )
    grouped = prepare_data(config_of(train_csv=str(table), group_col="group"))
    assert grouped.manifest.groups is not None
    folds_of_group: dict[str, set[int]] = {}
    for group, fold in zip(grouped.manifest.groups, grouped.assignment.fold_of_N, strict=True):
        folds_of_group.setdefault(group, set()).add(fold)
    assert len(folds_of_group) > 100
    assert all(len(folds) == 1 for folds in folds_of_group.values())


def test_local_weights_are_loaded_except_the_classifier(config_of: Callable[..., Config]) -> None:
    config = config_of().model.model_copy(update={"name": "tf_efficientnet_lite0", "weights": WEIGHTS})
    from safetensors.torch import load_file

    stored, loaded = load_file(WEIGHTS), build_model(config, 17, 160).state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in loaded if not name.startswith("classifier"))
    assert loaded["classifier.weight"].shape == (17, 1280)
