"""One sample of a shard set, decoded and checked against its record; what to call it if damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigdet.data.decode import decode_image
from bigdet.data.shards import ShardError, ShardSet, UnavailableShardError


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
    """Note of a replaced sample: its row, the kind of damage, the whole message."""

    row: int
    kind: str
    message: str


def load_sample(shards: ShardSet, row: int) -> tuple[Tensor, dict[str, Any]]:
    """Return a sample's image, ``(3, H, W)`` uint8, and its record.

    Raises:
        DamagedSampleError: with shard, sample and offset.
        UnavailableShardError: the shard lies at an address and cannot be fetched.
    """
    try:
        sample = shards.read(row)
    except UnavailableShardError:
        raise  # another sample in its place would be as far away
    except ShardError as error:
        raise DamagedSampleError(str(error), "unreadable") from error
    try:
        image = decode_image(sample.image_bytes)
    except ValueError as error:
        raise damaged(shards, row, "undecodable", f"cannot be decoded: {error}") from error
    expected = (sample.record["height"], sample.record["width"])
    if tuple(image.shape[1:]) != expected:
        what = f"is {tuple(image.shape[1:])}, height and width, its record says {expected}"
        raise damaged(shards, row, "wrong_size", what)
    return image, sample.record


def damaged(shards: ShardSet, row: int, kind: str, what: str) -> DamagedSampleError:
    """Return the error for a sample whose image ``what``, a predicate."""
    offset = int(shards.index[row]["image_offset"])
    return DamagedSampleError(
        f"{shards.place(row)}: the image of sample {shards.key(row)} (row {row}, offset {offset}) "
        f"{what}. tools/check_shards.py {shards.address} lists all that is damaged; make the "
        "shards again from a good copy.",
        kind,
    )


def aspect_ratios(
    index: NDArray[np.void], rows: slice | NDArray[np.int32] = slice(None)
) -> NDArray[np.float64]:
    """Return width over height of records of an index."""
    widths, heights = index["width"][rows], index["height"][rows]
    ratios: NDArray[np.float64] = np.divide(widths, heights, dtype=np.float64)
    return ratios
