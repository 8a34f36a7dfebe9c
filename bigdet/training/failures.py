"""Errors in the middle of a step, as one message that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from bigdet import distributed
from bigdet.host import errors
from bigdet.host.limits import host_memory
from bigdet.training.metrics import peak_memory_gib
from bigdet.training.profiling import write_memory

if TYPE_CHECKING:
    from bigdet.training.loop import PhaseTrainer

_GIB = 1 << 30


class StepError(ValueError):
    """A step failed."""


@contextmanager
def explained(trainer: PhaseTrainer) -> Iterator[None]:
    """Add the position in the run to an error of the block.

    Raises:
        StepError: the memory is full, or another rank or a loader process has ended.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        where = trainer.run.watchdog.where
        if errors.is_out_of_memory(error):
            raise StepError(_out_of_memory(trainer, where)) from error
        if lost := distributed.lost_peer(error) or errors.explain_killed(error):
            raise StepError(f"{where}: {lost}") from error
        raise


def _out_of_memory(trainer: PhaseTrainer, where: str) -> str:
    """Return a message with the memory in use and the options that need less."""
    shapes = sorted({str(tuple(batch.images.shape)) for batch in trainer.micro_batches})
    images = ", ".join(shapes) or "of the validation set"
    device = trainer.device
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory / _GIB
        found = f"{peak_memory_gib():.1f} of {room:.1f} GiB of {device}"
        with suppress(OSError):  # a full disk
            write_memory(trainer.run.run_dir.memory_snapshot("full", distributed.rank()))
    else:
        room = host_memory().total / _GIB
        found = f"{peak_memory_gib():.1f} of {room:.1f} GiB of memory"
    key = f"phases.{trainer.name}"
    return (
        f"{where}: out of memory on rank {distributed.rank()}: images {images}, peak "
        f"{found}. Lower {key}.images_per_gpu (images_per_step may stay: the rest is "
        f"accumulated, but losses are normalized over the images of one forward pass, so the "
        f"gradient changes), {key}.resize.size or model.roi.rois_per_image, write "
        f"engine.precision=bf16, engine.activation_checkpointing=true or a higher "
        f"engine.zero_stage; in an evaluation, lower evaluation.images_per_gpu (another padding "
        f"changes AP a little)."
    )
