"""The data: what is read, which part of it, and where copies of remote shards are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.rules import (
    ConfigError,
    Ignored,
    not_negative,
    only_for,
    positive,
    positive_fraction,
    require,
)

Order = Literal["shuffled", "windowed"]
WorkerKind = Literal["processes", "threads"]


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Some of the images: a number of them, or those of a list."""

    images: int | None = None
    """This many images, drawn from those that would be trained on."""
    seed: int = 0
    """Seed of the draw. With the same seed, a smaller subset is part of a larger one."""
    ids: str | None = None
    """File with image ids: a JSON list, or numbers separated by spaces or line ends."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitConfig:
    """The images to learn from."""

    shards: str = MISSING
    """Folder of a shard set (``bigdet shards`` makes one), or its address: ``https://``,
    ``s3://``, ``gs://``, ``hf://``, ..., or a command ``pipe:ssh HOST cat /data/coco/{}``."""
    more_shards: list[str] = field(default_factory=list)
    """Folders or addresses of further sets to mix in. Categories with the same name are one class;
    the others are appended to those of ``shards``. Where keypoints are learned, those of a class
    are the same in all sets, in the same order."""
    weights: list[float] | None = None
    """How often a pass shows each image of each set, ``shards`` first: 1 is exactly once, 0.5 in
    every other pass. None: 1 for all."""
    subset: SubsetConfig | None = None
    """Train on some of the images only. None: all."""
    repeat_threshold: float | None = None
    """Show images of rare classes more often: classes that occur in less than this fraction of the
    images (repeat factor sampling; LVIS uses 0.001). Reads all annotations at the start. None:
    off."""
    order: Order = "shuffled"
    """``shuffled``: shuffle the whole set. ``windowed``: each lane reads its own shards and
    shuffles within windows, for remote shards and slow disks."""
    window: int = field(default=1024, metadata=only_for("order", "windowed"))
    """For ``windowed``: how many images are shuffled together, 256 to 2048."""
    keep_empty: bool = False
    """Train on images without objects too. The papers' code leaves them out."""
    min_keypoints: int = 0
    """Train only on images whose objects together have at least this many labeled keypoints; 1 for
    Keypoint R-CNN in Detectron and detectron2. Reads all annotations at the start. 0: no limit."""
    max_damaged: int = 100
    """Damaged samples, over all ranks, that may be replaced before the run stops."""
    scaled_decoding: bool = False
    """Decode JPEGs of at least twice the size needed at 1/2, 1/4 or 1/8: faster, but the pixels
    differ slightly. Evaluation always decodes in full."""


@dataclass(frozen=True, kw_only=True)
class ValSplitConfig:
    """The images to evaluate on; every one of them is used."""

    shards: str = MISSING
    """Folder or address of a shard set."""


@dataclass(frozen=True, kw_only=True)
class PhaseDataConfig:
    """Data of one phase; the other phases do not see it."""

    train: TrainSplitConfig | None = None
    """The training split of this phase, whole: what it does not set has its default, not the value
    of ``data.train``. The detector of the phase has the classes of this split; those that the phase
    before had too, by name, keep their weights. None: ``data.train``."""
    val: ValSplitConfig | None = None
    """The validation split of this phase. AP on different sets is not comparable: reports compare
    on the set of the last evaluation, and ``best`` is the best on the newest set. None:
    ``data.val``."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where this host keeps copies of remote shards; local sets need none."""

    mode: Literal["shards", "ranges"] = "shards"
    """``shards``: fetch a shard whole when it is first needed. ``ranges``: fetch runs of 8 MiB, for
    large shards, small caches and an early first step; not with ``pipe:``."""
    folder: str = "~/.cache/bigdet"
    """Folder of the cache; all processes and runs of a host may share it."""
    gib: float = 100.0
    """Space for shards, GiB; the least recently used make room for others. The sets that a phase
    reads in random order (validation, and training unless ``windowed``) must fit together."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are read."""

    train: TrainSplitConfig = field(default_factory=TrainSplitConfig)
    """The training split."""
    val: ValSplitConfig = field(default_factory=ValSplitConfig)
    """The validation split."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Copies of remote shards."""
    workers: int = 2
    """Loader processes or threads per rank; 0 decodes in the training process."""
    worker_kind: WorkerKind = "processes"
    """``threads`` copy nothing between processes and need no shared memory, but share Python's lock
    with the training loop. The batches are the same. The CPU time of a run has the decoding of
    threads, not that of processes."""


def check_data(data: DataConfig) -> None:
    """Check what can be known of the data without reading any of it."""
    positive("data.cache", data.cache, "gib")
    not_negative("data", data, "workers")
    require(bool(data.cache.folder), "data.cache.folder", "nothing", "a folder")
    check_splits("data", data.train, data.val, data.cache)


def check_splits(
    key: str, train: TrainSplitConfig | None, val: ValSplitConfig | None, cache: CacheConfig
) -> None:
    """Check the splits of a section: ``data``, or ``phases.NAME.data``."""
    addresses = [] if val is None else [(f"{key}.val.shards", val.shards)]
    if train is not None:
        check_train_split(f"{key}.train", train)
        addresses.append((f"{key}.train.shards", train.shards))
        addresses += [(f"{key}.train.more_shards", address) for address in train.more_shards]
    for option, address in addresses:
        if not address.startswith("pipe:"):
            continue
        place = "where the name of a file goes, such as pipe:ssh HOST cat /data/{}"
        require("{}" in address, option, address, f"{{}} in the command {place}")
        if cache.mode == "ranges":
            raise ConfigError(
                f"data.cache.mode: found ranges, but {option} is a pipe:, which can only be read "
                f"whole. Write shards."
            )


def check_train_split(key: str, split: TrainSplitConfig) -> None:
    """Check which images are trained on, and in which order."""
    not_negative(key, split, "max_damaged", "min_keypoints")
    num_sets, weights = 1 + len(split.more_shards), split.weights
    if weights is not None and (len(weights) != num_sets or min(weights) <= 0):
        raise ConfigError(
            f"{key}.weights: found {weights}, expected a number above 0 for each of {num_sets} "
            f"sets: shards, then more_shards."
        )
    positive_fraction(key, split, "repeat_threshold")
    if split.order == "windowed":
        require(256 <= split.window <= 2048, f"{key}.window", split.window, "256 to 2048")
    if (subset := split.subset) is not None:
        if (subset.images is None) == (subset.ids is None):
            raise ConfigError(f"{key}.subset: write one of images (a number) and ids (a file).")
        positive(f"{key}.subset", subset, "images")
        if subset.ids is not None and split.more_shards:
            raise ConfigError(
                f"{key}.subset.ids: an image id may name several images when sets are "
                f"mixed. Write subset.images, or make shards of the images that you want."
            )


def ignored_in_train_split(key: str, split: TrainSplitConfig, *, has_keypoints: bool) -> Ignored:
    """Yield the options without effect; ``has_keypoints``: a phase learns keypoints from it."""
    if split.subset is not None and split.subset.ids is not None:
        yield f"{key}.subset.seed", "is for a number of images"
    if not has_keypoints:
        yield f"{key}.min_keypoints", "is for keypoint_rcnn"
