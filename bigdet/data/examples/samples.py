"""One sample of a shard set, decoded and checked against its record; errors of damaged ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigdet.data.examples.decode import decode_image, stored_size
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import Sample, ShardSet, UnavailableShardError
from bigdet.host.reading import why_unread
from bigdet.pictures.pixels import turned_size


class DamagedSampleError(ShardError):
    """A sample that cannot be used.

    Attributes:
        kind: ``unreadable`` (the bytes are not those that were written), ``undecodable``,
            ``wrong_size`` (not as its record says), ``bad_annotation``.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Damage:
    """A sample that was replaced: its row, the kind of damage, the whole message."""

    row: int
    kind: str
    message: str


def load_sample(shards: ShardSet, row: int) -> tuple[Tensor, dict[str, Any]]:
    """Return a sample's image, ``(3, H, W)`` uint8, and its record.

    Raises:
        DamagedSampleError: with shard, sample and offset.
        UnavailableShardError: the shard cannot be fetched, or the system does not allow reading it.
    """
    sample = read_sample(shards, row)
    return decode_sample(shards, row, sample), sample.record


def read_sample(shards: ShardSet, row: int) -> Sample:
    """Return a sample as stored; ``DamagedSampleError`` with shard, sample and offset."""
    try:
        return shards.read(row)
    except UnavailableShardError:
        raise  # not because of the sample: others would fail in the same way
    except ShardError as error:
        raise DamagedSampleError(str(error), "unreadable") from error


def decode_sample(
    shards: ShardSet, row: int, sample: Sample, least_size: tuple[int, int] | None = None
) -> Tensor:
    """Return the image of a sample as it was annotated, ``(3, H, W)`` uint8; its size is checked.

    With ``least_size`` (height, width) it may be decoded smaller, but not smaller than this.

    Raises:
        DamagedSampleError: with shard, sample and offset.
    """
    try:
        image = decode_image(sample.image_bytes, least_size, sample.orientation)
        if least_size is None:
            found = tuple(image.shape[1:])
        else:
            found = turned_size(stored_size(sample.image_bytes), sample.orientation)
    except ValueError as error:
        raise damaged(shards, row, "undecodable", f"cannot be decoded: {error}") from error
    except MemoryError as error:
        raise UnavailableShardError(
            f"{shards.place(row)}: the image of sample {shards.key(row)} {why_unread(error)}"
        ) from error
    expected = (sample.record["height"], sample.record["width"])
    if found != expected:
        what = f"is {found}, height and width, its record says {expected}"
        raise damaged(shards, row, "wrong_size", what)
    return image


def damaged(shards: ShardSet, row: int, kind: str, what: str) -> DamagedSampleError:
    """Return the error of a damaged sample; ``what`` is a predicate of its image."""
    offset = int(shards.index[row]["image_offset"])
    return DamagedSampleError(
        f"{shards.place(row)}: the image of sample {shards.key(row)} (row {row}, offset {offset}) "
        f"{what}. `bigdet check-shards {shards.address}` lists all that is damaged; make the "
        "shards again from a good copy.",
        kind,
    )
