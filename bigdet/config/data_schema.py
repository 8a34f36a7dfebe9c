"""Options of the data: what is read, which part of it, and where remote shards are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

Order = Literal["shuffled", "windowed"]


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Some of the images: a number of them, or those of a list."""

    images: int | None = None
    """So many images, drawn from those that would be trained on."""
    seed: int = 0
    """Another seed draws others; of one seed, a smaller subset is part of a larger one."""
    ids: str | None = None
    """File with image ids: a JSON list, or numbers between blanks or line ends."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitConfig:
    """The images to learn from."""

    shards: str = MISSING
    """Folder of a shard set (``bigdet shards`` makes one), or its address: ``https://``,
    ``s3://``, ``gs://``, ``hf://``, ..., or a command ``pipe:ssh HOST cat /data/coco/{}``."""
    more_shards: list[str] = field(default_factory=list)
    """Folders or addresses of further sets to mix in. Categories of the same name are one class;
    the others are appended to those of ``shards``."""
    weights: list[float] | None = None
    """How often a pass shows each image of each set, ``shards`` first: 1 is exactly once, 0.5 in
    every other pass. None: 1 for all."""
    subset: SubsetConfig | None = None
    """Train on some of the images only. None: all."""
    repeat_threshold: float | None = None
    """Images with classes that are on less than this part of the images are shown more often
    (repeat factor sampling; LVIS uses 0.001). Reads all annotations at start. None: off."""
    order: Order = "shuffled"
    """``shuffled``: over the whole set. ``windowed``: each lane walks through its own shards and
    shuffles within windows, for remote shards and slow disks."""
    window: int = 1024
    """Images that are shuffled together in ``windowed``."""
    keep_empty: bool = False
    """Train on images without objects too. The papers' code leaves them out."""
    min_keypoints: int = 0
    """Train only on images whose objects have at least so many labelled keypoints together; 1 for
    Keypoint R-CNN in Detectron and detectron2. Reads all annotations at start. 0: no such rule."""
    max_damaged: int = 100
    """Damaged samples, over all ranks, that may be replaced before the run stops."""
    scaled_decoding: bool = False
    """Decode JPEGs of at least twice the size at which they are seen at 1/2, 1/4 or 1/8: faster,
    but other pixels (README). Evaluation always decodes whole."""


@dataclass(frozen=True, kw_only=True)
class ValSplitConfig:
    """The images to measure on; every one of them is used."""

    shards: str = MISSING
    """Folder or address of a shard set."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards that lie at an address are kept on this host; local sets do without."""

    mode: Literal["shards", "ranges"] = "shards"
    """``shards``: a shard is fetched whole when it is first read from. ``ranges``: in runs of
    8 MiB, for large shards, small caches and an early first step; not with ``pipe:``."""
    folder: str = "~/.cache/bigdet"
    """All processes and runs of a host may share it."""
    gib: float = 100.0
    """Room for shards, GiB; those used longest ago make room for others."""


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
    """Loader processes per rank; 0 decodes in the training process."""
