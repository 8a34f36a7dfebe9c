"""The training stream of a phase, from the config of the run."""

from __future__ import annotations

from bigdet.config.model import has_keypoints, has_masks
from bigdet.config.run import RunConfig, phase_model
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import TrainStream


def stream_for_phase(
    config: RunConfig,
    name: str,
    shards: ShardSet,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> TrainStream:
    """Return the batches that one rank trains on in a phase.

    Args:
        config: of the run; the folders of its data are not read.
        name: name of the phase.
        shards: the training set.
        rank: in ``0..world_size-1``.
        world_size: number of ranks.
        first_step: finished steps of this phase; iteration starts with the next one.
    """
    model = phase_model(config, name)
    return TrainStream(
        shards,
        config.data,
        config.phases[name],
        name=name,
        with_masks=has_masks(model),
        with_keypoints=has_keypoints(model),
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
    )
