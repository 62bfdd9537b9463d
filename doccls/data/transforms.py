"""Training augmentation: albumentations, drawn afresh from (seed, fold, epoch, sample) for each page."""

import os
import random

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

    def __init__(self, config: AugmentConfig) -> None:
        self._compose = A.Compose(_list_transforms(config))

    def apply(self, page: np.ndarray, stream: np.random.SeedSequence) -> np.ndarray:
        """(size, size, 3) uint8 -> the same shape and dtype; a pure function of the page and the stream."""
        numpy_stream, python_stream = stream.spawn(2)
        self._compose.set_random_state(
            np.random.Generator(np.random.PCG64(numpy_stream)),
            random.Random(int(python_stream.generate_state(1, np.uint64)[0])),
        )
        augmented: np.ndarray = self._compose(image=page)["image"]
        return augmented


def _list_transforms(config: AugmentConfig) -> list[A.BasicTransform | A.BaseCompose]:
    """In the order in which a page meets them: turned, moved, photographed, lit, blurred, sensed, compressed."""
    flat = {"fill": WHITE, "border_mode": cv2.BORDER_CONSTANT, "interpolation": cv2.INTER_LINEAR}
    transforms: list[A.BasicTransform | A.BaseCompose] = []
    if config.quarter_turn_prob:
        transforms.append(A.RandomRotate90(p=config.quarter_turn_prob))
    if config.hflip_prob:
        transforms.append(A.HorizontalFlip(p=config.hflip_prob))
    if config.vflip_prob:
        transforms.append(A.VerticalFlip(p=config.vflip_prob))
    if config.rotate_deg:
        transforms.append(A.Rotate(limit=(-config.rotate_deg, config.rotate_deg), p=config.rotate_prob, **flat))
    if config.scale or config.shift:
        zoom, move = (1 - config.scale, 1 + config.scale), (-config.shift, config.shift)
        transforms.append(A.Affine(scale=zoom, keep_ratio=True, translate_percent=move, p=1, **flat))
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
