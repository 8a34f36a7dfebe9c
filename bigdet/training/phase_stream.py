"""The training stream of a phase, from the config of the run."""

from __future__ import annotations

from bigdet.config.model import has_keypoints, has_masks
from bigdet.config.run import RunConfig, phase_data, phase_model
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
    """Return the batches of a phase that one rank of ``world_size`` trains on.

    ``shards`` is the training set of the phase. Iteration starts after ``first_step`` of its steps.
    """
    model = phase_model(config, name)
    return TrainStream(
        shards,
        phase_data(config, name),
        config.phases[name],
        name=name,
        with_masks=has_masks(model),
        with_keypoints=has_keypoints(model),
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
    )
