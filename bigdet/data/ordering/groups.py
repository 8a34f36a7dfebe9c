"""Which samples are in which group: a pure function of the index, numpy only.

A step of ``images_per_step`` samples is cut into **lanes** of ``images_per_gpu`` samples; the unit
is the **group** (phase, step, lane). Rank r of R runs the lanes r*L/R to (r+1)*L/R - 1, so a group
is the same whatever the number of ranks and workers. Both orders are part of what a checkpoint
relies on: a change of one needs a new name.

- A pass is a list of **entries**, equally long in every pass: each sample once, or as often as its
  ``repeats`` say (``repeats.py``).
- ``shuffled``: one permutation of all entries per (seed, phase, pass), filled up to a whole number
  of steps with **masked slots** and cut into (steps, lanes, images_per_gpu): all masked slots are
  at the end of the last step. They repeat the first entries of the permutation, with weight 0.
- ``windowed``, for remote shards and slow disks: each lane walks through its own part of the shards
  (``windows.py``). Lanes differ in length by at most one entry, so masked slots are at the end of a
  lane, in the last step; they repeat what came one step before, with weight 0.
- **Aspect pools**: within a lane, 16 consecutive groups are sorted by aspect ratio, cut into groups
  again, and the groups permuted: images of one group then need little padding. The last step of a
  pass belongs to no pool, so that masked slots stay where they are; the last pool may be shorter.

Letters: N samples, P entries of a pass, L lanes, m images per group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.data.ordering.repeats import Repeats
from bigdet.data.ordering.windows import Windows, windowed
from bigdet.ops.random import permutation

POOL_GROUPS = 16
"""Groups of a lane that are sorted by aspect ratio together."""


@dataclass(frozen=True)
class Group:
    """The samples of one lane in one step.

    Attributes:
        samples: ``(m,)`` int64 in ``0..N-1``.
        copies: ``(m,)`` int64: 0 where a sample comes for the first time in its pass, 1 for the
            second time, ...
        weights: ``(m,)`` float32: 0 for a masked slot, else 1.
        pass_number: the trip through the data set that this group belongs to, from 0.
    """

    samples: NDArray[np.int64]
    copies: NDArray[np.int64]
    weights: NDArray[np.float32]
    pass_number: int


@dataclass(frozen=True)
class _Pass:
    """One pass before pooling.

    Attributes:
        number: from 0.
        slots: ``(steps_per_pass, L, m)`` int32 entries.
        last_weights: ``(L, m)`` float32 of the last step; all others are 1.
        ends: ``(N,)`` int64: sample i has the entries ``ends[i - 1]`` to ``ends[i] - 1``; None
            where entry and sample are the same.
    """

    number: int
    slots: NDArray[np.int32]
    last_weights: NDArray[np.float32]
    ends: NDArray[np.int64] | None

    def samples(self, entries: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sample of each entry, and which copy of it the entry is."""
        if self.ends is None:
            return entries.astype(np.int64), np.zeros(len(entries), np.int64)
        samples = np.searchsorted(self.ends, entries, side="right").astype(np.int64)
        starts = np.where(samples > 0, self.ends[samples - 1], 0)
        return samples, entries.astype(np.int64) - starts


_Pool = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Samples and copies of the groups of a pool, ``(groups, m)`` each."""


class Order:
    """The endless order of a phase. Any group of any step is found without those before it.

    Args:
        aspect_ratios: ``(N,)`` width over height.
        seed: seed of the run.
        phase: name of the phase.
        images_per_gpu: samples of a group, m.
        num_lanes: groups of a step, L.
        repeats: how often a pass shows each sample; None is once.
        windows: the shard of each sample and the size of a window: ``windowed``; None is
            ``shuffled``.
    """

    def __init__(
        self,
        aspect_ratios: NDArray[np.float64],
        *,
        seed: int,
        phase: str,
        images_per_gpu: int,
        num_lanes: int,
        repeats: Repeats | None = None,
        windows: Windows | None = None,
    ) -> None:
        self.name = "shuffled" if windows is None else "windowed"
        self.images_per_step = num_lanes * images_per_gpu
        self.num_entries = len(aspect_ratios) if repeats is None else repeats.num_entries
        self.steps_per_pass = -(-self.num_entries // self.images_per_step)
        self.num_lanes = num_lanes
        self._aspect_ratios = aspect_ratios
        self._key = (seed, phase)
        self._images_per_gpu = images_per_gpu
        self._repeats = repeats
        self._windows = windows
        self._pass: _Pass | None = None
        # The last pool of each lane, and its pass and number.
        self._pools: dict[int, tuple[tuple[int, int], _Pool]] = {}
        # The last pool of each lane that ``upcoming`` has returned.
        self._expected: dict[int, tuple[int, int]] = {}

    def for_thread(self) -> Order:
        """Return the same order for another thread, which keeps what it draws to itself."""
        own = copy.copy(self)
        own._pools, own._expected = {}, {}
        return own

    def group(self, step: int, lane: int) -> Group:
        """Return the group of a step, from 1, and a lane, ``0..L-1``."""
        pass_number, position = divmod(step - 1, self.steps_per_pass)
        whole = self._whole_pass(pass_number)
        if position < self.steps_per_pass - 1:
            samples, copies = self._pooled(whole, position, lane)
            weights = np.ones(len(samples), np.float32)
        else:
            samples, copies = whole.samples(whole.slots[position, lane])
            weights = whole.last_weights[lane]
        return Group(samples, copies, weights, pass_number)

    def lane_images(self, step: int) -> NDArray[np.int64]:
        """Return how many slots of each lane of a step, from 1, are not masked: ``(L,)``."""
        pass_number, position = divmod(step - 1, self.steps_per_pass)
        if position < self.steps_per_pass - 1:
            return np.full(self.num_lanes, self._images_per_gpu, np.int64)
        images: NDArray[np.int64] = self._whole_pass(pass_number).last_weights.sum(
            axis=1, dtype=int
        )
        return images

    def upcoming(self, step: int, lane: int) -> NDArray[np.int64] | None:
        """Return what a lane reads next, from its aspect pool to a window further, or None.

        It is returned once for each pool of a lane, and only in the order ``windowed``.
        """
        pass_number, position = divmod(step - 1, self.steps_per_pass)
        pool = (pass_number, position // POOL_GROUPS)
        if self._windows is None or self._expected.get(lane) == pool:
            return None
        self._expected[lane] = pool
        first = pool[1] * POOL_GROUPS
        last = first + POOL_GROUPS + -(-self._windows.size // self._images_per_gpu)
        whole = self._whole_pass(pass_number)
        return whole.samples(whole.slots[first:last, lane].reshape(-1))[0]

    def _whole_pass(self, number: int) -> _Pass:
        """Return a pass before pooling; kept for reuse.

        It takes some 10 ms per 100,000 samples, a pool 0.05 ms. Two threads may ask.
        """
        whole = self._pass
        if whole is None or whole.number != number:
            self._pass = whole = None  # before the next one takes memory
            ends = None if self._repeats is None else self._repeats.draw(*self._key, number)
            if self._windows is None:
                slots, last_weights = self._shuffled(number)
            else:
                slots, last_weights = self._windowed(self._windows, number, ends)
            self._pass = whole = _Pass(number, slots, last_weights, ends)
        return whole

    def _shuffled(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return slots and last weights of a pass of the order ``shuffled``."""
        order = permutation("order", *self._key, number, count=self.num_entries)
        num_slots = self.steps_per_pass * self.images_per_step
        # np.resize starts again from the first entry, as often as it takes.
        slots = np.resize(order.astype(np.int32), num_slots)
        is_real = np.arange(num_slots - self.images_per_step, num_slots) < self.num_entries
        shape = (self.num_lanes, self._images_per_gpu)
        return slots.reshape(-1, *shape), is_real.astype(np.float32).reshape(shape)

    def _windowed(
        self, windows: Windows, number: int, ends: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return slots and last weights of a pass of the order ``windowed``."""
        shards = windows.shards
        if ends is not None:
            shards = np.repeat(shards, np.diff(ends, prepend=0))
        entries, lane_starts = windowed(shards, windows.size, self.num_lanes, *self._key, number)
        m = self._images_per_gpu
        places = np.arange(self.steps_per_pass * m, dtype=np.int32).reshape(-1, m)  # of a lane
        is_real = places[-1] < np.diff(lane_starts)[:, None]  # (L, m)
        slots = lane_starts[:-1, None].astype(np.int32) + places[:, None]  # (steps, L, m)
        slots[-1][~is_real] -= m
        return entries[slots % len(entries)], is_real.astype(np.float32)

    def _pooled(
        self, whole: _Pass, position: int, lane: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return samples and copies, both ``(m,)``, of a group from its aspect pool."""
        pool, place = divmod(position, POOL_GROUPS)
        known, found = self._pools.get(lane, (None, None))
        if found is None or known != (whole.number, pool):
            found = self._pool(whole, pool, lane)
            self._pools[lane] = ((whole.number, pool), found)
        return found[0][place], found[1][place]

    def _pool(self, whole: _Pass, pool: int, lane: int) -> _Pool:
        """Return the groups of an aspect pool of a lane."""
        first = pool * POOL_GROUPS
        last = min(first + POOL_GROUPS, self.steps_per_pass - 1)
        samples, copies = whole.samples(whole.slots[first:last, lane].reshape(-1))
        ranked = np.argsort(self._aspect_ratios[samples], kind="stable").reshape(last - first, -1)
        key = ("pool", *self._key, whole.number, pool, lane)
        chosen = ranked[permutation(*key, count=last - first)]
        return samples[chosen], copies[chosen]


def aspect_ratios(
    index: NDArray[np.void], rows: slice | NDArray[np.int32] = slice(None)
) -> NDArray[np.float64]:
    """Return width over height of the images of an index, or of some of its rows."""
    widths, heights = index["width"][rows], index["height"][rows]
    ratios: NDArray[np.float64] = np.divide(widths, heights, dtype=np.float64)
    return ratios


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
    """Return which rank evaluates which images: groups of similar shape, equally many per rank.

    All images are sorted by aspect ratio and dealt out group by group. Which images share a group,
    and thus a canvas, does not depend on the number of ranks.

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
