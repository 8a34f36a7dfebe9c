"""Losses and gradient norms of a log line: means over all images of its steps.

At the end of a pass a step may have lanes without an image. They add nothing to the gradient, which
is a sum over all lanes, and must not lower the means either.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from bigdet import distributed
from bigdet.engine.base import StepResult
from bigdet.training.metrics import mean_losses
from bigdet.training.state import Interval


class LossMeter:
    """Sums of losses and gradient norms since the last log line; every image has the same weight.

    Only ``means`` and ``interval`` wait for the device.
    """

    def __init__(self, device: torch.device, before: Interval) -> None:
        """Start from the sums of a checkpoint: steps since the last line of an earlier process."""
        self._device = device
        self._images, self._norm_images = before.images, before.norm_images
        self._norm = before.norm
        ranks = before.losses
        if len(ranks) == distributed.world_size():  # the same sums in the same order: bit-equal
            self._before = ranks[distributed.rank()]
        elif distributed.is_main() and ranks:
            names = dict.fromkeys(name for rank in ranks for name in rank)  # some have had no step
            self._before = {
                name: math.fsum(rank.get(name, 0.0) for rank in ranks) for name in names
            }
        else:
            self._before = {}
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, result: StepResult, images: NDArray[np.int64], lanes: range) -> None:
        """Count one step.

        A step that was not finite is left out, except for the losses at an overflow of fp16.

        Args:
            result: of this rank's M lanes.
            images: ``(L,)`` images of each lane of the step, masked slots not counted.
            lanes: this rank's lanes, M of 0 to L - 1.
        """
        if not self._names:
            self._names = list(result.lane_losses)
            sums = [self._before.get(name, 0.0) for name in self._names]
            self._sums = torch.tensor(sums, dtype=torch.float64, device=self._device)
        num_images = float(images.sum())
        if result.is_finite or result.is_overflow:
            own = images[lanes.start : lanes.stop].astype(np.float64)
            weights = torch.from_numpy(own).to(self._device, non_blocking=True)
            losses = torch.stack(list(result.lane_losses.values()))  # (names, M)
            self._sums += (losses.double() * weights).sum(dim=1)
            self._images += num_images
        if result.is_finite:
            # Norm of the mean over the lanes that have an image, like the losses.
            norm = result.grad_norm * len(images) / np.count_nonzero(images)
            self._norm += num_images * float(norm)
            self._norm_images += num_images

    def means(self) -> dict[str, float | None]:
        """Return the means by logged name, None without a step, and reset the sums (collective)."""
        means: dict[str, float | None] = {f"loss/{name}": None for name in self._names}
        if self._images:
            shares = self._sums * (distributed.world_size() / self._images)
            means |= mean_losses(dict(zip(self._names, shares, strict=True)))
        means["grad_norm"] = self._norm / self._norm_images if self._norm_images else None
        self._sums = torch.zeros_like(self._sums)
        self._images = self._norm_images = self._norm = 0.0
        return means

    def interval(self) -> Interval:
        """Return the sums since the last line, for a checkpoint (collective)."""
        if not self._images and not self._norm_images:
            return Interval()
        own = self._before
        if self._names:
            own = dict(zip(self._names, self._sums.tolist(), strict=True))
        ranks = distributed.all_gather_objects(own)
        return Interval(self._images, ranks, self._norm_images, self._norm)
