"""Training augmentation: albumentations, drawn afresh from (seed, fold, epoch, sample) for each page."""

import os
import random
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks PyPI for its newest version

import albumentations as A

from doccls.config.schema import AugmentConfig
from doccls.data.images import WHITE


class Augmentation:
    """The pipeline of one AugmentConfig.

    albumentations 2.0.8: `Compose.set_random_seed` gives every transform the same stream; `set_random_state` with fresh
    generators for each page does not, and makes the draw independent of whatever was drawn before.
    """

    def __init__(self, config: AugmentConfig, size_px: int) -> None:
        self._compose = A.Compose(_list_transforms(config, size_px))

    def apply(self, page: np.ndarray, stream: np.random.SeedSequence) -> np.ndarray:
        """(page_px, page_px, 3) uint8 -> (size_px, size_px, 3) uint8; a pure function of the page and the stream."""
        numpy_stream, python_stream = stream.spawn(2)
        self._compose.set_random_state(
            np.random.Generator(np.random.PCG64(numpy_stream)),
            random.Random(int(python_stream.generate_state(1, np.uint64)[0])),
        )
        augmented: np.ndarray = self._compose(image=page)["image"]
        return augmented


class _Placement(A.Affine):  # type: ignore[misc]  # albumentations is untyped
    """Turned, zoomed and moved, and scaled from the page's size to `size_px`, all in one pass over the pixels.

    albumentations' own keeps the size; its matrix is taken as it is, and a scaling about the centre put before it.
    """

    def __init__(self, size_px: int, **words: Any) -> None:
        super().__init__(**words)
        self._size_px = size_px

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Its own, for another size."""
        found: dict[str, Any] = super().get_params_dependent_on_data(params, data)
        factor = self._size_px / params["shape"][0]
        middle = (factor - 1) / 2  # a pixel's place is its middle
        scaling = np.array([[factor, 0, middle], [0, factor, middle], [0, 0, 1]])
        return found | {"matrix": scaling @ found["matrix"], "output_shape": (self._size_px, self._size_px)}


def _list_placements(config: AugmentConfig, size_px: int) -> list[A.BasicTransform | A.BaseCompose]:
    zoom, move = (1 - config.scale, 1 + config.scale), (-config.shift, config.shift)
    words = {"scale": zoom, "keep_ratio": True, "translate_percent": move, "interpolation": cv2.INTER_LINEAR}
    words |= {"fill": WHITE, "border_mode": cv2.BORDER_CONSTANT}
    turn, share = (-config.rotate_deg, config.rotate_deg), config.rotate_prob if config.rotate_deg else 0.0
    turned = [_Placement(size_px, rotate=turn, p=share, **words)] if share > 0 else []
    straight = [_Placement(size_px, p=1 - share, **words)] if share < 1 else []
    return [A.OneOf([*turned, *straight], p=1)] if turned and straight else [*turned, *straight]


def _list_transforms(config: AugmentConfig, size_px: int) -> list[A.BasicTransform | A.BaseCompose]:
    """In the order in which a page meets them: turned, placed, photographed, lit, blurred, sensed, compressed."""
    flat = {"fill": WHITE, "border_mode": cv2.BORDER_CONSTANT, "interpolation": cv2.INTER_LINEAR}
    transforms: list[A.BasicTransform | A.BaseCompose] = []
    if config.quarter_turn_prob:
        transforms.append(A.RandomRotate90(p=config.quarter_turn_prob))
    if config.hflip_prob:
        transforms.append(A.HorizontalFlip(p=config.hflip_prob))
    if config.vflip_prob:
        transforms.append(A.VerticalFlip(p=config.vflip_prob))
    transforms += _list_placements(config, size_px)
    if config.perspective_prob:
        transforms.append(A.Perspective(scale=(0.03, 0.1), p=config.perspective_prob, **flat))
    if config.shadow_prob:
        edge = A.RandomShadow(
            (0, 0, 1, 1), num_shadows_limit=(1, 1), shadow_dimension=4, shadow_intensity_range=(0.2, 0.5)
        )
        shadows = [edge, A.PlasmaShadow()]
        transforms.append(A.OneOf(shadows, p=config.shadow_prob))
    if config.brightness:
        # Paper is near white already: much brighter would only wash the ink out.
        light, contrast = (-config.brightness, config.brightness / 4), (-config.brightness, config.brightness)
        transforms.append(A.RandomBrightnessContrast(light, contrast, p=1))
    if config.blur_prob:
        blurs = [A.MotionBlur(blur_limit=(3, 7)), A.GaussianBlur(sigma_limit=(0.5, 1.5)), A.Defocus(radius=(1, 3))]
        transforms.append(A.OneOf(blurs, p=config.blur_prob))
    if config.noise_prob:
        noises = [A.GaussNoise(std_range=(0.02, 0.1)), A.ISONoise(), A.ShotNoise(scale_range=(0.01, 0.08))]
        transforms.append(A.OneOf(noises, p=config.noise_prob))
    if config.jpeg_prob:
        transforms.append(A.ImageCompression(quality_range=(20, 70), p=config.jpeg_prob))
    return transforms
