"""The batches of training and of evaluation.

``TrainStream`` is endless, starts at any step, and gives every group of images the same ids,
pixels and seed whatever the number of ranks, loader processes or threads (``ordering/groups.py``
says which rank gets which group). ``EvalStream`` gives every image once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.config.data import DataConfig, WorkerKind
from bigdet.config.phase import PhaseConfig, data_key
from bigdet.config.resize import largest_plan
from bigdet.data.examples.collate import (
    Allocate,
    PackedGroup,
    group_bytes,
    num_dropped,
    pack,
    unpack,
)
from bigdet.data.examples.objects import Wanted, keypoint_order, no_objects
from bigdet.data.examples.samples import Damage, load_sample
from bigdet.data.examples.train_groups import TrainGroups
from bigdet.data.examples.transforms import Example
from bigdet.data.examples.views import whole_view
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.ordering.groups import Order, aspect_ratios, evaluation_groups, lanes_of_rank
from bigdet.data.ordering.selection import left_out, select
from bigdet.data.streams.loader import Loader
from bigdet.data.streams.reading import Read
from bigdet.host.limits import num_cpus
from bigdet.structures import Batch

logger = logging.getLogger(__name__)

LISTED_DAMAGES = 20
"""Damaged samples that are named when a run stops because of them."""


class TrainStream:
    """The batches that one rank trains on in one phase.

    Attributes:
        damages: samples that this rank found damaged and replaced, by row.
        damaged: their number by kind.
        dropped_boxes: boxes so far of which a random crop left nothing.
        max_damaged: how many samples may be replaced.
    """

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        phase: PhaseConfig,
        *,
        name: str,
        with_masks: bool,
        with_keypoints: bool = False,
        seed: int,
        rank: int,
        world_size: int,
        first_step: int = 0,
    ) -> None:
        """Compute the order; nothing is read and no process started before iteration.

        Args:
            shards: the training set.
            data: of the phase: which of its images in which order, how many damaged ones may be
                replaced before iteration raises, and the number of loader processes or threads (0
                reads in this process). Its paths are ignored.
            phase: resize, augmentation, images per batch and per step.
            name: that of the phase; another name is another order.
            with_masks: targets have masks.
            with_keypoints: targets have keypoints.
            seed: that of the run.
            rank: from 0.
            world_size: number of ranks.
            first_step: finished steps of this phase; iteration starts with the next one.
        """
        images_per_gpu = phase.images_per_gpu
        images_per_step = phase.images_per_step or world_size * images_per_gpu
        if images_per_step % images_per_gpu:
            raise ValueError(
                f"phases.{name}.images_per_step: {images_per_step} is not a multiple of "
                f"images_per_gpu, {images_per_gpu}. Change one of them."
            )
        self._key = data_key(name, phase, "train")
        selection = select(shards, data.train, self._key)
        rows = selection.rows
        order = Order(
            aspect_ratios(shards.index, rows),
            seed=seed,
            phase=name,
            images_per_gpu=images_per_gpu,
            num_lanes=images_per_step // images_per_gpu,
            repeats=selection.repeats,
            windows=selection.windows,
        )
        if order.num_entries < images_per_step:
            raise ValueError(
                f"phase {name}: the training set has {order.num_entries} samples that can be used, "
                f"one step needs {images_per_step} ({order.num_lanes} lanes of {images_per_gpu})."
                f"{left_out(shards, data.train, self._key)} Lower phases.{name}.images_per_step or "
                f"images_per_gpu, use fewer ranks, or more data."
            )
        wanted = Wanted(
            masks=with_masks,
            keypoint_order=keypoint_order(shards.categories) if with_keypoints else None,
            tight_boxes=phase.resize.kind == "jitter",
            scaled_decoding=data.train.scaled_decoding,
        )
        self._groups = TrainGroups(shards, rows, order, phase, wanted, (seed, name))
        self.lanes = lanes_of_rank(order.num_lanes, rank, world_size)
        self.damaged: dict[str, int] = {}
        self.dropped_boxes = 0
        self.damages: dict[int, Damage] = {}
        self.max_damaged = data.train.max_damaged
        self._workers, self._worker_kind = data.workers, data.worker_kind
        largest = largest_plan(phase.resize)
        self._group_bytes = group_bytes(images_per_gpu, largest, with_masks=with_masks)
        self._first_step = first_step
        self._loader: Loader[tuple[int, int]] | None = None
        self._state = {
            "order": order.name,
            "seed": seed,
            "phase": name,
            "lanes": order.num_lanes,
            "images_per_gpu": images_per_gpu,
            **selection.state,
        }

    @property
    def steps_per_pass(self) -> int:
        """Steps that show every sample once."""
        return self._groups.order.steps_per_pass

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's lanes of step ``first_step + 1``, in order, then of the next, ..."""
        yield from map(self.use, self.groups())

    def groups(self) -> Iterator[PackedGroup]:
        """Yield the same as packed groups, of which nothing is counted before `use`."""
        self.close()
        order = self._groups.order
        logger.info(
            f"phase {self._state['phase']}: {self._state['samples']:,} of "
            f"{len(self._groups.shards):,} images, {order.num_entries:,} samples in a pass of "
            f"{order.steps_per_pass:,} steps, order {order.name}"
        )
        if (workers := self._workers) > (cores := num_cpus()):
            kind = self._worker_kind
            logger.info(f"data.workers: {workers} loader {kind} for each rank, on {cores} cores")
        order.group(self._first_step + 1, 0)  # drawn once, and shared by all that read
        steps = itertools.count(self._first_step + 1)
        keys = ((step, lane) for step in steps for lane in self.lanes)
        self._loader = Loader(
            self._groups.read,
            keys,
            workers=self._workers,
            group_bytes=self._group_bytes,
            thread_read=self._thread_read if self._worker_kind == "threads" else None,
        )
        yield from self._loader

    def use(self, packed: PackedGroup) -> Batch:
        """Unpack a group, and count what it reports; too many damaged samples are an error."""
        self._note(packed)
        return unpack(packed)

    def from_step(self, first_step: int) -> TrainStream:
        """Return another stream of the same groups from a step on; it has new loaders and counts.

        Args:
            first_step: finished steps, as in the constructor.
        """
        other = copy.copy(self)
        other._first_step, other._loader = first_step, None
        other.damaged, other.dropped_boxes, other.damages = {}, 0, {}
        return other

    def read_group(self, step: int, lane: int) -> Batch:
        """Make one group of any step, from 1, and any lane, in this process."""
        return self.use(self._groups.read((step, lane)))

    def group_ids(self, step: int, lane: int) -> list[int | None]:
        """Return the image ids of one group, from the index alone; None for a masked slot."""
        group = self._groups.order.group(step, lane)
        ids = self._groups.shards.index["image_id"][self._groups.rows[group.samples]]
        return [
            int(image_id) if weight else None
            for image_id, weight in zip(ids, group.weights, strict=True)
        ]

    def lane_images(self, step: int) -> NDArray[np.int64]:
        """Return how many images of each lane of a step, from 1, are not masked: ``(L,)``."""
        return self._groups.order.lane_images(step)

    def state(self) -> dict[str, Any]:
        """Return what a number of finished steps depends on, for a checkpoint."""
        return dict(self._state)

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless a saved position means the same in this stream."""
        wrong = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self._state.items()
            if saved.get(name) != value
        ]
        if wrong:
            raise ValueError(
                f"phase {self._state['phase']}: the checkpoint was written on another data stream: "
                f"{'; '.join(wrong)}. Continue with the data, order, seed, images_per_gpu and "
                "images_per_step of the checkpoint (ranks and workers may change), or start a new "
                "run in another output folder."
            )

    def close(self) -> None:
        """End the loader processes or threads."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _thread_read(self) -> Read[tuple[int, int]]:
        return self._groups.for_thread().read

    def _note(self, packed: PackedGroup) -> None:
        self.dropped_boxes += num_dropped(packed)
        for damage in packed.notes:
            if damage.row in self.damages:
                continue
            self.damages[damage.row] = damage
            self.damaged[damage.kind] = self.damaged.get(damage.kind, 0) + 1
            logger.warning("damaged sample replaced by another one: %s", damage.message)
        if len(self.damages) > self.max_damaged:
            messages = (damage.message for damage in self.damages.values())
            raise ShardError(self.too_damaged(self.damaged, messages))

    def too_damaged(self, num_damaged: Mapping[str, int], messages: Iterable[str]) -> str:
        """Return the error of a set with more damaged samples than ``max_damaged`` of its split.

        ``num_damaged`` counts them by kind; of ``messages``, one for each, the first are listed.
        """
        listed = "".join(f"\n  {message}" for message in itertools.islice(messages, LISTED_DAMAGES))
        return (
            f"{self._groups.shards.address}: {sum(num_damaged.values())} damaged training samples "
            f"had to be replaced ({num_damaged}), {self._key}.max_damaged allows "
            f"{self.max_damaged}. Repair the shards or raise the limit; `bigdet check-shards` "
            f"lists all that is damaged. The first ones:{listed}"
        )


class EvalStream:
    """One rank's share of all images, scaled whole, without targets.

    Every rank has the same number of batches. Surplus slots repeat an image with weight 0; every
    image comes once with weight 1 over all ranks. A damaged image is an error: a score over fewer
    images would be another score. Images of a batch have similar aspect ratios, to save padding.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        size_cap: tuple[int, int] | None,
        images_per_gpu: int,
        rank: int,
        world_size: int,
        workers: int,
        worker_kind: WorkerKind = "processes",
    ) -> None:
        """Decide which images this rank gets.

        Args:
            shards: the set; all of it is used.
            size_cap: short side and longest long side, pixels; None leaves images as they are.
            images_per_gpu: images of a batch.
            rank: from 0.
            world_size: number of ranks.
            workers: loader processes or threads; 0 reads in this process.
            worker_kind: which of the two.
        """
        ratios = aspect_ratios(shards.index)
        rows, weights = evaluation_groups(ratios, images_per_gpu, world_size)
        self._rows, self._weights = rows[:, rank], weights[:, rank]
        self._shards = shards
        self._size_cap = size_cap
        self._workers, self._worker_kind = workers, worker_kind

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        loader = Loader(
            self._read,
            range(len(self)),
            workers=self._workers,
            group_bytes=group_bytes(self._rows.shape[1], self._largest(), with_masks=False),
            thread_read=self._thread_read if self._worker_kind == "threads" else None,
        )
        with contextlib.closing(loader):
            yield from map(unpack, loader)

    def _largest(self) -> tuple[int, int]:
        """Return the short side and the longest long side of the images in batches, pixels."""
        if self._size_cap is not None:
            return self._size_cap
        sizes = self._shards.index[["height", "width"]].tolist()
        short, long = (max(map(side, sizes)) for side in (min, max))
        return short, long

    def _thread_read(self) -> Read[int]:
        own = copy.copy(self)
        own._shards = self._shards.for_thread()
        return own._read

    def _read(self, batch: int, allocate: Allocate) -> PackedGroup:
        examples = [
            self._example(int(row), float(weight))
            for row, weight in zip(self._rows[batch], self._weights[batch], strict=True)
        ]
        return pack(examples, canvas=None, seed=0, allocate=allocate)

    def _example(self, row: int, weight: float) -> Example:
        image, record = load_sample(self._shards, row)
        size = (record["height"], record["width"])
        plan = self._size_cap or (min(size), max(size))
        seen = whole_view(size, plan).move_image(image)
        return Example(seen, size, record["image_id"], weight, no_objects())
