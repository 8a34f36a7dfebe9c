"""What start, step and save of a model take of a rank on many GPUs, whole and in shares.

Whole, as many trainers do it: each rank builds the model on its device and then divides it; a
checkpoint is gathered in the memory of rank 0, which writes it alone. In shares, as bigdet does
(`pieces/building.py`, `engine/writing.py`): each rank takes its part of the start weights from a
file, and writes its part of a checkpoint from a copy of it, while the training goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigdet.planning.cluster import link_speed
from bigdet.planning.devices import Memory, memory_of, stage_of
from bigdet.planning.simulated import Step
from bigdet.training.sizes import BF16_BYTES, ModelSizes

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Scale:
    """A run on a number of GPUs.

    Attributes:
        step: memory of a GPU in a step.
        start_whole: bytes of a GPU at the start, where each rank builds the whole model.
        start: the same where it takes its share.
        save_whole: bytes of rank 0's host memory in a save, where it gathers the checkpoint.
        save: bytes of each rank's host memory, for the copy of its share.
        write_whole: seconds to write the checkpoint from one host.
        write: seconds to write it from all hosts, each to a disk of its own.
        wait: seconds that training waits for the copies.
    """

    gpus: int
    step: Memory
    start_whole: float
    start: float
    save_whole: float
    save: float
    write_whole: float
    write: float
    wait: float


def scale(
    step: Step,
    kind: str,
    gpus: int,
    sizes: ModelSizes,
    over: int,
    disk: float,
    *,
    shares_frozen: bool = False,
) -> Scale:
    """Predict one number of GPUs.

    Args:
        step: simulated on one GPU.
        kind: one of ``cluster.KINDS``.
        gpus: number of GPUs, eight on a host.
        sizes: of the model.
        over: number of GPUs that share what the engine divides: all, or those of a host.
        disk: bytes per second that a host writes.
        shares_frozen: all GPUs share a frozen backbone, which is in no checkpoint.
    """
    checkpoint = float(step.weights - BF16_BYTES * sizes.frozen + step.state)
    share = checkpoint / gpus
    hosts = math.ceil(gpus / GPUS_PER_HOST)
    memory = memory_of(step, kind, gpus, sizes, over, shares_frozen=shares_frozen)
    return Scale(
        gpus=gpus,
        step=memory,
        start_whole=step.weights + (memory.weights if stage_of(kind) == 3 and gpus > 1 else 0.0),
        start=memory.weights,
        save_whole=checkpoint,
        save=share,
        write_whole=checkpoint / disk,
        write=checkpoint / hosts / disk,
        wait=share / link_speed("pcie4"),
    )
