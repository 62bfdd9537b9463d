"""Training augmentation with albumentations, drawn for each page from (seed, fold, epoch, sample)."""

import os
import random
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import asks PyPI for the newest version

import albumentations as A

from doccls.config.schema import AugmentConfig
from doccls.data.images import WHITE


class Augmentation:
    """The augmentation pipeline of an AugmentConfig.

    In albumentations 2.0.8, `Compose.set_random_seed` gives every transform the same stream. `set_random_state` with
    fresh generators for each page does not, and makes each draw independent of earlier ones.
    """

    def __init__(self, config: AugmentConfig, size_px: int) -> None:
        self._compose = A.Compose(_list_transforms(config, size_px))

    def apply(self, page: np.ndarray, stream: np.random.SeedSequence) -> np.ndarray:
        """Augment (page_px, page_px, 3) uint8 to (size_px, size_px, 3) uint8: a pure function of page and stream."""
        numpy_stream, python_stream = stream.spawn(2)
        self._compose.set_random_state(
            np.random.Generator(np.random.PCG64(numpy_stream)),
            random.Random(int(python_stream.generate_state(1, np.uint64)[0])),
        )
        augmented: np.ndarray = self._compose(image=page)["image"]
        return augmented


class _ScalingAffine(A.Affine):  # type: ignore[misc]  # albumentations is untyped
    """An affine transform that also scales the page to `size_px`, in one pass over the pixels.

    A.Affine keeps the image's size. Its matrix is used unchanged, and followed by a scaling about the centre.
    """

    def __init__(self, size_px: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._size_px = size_px

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Add the scaling to the parameters of A.Affine."""
        affine: dict[str, Any] = super().get_params_dependent_on_data(params, data)
        factor = self._size_px / params["shape"][0]
        offset = (factor - 1) / 2  # pixel coordinates refer to pixel centres
        scaling = np.array([[factor, 0, offset], [0, factor, offset], [0, 0, 1]])
        return affine | {"matrix": scaling @ affine["matrix"], "output_shape": (self._size_px, self._size_px)}


def _list_affines(config: AugmentConfig, size_px: int) -> list[A.BasicTransform | A.BaseCompose]:
    zoom, shift = (1 - config.scale, 1 + config.scale), (-config.shift, config.shift)
    kwargs = {"scale": zoom, "keep_ratio": True, "translate_percent": shift, "interpolation": cv2.INTER_LINEAR}
    kwargs |= {"fill": WHITE, "border_mode": cv2.BORDER_CONSTANT}
    angles, prob = (-config.rotate_deg, config.rotate_deg), config.rotate_prob if config.rotate_deg else 0.0
    rotated = [_ScalingAffine(size_px, rotate=angles, p=prob, **kwargs)] if prob > 0 else []
    upright = [_ScalingAffine(size_px, p=1 - prob, **kwargs)] if prob < 1 else []
    return [A.OneOf([*rotated, *upright], p=1)] if rotated and upright else [*rotated, *upright]


def _list_transforms(config: AugmentConfig, size_px: int) -> list[A.BasicTransform | A.BaseCompose]:
    """List the transforms in the order of a photo: turn, affine, perspective, light, blur, noise, compression."""
    flat = {"fill": WHITE, "border_mode": cv2.BORDER_CONSTANT, "interpolation": cv2.INTER_LINEAR}
    transforms: list[A.BasicTransform | A.BaseCompose] = []
    if config.quarter_turn_prob:
        transforms.append(A.RandomRotate90(p=config.quarter_turn_prob))
    if config.hflip_prob:
        transforms.append(A.HorizontalFlip(p=config.hflip_prob))
    if config.vflip_prob:
        transforms.append(A.VerticalFlip(p=config.vflip_prob))
    transforms += _list_affines(config, size_px)
    if config.perspective_prob:
        transforms.append(A.Perspective(scale=(0.03, 0.1), p=config.perspective_prob, **flat))
    if config.shadow_prob:
        edge = A.RandomShadow(
            (0, 0, 1, 1), num_shadows_limit=(1, 1), shadow_dimension=4, shadow_intensity_range=(0.2, 0.5)
        )
        shadows = [edge, A.PlasmaShadow()]
        transforms.append(A.OneOf(shadows, p=config.shadow_prob))
    if config.brightness:
        # Paper is nearly white already: much more brightness would only wash out the ink.
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
