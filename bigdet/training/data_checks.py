"""Checks before the first step that training set, validation set and model fit together."""

from __future__ import annotations

from bigdet.config.model import has_keypoints, has_masks, used
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig, phase_model
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import class_ids, warn_of_absent
from bigdet.data.format.shard_set import FLAG_KEYPOINTS, FLAG_MASKS, ShardSet
from bigdet.evaluation.coco_metrics import evaluation_kinds


def check_data(config: RunConfig, train_set: ShardSet, val_set: ShardSet) -> None:
    """Check that the two sets and the models of all phases fit together."""
    _check_classes(train_set, val_set)
    measured = config.evaluation
    evaluation_kinds(val_set, False, False, measured.metric, measured.max_detections)
    val_set.check_random_reads()
    if config.data.train.order != "windowed":
        train_set.check_random_reads()
    if not len(val_set):
        raise ConfigError(f"data.val.shards: {val_set.address} has no images.")
    data_has_masks = (train_set.index["flags"] & FLAG_MASKS).any()
    for name in config.phases:
        model = phase_model(config, name)
        if has_masks(model) and not data_has_masks:
            raise ConfigError(
                f"model.detector: {model.detector} needs masks, but {train_set.address} has none. "
                f"Choose another detector, or make shards from annotations with segmentations."
            )
        counts = [len(category.keypoints or []) for category in train_set.categories]
        own = used(model.keypoint).num_keypoints if has_keypoints(model) else None
        if own is not None and max(counts) != own:
            raise ConfigError(
                f"model.keypoint.num_keypoints: found {own}, but the "
                f"categories of {train_set.address} have {max(counts)}. Set that, or make shards "
                f"with --keypoints."
            )
        if has_keypoints(model) and not (train_set.index["flags"] & FLAG_KEYPOINTS).any():
            raise ConfigError(
                f"model.detector: {model.detector} needs keypoints, but no object of "
                f"{train_set.address} has any. Choose another detector, or see in its "
                f"manifest.json why they were dropped and make the shards again."
            )


def _check_classes(train_set: ShardSet, val_set: ShardSet) -> None:
    """Check that trained classes can be evaluated: classes of one name have the same keypoints."""
    names = [category.name for category in train_set.categories]
    try:
        warn_of_absent(val_set, names)
    except ShardError as error:
        raise ConfigError(f"data.val.shards: {error}") from error
    points = {category.id: category.keypoints for category in val_set.categories}
    for category, number in zip(train_set.categories, class_ids(val_set, names), strict=True):
        found = points.get(number) if number is not None else None
        if category.keypoints and found and category.keypoints != found:
            raise ConfigError(
                f"data.val.shards: {val_set.address}: the keypoints of {category.name} are "
                f"{', '.join(found)}, expected those of {train_set.address}, in their order: "
                f"{', '.join(category.keypoints)}. Make both sets with the same keypoints."
            )
