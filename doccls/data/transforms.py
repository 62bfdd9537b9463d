"""Training augmentation with albumentations, drawn for each page from (seed, fold, epoch, sample)."""

import os
import random
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import asks PyPI for the newest version

import albumentations as A

from doccls.config.schema import AugmentConfig
from doccls.data import effects
from doccls.data.damage import damage_page
from doccls.data.images import WHITE, pad_page


class Augmentation:
    """The augmentation of training pages: `damage_prob` of them are damaged, the others go through albumentations.

    In albumentations 2.0.8, `Compose.set_random_seed` gives every transform the same stream. `set_random_state` with
    fresh generators for each page does not, and makes each draw independent of earlier ones.
    """

    def __init__(self, config: AugmentConfig, size_px: int) -> None:
        self._size_px, self._strength = size_px, config.strength
        self._damage_prob = config.damage_prob * config.strength
        self._compose = A.Compose(_list_transforms(config.scale_by_strength(), size_px, config.strength))

    def apply(self, page: np.ndarray, stream: np.random.SeedSequence) -> np.ndarray:
        """Augment a page (h, w, 3) uint8 to (size_px, size_px, 3) uint8: a pure function of page and stream."""
        numpy_stream, python_stream = stream.spawn(2)
        if self._damage_prob > 0:
            choice_stream, damage_stream = stream.spawn(2)
            if np.random.Generator(np.random.PCG64(choice_stream)).random() < self._damage_prob:
                return damage_page(page, self._size_px, self._strength, damage_stream)
        self._compose.set_random_state(
            np.random.Generator(np.random.PCG64(numpy_stream)),
            random.Random(int(python_stream.generate_state(1, np.uint64)[0])),
        )
        augmented: np.ndarray = self._compose(image=pad_page(page, max(page.shape[:2])))["image"]
        return augmented


class _Defect(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations is untyped
    """A defect of `effects`. Those of albumentations take up to 100 times as long."""

    def __init__(self, effect: effects.Effect, strength: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self._effect, self._strength = effect, strength

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Apply the defect; called by albumentations."""
        return self._effect(img.copy(), self._strength, self.random_generator)


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


def _list_transforms(config: AugmentConfig, size_px: int, strength: float) -> list[A.BasicTransform | A.BaseCompose]:
    """List the transforms in the order of a photo: turn, affine, perspective, light, blur, noise, compression.

    The probabilities of `config` are final; `strength` scales the magnitudes that have no key.
    """
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
        transforms.append(A.Perspective(scale=(0.03 * strength, 0.1 * strength), p=config.perspective_prob, **flat))
    if config.shadow_prob:
        shadows = [_Defect(effects.shade, strength), _Defect(effects.cast_shadow, strength)]
        transforms.append(A.OneOf(shadows, p=config.shadow_prob))
    if config.brightness:
        # Paper is nearly white already: much more brightness would only wash out the ink.
        light, contrast = (-config.brightness, config.brightness / 4), (-config.brightness, config.brightness)
        transforms.append(A.RandomBrightnessContrast(light, contrast, p=1))
    if config.blur_prob:
        transforms.append(_Defect(effects.blur, strength, config.blur_prob))
    if config.noise_prob:
        transforms.append(_Defect(effects.add_noise, strength, config.noise_prob))
    if config.jpeg_prob:
        transforms.append(_Defect(effects.compress, strength, config.jpeg_prob))
    return transforms
