"""Samples and batches: the right page, label and index, with stateless augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from doccls.config.schema import AugmentConfig
from doccls.data.damage import damage_page
from doccls.data.dataset import AugmentationKey, DocClsDataset, LoadedSamples, Pages, SampleKey, collate_batch
from doccls.data.images import decode_image, fit_page, load_page
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.data.transforms import Augmentation
from doccls.errors import RankLocalError
from doccls.randomness import Purpose, derive_stream

AUGMENT = AugmentConfig(rotate_deg=20, hflip_prob=0.5, noise_prob=0.5)


def test_key_gives_fitted_page_target_and_index(pages: Pages) -> None:
    page, target, index = DocClsDataset(pages)[SampleKey(3)]
    path = pages.paths[3]
    assert path is not None
    assert np.array_equal(page, fit_page(decode_image(path.read_bytes(), 10**6), 16))
    assert (target, index) == (1, 3)


def test_without_an_augmentation_key_nothing_is_augmented(pages: Pages) -> None:
    key = SampleKey(2)
    assert np.array_equal(DocClsDataset(pages, Augmentation(AUGMENT, 16))[key][0], DocClsDataset(pages)[key][0])


def test_augmentation_depends_on_seed_fold_epoch_and_sample(pages: Pages) -> None:
    def draw(seed: int, fold: int, epoch: int) -> bytes:
        dataset = DocClsDataset(pages, Augmentation(AUGMENT, 16), seed)
        return dataset[SampleKey(0, AugmentationKey(fold, epoch))][0].tobytes()

    pages_drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert len(set(pages_drawn)) == 4
    assert draw(0, 0, 0) == pages_drawn[0]


def test_order_of_access_changes_nothing(pages: Pages) -> None:
    forward, backward = (DocClsDataset(pages, Augmentation(AUGMENT, 16), 1) for _ in range(2))
    keys = [SampleKey(index, AugmentationKey(0, epoch)) for epoch in range(2) for index in range(6)]
    first = {key: forward[key][0].tobytes() for key in keys}
    assert first == {key: backward[key][0].tobytes() for key in reversed(keys)}


def test_only_training_batches_are_augmented(pages: Pages) -> None:
    dataset = DocClsDataset(pages, Augmentation(AUGMENT, 16), 1)
    for phase, augmentation in (("train", AugmentationKey(2, 1)), ("validate", None), ("predict", None)):
        place = BatchPlace(phase, 2, 1)  # type: ignore[arg-type]
        loaded = dataset.__getitems__(BatchRequest(place, (4, 1)))
        assert loaded.place is place
        for (page, target, index), sample in zip(loaded.samples, (4, 1), strict=True):
            expected = dataset[SampleKey(sample, augmentation)]
            assert np.array_equal(page, expected[0]) and (target, index) == expected[1:]


def test_only_damaged_validation_batches_are_damaged(pages: Pages) -> None:
    dataset = DocClsDataset(pages, Augmentation(AUGMENT, 16), 1, damage_strength=0.5)
    clean, damaged = (
        dataset.__getitems__(BatchRequest(BatchPlace(phase, 2, 1), (4, 1))).samples
        for phase in ("validate", "validate_damaged")
    )  # type: ignore[arg-type]
    assert [sample[1:] for sample in damaged] == [sample[1:] for sample in clean]
    for (page, _, index), (clean_page, _, _) in zip(damaged, clean, strict=True):
        assert page.shape == (16, 16, 3) and page.dtype == np.uint8 and not np.array_equal(page, clean_page)
        assert np.array_equal(page, dataset[SampleKey(index, is_damaged=True)][0])


def test_damage_gets_the_unpadded_page_and_a_stream_of_the_sample_alone(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(page: np.ndarray, size_px: int, strength: float, stream: np.random.SeedSequence) -> np.ndarray:
        calls.append((page.shape, size_px, strength, tuple(stream.generate_state(4))))
        return np.zeros((size_px, size_px, 3), np.uint8)

    monkeypatch.setattr("doccls.data.dataset.damage_page", record)
    for seed, epoch in ((0, 0), (7, 3)):
        dataset = DocClsDataset(pages, seed=seed, damage_strength=0.5)
        dataset.__getitems__(BatchRequest(BatchPlace("validate_damaged", seed, epoch), (3, 5)))
    assert calls[:2] == calls[2:] and calls[0][3] != calls[1][3]
    path = pages.paths[3]
    assert path is not None
    height, width = decode_image(path.read_bytes(), 10**6).shape[:2]
    assert calls[0][0][0] / calls[0][0][1] == pytest.approx(height / width, rel=0.1) and height != width
    assert max(calls[0][0]) == pages.page_px and calls[0][1:3] == (pages.img_size, 0.5)


def test_damage_never_changes(pages: Pages) -> None:
    """Runs are compared, and their logits blended, on the same damaged pages."""
    stream = derive_stream(0, Purpose.DAMAGE, 3)
    assert Purpose.DAMAGE == 6
    page = DocClsDataset(pages, seed=5, damage_strength=1.0)[SampleKey(3, is_damaged=True)][0]
    path = pages.paths[3]
    assert path is not None
    expected = damage_page(load_page(path.read_bytes(), 10**6, pages.page_px), pages.img_size, 1.0, stream)
    assert np.array_equal(page, expected)


def test_unreadable_image_error_names_id_and_path(pages: Pages) -> None:
    path = pages.paths[2]
    assert path is not None
    path.write_bytes(b"x")
    with pytest.raises(RankLocalError) as caught:
        DocClsDataset(pages)[SampleKey(2)]
    assert "'i2'" in str(caught.value) and str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(RankLocalError, match="'i2'"):
        DocClsDataset(pages)[SampleKey(2)]


def test_pixel_limit_applies_during_training(pages: Pages) -> None:
    with pytest.raises(RankLocalError, match="max_image_pixels"):
        DocClsDataset(pages._replace(max_pixels=10))[SampleKey(0)]


def test_sample_without_image_must_not_be_requested(pages: Pages) -> None:
    with pytest.raises(AssertionError):
        DocClsDataset(pages._replace(paths=[None] * 6))[SampleKey(0)]


def test_batch_holds_uint8_pages_and_int64_targets_and_indices() -> None:
    page = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    place = BatchPlace("validate", 3)
    batch = collate_batch(LoadedSamples(place, [(page, 2, 7), (page + 1, 0, 9)]))
    assert batch.place is place
    assert batch.images_NHWC.shape == (2, 4, 4, 3) and batch.images_NHWC.dtype == torch.uint8
    assert batch.targets_N.tolist() == [2, 0] and batch.targets_N.dtype == torch.int64
    assert batch.indices_N.tolist() == [7, 9] and batch.indices_N.dtype == torch.int64
    assert np.array_equal(batch.images_NHWC[1].numpy(), page + 1)


def test_copy_of_an_image_gives_the_same_page(pages: Pages, tmp_path: Path) -> None:
    alias = tmp_path / "alias.png"
    path = pages.paths[1]
    assert path is not None
    alias.write_bytes(path.read_bytes())
    other = DocClsDataset(pages._replace(paths=[None, alias, *pages.paths[2:]]))
    assert np.array_equal(other[SampleKey(1)][0], DocClsDataset(pages)[SampleKey(1)][0])
