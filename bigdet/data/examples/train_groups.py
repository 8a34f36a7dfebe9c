"""One group of a training stream, made from nothing but its step and lane."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigdet.config.phase import PhaseConfig
from bigdet.config.resize import ResizeConfig, is_square
from bigdet.data.examples.collate import Allocate, PackedGroup, fresh_memory, pack
from bigdet.data.examples.objects import Wanted, check_annotations
from bigdet.data.examples.samples import (
    Damage,
    DamagedSampleError,
    damaged,
    decode_sample,
    read_sample,
)
from bigdet.data.examples.transforms import Scene, make_examples
from bigdet.data.examples.views import (
    Size,
    draw_size,
    draw_view,
    resize_of_step,
    training_canvas,
)
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.ordering.groups import Order
from bigdet.ops.random import Words, seed_of

REPLACEMENT_TRIES = 100
"""Samples that are tried in place of a damaged one before the run ends."""


class _Shared(NamedTuple):
    """What the images of a group have in common."""

    pass_number: int
    resize: ResizeConfig
    canvas: Size | None


class TrainGroups:
    """Makes any group of a phase from nothing but its step and lane."""

    def __init__(
        self,
        shards: ShardSet,
        rows: NDArray[np.int32],
        order: Order,
        phase: PhaseConfig,
        wanted: Wanted,
        key: tuple[int, str],
    ) -> None:
        """Keep what groups are made of.

        Args:
            shards: the training set.
            rows: ``(N,)`` those of the samples that are trained on.
            order: which of the N samples are in which group.
            phase: resize, flip and augmentation.
            wanted: what to compute besides boxes and labels.
            key: seed of the run and name of the phase, for random numbers.
        """
        self.shards = shards
        self.rows = rows
        self.order = order
        self._phase = phase
        self._wanted = wanted
        self._key = key

    def for_thread(self) -> TrainGroups:
        """Return groups with shards and drawn orders of their own, for use by one thread."""
        own = copy.copy(self)
        own.shards, own.order = self.shards.for_thread(), self.order.for_thread()
        return own

    def read(self, key: tuple[int, int], allocate: Allocate = fresh_memory) -> PackedGroup:
        """Return the group of (step, lane), in memory from ``allocate``."""
        step, lane = key
        upcoming = self.order.upcoming(step, lane)
        if upcoming is not None:
            self.shards.expect(self.rows[upcoming])
        group = self.order.group(step, lane)
        resize = resize_of_step(self._phase.resize, *self._key, step)
        index = self.shards.index[self.rows[group.samples]]
        sizes = list(zip(index["height"].tolist(), index["width"].tolist(), strict=True))
        canvas = training_canvas(resize, sizes)
        shared = _Shared(group.pass_number, resize, canvas)
        damages: list[Damage] = []
        scenes = (
            self._sound_scene(int(self.rows[sample]), int(number), float(weight), shared, damages)
            for sample, number, weight in zip(
                group.samples, group.copies, group.weights, strict=True
            )
        )
        square = canvas if is_square(resize) else None
        examples = make_examples(scenes, self._phase.augment, square, self._wanted)
        seed = seed_of("model", *self._key, step, lane)
        return pack(examples, canvas=canvas, seed=seed, notes=damages, allocate=allocate)

    def _sound_scene(
        self, row: int, copy: int, weight: float, shared: _Shared, damages: list[Damage]
    ) -> Scene:
        """Return the scene of a sample, or of one drawn in its place when it is damaged."""
        replacement_words: Words | None = None
        for _ in range(REPLACEMENT_TRIES):
            try:
                return self._scene(row, copy, weight, shared)
            except DamagedSampleError as error:
                damages.append(Damage(row, error.kind, str(error)))
                if replacement_words is None:
                    replacement_words = Words("replacement", *self._key, shared.pass_number, row)
                row = int(self.rows[replacement_words.integer(len(self.rows))])
        raise ShardError(
            f"{self.shards.address}: {REPLACEMENT_TRIES} samples drawn in a row are damaged, the "
            f"last one: {damages[-1].message}"
        )

    def _scene(self, row: int, copy: int, weight: float, shared: _Shared) -> Scene:
        sample = read_sample(self.shards, row)
        record = sample.record
        copy_key = (copy,) if copy else ()  # a sample that comes again in a pass looks different
        key = (*self._key, shared.pass_number, row, *copy_key)
        resize, words = draw_size(shared.resize, *key), Words("augmentation", *key)
        view = draw_view(record, resize, self._phase.flip, words, shared.canvas)
        may_shrink = self._wanted.scaled_decoding and view.window is None
        least_size = view.scaled_size if may_shrink else None
        image = decode_sample(self.shards, row, sample, least_size)
        try:
            check_annotations(record["annotations"], view.original_size, self._wanted)
        except ValueError as error:
            raise damaged(self.shards, row, "bad_annotation", f"has an {error}") from error
        return Scene(image, record, view, weight, key)
