"""Warnings if AP counts fewer detections than there are objects.

COCO counts the best 100 detections per class and image. If an image has more objects, no model can
find the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.config.model import reported
from bigdet.config.run import RunConfig
from bigdet.data.format.remote import is_remote
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.ground_truth import GroundTruth

logger = logging.getLogger(__name__)

DENSEST_IMAGES = 8
"""At the start of a run the annotations of this many images with the most objects are read."""


def warn_at_start(config: RunConfig, sets: Sequence[ShardSet]) -> None:
    """Warn before training of what ``warn_of_dense`` would only report hours later.

    Args:
        config: its ``evaluation`` and ``model`` have the limits.
        sets: for validation; nothing is read of a remote one.
    """
    warn_of_few(config)
    for shards in sets:
        if config.evaluation.metric == "coco" and not is_remote(shards.address):
            _warn_of_densest(shards, config.evaluation.max_detections)


def _warn_of_densest(shards: ShardSet, limit: int) -> None:
    """Warn if an image of a set has more objects of a class than detections count."""
    rows = np.argsort(-shards.index["num_boxes"].astype(np.int64), kind="stable")[:DENSEST_IMAGES]
    most, name = 0, ""
    for row in rows[shards.index["num_boxes"][rows] > limit].tolist():
        record = shards.record(row)
        labels = [each["label"] for each in record["annotations"] if not each["iscrowd"]]
        counts = np.bincount(labels, minlength=1)
        if counts.max() > most:
            most, name = int(counts.max()), shards.categories[int(counts.argmax())].name
    _warn(shards.address, name, most, limit)


def warn_of_few(config: RunConfig) -> None:
    """Warn if AP counts more than 100 detections, but the model gives fewer."""
    limit = config.evaluation.max_detections
    key, given = reported(config.model) or ("", limit)
    if given < limit and limit > MAX_DETECTIONS:
        logger.warning(
            "evaluation.max_detections is %d, but the model gives %d detections per image: raise "
            "%s too",
            limit,
            given,
            key,
        )


def warn_of_dense(truth: GroundTruth, limit: int) -> None:
    """Warn if an image has more objects of a class than AP counts detections.

    Args:
        truth: the objects.
        limit: detections per class and image that AP counts.
    """
    kinds = truth.images * len(truth.categories) + truth.labels
    places, counts = np.unique(kinds[~truth.is_crowd], return_counts=True)
    if len(counts):
        label = int(places[counts.argmax()]) % len(truth.categories)
        _warn(truth.address, truth.categories[label].name, int(counts.max()), limit)


def _warn(address: str, name: str, most: int, limit: int) -> None:
    if most > limit:
        logger.warning(
            f"{address}: an image has {most} objects of the class {name}, but AP counts {limit} "
            f"detections: raise evaluation.max_detections (the AP is then not COCO's), and "
            f"detections_per_image of the model"
        )
