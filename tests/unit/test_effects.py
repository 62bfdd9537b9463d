"""Defects of pages: each changes what it names, leaves the rest, and scales with strength and size."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from doccls.config.schema import DAMAGE_VERSION
from doccls.data import effects

Effect = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
EFFECTS: tuple[Effect, ...] = (
    effects.show_through, effects.recolour, effects.lay_sheet, effects.turn_grey, effects.shade, effects.cast_shadow,
    effects.blur, effects.add_noise, effects.sprinkle, effects.occlude, effects.compress,
)  # fmt: skip


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def make_page(height: int = 96, width: int = 64) -> np.ndarray:
    """Draw lines of coloured print on white paper."""
    page = np.full((height, width, 3), 255, np.uint8)
    for top in range(height // 8, height - height // 8, 6):
        page[top : top + 2, width // 8 : width // 2 + (top * 5) % (width // 3)] = (20, 40, 160)
    return page


def make_paper(size: int = 64, value: int = 255) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def apply_often(effect: Effect, page: np.ndarray, strength: float = 1.0, count: int = 40) -> list[np.ndarray]:
    return [effect(page.copy(), strength, rng(number)) for number in range(count)]


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.__name__)
@pytest.mark.parametrize("shape", [(96, 64), (33, 80), (64, 64)])
def test_effect_keeps_shape_and_changes_page(effect: Effect, shape: tuple[int, int]) -> None:
    page = make_page(*shape)
    results = apply_often(effect, page, count=10)
    assert all(result.shape == (*shape, 3) and result.dtype == np.uint8 for result in results)
    assert sum(not np.array_equal(result, page) for result in results) >= 9


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.__name__)
def test_effect_depends_only_on_generator(effect: Effect) -> None:
    first, second, other = (effect(make_page(), 1.0, rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    if effect is not effects.turn_grey:
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.__name__)
def test_number_of_draws_does_not_depend_on_size(effect: Effect) -> None:
    """Otherwise a page would get other defects after this one at other sizes."""
    for number in range(20):
        small, large = rng(number), rng(number)
        effect(make_page(96, 64), 1.0, small)
        effect(make_page(288, 192), 1.0, large)
        assert small.bit_generator.state == large.bit_generator.state


@pytest.mark.parametrize("effect", [effect for effect in EFFECTS if effect is not effects.turn_grey])
def test_effect_grows_with_strength(effect: Effect) -> None:
    page = make_page().astype(int)
    change = [np.mean([np.abs(result - page).mean() for result in apply_often(effect, make_page(), strength)])
              for strength in (0.1, 0.5, 1.0)]  # fmt: skip
    assert change[0] < change[1] < change[2]


# The mean change of the page by each effect. A new effect needs a new DAMAGE_VERSION.
VERSIONS = {
    1: {
        effects.show_through: 3.34, effects.recolour: 65.45, effects.lay_sheet: 16.85, effects.turn_grey: 6.50,
        effects.shade: 43.79, effects.cast_shadow: 34.86, effects.blur: 16.87, effects.add_noise: 5.53,
        effects.sprinkle: 1.07, effects.occlude: 8.41, effects.compress: 6.19,
    },
}  # fmt: skip


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.__name__)
def test_effect_of_a_version_never_changes(effect: Effect) -> None:
    results = np.stack(apply_often(effect, make_page(), count=8)).astype(int)
    assert np.abs(results - make_page()).mean() == pytest.approx(VERSIONS[DAMAGE_VERSION][effect], rel=0.02), (
        "a new effect needs a new DAMAGE_VERSION"
    )


def test_show_through_darkens_paper_with_mirrored_print() -> None:
    page = make_paper()
    page[20:40, :16] = 0
    for result in apply_often(effects.show_through, page, count=10):
        assert result[22:38, 50:62].max() < 245, "the print's mirror image"
        assert result[:16].min() == 255 and result[22:38, 2:14].max() == 0, "white paper and print stay"


def test_recolour_lightens_ink_and_darkens_paper() -> None:
    page = make_paper()
    page[:32] = 0
    results = apply_often(effects.recolour, page)
    assert all(result[:32].max() <= 70 for result in results)
    assert all(result[32:].min() >= 110 for result in results)
    assert max(result[:32].max() for result in results) > 40 and min(result[32:].max() for result in results) < 200
    assert any(np.ptp(result[40, 40]) > 20 for result in results), "some paper is tinted"


def test_grey_page_has_equal_channels_and_same_brightness() -> None:
    grey = effects.turn_grey(make_page(), 1.0, rng())
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    assert np.array_equal(grey[..., 0], cv2.cvtColor(make_page(), cv2.COLOR_RGB2GRAY))


@pytest.mark.parametrize("effect", [effects.shade, effects.cast_shadow])
def test_uneven_light_is_smooth_and_only_darkens(effect: Effect) -> None:
    results = apply_often(effect, make_paper(128))
    assert all(result.min() >= 255 * 0.38 for result in results)
    steps = [np.abs(np.diff(result[..., 0].astype(int), axis=axis)).max() for result in results for axis in (0, 1)]
    assert max(steps) < 60
    assert np.mean([np.ptp(result) for result in results]) > 50, "the light differs over the page"


def test_blur_keeps_mean_and_loses_contrast() -> None:
    page = make_page(128, 128)
    for result in apply_often(effects.blur, page):
        assert abs(result.mean() - page.mean()) < 2
        assert result.std() < page.std()


def test_motion_blur_smears_along_one_direction_only() -> None:
    page = make_paper(129, 0)
    page[64, 64] = 255
    spreads = []
    for result in apply_often(effects.blur, page, count=90):
        rows, columns = np.nonzero(result[..., 0])
        if len(rows) > 2:
            values = np.linalg.eigvalsh(np.cov(np.stack([rows, columns])))
            spreads.append(values[1] / max(values[0], 0.05))
    assert sum(spread > 3 for spread in spreads) >= 8, "about a third are motion"


def test_noise_is_centred_and_as_strong_as_stated() -> None:
    results = apply_often(effects.add_noise, make_paper(128, 128))
    assert all(abs(result.mean() - 128) < 1.5 for result in results)
    deviations = [result.std() for result in results]
    assert 2 < min(deviations) < 6 and 15 < max(deviations) < 22
    coloured = [not np.array_equal(result[..., 0], result[..., 1]) for result in results]
    assert 3 < sum(coloured) < 25


def test_noise_does_not_repeat_within_page() -> None:
    result = effects.add_noise(make_paper(400, 128), 1.0, rng())[..., 0].astype(float)
    left, right = result[:, :200].ravel(), result[:, 200:].ravel()
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.02


def test_salt_and_pepper_sets_few_pixels_to_black_and_white() -> None:
    for result in apply_often(effects.sprinkle, make_paper(128, 128)):
        assert set(np.unique(result)) == {0, 128, 255}
        assert 0.0005 < (result[..., 0] != 128).mean() <= 0.015


def test_sheet_covers_part_of_one_edge() -> None:
    edges = set()
    for result in apply_often(effects.lay_sheet, make_paper(100, 0)):
        covered = result[..., 0] > 0
        assert 0 < covered.mean() < 0.4 and not covered[40:60, 40:60].any()
        borders = {"top": covered[0], "bottom": covered[-1], "left": covered[:, 0], "right": covered[:, -1]}
        edges.add(max(borders, key=lambda name: borders[name].mean()))
    assert edges == {"top", "bottom", "left", "right"}


def test_occlusion_covers_rectangles_of_one_shade() -> None:
    covered = [(result[..., 0] != 255).mean() for result in apply_often(effects.occlude, make_paper(100))]
    assert np.mean(covered) > 0.01 and max(covered) < 0.15


def test_compression_keeps_colours() -> None:
    """A mix-up of RGB and BGR would turn blue print red."""
    page = make_paper(64, 0)
    page[..., 2] = 200
    for result in apply_often(effects.compress, page):
        assert np.abs(result.astype(int) - page).max() < 12
