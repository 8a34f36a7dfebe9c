"""A shard set on disk and its reader: WebDataset tars with an index and a manifest.

    DIR/manifest.json      what the set holds, its categories, its tars with their hashes
    DIR/index.npy          one 48-byte record per sample; the row number is the sample's index
    DIR/000000.tar ...     per sample KEY.jpg (or .png, .webp) and KEY.json, KEY the image id
    DIR/skipped.jsonl      what was left out when the set was made, one object per line, if any

``manifest.json`` (``manifest.py``) is written last, so a folder without it is not a finished set.
``KEY.json`` describes the pixels of its image as they are stored; if EXIF shows the image turned,
and it was annotated so, both are returned turned (``orientation.py``). A set may also be at an
address (``remote.py``), read through a cache (``cache.py``). ``data/making`` writes sets.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from bigdet.config.data import CacheConfig
from bigdet.data.format.manifest import MANIFEST_NAME, Category, Manifest, Shard, ShardError
from bigdet.data.format.orientation import as_seen
from bigdet.data.format.remote import UnreachableError, file_address, is_remote, shown
from bigdet.data.format.tars import Span, check_random_reads, local_copy, open_tars
from bigdet.data.format.web_pages import found_page
from bigdet.host.files import file_sha256
from bigdet.host.reading import patiently, why_unread

logger = logging.getLogger(__name__)
T = TypeVar("T")

INDEX_DTYPE = np.dtype(
    [
        ("image_id", "<i8"),
        ("image_offset", "<u8"),  # of the image's first byte in its tar
        ("image_size", "<u4"),
        ("annotation_offset", "<u8"),
        ("annotation_size", "<u4"),
        ("crc32", "<u4"),  # over the image bytes, then the annotation bytes
        ("width", "<u2"),  # after turning
        ("height", "<u2"),
        ("flags", "<u2"),
        ("num_boxes", "<u2"),  # crowds not counted
        ("shard", "<u4"),
    ]
)
FLAG_CROWD = 1
FLAG_MASKS = 2
FLAG_KEYPOINTS = 4
FLAG_PROGRESSIVE = 8
FLAG_NOT_JPEG = 16
TURN_BIT = 5  # from here on 3 bits: the EXIF orientation, less 1, that the image is turned by

INDEX_NAME = "index.npy"
SKIPPED_NAME = "skipped.jsonl"
MISSING = "the file is missing"
STRING_IDS = {"image_ids": "strings"}
"""In the options of a set that has ``source_id`` in its records."""
LABEL_LISTS = ("negative_labels", "not_exhaustive_labels")
"""What records of a federated set have, see ``Sample``."""


class UnavailableShardError(ShardError):
    """A shard that cannot be read: its samples may be intact, but the run ends."""


@dataclass(frozen=True)
class Sample:
    """One image with its annotations, as the data set has them.

    Attributes:
        image_bytes: the encoded image.
        record: ``image_id, file_name, height, width, annotations``; each annotation has
            ``id, label, bbox`` (xywh, pixels), ``area, iscrowd`` and maybe ``segmentation`` and
            ``keypoints`` (x, y, visibility 0..2 of each of the category's, flat). Where the data
            set's own image id is a string it is in ``source_id``. A federated set has two lists:
            ``negative_labels``, classes looked for that are not there, and
            ``not_exhaustive_labels``, classes of which not all objects are annotated; nothing is
            known of other classes without objects.
        orientation: how the decoded image is turned to fit the record, ``1..8`` as in EXIF.
    """

    image_bytes: bytes
    record: dict[str, Any]
    orientation: int = 1


class ShardSet:
    """Reads samples by row, in any order, from any process.

    The index is mapped, not read, so all processes of a host share it. Tars are opened when they
    are first read from, again in every process that gets a pickled copy. Not thread-safe: each
    thread needs its own ``for_thread``.

    Attributes:
        address: that of the set, for messages.
        folder: of manifest and index: the set itself, or the copies of a remote one.
    """

    def __init__(
        self, path: str | Path, *, cache: CacheConfig | None = None, check_files: bool = True
    ) -> None:
        """Open a shard set.

        Args:
            path: folder or address.
            cache: how a remote set is read; None for the defaults of the config.
            check_files: check first that every tar of a local set has the size in the manifest.
        """
        self._cache = CacheConfig() if cache is None else cache
        self._path = str(path)
        self.address = shown(self._path)
        try:
            self.folder = local_copy(self._path, self._cache)
        except UnreachableError as error:
            raise UnavailableShardError(
                f"{self.address}: manifest and index of the shard set cannot be fetched: {error}. "
                "Give the address of the folder that `bigdet shards` wrote."
            ) from error
        try:
            patiently(self._load, str(self.folder))
            if check_files and not is_remote(self._path):
                self._check_files()
        except OSError as error:
            place = error.filename or self.folder
            raise UnavailableShardError(f"{place}: {why_unread(error)}") from error
        except ShardError as error:
            if not is_remote(self._path):
                raise
            raise ShardError(f"{self.address}: in the files fetched from there, {error}") from error

    def _load(self) -> None:
        """Read manifest and index."""
        self.manifest = Manifest.load(self.folder)
        self.index = load_index(self.folder, self.manifest)
        expected = self.manifest.index_sha256
        if expected is not None and file_sha256(self.folder / INDEX_NAME) != expected:
            raise ShardError(
                f"{self.folder / INDEX_NAME}: its SHA-256 is not that in {MANIFEST_NAME}, so it is "
                "damaged or of another set. Copy or make the set again."
            )
        self._tars = open_tars(self._path, self.manifest.shards, self._cache)

    def _check_files(self) -> None:
        """Check that every tar of a local set is complete and readable."""
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if problem := size_problem(self.folder, shard):
                raise ShardError(
                    f"{path}: {problem}. Copy the set again, or make it again with `bigdet shards`."
                )
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def categories(self) -> list[Category]:
        """The classes in the order of the labels."""
        return self.manifest.categories

    @property
    def num_classes(self) -> int:
        """How many classes there are, background not counted."""
        return len(self.manifest.categories)

    def index_hash(self) -> str:
        """Return a hash of ``index.npy``: two sets with the same one hold the same samples."""
        with open(self.folder / INDEX_NAME, "rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()

    @property
    def bytes_at(self) -> dict[str, int]:
        """The bytes of all tars, by the path or address of the set."""
        return {self._path: sum(shard.bytes for shard in self.manifest.shards)}

    def check_random_reads(self, *others: ShardSet) -> None:
        """Raise ``ConfigError`` if reading all in any order would fetch shards over and over."""
        sets = (self, *others)
        bytes_at = {path: size for each in sets for path, size in each.bytes_at.items()}
        check_random_reads(bytes_at, self._cache)

    def key(self, row: int) -> str:
        """Return the name of a sample in its tar, without extension."""
        return sample_key(int(self.index[row]["image_id"]))

    def path(self, row: int) -> Path:
        """Return the tar that holds a sample, of a local set."""
        return self.folder / self._shard(row).file

    def place(self, row: int) -> str:
        """Return the full name of the tar that holds a sample, for messages."""
        if is_remote(self._path):
            return shown(file_address(self._path, self._shard(row).file))
        return str(self.path(row))

    def read(self, row: int) -> Sample:
        """Return one sample; ``ShardError`` if its bytes are not those that were written."""
        return self._twice(row, self._read)

    def record(self, row: int) -> dict[str, Any]:
        """Return the annotations of one sample, see ``Sample``, without reading its image."""
        return self._twice(row, self._record)

    def _twice(self, row: int, read: Callable[[int], T]) -> T:
        """Read a sample; where the cached copy of a remote set is damaged, from a new one."""
        try:
            return read(row)
        except UnavailableShardError:
            raise
        except ShardError as error:
            if not self._tars.forget(*self._spans(np.array([row]))[0]):
                raise
            what = f"{self.place(row)}: sample {self.key(row)}: {error.finding}"
            logger.warning("%s; fetched again, as its copy in the cache may be damaged", what)
        return read(row)

    def _read(self, row: int) -> Sample:
        entry = self.index[row]
        image = self._bytes(row, int(entry["image_offset"]), int(entry["image_size"]))
        text = self._bytes(row, int(entry["annotation_offset"]), int(entry["annotation_size"]))
        found, expected = zlib.crc32(text, zlib.crc32(image)), int(entry["crc32"])
        if found != expected:
            raise self._damaged(row, f"CRC-32 is {found:08x}, expected {expected:08x}")
        return Sample(image, self._parse(row, text), orientation_of(int(entry["flags"])))

    def _record(self, row: int) -> dict[str, Any]:
        entry = self.index[row]
        offset, size = int(entry["annotation_offset"]), int(entry["annotation_size"])
        return self._parse(row, self._bytes(row, offset, size))

    def expect(self, rows: NDArray[np.integer[Any]]) -> None:
        """Take note of samples that will be read soon, in this order."""
        self._tars.expect(self._spans(rows))

    def _spans(self, rows: NDArray[np.integer[Any]]) -> list[Span]:
        """Return what samples take in the tars."""
        entries = self.index[rows]
        starts = np.minimum(entries["image_offset"], entries["annotation_offset"])
        stops = np.maximum(
            entries["image_offset"] + entries["image_size"],
            entries["annotation_offset"] + entries["annotation_size"],
        )
        columns = (entries["shard"], starts, stops)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def for_thread(self) -> ShardSet:
        """Return the same set for use by one other thread; index and manifest are shared."""
        own = self._alias()
        own._tars = self._tars.for_thread()
        return own

    def _alias(self) -> Self:
        """Return another object of the same attributes; ``copy`` would open the files again."""
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__)
        return own

    def close(self) -> None:
        """Close the tars; they are opened again when needed."""
        self._tars.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("address", "folder", "manifest", "_path", "_cache")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.index = load_index(self.folder, self.manifest)
        self._tars = open_tars(self._path, self.manifest.shards, self._cache)

    def __del__(self) -> None:
        if hasattr(self, "_tars"):
            self._tars.close()

    def _shard(self, row: int) -> Shard:
        return self.manifest.shards[int(self.index[row]["shard"])]

    def _bytes(self, row: int, offset: int, size: int) -> bytes:
        length = self._shard(row).bytes
        if offset + size > length:  # in a damaged index these may be too large for any memory
            raise self._damaged(row, f"bytes {offset} to {offset + size} of a tar of {length}")
        try:
            data = self._tars.read(int(self.index[row]["shard"]), offset, size)
        except UnreachableError as error:
            raise UnavailableShardError(
                f"{self.place(row)}: the shard cannot be fetched: {error}. Check that the "
                "address can be reached from this host, and start again to continue."
            ) from error
        except (OSError, MemoryError) as error:
            raise UnavailableShardError(f"{self.place(row)}: {why_unread(error)}") from error
        if len(data) != size:
            raise self._damaged(row, f"the tar ends after {len(data)} of {size} bytes")
        return data

    def _parse(self, row: int, text: bytes) -> dict[str, Any]:
        try:
            record: dict[str, Any] = orjson.loads(text)  # 7 times as fast as json
            if record["image_id"] != self.index[row]["image_id"]:
                raise self._damaged(row, f"annotations are of image {record['image_id']}")
            drop_empty_outlines(record)
            return as_seen(record)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise self._damaged(row, f"annotations are not readable ({error!r})") from error

    def _damaged(self, row: int, what: str) -> ShardError:
        offset = int(self.index[row]["image_offset"])
        error = ShardError(
            f"{self.place(row)}: sample {self.key(row)} (row {row}, offset {offset}): {what}. The "
            f"shard is damaged: `bigdet check-shards {self.address}` lists all that is; copy or "
            "make it again."
        )
        error.finding = what
        return error


def source_ids(shards: ShardSet) -> dict[str, int]:
    """Return the number of each image whose own id is a string."""
    if not STRING_IDS.items() <= shards.manifest.options.items():
        return {}
    records = map(shards.record, range(len(shards)))
    return {r["source_id"]: r["image_id"] for r in records if "source_id" in r}


def orientation_of(flags: int) -> int:
    """Return the EXIF orientation that an image is turned by, from its flags in the index."""
    return 1 + (flags >> TURN_BIT & 7)


def is_no_mask(segmentation: Any) -> bool:
    """Return whether this is how tools write that there is no mask: null, "", {}, [], [[], []]."""
    return not segmentation or (isinstance(segmentation, list) and not any(segmentation))


def drop_empty_outlines(record: dict[str, Any]) -> None:
    """Remove empty masks and keypoints from a record: tars of others have them for "none"."""
    entries = record.get("annotations")
    for annotation in entries if isinstance(entries, list) else []:
        if not isinstance(annotation, dict):
            continue
        if is_no_mask(annotation.get("segmentation")):
            annotation.pop("segmentation", None)
        if not annotation.get("keypoints"):
            annotation.pop("keypoints", None)


def sample_key(image_id: int) -> str:
    """Return the name of a sample's files without extension: its zero-padded image id."""
    return f"{image_id:012d}"


def load_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """Map the index of a shard set into memory, read-only, as an array of ``INDEX_DTYPE``."""
    path = folder / INDEX_NAME
    try:
        index: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise almost any error
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        reason = found_page(path) or error
        raise ShardError(
            f"{path}: not the index of a shard set ({reason}). Make the shards again with "
            "`bigdet shards`."
        ) from error
    num_shards = len(manifest.shards)
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.images,):
        what = f"has {index.shape} records of {index.dtype.itemsize} bytes"
    elif len(index) and int(index["shard"].max()) >= num_shards:
        what = f"names shard {index['shard'].max()} of {num_shards}"
    else:
        return index
    raise ShardError(
        f"{path}: {what}; {MANIFEST_NAME} next to it says {manifest.images} samples of "
        f"{INDEX_DTYPE.itemsize} bytes in {num_shards} shards. The two files are not of one set: "
        "copy or make it again."
    )


def size_problem(folder: Path, shard: Shard) -> str | None:
    """Return what is wrong with a tar that is absent or has another size than in the manifest."""
    path = folder / shard.file
    if not path.is_file():
        return MISSING
    size = path.stat().st_size
    return None if size == shard.bytes else f"{size} bytes, {MANIFEST_NAME} says {shard.bytes}"
