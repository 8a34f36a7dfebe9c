"""Opens a stream from options of all sections at once."""

import dataclasses
from typing import Any

from bigdet.config.data import DataConfig, TrainSplitConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.resize import ResizeConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import TrainStream


def open_stream(shards: ShardSet, **options: Any) -> TrainStream:
    """A stream of the phase ``train``: options of the split, of the phase and of the stream."""
    split = {"shards": "unused", "keep_empty": True} | _taken(options, TrainSplitConfig)
    phase = {
        "steps": 1,
        "lr": 1.0,
        "resize": ResizeConfig(kind="direct", size=32),
        "images_per_gpu": 2,
    } | _taken(options, PhaseConfig)
    loading = {name: options.pop(name) for name in ("workers", "worker_kind") if name in options}
    data = DataConfig(train=TrainSplitConfig(**split), **{"workers": 0, **loading})
    more = {"name": "train", "with_masks": False, "seed": 0, "rank": 0, "world_size": 1}
    return TrainStream(shards, data, PhaseConfig(**phase), **more | options)


def _taken(options: dict[str, Any], section: type) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(section)]
    return {name: options.pop(name) for name in names if name in options}
