"""Which samples stand in which group: a pure function of the index, numpy only.

A step of ``images_per_step`` samples is cut into **lanes** of ``images_per_gpu`` samples; the atom
is the **group** (phase, step, lane). Rank r of R runs the lanes r*L/R to (r+1)*L/R - 1, so a group
is the same whatever the number of ranks and workers. This order (``shuffled``) is part of what a
checkpoint relies on: a change of it needs a new name.

- One permutation of all samples per (seed, phase, pass), filled up to a whole number of steps with
  **masked slots**: they repeat the first samples of the permutation, with weight 0. Cut into
  (steps, lanes, images_per_gpu), all masked slots stand at the end of the last step.
- **Aspect pools**: within a lane, 16 consecutive groups are sorted by aspect ratio, cut into groups
  again, and the groups permuted: images of one group then need little padding. The last step of a
  pass belongs to no pool, so that masked slots stay where they are; the last pool may be shorter.

Letters: N samples, L lanes, m images per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.ops.random import permutation

POOL_GROUPS = 16
"""Groups of a lane that are sorted by aspect ratio together."""


@dataclass(frozen=True)
class Group:
    """The samples of one lane in one step.

    Attributes:
        samples: ``(m,)`` int64 in ``0..N-1``.
        weights: ``(m,)`` float32: 0 for a masked slot, else 1.
        pass_number: the trip through the data set that this group belongs to, from 0.
    """

    samples: NDArray[np.int64]
    weights: NDArray[np.float32]
    pass_number: int


class Order:
    """The endless order of a phase. Any group of any step is found without those before it.

    Args:
        aspect_ratios: ``(N,)`` width over height.
        seed: seed of the run.
        phase: name of the phase.
        images_per_gpu: samples of a group, m.
        num_lanes: groups of a step, L.
    """

    name = "shuffled"

    def __init__(
        self,
        aspect_ratios: NDArray[np.float64],
        *,
        seed: int,
        phase: str,
        images_per_gpu: int,
        num_lanes: int,
    ) -> None:
        self.images_per_step = num_lanes * images_per_gpu
        if len(aspect_ratios) < self.images_per_step:
            raise ValueError(
                f"phase {phase}: the training set has {len(aspect_ratios)} samples to offer, one "
                f"step needs {self.images_per_step} ({num_lanes} lanes of {images_per_gpu}). Lower "
                f"phases.{phase}.images_per_step or images_per_gpu, use fewer ranks, or more data."
            )
        self.steps_per_pass = -(-len(aspect_ratios) // self.images_per_step)
        self.num_lanes = num_lanes
        self._aspect_ratios = aspect_ratios
        self._seed = seed
        self._phase = phase
        self._images_per_gpu = images_per_gpu
        self._slots: tuple[int, NDArray[np.int64]] | None = None

    def group(self, step: int, lane: int) -> Group:
        """Return one group.

        Args:
            step: of the phase, from 1.
            lane: ``0..L-1``.
        """
        pass_number, position = divmod(step - 1, self.steps_per_pass)
        slots = self._slots_of_pass(pass_number)
        if position < self.steps_per_pass - 1:
            samples = self._pooled(slots, pass_number, position, lane)
            return Group(samples, np.ones(len(samples), np.float32), pass_number)
        first_slot = position * self.images_per_step + lane * self._images_per_gpu
        is_real = first_slot + np.arange(self._images_per_gpu) < len(self._aspect_ratios)
        return Group(slots[position, lane], is_real.astype(np.float32), pass_number)

    def _slots_of_pass(self, pass_number: int) -> NDArray[np.int64]:
        """Return the samples of a pass before pooling, ``(steps_per_pass, L, m)``; kept for reuse.

        The permutation takes some 10 ms per 100,000 samples, a pool 0.05 ms: that is done anew
        for every group.
        """
        if self._slots is None or self._slots[0] != pass_number:
            count = len(self._aspect_ratios)
            order = permutation("order", self._seed, self._phase, pass_number, count=count)
            num_masked = self.steps_per_pass * self.images_per_step - count
            slots = np.concatenate([order, order[:num_masked]])
            shape = (self.steps_per_pass, self.num_lanes, self._images_per_gpu)
            self._slots = (pass_number, slots.reshape(shape))
        return self._slots[1]

    def _pooled(
        self, slots: NDArray[np.int64], pass_number: int, position: int, lane: int
    ) -> NDArray[np.int64]:
        """Return the samples, ``(m,)``, that the aspect pool of a group gives it."""
        pool, place = divmod(position, POOL_GROUPS)
        first = pool * POOL_GROUPS
        last = min(first + POOL_GROUPS, self.steps_per_pass - 1)
        members = slots[first:last, lane].reshape(-1)
        ranked = members[np.argsort(self._aspect_ratios[members], kind="stable")]
        key = ("pool", self._seed, self._phase, pass_number, pool, lane)
        chosen = permutation(*key, count=last - first)[place]
        samples: NDArray[np.int64] = ranked.reshape(last - first, -1)[chosen]
        return samples


def lanes_of_rank(num_lanes: int, rank: int, world_size: int) -> range:
    """Return the lanes that a rank runs, in this order; ranks must divide lanes."""
    if num_lanes % world_size:
        raise ValueError(
            f"{num_lanes} lanes (images_per_step / images_per_gpu) do not divide among "
            f"{world_size} ranks. Choose images_per_step as a multiple of ranks x images_per_gpu."
        )
    share = num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


def evaluation_groups(
    aspect_ratios: NDArray[np.float64], images_per_gpu: int, world_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return who looks at which image: groups of similar shape, equally many for every rank.

    All images are sorted by aspect ratio and dealt out group by group. Which images share a group,
    and so the canvas of each, does not depend on the number of ranks.

    Args:
        aspect_ratios: ``(N,)`` width over height.
        images_per_gpu: images of a group, m.
        world_size: number of ranks, R.

    Returns:
        Samples ``(rounds, R, m)`` int64 and weights of that shape, float32: 1 once for every
        image, 0 for a surplus slot, which repeats the last image.
    """
    order = np.argsort(aspect_ratios, kind="stable")
    shape = (-(-len(order) // (images_per_gpu * world_size)), world_size, images_per_gpu)
    slots = np.arange(int(np.prod(shape)))
    weights = (slots < len(order)).astype(np.float32)
    samples = order[np.minimum(slots, len(order) - 1)] if len(order) else slots
    return samples.reshape(shape), weights.reshape(shape)
