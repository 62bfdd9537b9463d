"""Keys that the user stated but that other keys make idle: each is worth a warning, not an error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doccls.config.schema import AugmentConfig, Config


@dataclass(frozen=True)
class _Idleness:
    """Keys that have no effect, and why."""

    keys: tuple[str, ...]
    reason: str


def find_idle_keys(config: Config, where_stated: Mapping[str, str]) -> list[str]:
    """Return a line for each stated key that has no effect in this config.

    Args:
        where_stated: dotted key -> where the user stated it. Keys that a mode or the schema sets are not reported.
    """
    return [
        f"{key} = {_render(_get(config, key))} ({where_stated[key]}) has no effect, since {idleness.reason}"
        for idleness in _list_idle(config)
        for key in idleness.keys
        if key in where_stated
    ]


def _list_idle(config: Config) -> list[_Idleness]:
    """List the keys that have no effect, whoever set them. A key whose value turns something off is not idle."""
    model, train, augment, tracking = config.model, config.train, config.augment, config.tracking
    valid = config.valid
    found: list[_Idleness] = []

    def add(is_idle: bool, keys: str, reason: str) -> None:
        if is_idle:
            found.append(_Idleness(tuple(keys.split()), reason))

    add(model.pretrained and model.weights is not None, "model.pretrained", "model.weights is set")

    has_alphas = train.mixup_alpha > 0 or train.cutmix_alpha > 0
    no_alphas = "train.mixup_alpha and train.cutmix_alpha are 0"
    add(not has_alphas and train.mix_prob > 0, "train.mix_prob", no_alphas)
    add(not has_alphas and train.unmixed_epochs > 0, "train.unmixed_epochs", no_alphas)
    add(train.mixup_alpha > 0 and train.mix_prob == 0, "train.mixup_alpha", "train.mix_prob is 0")
    add(train.cutmix_alpha > 0 and train.mix_prob == 0, "train.cutmix_alpha", "train.mix_prob is 0")

    is_never_mixed = train.unmixed_epochs >= train.epochs
    unmixed = f"the last train.unmixed_epochs = {train.unmixed_epochs} of {train.epochs} epochs are not mixed"
    add(train.mixup_alpha > 0 and is_never_mixed, "train.mixup_alpha", unmixed)
    add(train.cutmix_alpha > 0 and is_never_mixed, "train.cutmix_alpha", unmixed)
    add(has_alphas and train.mix_prob > 0 and is_never_mixed, "train.mix_prob", unmixed)

    scheduler, other = train.scheduler, f"train.scheduler is {train.scheduler}"
    add(scheduler != "step", "train.decay_epochs", other)
    add(scheduler not in ("step", "poly"), "train.decay_rate", other)
    add(
        scheduler == "step" and train.decay_epochs >= train.epochs,
        "train.decay_epochs train.decay_rate",
        f"training ends before the first decay (train.decay_epochs {train.decay_epochs:g}, train.epochs "
        f"{train.epochs}): the learning rate is constant",
    )
    is_flat = scheduler in ("constant", "step")
    add(is_flat and train.min_lr > 0 and train.warmup_epochs == 0, "train.min_lr", f"{other}, without a warm-up")

    add(not valid.has_damage and valid.select is not None, "valid.select", "valid.damage is none")

    add(augment.rotate_deg == 0 and augment.rotate_prob > 0, "augment.rotate_prob", "augment.rotate_deg is 0")
    add(augment.rotate_deg > 0 and augment.rotate_prob == 0, "augment.rotate_deg", "augment.rotate_prob is 0")

    found += _list_idle_augmentation(augment)

    add(not tracking.wandb and tracking.project is not None, "tracking.project", "tracking.wandb is false")
    add(not tracking.wandb and tracking.entity is not None, "tracking.entity", "tracking.wandb is false")
    return found


def _list_idle_augmentation(augment: AugmentConfig) -> list[_Idleness]:
    """List the keys that strength or damage make idle."""
    is_rotated = augment.rotate_deg > 0 and augment.rotate_prob > 0
    unused = ("strength",) if is_rotated else ("strength", "rotate_deg", "rotate_prob")
    scaled = [key for key in AugmentConfig.model_fields if key not in unused]
    used = tuple(f"augment.{key}" for key in scaled if getattr(augment, key) > 0)
    replaced = tuple(key for key in used if key != "augment.damage_prob")
    if augment.strength == 0:
        return [_Idleness(used, "augment.strength is 0")]
    if not used and augment.strength < 1:
        return [_Idleness(("augment.strength",), "there is no augmentation that it could scale")]
    if augment.damage_prob * augment.strength == 1:
        return [_Idleness(replaced, "augment.damage_prob is 1: every page is damaged instead")]
    return []


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _render(value: Any) -> str:
    """Render a value as a user writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
