"""Checks before the first step that the data and the model of each phase fit together."""

from __future__ import annotations

from collections.abc import Mapping

from bigdet.config.model import has_keypoints, has_masks, used
from bigdet.config.phase import data_key
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig, phase_data, phase_model
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import check_same_keypoints, class_ids, warn_of_absent
from bigdet.data.format.phase_sets import DataSets, phases_by_sets
from bigdet.data.format.shard_set import FLAG_KEYPOINTS, FLAG_MASKS, ShardSet
from bigdet.evaluation.coco_metrics import evaluation_kinds


def check_data(config: RunConfig, sets: Mapping[str, DataSets]) -> None:
    """Check that the sets and the model of each phase fit together."""
    for data, names in phases_by_sets(sets).items():
        _check_sets(config, names[0], data)
        for name in names:
            if has_keypoints(phase_model(config, name)):
                check_same_keypoints(data.train, data.val)
            _check_model(config, name, data.train)


def _check_sets(config: RunConfig, name: str, data: DataSets) -> None:
    """Check the two sets of a phase."""
    phase, measured = config.phases[name], config.evaluation
    key = data_key(name, phase, "val")
    has_own_classes = phase.data.train is not None and phase.data.val is None
    hint = f" Or write phases.{name}.data.val.shards too." * has_own_classes
    _check_classes(f"{key}.shards", data.train, data.val, hint)
    evaluation_kinds(data.val, False, False, measured.metric, measured.max_detections)
    is_windowed = phase_data(config, name).train.order == "windowed"
    data.val.check_random_reads(*([] if is_windowed else [data.train]))
    if not len(data.val):
        raise ConfigError(f"{key}.shards: {data.val.address} has no images.")


def _check_model(config: RunConfig, name: str, train_set: ShardSet) -> None:
    """Check that the training set of a phase has what its model learns."""
    model = phase_model(config, name)
    if has_masks(model) and not (train_set.index["flags"] & FLAG_MASKS).any():
        raise ConfigError(
            f"model.detector: {model.detector} needs masks, but {train_set.address} has none. "
            f"Choose another detector, or make shards from annotations with segmentations."
        )
    if not has_keypoints(model):
        return
    own = used(model.keypoint).num_keypoints
    most = max(len(category.keypoints or []) for category in train_set.categories)
    if most != own:
        raise ConfigError(
            f"model.keypoint.num_keypoints: found {own}, but the categories of "
            f"{train_set.address} have {most}. Set that, or make shards with --keypoints."
        )
    if not (train_set.index["flags"] & FLAG_KEYPOINTS).any():
        raise ConfigError(
            f"model.detector: {model.detector} needs keypoints, but no object of "
            f"{train_set.address} has any. Choose another detector, or see in its "
            f"manifest.json why they were dropped and make the shards again."
        )


def _check_classes(key: str, train_set: ShardSet, val_set: ShardSet, hint: str) -> None:
    """Check that trained classes can be evaluated: classes of one name have the same keypoints.

    ``key`` is the option that names the validation set, ``hint`` what else to do.
    """
    names = [category.name for category in train_set.categories]
    try:
        warn_of_absent(val_set, names)
    except ShardError as error:
        raise ConfigError(f"{key}: {error}{hint}") from error
    points = {category.id: category.keypoints for category in val_set.categories}
    for category, number in zip(train_set.categories, class_ids(val_set, names), strict=True):
        found = points.get(number) if number is not None else None
        if category.keypoints and found and category.keypoints != found:
            raise ConfigError(
                f"{key}: {val_set.address}: the keypoints of {category.name} are "
                f"{', '.join(found)}, expected those of {train_set.address}, in their order: "
                f"{', '.join(category.keypoints)}. Make both sets with the same keypoints."
                f"{hint}"
            )
