"""Random changes of training images, other than their size."""

from __future__ import annotations

from dataclasses import dataclass

from bigdet.config.model import ModelConfig, has_masks
from bigdet.config.rules import ConfigError, fraction

_MOSAIC_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images besides scale, crop and flip; 0 turns one off."""

    color_jitter: float = 0.0
    """Probability that brightness, contrast and saturation of an image change, each by a factor of
    0.6 to 1.4."""
    copy_paste: float = 0.0
    """Probability that some objects of another image of the group are pasted into an image, cut out
    by their masks."""
    mosaic: float = 0.0
    """Probability that an image is replaced by four in a 2x2 grid, at about half their size: itself
    and three others of its group. Nothing is pasted into a mosaic."""


def check_augment(
    key: str, augment: AugmentConfig, images_per_gpu: int, model: ModelConfig
) -> None:
    """Check the probabilities, and that masks and groups of ``images_per_gpu`` suffice."""
    fraction(key, augment, "color_jitter", "copy_paste", "mosaic")
    if augment.copy_paste and not has_masks(model):
        raise ConfigError(
            f"{key}.copy_paste: objects are cut out by their masks, but {model.detector} does "
            f"not learn masks. Remove it, or choose mask_rcnn."
        )
    for name, num_images in (("copy_paste", 2), ("mosaic", _MOSAIC_IMAGES)):
        if getattr(augment, name) and images_per_gpu < num_images:
            raise ConfigError(
                f"{key}.{name}: the other images come from the same group, so it needs "
                f"images_per_gpu of at least {num_images}, found {images_per_gpu}."
            )
