"""An annotation file of COCO's form, looked at as a whole.

What contradicts itself as a whole (an id given twice, an unknown category) is an error here. Of the
annotations only their ids are held; the rest is read when the turn of their image comes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.manifest import Category, ShardError
from bigdet.data.sources.categories import make_category, short_repr
from bigdet.data.sources.json_lists import Entry, read_lists

LISTS = ["images", "annotations", "categories"]
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "width": int, "height": int, "file_name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
MAX_ID = 2**63 - 1

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image as the file lists it; sizes in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file. A annotations.

    Attributes:
        path: of the file.
        images: by rising id.
        categories: by rising id; the place in the list is the label.
        annotations: ``(A,)`` with the fields ``id, image_id, category_id``, and ``offset, size``
            of their text in the file, bytes; by rising image id, then in the order of the file.
        digest: of the whole file.
    """

    path: Path
    images: list[ImageEntry]
    categories: list[Category]
    annotations: NDArray[np.void]
    digest: str

    def of_images(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first annotation of each image and the one behind its last, ``(N,)`` each."""
        image_ids = self.annotations["image_id"]
        return np.searchsorted(image_ids, ids), np.searchsorted(image_ids, ids, side="right")


def load_coco(path: Path) -> CocoFile:
    """Read an annotation file; ``ShardError`` if it is not COCO or contradicts itself."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise ShardError(f"{path}: not JSON (the file is empty). Give an annotation file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read ({error.strerror}). Give the annotation file."
        ) from error


def read_text(path: Path, entries: NDArray[np.void]) -> list[Json]:
    """Return annotations by their places in the file."""
    annotations = []
    try:
        with open(path, "rb") as file:
            for offset, size in zip(
                entries["offset"].tolist(), entries["size"].tolist(), strict=True
            ):
                file.seek(offset)
                annotations.append(json.loads(file.read(size)))
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{path}: cannot be read again at byte {offset} ({error}). Do not change it while it "
            "is converted; its text must be UTF-8."
        ) from error
    return annotations


def _read(path: Path, data: mmap.mmap) -> CocoFile:
    images: list[ImageEntry] = []
    categories: list[Json] = []
    columns = {name: array("q") for name in ("id", "image_id", "category_id", "offset", "size")}
    keys: list[str] = []
    counts = Counter[str]()
    for entry in read_lists(path, data, LISTS):
        if isinstance(entry, str):
            keys.append(entry)
            continue
        _check_fields(path, entry, counts[entry.name])
        counts[entry.name] += 1
        if entry.name == "annotations":
            for name in FIELDS["annotations"]:
                columns[name].append(entry.value[name])
            columns["offset"].append(entry.offset)
            columns["size"].append(entry.size)
            continue
        value = _with_characters(path, data, entry)
        if entry.name == "images":
            size = (value["height"], value["width"])
            images.append(ImageEntry(value["id"], value["file_name"], *size))
        else:
            categories.append(value)
    _check_lists(path, keys, counts)
    annotations = _table(columns)
    _check_ids(path, images, categories, annotations)
    images.sort(key=lambda image: image.id)
    categories.sort(key=lambda category: int(category["id"]))
    by_image = np.argsort(annotations["image_id"], kind="stable")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    made = [make_category(path, category) for category in categories]
    return CocoFile(path, images, made, annotations[by_image], digest)


def _check_fields(path: Path, entry: Entry, place: int) -> None:
    """Raise ``ShardError`` if an entry lacks what every one must have."""
    for key, kind in FIELDS[entry.name].items():
        value = entry.value.get(key) if isinstance(entry.value, dict) else None
        if type(value) is kind and not (isinstance(value, int) and abs(value) > MAX_ID):
            continue
        expected = "a string" if kind is str else "an integer below 2**63"
        raise ShardError(
            f"{path}: {entry.name}[{place}] is not as in COCO: {key} is {short_repr(value)}, "
            f"expected {expected}. Correct the file."
        )


def _check_lists(path: Path, keys: list[str], counts: Counter[str]) -> None:
    for name in LISTS:
        if name not in keys:
            if name == "annotations" and path.name.startswith("image_info"):
                continue  # COCO's lists of test images, whose annotations are kept secret
            raise ShardError(
                f"{path}: not a COCO annotation file: it has no list of {name}, only "
                f"{', '.join(keys[:6]) or 'nothing'}. Expected images, annotations and categories."
            )
        if not counts[name] and name != "annotations":
            raise ShardError(
                f"{path}: its list of {name} is empty. Nothing can be learned from it."
            )


def _check_ids(
    path: Path, images: list[ImageEntry], categories: list[Json], annotations: NDArray[np.void]
) -> None:
    for what, ids in (
        ("image", np.array([image.id for image in images])),
        ("annotation", annotations["id"]),
        ("category", np.array([category["id"] for category in categories])),
    ):
        found, counts = np.unique(ids, return_counts=True)
        _refuse(path, f"{what} ids that stand there more than once", found[counts > 1].tolist())
    known = [category["id"] for category in categories]
    unknown = np.setdiff1d(annotations["category_id"], known).tolist()
    _refuse(path, "annotations of category ids that are not in its categories", unknown)
    negative = [image.id for image in images if image.id < 0]
    _refuse(path, "image ids that are negative", negative)


def _table(columns: dict[str, array[int]]) -> NDArray[np.void]:
    """Return columns of integers as one array of records."""
    table = np.empty(len(columns["id"]), dtype=[(name, np.int64) for name in columns])
    for name, column in columns.items():
        table[name] = np.frombuffer(column, dtype=np.int64) if len(column) else []
    return table


def _with_characters(path: Path, data: mmap.mmap, entry: Entry) -> Json:
    """Return an entry with characters for what ``Entry.value`` has bytes for."""
    text = data[entry.offset : entry.offset + entry.size]
    if text.isascii():
        return dict(entry.value)
    try:
        value: Json = json.loads(text)
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{path}: not JSON (byte {entry.offset}: {error.reason}). Store the file as UTF-8."
        ) from error
    return value


def _refuse(path: Path, what: str, ids: Iterable[int]) -> None:
    if found := sorted(ids):
        listed = ", ".join(str(number) for number in found[:5]) + ", ..." * (len(found) > 5)
        raise ShardError(f"{path}: {len(found)} {what}: {listed}. Correct the file.")
