"""Whether AP counts enough detections for the objects that there are; warnings where it does not.

COCO counts the best 100 detections of a class on an image. Where more objects are, the rest cannot
be found, whatever the model does.
"""

from __future__ import annotations

import logging

import numpy as np

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.config.model import reported
from bigdet.config.run import RunConfig
from bigdet.data.format.remote import is_remote
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.ground_truth import GroundTruth

logger = logging.getLogger(__name__)

DENSEST_IMAGES = 8
"""Images whose annotations are read at the start of a run, those with the most objects."""


def warn_at_start(config: RunConfig, shards: ShardSet) -> None:
    """Say before hours of training what ``warn_of_dense`` would say after them.

    Args:
        config: of the run.
        shards: what AP is measured on; of a remote set nothing is read ahead of time.
    """
    limit = config.evaluation.max_detections
    warn_of_few(config)
    if config.evaluation.metric != "coco" or is_remote(shards.address):
        return
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
    """Warn where more detections would be counted than the model gives."""
    limit = config.evaluation.max_detections
    key, given = reported(config.model) or ("", limit)
    if given < limit and limit > MAX_DETECTIONS:
        logger.warning(
            "evaluation.max_detections is %d, but the model gives %d detections an image: raise "
            "%s too", limit, given, key,
        )  # fmt: skip


def warn_of_dense(truth: GroundTruth, limit: int) -> None:
    """Warn where a class has more objects on an image than detections of it are counted.

    Args:
        truth: what there is to find.
        limit: detections of a class on an image that AP counts.
    """
    kinds = truth.images * len(truth.categories) + truth.labels
    places, counts = np.unique(kinds[~truth.is_crowd], return_counts=True)
    if len(counts):
        label = int(places[counts.argmax()]) % len(truth.categories)
        _warn(truth.address, truth.categories[label].name, int(counts.max()), limit)


def _warn(address: str, name: str, most: int, limit: int) -> None:
    if most > limit:
        logger.warning(
            "%s: an image has %d objects of the class %s, of which AP can find %d: raise "
            "evaluation.max_detections (the AP is then another one than COCO's), and "
            "detections_per_image of the model", address, most, name, limit,
        )  # fmt: skip
