"""The order ``windowed`` before its aspect pools: each lane reads few shards at a time. Numpy only.

Per (seed, phase, pass) the shards are permuted, and within each shard its runs of 64 consecutive
samples. This sequence is cut into one span per lane, equally long but for one sample, and each span
into windows, within which all samples are shuffled. So a lane reads only what a window touches: one
or two shards if they are larger than windows, in runs, to which it does not return in the pass.

Letters: P entries of a pass, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.ops.random import permutation, words

RUN_SAMPLES = 64
"""Neighbors in a shard that stay together until a window shuffles them: one range to read."""


@dataclass(frozen=True)
class Windows:
    """What the order ``windowed`` depends on.

    Attributes:
        shards: ``(N,)`` the shard of each sample.
        size: samples that are shuffled together.
    """

    shards: NDArray[np.uint32]
    size: int


def windowed(
    shards: NDArray[np.uint32], size: int, num_lanes: int, *key: int | str
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the entries of a pass, lane after lane.

    Args:
        shards: ``(P,)`` the shard of each entry, at least one entry.
        size: of a window, entries.
        num_lanes: L.
        key: seed, phase, pass.

    Returns:
        ``(P,)`` int32 entries, each once, and ``(L + 1,)`` int64: lane l has those from
        ``starts[l]`` to ``starts[l + 1] - 1``.
    """
    entries = _permute_runs(shards, *key)
    share, num_longer = divmod(len(entries), num_lanes)
    lengths = np.where(np.arange(num_lanes) < num_longer, share + 1, share)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    num_windows = -(-lengths // size)
    window_sizes = np.full(int(num_windows.sum()), size)
    ends = np.cumsum(num_windows)[num_windows > 0]
    window_sizes[ends - 1] = (lengths - (num_windows - 1) * size)[num_windows > 0]
    # One sort for all windows: the number of its window above, 40 random bits below.
    ranks = words("window", *key, count=len(entries))
    ranks >>= np.uint64(24)
    ranks |= np.repeat(np.arange(len(window_sizes), dtype=np.uint64) << np.uint64(40), window_sizes)
    return entries[np.argsort(ranks, kind="stable")], starts


def _permute_runs(shards: NDArray[np.uint32], *key: int | str) -> NDArray[np.int32]:
    """Return all entries, ``(P,)`` int32: shards permuted, and the runs within each."""
    count = len(shards)
    by_shard = np.argsort(shards, kind="stable").astype(np.int32)
    sorted_shards = shards[by_shard]
    firsts = np.flatnonzero(sorted_shards[1:] != sorted_shards[:-1]) + 1
    firsts = np.concatenate([[0], firsts])
    sizes = np.diff(firsts, append=count)
    runs_per_shard = -(-sizes // RUN_SAMPLES)
    shard_of_run = np.repeat(np.arange(len(sizes)), runs_per_shard)
    first_run = np.cumsum(runs_per_shard) - runs_per_shard
    place_in_shard = np.arange(len(shard_of_run)) - first_run[shard_of_run]
    starts = firsts[shard_of_run] + place_in_shard * RUN_SAMPLES
    shard_ranks = words("shard", *key, count=len(sizes))
    run_ranks = permutation("run", *key, count=len(starts))
    order = np.lexsort((run_ranks, shard_of_run, shard_ranks[shard_of_run]))
    lengths = np.diff(starts, append=count)[order]
    shifts = (starts[order] - (np.cumsum(lengths) - lengths)).astype(np.int32)
    places = np.repeat(shifts, lengths) + np.arange(count, dtype=np.int32)
    entries: NDArray[np.int32] = by_shard[places]
    return entries
