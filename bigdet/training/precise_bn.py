"""Statistics of BN at the present weights, for an evaluation: means over many training batches.

The moving averages of ``models/norms.py`` lag behind: they mix statistics of weights of the last
tens of steps. Here the weights stand still while the next training batches go through the network
(Wu and Johnson, *Rethinking "Batch" in BatchNorm*, section 3).
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

    Every rank must call it, with the same number of steps; afterwards all have the same statistics.
    They depend on the weights and the batches alone: not on the statistics before, nor on the
    number of ranks where BN is ``live``.

    Args:
        detector: in training mode, between two steps.
        stream: of its own, from which the training takes nothing.
        num_steps: how many steps' batches, of all lanes.
        device: of this rank.
        precision: of activations and matrix products, as in training.
        must_stop: asked on all ranks after every step's batches; the same answer on all.

    Returns:
        False when it was told to stop; the statistics are then what they were.
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
