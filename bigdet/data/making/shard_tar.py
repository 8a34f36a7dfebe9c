"""One tar of a shard set in the making: samples in, tar and index records out.

The same samples give the same bytes: nothing of the machine or the moment goes into a tar.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.class_counts import ClassCounter
from bigdet.data.format.manifest import Shard, ShardError
from bigdet.data.format.orientation import as_stored
from bigdet.data.format.shard_set import (
    FLAG_CROWD,
    FLAG_KEYPOINTS,
    FLAG_MASKS,
    FLAG_NOT_JPEG,
    FLAG_PROGRESSIVE,
    INDEX_DTYPE,
    TURN_BIT,
    sample_key,
)
from bigdet.host.files import file_sha256
from bigdet.pictures.jpeg import is_jpeg, jpeg_segments

TAR_BLOCK = 512  # bytes: of a header, and the unit to which payloads are padded
MAX_U2 = 2**16 - 1  # the index holds sides and numbers of boxes in 16 bits


@dataclass
class SampleLog:
    """What a conversion leaves out or alters, for ``skipped.jsonl`` and the manifest's counts.

    Attributes:
        lines: of ``skipped.jsonl``: ``skipped`` (an image) or ``changed`` (an annotation) with
            the reason, then what it is about.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, reason: str, **details: Any) -> None:
        """Note an image that is left out."""
        self.lines.append({"skipped": reason, **details})

    def change(self, reason: str, **details: Any) -> None:
        """Note an annotation that is left out or altered."""
        self.lines.append({"changed": reason, **details})


@dataclass(frozen=True)
class FinishedShard:
    """What a set's index and manifest need to know of a tar.

    Attributes:
        shard: its entry in the manifest; a tar without samples has no file.
        rows: its records of the index; ``shard`` in them is 0.
        classes: ``[label, instances, crowd]`` of each class in it, by rising label.
        log: lines for ``skipped.jsonl``.
    """

    shard: Shard
    rows: NDArray[np.void]
    classes: list[list[int]]
    log: list[dict[str, Any]]


class ShardTar:
    """A tar that takes samples one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes so far
        self._rows: list[tuple[int, ...]] = []
        self._classes = ClassCounter()
        self._file = open(path, "wb")  # noqa: SIM115
        # The bytes that webdataset's TarWriter writes, without its import of torch.
        self._writer = tarfile.open(fileobj=self._file, mode="w|")  # noqa: SIM115

    def add(self, image: bytes, record: dict[str, Any], orientation: int = 1) -> None:
        """Append one sample, a JPEG, PNG or WebP with its record, see ``shard_set.Sample``.

        ``orientation`` is that of EXIF if the annotations are of the image turned by it.
        """
        suffix = image_suffix(image)
        assert suffix is not None
        annotations = record["annotations"]
        num_boxes = count_boxes(annotations)
        height, width = record["height"], record["width"]
        if max(height, width, num_boxes) > MAX_U2:
            raise ShardError(
                f"image {record['image_id']} ({record['file_name']}): {height} x {width} pixels, "
                f"{num_boxes} boxes; the shard format holds at most {MAX_U2} of each. Leave it out."
            )
        text = record_text(as_stored(record, orientation))
        offsets = self._write(sample_key(record["image_id"]), {suffix: image, "json": text})
        flags = image_flags(image) | annotation_flags(annotations) | turn_flags(orientation)
        image_fields = (record["image_id"], offsets[suffix], len(image))
        crc = zlib.crc32(text, zlib.crc32(image))
        other_fields = (crc, width, height, flags, num_boxes, 0)
        self._rows.append((*image_fields, offsets["json"], len(text), *other_fields))
        self._classes.add(annotations)

    def close(self) -> FinishedShard:
        """Finish the tar."""
        self._writer.close()
        self._file.close()
        size = self.path.stat().st_size
        shard = Shard(self.path.name, size, len(self._rows), file_sha256(self.path))
        rows = np.array(self._rows, dtype=INDEX_DTYPE)
        return FinishedShard(shard, rows, self._classes.listed(), [])

    def abandon(self) -> None:
        """Close the file as it is, after an error."""
        # A full disk fails again when the buffer is written; that error is raised already.
        with contextlib.suppress(OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, key: str, files: dict[str, bytes]) -> dict[str, int]:
        """Append files by extension; return the offset of each one's first byte in the tar."""
        offsets = {}
        for suffix, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size, member.mode = len(data), 0o444
            member.uname = member.gname = "bigdet"
            self._writer.addfile(member, io.BytesIO(data))
            offsets[suffix] = self.size + TAR_BLOCK
            self.size += TAR_BLOCK + _padded(len(data))
        assert self.size == self._writer.offset
        return offsets


def record_text(record: dict[str, Any]) -> bytes:
    """Return the annotations of a sample as they are in a tar."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def stored_bytes(image_bytes: int, annotation_bytes: int) -> int:
    """Return how much a sample takes in a tar."""
    return 2 * TAR_BLOCK + _padded(image_bytes) + _padded(annotation_bytes)


def image_suffix(image: bytes) -> str | None:
    """Return the extension of an encoded image by its first bytes; None if it cannot be used."""
    if is_jpeg(image):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


def image_flags(image: bytes) -> int:
    """Return the index flags of an encoded image."""
    if image_suffix(image) != "jpg":
        return FLAG_NOT_JPEG
    markers = (marker for marker, *_ in jpeg_segments(image))
    frames = (each for each in markers if 0xC0 <= each <= 0xCF and each not in (0xC4, 0xC8, 0xCC))
    return FLAG_PROGRESSIVE if next(frames, 0) & 3 == 2 else 0


def turn_flags(orientation: int) -> int:
    """Return the index flags of an image that is turned by an EXIF orientation."""
    return (orientation - 1) << TURN_BIT


def annotation_flags(annotations: list[dict[str, Any]]) -> int:
    """Return the index flags of the annotations of one image."""
    flags = 0
    for annotation in annotations:
        flags |= FLAG_CROWD if annotation["iscrowd"] else 0
        flags |= FLAG_MASKS if "segmentation" in annotation else 0
        flags |= FLAG_KEYPOINTS if "keypoints" in annotation else 0
    return flags


def count_boxes(annotations: list[dict[str, Any]]) -> int:
    """Return how many annotations of an image are not crowd."""
    return sum(not annotation["iscrowd"] for annotation in annotations)


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK
