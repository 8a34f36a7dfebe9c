"""BN statistics of the present weights, for an evaluation: means over many training batches.

The moving averages of ``models/norms.py`` lag behind: they mix the statistics of the last tens of
steps, each with other weights. Here the weights are fixed while the next training batches go
through the network (Wu and Johnson, *Rethinking "Batch" in BatchNorm*, section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice

import torch

from bigdet import distributed
from bigdet.config.engine import Precision
from bigdet.data.streams.stream import TrainStream
from bigdet.engine.precision import autocast
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.training.prefetch import prefetch

logger = logging.getLogger(__name__)


def measure_statistics(
    detector: Detector,
    stream: TrainStream,
    num_steps: int,
    device: torch.device,
    precision: Precision,
    must_stop: Callable[[], bool],
) -> bool:
    """Set the running statistics of live BN layers to their means over the batches of some steps.

    A collective; afterwards all ranks have the same statistics. They depend only on the weights and
    the batches: not on the statistics before, nor, if BN is ``live``, on the number of ranks.

    Args:
        detector: in training mode, between two steps.
        stream: another one than training uses; closed at the end.
        num_steps: number of steps whose batches are used, the same on all ranks.
        device: where the batches are copied to.
        precision: of activations and matrix products, as in training.
        must_stop: called on all ranks after every step; must return the same on all of them.

    Returns:
        False when asked to stop; the statistics are then unchanged.
    """
    batches = iter(stream)
    norms.discard_statistics(detector)
    try:
        for _ in range(num_steps):
            with distributed.together():
                micro_batches = list(islice(batches, len(stream.lanes)))
            for batch in prefetch(micro_batches, device):
                with (
                    torch.no_grad(),
                    torch.compiler.set_stance("force_eager"),
                    autocast(device, precision),
                ):
                    detector(batch)
            if must_stop():
                norms.discard_statistics(detector)
                return False
    finally:
        stream.close()
    norms.update_running_statistics(detector, momentum=1.0)
    logger.info("BN: running statistics measured over the batches of %d steps", num_steps)
    return True
