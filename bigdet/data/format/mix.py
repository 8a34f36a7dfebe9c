"""Several shard sets as one, and sets whose labels follow another list of categories.

Categories are matched by name, ignoring case and blanks. The classes of a mix are those of its
first set, in their order, followed by those that the others add. A class that one of the sets does
not annotate is background on its images; a warning says so.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.config.data import CacheConfig, DataConfig, TrainSplitConfig
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import LABEL_LISTS, Sample, ShardSet

logger = logging.getLogger(__name__)

LISTED_NAMES = 10
"""Categories that a message names."""


class MixedSet(ShardSet):
    """Sets one after the other, read like one set with one list of categories.

    Rows, and the numbers of shards in the index, continue from set to set. Image ids are those of
    the sets, so different sets may use the same one.

    Attributes:
        parts: the sets.
        starts: ``(parts + 1,)`` the first row of each set, and the number of rows.
    """

    def __init__(self, parts: Sequence[ShardSet], categories: Sequence[Category]) -> None:
        """Join sets, at least one; ``categories`` has those of all of them, by name."""
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.address, self.folder = parts[0].address, parts[0].folder
        self._cache = parts[0]._cache
        manifests = [part.manifest for part in parts]
        self.manifest = replace(
            manifests[0],
            name=" + ".join(manifest.name for manifest in manifests),
            images=sum(manifest.images for manifest in manifests),
            instances=sum(manifest.instances for manifest in manifests),
            crowd=sum(manifest.crowd for manifest in manifests),
            federated=any(manifest.federated for manifest in manifests),
            pixels=sum(manifest.pixels for manifest in manifests),
            categories=list(categories),
            shards=[shard for manifest in manifests for shard in manifest.shards],
        )
        self.index = parts[0].index
        if len(parts) > 1:
            self.index = np.concatenate([part.index for part in parts])
            num_shards = np.cumsum([0, *(len(manifest.shards) for manifest in manifests)])
            for start, end, shift in zip(self.starts, self.starts[1:], num_shards, strict=False):
                self.index["shard"][start:end] += np.uint32(shift)
        place = {name_key(category.name): label for label, category in enumerate(categories)}
        self._labels = [
            [place[name_key(category.name)] for category in part.categories] for part in parts
        ]
        self.manifest = replace(
            self.manifest,
            instances_per_class=self._add_up([m.instances_per_class for m in manifests]),
            crowd_per_class=self._add_up([m.crowd_per_class for m in manifests]),
        )

    def index_hash(self) -> str:
        """Return a hash of the indices of all sets: the same one means the same samples."""
        hashes = [part.index_hash() for part in self.parts]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.blake2b(" ".join(hashes).encode(), digest_size=16).hexdigest()

    def path(self, row: int) -> Path:
        """Return the tar that holds a sample."""
        part, own_row = self._locate(row)
        return self.parts[part].path(own_row)

    def place(self, row: int) -> str:
        """Return the full name of the tar that holds a sample, for messages."""
        part, own_row = self._locate(row)
        return self.parts[part].place(own_row)

    @property
    def bytes_at(self) -> dict[str, int]:
        """The bytes of all tars, by the paths or addresses of the sets."""
        return {path: size for part in self.parts for path, size in part.bytes_at.items()}

    def read(self, row: int) -> Sample:
        """Return one sample; ``ShardError`` if its bytes are not those that were written."""
        part, own_row = self._locate(row)
        sample = self.parts[part].read(own_row)
        self._relabel(part, own_row, sample.record)
        return sample

    def record(self, row: int) -> dict[str, Any]:
        """Return the annotations of one sample, without reading its image."""
        part, own_row = self._locate(row)
        record = self.parts[part].record(own_row)
        self._relabel(part, own_row, record)
        return record

    def expect(self, rows: NDArray[np.integer[Any]]) -> None:
        """Take note of samples that will be read soon, in this order."""
        for part, (start, end) in zip(self.parts, pairwise(self.starts), strict=True):
            part.expect(rows[(rows >= start) & (rows < end)] - start)

    def for_thread(self) -> MixedSet:
        """Return the same sets for use by one other thread; index and labels are shared."""
        own = self._alias()
        own.parts = [part.for_thread() for part in self.parts]
        return own

    def close(self) -> None:
        """Close the tars; they are opened again when needed."""
        for part in self.parts:
            part.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedSet, (self.parts, self.categories)

    def _locate(self, row: int) -> tuple[int, int]:
        """Return the number of the set that has a row, and the row there."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])

    def _add_up(self, counts: Sequence[list[int] | None]) -> list[int] | None:
        """Return counts by label, summed over the sets; None if one of them has no counts."""
        sums = [0] * len(self.manifest.categories)
        for own, labels in zip(counts, self._labels, strict=True):
            if own is None or len(own) != len(labels):
                return None
            for label, count in zip(labels, own, strict=True):
                sums[label] += count
        return sums

    def _relabel(self, part: int, own_row: int, record: dict[str, Any]) -> None:
        labels = self._labels[part]
        for annotation in record["annotations"]:
            label = annotation["label"]
            if not 0 <= label < len(labels):
                shards = self.parts[part]
                raise ShardError(
                    f"{shards.place(own_row)}: sample {shards.key(own_row)} (row {own_row}) has an "
                    f"object of label {label}, the set has {len(labels)} categories. Make the set "
                    f"again; `bigdet check-shards {shards.address}` lists all that is wrong."
                )
            annotation["label"] = labels[label]
        for name in LABEL_LISTS:
            if name in record:
                record[name] = [labels[label] for label in record[name]]


def open_sets(data: DataConfig) -> tuple[ShardSet, ShardSet]:
    """Return the training set and the validation set of a phase, labels meaning the same.

    If training sets are mixed, validation gets the categories of the mix; otherwise both are as
    they are on disk.
    """
    train = open_train_set(data.train, data.cache)
    val = ShardSet(data.val.shards, cache=data.cache)
    return train, with_categories(val, train.categories) if isinstance(train, MixedSet) else val


def open_train_set(split: TrainSplitConfig, cache: CacheConfig) -> ShardSet:
    """Return the training set of a split: one set, or several mixed."""
    first = ShardSet(split.shards, cache=cache)
    if not split.more_shards:
        return first
    parts = [first, *(ShardSet(folder, cache=cache) for folder in split.more_shards)]
    categories = _union([part.categories for part in parts])
    for part in parts:
        _check_names(part)
        own = {name_key(category.name) for category in part.categories}
        absent = [category.name for category in categories if name_key(category.name) not in own]
        if absent:
            logger.warning(
                f"{part.address} does not have {len(absent)} of the "
                f"{len(categories)} classes of the mix; objects of these on its images are "
                f"background: {_shortened(absent)}"
            )
    return MixedSet(parts, categories)


def with_categories(shards: ShardSet, categories: Sequence[Category]) -> ShardSet:
    """Return a set with the labels of another list of categories, matched by name."""
    known = {name_key(category.name) for category in categories}
    unknown = [repr(entry.name) for entry in shards.categories if name_key(entry.name) not in known]
    if unknown:
        raise ShardError(
            f"{shards.address}: {len(unknown)} of its categories are not among the {len(known)} of "
            f"the training data: {_shortened(unknown)}. Give a set of the same classes."
        )
    _check_names(shards)
    own = {name_key(category.name): category.id for category in shards.categories}
    used = set(own.values())
    renumbered = []
    for category in categories:  # results have the ids of the set that they are for
        known_id = own.get(name_key(category.name))
        number = take_id(category.id, used) if known_id is None else known_id
        renumbered.append(replace(category, id=number))
    return MixedSet([shards], renumbered)


def check_same_keypoints(*sets: ShardSet) -> None:
    """Check that classes of one name have the same keypoints in the same order, in all parts.

    Raises:
        ShardError: with both sets and their keypoints.
    """
    known: dict[str, tuple[str, list[str]]] = {}
    for shards in sets:
        for part in shards.parts if isinstance(shards, MixedSet) else [shards]:
            for category in part.categories:
                if not category.keypoints:
                    continue
                key, own = name_key(category.name), (part.address, category.keypoints)
                address, expected = known.setdefault(key, own)
                if category.keypoints != expected:
                    raise ShardError(
                        f"{part.address}: the keypoints of {category.name} are "
                        f"{', '.join(category.keypoints)}, expected those of {address}, in their "
                        f"order: {', '.join(expected)}. Make both sets with the same keypoints."
                    )


def class_ids(shards: ShardSet, names: Sequence[str]) -> list[int | None]:
    """Return the id that a set has for each class of a model; None where it lacks the class.

    Names are matched as they are, or else ignoring case and blanks; those of the model's classes
    are in the order of its labels.

    Raises:
        ShardError: the set has classes that the model lacks, or a name may mean two.
    """
    ids = {category.name: category.id for category in shards.categories}
    if set(ids) <= set(names):
        return [ids.get(name) for name in names]
    known = [name_key(name) for name in names]
    unknown = [repr(name) for name in ids if name_key(name) not in known]
    if unknown:
        raise ShardError(
            f"{shards.address}: {len(unknown)} of its categories are not among the {len(names)} "
            f"that are learned: {_shortened(unknown)}. Make both sets with one list of categories: "
            f"`bigdet shards ... --categories FILE`."
        )
    _check_names(shards)
    if twice := _repeated(known):
        raise ShardError(
            f"{shards.address}: {twice} may be several of the classes that are learned, which "
            f"differ in case and blanks only. Rename them."
        )
    own = {name_key(name): number for name, number in ids.items()}
    return [own.get(key) for key in known]


def warn_of_absent(shards: ShardSet, names: Sequence[str]) -> None:
    """Log which of a model's classes a set lacks: they are not measured."""
    ids = class_ids(shards, names)
    absent = [name for name, number in zip(names, ids, strict=True) if number is None]
    if absent:
        logger.warning(
            f"{shards.address} does not have {len(absent)} of the {len(names)} classes that are "
            f"learned; they are not measured, and detections of them are left out: "
            f"{_shortened(absent)}"
        )


def _union(lists: Sequence[Sequence[Category]]) -> list[Category]:
    """Return the categories of all lists, each name once; later ones get new ids if needed.

    Keypoints are those of the first list that has any for the name.
    """
    union: dict[str, Category] = {}
    used: set[int] = set()
    for category in (category for categories in lists for category in categories):
        key = name_key(category.name)
        if key not in union:
            union[key] = replace(category, id=take_id(category.id, used))
        elif not union[key].keypoints:
            names, lines, pairs = category.keypoints, category.skeleton, category.flip_pairs
            union[key] = replace(union[key], keypoints=names, skeleton=lines, flip_pairs=pairs)
    return list(union.values())


def _check_names(shards: ShardSet) -> None:
    """Refuse a set in which two categories would become one."""
    if twice := _repeated([name_key(category.name) for category in shards.categories]):
        raise ShardError(
            f"{shards.address}: several categories are named {twice}, ignoring case and blanks, so "
            f"categories cannot be matched by name. Rename them."
        )


def _repeated(names: Sequence[str]) -> str:
    """Return the names that are there more than once, as a message lists them."""
    return ", ".join(repr(name) for name, count in sorted(Counter(names).items()) if count > 1)


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def take_id(wanted: int, used: set[int]) -> int:
    """Return an id that is not in use, if possible the wanted one; it is in use from now on."""
    number = max(used) + 1 if wanted in used else wanted
    used.add(number)
    return number


def name_key(name: str) -> str:
    """Return a name such that two names with the same meaning become equal."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
