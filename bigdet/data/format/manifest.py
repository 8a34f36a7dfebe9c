"""What a shard set says about itself: its ``manifest.json``, with its categories and its tars.

It carries the SHA-256 of each tar, of ``index.npy`` (``index_sha256``) and of its own other values
(``sha256``, over their JSON with sorted keys and no blanks), so that no damage goes unnoticed; sets
without the last two are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigdet.data.format.web_pages import found_page

VERSION = 1
MANIFEST_NAME = "manifest.json"


class ShardError(ValueError):
    """A shard set that is missing, damaged or not what its manifest says.

    Attributes:
        finding: what is wrong with a damaged sample, without the place and the advice.
    """

    finding = ""


@dataclass(frozen=True)
class Category:
    """One class; its place in the manifest's list is its label.

    Attributes:
        id: its number in the data set.
        name: its name in the data set.
        supercategory: the group that it belongs to, if any.
        keypoints: names of its keypoints, if any.
        skeleton: pairs of keypoints, by number from 0, between which a line is drawn.
        flip_pairs: pairs of keypoints, by number from 0, that a mirror exchanges: left and right.
        frequency: ``r``, ``c`` or ``f``: LVIS's rare, common and frequent classes.
    """

    id: int
    name: str
    supercategory: str | None = None
    keypoints: list[str] | None = None
    skeleton: list[list[int]] | None = None
    flip_pairs: list[list[int]] | None = None
    frequency: str | None = None


def unique_names(categories: Sequence[Category]) -> list[str]:
    """Return a name of each category for tables: with its id where others have the same name.

    Sets are no longer made with such categories, but there are old ones.
    """
    counts = Counter(category.name for category in categories)
    return [
        category.name if counts[category.name] == 1 else f"{category.name} (id {category.id})"
        for category in categories
    ]


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        file: name in the folder.
        bytes: size of the file.
        samples: number of samples.
        sha256: of the whole file, hexadecimal.
    """

    file: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard set says about itself.

    Attributes:
        version: of the format.
        name: of the set, for people.
        source: the kind of data it was made from: ``coco``, ``shapes``.
        images: number of samples.
        instances: annotations that are not crowd.
        crowd: crowd annotations.
        instances_per_class: as ``instances``, by label; None in sets of older versions.
        crowd_per_class: likewise.
        pixels: sum of height x width over the images.
        skipped: images left out, by reason.
        changed: annotations left out or clipped, by reason.
        categories: in the order of the labels.
        shards: the tars, in order.
        options: what the set was made with.
        index_sha256: of ``index.npy``, hexadecimal; None in sets of older versions.
        federated: only some classes were looked for on each image, as in LVIS, see
            ``shard_set.Sample``.
    """

    version: int
    name: str
    source: str
    images: int
    instances: int
    crowd: int
    instances_per_class: list[int] | None = field(default=None, kw_only=True)
    crowd_per_class: list[int] | None = field(default=None, kw_only=True)
    pixels: int
    skipped: dict[str, int]
    changed: dict[str, int]
    categories: list[Category]
    shards: list[Shard]
    options: dict[str, Any]
    index_sha256: str | None = None
    federated: bool = False

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a shard set; ``ShardError`` if it is absent or not valid."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            found = "the folder has no manifest.json" if folder.is_dir() else "this is a file"
            found = found if folder.exists() else "there is no such folder"
            raise ShardError(
                f"{folder}: expected a shard set, but {found}. Give the folder that "
                "`bigdet shards` wrote, or run it again if it did not finish."
            )
        try:
            values = json.loads(path.read_bytes())
            if values["version"] != VERSION:
                raise ShardError(
                    f"{path}: shard format version {values['version']!r}, this bigdet reads "
                    f"{VERSION}. Make the shards again with `bigdet shards`."
                )
            expected = values.pop("sha256", None)
            if expected is not None and manifest_sha256(values) != expected:
                raise ShardError(
                    f"{path}: its values do not have the SHA-256 that it records, so it is damaged "
                    "or was edited. Copy or make the set again."
                )
            values["categories"] = [Category(**category) for category in values["categories"]]
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            for shard in values["shards"]:
                if Path(shard.file).name != shard.file:  # never read outside of the folder
                    raise ShardError(f"{path}: names a shard {shard.file!r}, expected a file name")
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ShardError):
                raise
            reason = found_page(path) or repr(error)
            raise ShardError(
                f"{path}: not the manifest of a shard set ({reason}). Make the shards again with "
                "`bigdet shards`."
            ) from error


def manifest_sha256(values: dict[str, Any]) -> str:
    """Return the hash of a manifest's values, which it records as ``sha256``."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
