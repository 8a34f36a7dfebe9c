"""Writes a shard set, byte for byte the same from the same input.

All files are written in the folder ``.unfinished`` inside the target and move up when complete,
the manifest last, so nothing unfinished ever looks finished; after an error nothing is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import webdataset

from bigdet.data.shards import (
    FLAG_CROWD,
    FLAG_KEYPOINTS,
    FLAG_MASKS,
    FLAG_NOT_JPEG,
    FLAG_PROGRESSIVE,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    SKIPPED_NAME,
    VERSION,
    Category,
    Manifest,
    Shard,
    ShardError,
    file_sha256,
    manifest_sha256,
    sample_key,
)

UNFINISHED = ".unfinished"
TAR_BLOCK = 512  # bytes: of a header, and the unit to which payloads are padded
MAX_U2 = 2**16 - 1  # the index holds sides and numbers of boxes in 16 bits


class ShardWriter:
    """A context manager that takes samples one by one; leaving it without error finishes the set.

    ``images``, ``skipped`` and ``changed`` may be read on the way, for a progress line, and
    ``manifest`` at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        source: str,
        categories: list[Category],
        options: dict[str, Any],
        shard_megabytes: int = 256,
    ) -> None:
        """Say what to write; the folder is touched on entering.

        Args:
            folder: target; must not hold a shard set yet.
            name: what people call the set.
            source: the kind of data it is made from.
            categories: in the order of the labels.
            options: what the set is made with, for the manifest.
            shard_megabytes: a tar is closed before it grows beyond this (10^6 bytes).
        """
        self.folder = folder
        self.images = 0
        self.skipped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.manifest: Manifest | None = None
        self._name, self._source = name, source
        self._categories, self._options = categories, options
        self._limit = shard_megabytes * 10**6
        self._rows: list[tuple[int, ...]] = []
        self._shards: list[Shard] = []
        self._tar: _Tar | None = None
        self._log: IO[str] | None = None
        self._crowd = 0

    def __enter__(self) -> ShardWriter:
        refuse_shards(self.folder)
        self._made_folders = _make_folders(self.folder / UNFINISHED)
        self._lock = os.open(self.folder / UNFINISHED, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ShardError(
                f"{self.folder}: another process is writing shards here. Wait for it, or give "
                "another folder."
            ) from error
        for path in (self.folder / UNFINISHED).iterdir():  # left by a process that was killed
            path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as clean_up:  # does all of it even if a part fails
            clean_up.callback(self._remove_made_folders)
            clean_up.callback(os.close, self._lock)
            clean_up.callback(shutil.rmtree, self.folder / UNFINISHED)
            if self._log is not None:
                clean_up.callback(self._log.close)
            if kind is None:
                self._finish()
            elif self._tar is not None:
                self._tar.close()

    def add(self, image: bytes, record: dict[str, Any]) -> None:
        """Append one sample.

        Args:
            image: the encoded image, of a format that ``image_suffix`` knows.
            record: its annotations, see ``shards.Sample``.
        """
        suffix = image_suffix(image)
        assert suffix is not None
        annotations = record["annotations"]
        num_boxes = sum(not annotation["iscrowd"] for annotation in annotations)
        height, width = record["height"], record["width"]
        if max(height, width, num_boxes) > MAX_U2:
            raise ShardError(
                f"image {record['image_id']} ({record['file_name']}): {height} x {width} pixels, "
                f"{num_boxes} boxes; the shard format holds at most {MAX_U2} of each. Leave it out."
            )
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        size = 2 * TAR_BLOCK + _padded(len(image)) + _padded(len(text))
        if self._tar is not None and self._tar.size + size > self._limit:
            self._close_tar()
        if self._tar is None:
            name = f"{len(self._shards):06d}.tar"
            self._tar = _Tar(self.folder / UNFINISHED / name)
        key = sample_key(record["image_id"])
        offsets = self._tar.write(key, {suffix: image, "json": text})
        crc = zlib.crc32(text, zlib.crc32(image))
        flags = image_flags(image) | annotation_flags(annotations)
        image_fields = (record["image_id"], offsets[suffix], len(image))
        other_fields = (crc, width, height, flags, num_boxes, len(self._shards))
        self._rows.append((*image_fields, offsets["json"], len(text), *other_fields))
        self._crowd += len(annotations) - num_boxes
        self.images += 1

    def skip(self, reason: str, **details: Any) -> None:
        """Count an image that is left out, and list it in ``skipped.jsonl``."""
        self.skipped[reason] += 1
        self._write_log({"skipped": reason, **details})

    def change(self, reason: str, **details: Any) -> None:
        """Count an annotation that is left out or altered, and list it in ``skipped.jsonl``."""
        self.changed[reason] += 1
        self._write_log({"changed": reason, **details})

    def _remove_made_folders(self) -> None:
        if self.manifest is None:
            for folder in self._made_folders[1:]:  # innermost first; the first was .unfinished
                folder.rmdir()

    def _write_log(self, line: dict[str, Any]) -> None:
        if self._log is None:
            self._log = open(self.folder / UNFINISHED / SKIPPED_NAME, "w")  # noqa: SIM115
        self._log.write(json.dumps(line) + "\n")

    def _close_tar(self) -> None:
        assert self._tar is not None
        self._shards.append(self._tar.close())
        self._tar = None

    def _finish(self) -> None:
        """Write index and manifest and move everything to its place, the manifest last."""
        if self._tar is None:
            skipped = "".join(f"; {count} x {what}" for what, count in self.skipped.items())
            raise ShardError(f"{self.folder}: not one image could be used{skipped}.")
        self._close_tar()
        index = np.array(self._rows, dtype=INDEX_DTYPE)
        unfinished = self.folder / UNFINISHED
        np.save(unfinished / INDEX_NAME, index, allow_pickle=False)
        pixels = int((index["height"].astype(np.int64) * index["width"]).sum())
        manifest = Manifest(
            version=VERSION,
            name=self._name,
            source=self._source,
            images=self.images,
            instances=int(index["num_boxes"].sum(dtype=np.int64)),
            crowd=self._crowd,
            pixels=pixels,
            skipped=dict(sorted(self.skipped.items())),
            changed=dict(sorted(self.changed.items())),
            categories=self._categories,
            shards=self._shards,
            options=self._options,
            index_sha256=file_sha256(unfinished / INDEX_NAME),
        )
        (unfinished / MANIFEST_NAME).write_text(_manifest_text(manifest))
        if self._log is not None:
            self._log.close()
        last = [INDEX_NAME, MANIFEST_NAME]
        names = sorted(path.name for path in unfinished.iterdir() if path.name not in last)
        for name in [*names, *last]:
            _flush_to_disk(unfinished / name)
            os.rename(unfinished / name, self.folder / name)
        _flush_to_disk(self.folder)
        self.manifest = manifest


class _Tar:
    """One tar under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.size = 0
        self.file = open(path, "wb")  # noqa: SIM115
        # Nothing of the machine or the moment goes into the headers: same input, same bytes.
        self._writer = webdataset.TarWriter(
            self.file, encoder=False, user="bigdet", group="bigdet", mode=0o444, mtime=0
        )

    def write(self, key: str, files: dict[str, bytes]) -> dict[str, int]:
        """Append files by extension; return the offset of each one's first byte in the tar."""
        offsets = {}
        for suffix in sorted(files):  # TarWriter's order
            offsets[suffix] = self.size + TAR_BLOCK
            self.size += TAR_BLOCK + _padded(len(files[suffix]))
        self._writer.write({"__key__": key, **files})
        assert self.size == self._writer.tarstream.offset
        self.samples += 1
        return offsets

    def close(self) -> Shard:
        """Finish the tar and return its entry in the manifest."""
        self._writer.close()
        self.file.close()
        size = self.path.stat().st_size
        return Shard(self.path.name, size, self.samples, file_sha256(self.path))


def refuse_shards(folder: Path) -> None:
    """Raise ``ShardError`` if a folder holds shards already, or is none."""
    if folder.exists() and not folder.is_dir():
        raise ShardError(f"{folder}: not a folder. Give the folder that is to hold the shards.")
    names = [folder / MANIFEST_NAME, folder / INDEX_NAME, *folder.glob("*.tar")]
    found = [path.name for path in names if path.exists()]
    if found:
        raise ShardError(
            f"{folder}: has shards already ({', '.join(found[:3])}). Give another folder, or "
            "delete this one first."
        )


def image_suffix(image: bytes) -> str | None:
    """Return the extension of an encoded image by its first bytes; None if it cannot be used."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


def image_flags(image: bytes) -> int:
    """Return the index flags of an encoded image."""
    if image_suffix(image) != "jpg":
        return FLAG_NOT_JPEG
    place = 2
    while place + 4 <= len(image):
        marker = image[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return FLAG_PROGRESSIVE if marker & 3 == 2 else 0
        if marker == 0xFF:  # markers may be preceded by any number of these
            place += 1
        else:
            place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    return 0


def annotation_flags(annotations: list[dict[str, Any]]) -> int:
    """Return the index flags of the annotations of one image."""
    flags = 0
    for annotation in annotations:
        flags |= FLAG_CROWD if annotation["iscrowd"] else 0
        flags |= FLAG_MASKS if "segmentation" in annotation else 0
        flags |= FLAG_KEYPOINTS if "keypoints" in annotation else 0
    return flags


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _manifest_text(manifest: Manifest) -> str:
    values = asdict(manifest)
    for category in values["categories"]:
        for name in [name for name, value in category.items() if value is None]:
            del category[name]
    values["sha256"] = manifest_sha256(values)
    return json.dumps(values, indent=1) + "\n"


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with all above it; return those that were not there, innermost first."""
    missing = []
    for path in [folder, *folder.parents]:
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flush_to_disk(path: Path) -> None:
    """Make sure that a file or folder survives a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
