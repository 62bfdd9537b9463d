"""Augmentation: a pure function of page and stream, with independent draws for each transform."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest

from doccls.config.load import read_mode
from doccls.config.schema import AugmentConfig
from doccls.data.damage import damage_page
from doccls.data.transforms import Augmentation
from doccls.randomness import Purpose, derive_stream

SINGLE_KEYS = {
    "rotate_deg": 180.0, "quarter_turn_prob": 1.0, "hflip_prob": 1.0, "vflip_prob": 1.0, "scale": 0.3, "shift": 0.2,
    "perspective_prob": 1.0, "blur_prob": 1.0, "noise_prob": 1.0, "shadow_prob": 1.0, "jpeg_prob": 1.0,
    "brightness": 0.5, "damage_prob": 1.0,
}  # fmt: skip


def make_page(size: int = 64) -> np.ndarray:
    """Draw dark print on white paper, without symmetry, so that every turn and flip shows."""
    page = np.full((size, size, 3), 255, np.uint8)
    page[size // 4 : size // 4 + 6, size // 4 : size - 8] = (20, 40, 160)
    page[size // 2 : size // 2 + 4, size // 4 : size // 2] = 0
    return page


def stream(*key: int) -> np.random.SeedSequence:
    return derive_stream(1, Purpose.AUGMENTATION, *key)


def read_augment(mode: str) -> AugmentConfig:
    keys = {key[1]: float(stated.value) for key, stated in read_mode(mode) if key[0] == "augment"}
    assert keys
    return AugmentConfig(**keys)


def test_single_keys_cover_every_transform() -> None:
    assert set(SINGLE_KEYS) == set(AugmentConfig.model_fields) - {"rotate_prob", "strength"}


def test_default_config_is_the_identity() -> None:
    page = make_page()
    assert np.array_equal(Augmentation(AugmentConfig(), 64).apply(page, stream(0)), page)


@pytest.mark.parametrize("key", SINGLE_KEYS)
def test_single_key_gives_no_warning_and_changes_the_page(key: str) -> None:
    """albumentations only warns of unknown arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmentation = Augmentation(AugmentConfig(**{key: SINGLE_KEYS[key]}), 64)
        pages = [augmentation.apply(make_page(), stream(number)) for number in range(12)]
    assert all(page.shape == (64, 64, 3) and page.dtype == np.uint8 for page in pages)
    changed = [not np.array_equal(page, make_page()) for page in pages]
    assert sum(changed) >= (6 if key == "quarter_turn_prob" else 10)  # a quarter turn may be by 0 degrees


@pytest.mark.parametrize("key", SINGLE_KEYS)
def test_strength_scales_every_key(key: str) -> None:
    config = AugmentConfig(**{key: SINGLE_KEYS[key]})
    weak = config.model_copy(update={"strength": 0.25})
    assert getattr(weak.scale_by_strength(), key) == SINGLE_KEYS[key] / 4

    def measure_change(config: AugmentConfig) -> float:
        augmentation, page = Augmentation(config, 64), make_page()
        return float(np.mean([np.abs(augmentation.apply(page, stream(n)).astype(int) - page) for n in range(60)]))

    assert 0 < measure_change(weak) < 0.8 * measure_change(config)
    assert measure_change(config.model_copy(update={"strength": 0.0})) == 0


@pytest.mark.parametrize("key", ["blur_prob", "noise_prob", "shadow_prob", "jpeg_prob", "perspective_prob"])
def test_strength_scales_magnitude_of_defects(key: str) -> None:
    """Not only how many pages have the defect."""
    changes = []
    for strength in (0.25, 1.0):
        augmentation = Augmentation(AugmentConfig(**{key: 1.0}, strength=strength), 64)
        pages = [augmentation.apply(make_page(), stream(number)).astype(int) for number in range(200)]
        changed = [np.abs(page - make_page()).mean() for page in pages if not np.array_equal(page, make_page())]
        changes.append(np.mean(changed))
    assert changes[0] < 0.7 * changes[1]


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_damage_prob_is_the_fraction_of_damaged_pages(prob: float) -> None:
    augmentation = Augmentation(AugmentConfig(damage_prob=prob), 64)
    damaged = [not np.array_equal(augmentation.apply(make_page(), stream(n)), make_page()) for n in range(300)]
    assert abs(np.mean(damaged) - prob) < 0.08


def test_damaged_pages_are_those_of_damage_page() -> None:
    page = make_page(80)[:, :60]
    for number in range(5):
        expected = damage_page(page, 64, 1.0, stream(number).spawn(4)[3])
        assert np.array_equal(Augmentation(AugmentConfig(damage_prob=1.0), 64).apply(page, stream(number)), expected)


@pytest.mark.parametrize("mode", ["basic", "highperf"])
def test_augmentation_of_mode_gives_no_warning(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmentation = Augmentation(read_augment(mode), 64)
        pages = [augmentation.apply(make_page(), stream(number)) for number in range(50)]
    assert all(page.shape == (64, 64, 3) and page.dtype == np.uint8 for page in pages)
    assert len({page.tobytes() for page in pages}) == 50


def test_input_page_is_not_modified() -> None:
    page = make_page()
    augmentation = Augmentation(read_augment("highperf"), 64)
    for number in range(20):
        augmentation.apply(page, stream(number))
    assert np.array_equal(page, make_page())


def test_result_depends_only_on_page_and_stream() -> None:
    config = read_augment("highperf")
    first = Augmentation(config, 64)
    forward = [first.apply(make_page(), stream(number)) for number in range(12)]
    second = Augmentation(config, 64)
    backward = [second.apply(make_page(), stream(number)) for number in reversed(range(12))][::-1]
    fresh = [Augmentation(config, 64).apply(make_page(), stream(number)) for number in range(12)]
    np.random.seed(0)  # noqa: NPY002 (the global generator must not matter)
    repeated = [first.apply(make_page(), stream(number)) for number in range(12)]
    for pages in (backward, fresh, repeated):
        assert all(np.array_equal(page, expected) for page, expected in zip(pages, forward, strict=True))


def test_global_generators_are_not_used() -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    Augmentation(read_augment("highperf"), 64).apply(make_page(), stream(0))
    assert np.random.random() == expected  # noqa: NPY002


def test_transforms_draw_independently() -> None:
    """With one stream for all transforms, only two of the eight outcomes would occur: all or nothing."""
    augmentation = Augmentation(AugmentConfig(hflip_prob=0.5, vflip_prob=0.5, jpeg_prob=0.5), 16)
    page = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    flips = {"none": page, "h": page[:, ::-1], "v": page[::-1], "hv": page[::-1, ::-1]}
    outcomes = []
    for number in range(240):
        result = augmentation.apply(page, stream(number))
        gaps = {name: np.abs(result.astype(int) - flipped).mean() for name, flipped in flips.items()}
        nearest = min(gaps, key=gaps.__getitem__)
        outcomes.append((nearest, gaps[nearest] > 0))
    counts = [outcomes.count((name, compressed)) for name in flips for compressed in (False, True)]
    assert min(counts) >= 12, f"expected eight outcomes of about 30 each, got {counts}"


@pytest.mark.parametrize("key", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_fold_epoch_and_sample_each_change_the_draw(key: tuple[int, ...]) -> None:
    augmentation = Augmentation(read_augment("highperf"), 64)
    first = augmentation.apply(make_page(), stream(0, 0, 0))
    assert not np.array_equal(first, augmentation.apply(make_page(), stream(*key)))


@pytest.mark.parametrize("key", ["rotate_deg", "shift", "scale", "perspective_prob"])
def test_uncovered_background_is_white(key: str) -> None:
    augmentation = Augmentation(AugmentConfig(**{key: SINGLE_KEYS[key]}), 64)
    paper = np.full((64, 64, 3), 255, np.uint8)
    assert all(augmentation.apply(paper, stream(number)).min() == 255 for number in range(25))


def test_probability_is_the_fraction_of_changed_pages() -> None:
    augmentation = Augmentation(AugmentConfig(hflip_prob=0.25), 64)
    changed = [not np.array_equal(augmentation.apply(make_page(), stream(n)), make_page()) for n in range(400)]
    assert 0.18 < np.mean(changed) < 0.32


def test_rotation_covers_both_directions_up_to_its_limit() -> None:
    """The angle of a dot right of the centre shows the rotation."""
    page = np.full((101, 101, 3), 255, np.uint8)
    page[48:53, 88:93] = 0
    augmentation = Augmentation(AugmentConfig(rotate_deg=30), 101)
    angles = []
    for number in range(60):
        rows, columns = np.nonzero(augmentation.apply(page, stream(number))[..., 0] < 128)
        angles.append(np.degrees(np.arctan2(50 - rows.mean(), columns.mean() - 50)))
    assert -31.5 < min(angles) < -15 and 15 < max(angles) < 31.5


# --- from a larger page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_px", [64, 80, 96, 128])
def test_larger_page_is_scaled_about_its_centre(page_px: int) -> None:
    page = cv2.resize(make_page(), (page_px, page_px), interpolation=cv2.INTER_AREA)
    scaled = Augmentation(AugmentConfig(), 64).apply(page, stream(0))
    assert scaled.shape == (64, 64, 3)
    assert np.abs(scaled.astype(int) - cv2.resize(page, (64, 64))).max() <= 1


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_rotating_a_larger_page_loses_less_detail(prob: float) -> None:
    """The reference is computed at eight times the size: a stream moves pages of any size alike."""
    config = AugmentConfig(rotate_deg=30, rotate_prob=prob, scale=0.2)
    full = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8), (0, 0), 6)
    full = cv2.normalize(full, None, 0, 255, cv2.NORM_MINMAX)
    losses: dict[int, list[float]] = {64: [], 80: []}
    for number in range(40):
        augmented = Augmentation(config, 512).apply(full, stream(number))
        reference = cv2.resize(augmented, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        for page_px, errors in losses.items():
            page = cv2.resize(full, (page_px, page_px), interpolation=cv2.INTER_AREA)
            errors.append(float(np.abs(Augmentation(config, 64).apply(page, stream(number)) - reference).mean()))
    assert np.mean(losses[80]) < 0.9 * np.mean(losses[64]), {size: np.mean(errors) for size, errors in losses.items()}
    assert np.mean(losses[80]) < 10, "the pages show the same"


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_rotate_prob_is_the_fraction_of_rotated_pages(prob: float) -> None:
    augmentation = Augmentation(AugmentConfig(rotate_deg=90, rotate_prob=prob), 64)
    rotated = [not np.array_equal(augmentation.apply(make_page(), stream(n)), make_page()) for n in range(300)]
    assert abs(np.mean(rotated) - prob) < 0.09
