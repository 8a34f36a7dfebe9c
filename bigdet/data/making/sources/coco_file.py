"""An annotation file in COCO's form, checked as a whole.

A file that contradicts itself (an id is used twice, a category is unknown) is an error. Only the
ids of annotations are kept in memory; the rest is read when their image is converted.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.making.annotations import are_numbers
from bigdet.data.making.loose_values import whole_number, with_numbers
from bigdet.data.making.sources.categories import make_category, refuse_same_names, short_repr
from bigdet.data.making.sources.json_lists import Entry, read_lists

LISTS = ["images", "annotations", "categories"]
COLUMNS = ["id", "image_id", "category_id", "offset", "size"]
NO_ID = -(2**63)
"""The id of an annotation that has none."""
FIRST_NAME = NO_ID + 1
"""Image ids that are not numbers are counted from here until all are known."""
MAX_NAMES = 2**40

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image as the file lists it.

    Attributes:
        id: its number.
        file_name: as the file has it, or the last two parts of ``coco_url`` (LVIS).
        height: pixels; 0 where height or width are not recorded.
        width: likewise.
        source_id: its id in the file if that is a string, or if others are not numbers.
        negative: ids of categories that were looked for and are not there (LVIS).
        not_exhaustive: ids of categories of which not all objects are annotated.
    """

    id: int
    file_name: str
    height: int
    width: int
    source_id: str | None = None
    negative: tuple[int, ...] = ()
    not_exhaustive: tuple[int, ...] = ()


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file with A annotations.

    Attributes:
        path: of the file.
        images: by rising id.
        categories: by rising id; the place in the list is the label.
        annotations: ``(A,)`` with the fields ``id, image_id, category_id``, and ``offset, size``
            of their text in the file, bytes; by rising image id, then in the order of the file.
        digest: of the whole file.
        notes: what is left out or altered, lines for ``skipped.jsonl``.
        is_numbered: ids of annotations are places in the file, from 1.
        has_urls: some file names are from ``coco_url``.
        federated: images say which categories were looked for on them.
    """

    path: Path
    images: list[ImageEntry]
    categories: list[Category]
    annotations: NDArray[np.void]
    digest: str
    notes: list[Json]
    is_numbered: bool
    has_urls: bool
    federated: bool

    def of_images(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first annotation of each image and the one after its last, ``(N,)`` each."""
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
    """Return annotations by their places in the file, with the ids of ``entries``."""
    annotations = []
    try:
        with open(path, "rb") as file:
            for number, _, category_id, offset, size in entries.tolist():
                file.seek(offset)
                ids = {"id": number, "category_id": category_id}
                annotations.append(json.loads(file.read(size)) | ids)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{path}: cannot be read again at byte {offset} ({error}). Do not change it while it "
            "is converted; its text must be UTF-8."
        ) from error
    return annotations


def _read(path: Path, data: mmap.mmap) -> CocoFile:
    lists, keys = _Lists(path), list[str]()
    for entry in read_lists(path, data, LISTS):
        if isinstance(entry, str):
            keys.append(entry)
        elif entry.name == "annotations":
            lists.add_annotation(entry, _with_its_image(path, data, entry))
        elif entry.name == "images":
            lists.add_image(entry, _with_characters(path, data, entry))
        else:
            lists.add_category(entry, _with_characters(path, data, entry))
    _check_lists(path, keys, lists.counts)
    lists.check_coordinates()
    images, categories, annotations = lists.images, lists.categories, _table(lists.columns)
    categories.sort(key=lambda category: int(category["id"]))
    _check_ids(path, images, categories, annotations)
    notes: list[Json] = []
    is_numbered = _number_annotations(path, data, annotations, notes)
    refuse_same_names(path, categories)
    images = number_images(images, annotations, lists.num_names)
    images.sort(key=lambda image: image.id)
    by_image = np.argsort(annotations["image_id"], kind="stable")
    return CocoFile(
        path=path,
        images=images,
        categories=[make_category(path, category, notes) for category in categories],
        annotations=annotations[by_image],
        digest=hashlib.blake2b(data, digest_size=16).hexdigest(),
        notes=notes,
        is_numbered=is_numbered,
        has_urls=lists.has_urls,
        federated=lists.federated,
    )


class _Lists:
    """The entries of the three lists, checked and with their numbers as whole numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: list[ImageEntry] = []
        self.categories: list[Json] = []
        self.columns = {name: array("q") for name in COLUMNS}
        self.counts = Counter[str]()
        self.has_urls = self.federated = False
        self._names: dict[str, int] = {}
        self._num_relative: int | None = 0  # boxes within 0 to 1; None once another was seen

    @property
    def num_names(self) -> int:
        """How many image ids are not numbers."""
        return len(self._names)

    def add_image(self, entry: Entry, value: Json) -> None:
        """Add one image, decoded from UTF-8."""
        number, given = self._image_id(entry, "id", value), value["id"]
        height, width = self._side(entry, "height"), self._side(entry, "width")
        name, url = value.get("file_name"), value.get("coco_url")
        if name is None and isinstance(url, str):  # LVIS
            self.has_urls, name = True, "/".join(url.split("/")[-2:])
        if not isinstance(name, str):
            raise self._misfit(entry, "file_name", name, "a string")
        lists = [self._ids(entry, k) for k in ("neg_category_ids", "not_exhaustive_category_ids")]
        self.federated |= any(ids is not None for ids in lists)
        if min(height, width) <= 0:
            height = width = 0
        source_id = given if isinstance(given, str) else None
        negative, others = (ids or () for ids in lists)
        self.images.append(ImageEntry(number, name, height, width, source_id, negative, others))
        self.counts["images"] += 1

    def add_annotation(self, entry: Entry, value: Json) -> None:
        """Add the ids of one annotation, its image's decoded from UTF-8, and its place."""
        number = whole_number(value.get("id"))
        self.columns["id"].append(NO_ID if number is None else number)
        self.columns["image_id"].append(self._image_id(entry, "image_id", value))
        self.columns["category_id"].append(self._whole(entry, "category_id"))
        self.columns["offset"].append(entry.offset)
        self.columns["size"].append(entry.size)
        self.counts["annotations"] += 1
        box = with_numbers(value.get("bbox")) if self._num_relative is not None else None
        if self._num_relative is not None and are_numbers(box) and len(box) == 4:
            if max(box) > 1:
                self._num_relative = None
            elif min(box[2:]) > 0:
                self._num_relative += 1

    def add_category(self, entry: Entry, value: Json) -> None:
        """Add one category, decoded from UTF-8."""
        number = self._whole(entry, "id")
        if not isinstance(value.get("name"), str):
            raise self._misfit(entry, "name", value.get("name"), "a string")
        self.categories.append({**value, "id": number})
        self.counts["categories"] += 1

    def check_coordinates(self) -> None:
        """Raise ``ShardError`` if all boxes are fractions of the image, not pixels."""
        largest = max((max(image.height, image.width) for image in self.images), default=0)
        if self._num_relative and largest != 1:
            raise ShardError(
                f"{self.path}: all {self._num_relative} boxes are within 0 to 1, so they seem to "
                "be relative coordinates. Expected x, y, width, height in pixels: multiply them by "
                "the sizes of the images."
            )

    def _image_id(self, entry: Entry, key: str, value: Any) -> int:
        """Return the number of an image; if its id is not a number, one from ``FIRST_NAME`` on."""
        given = value.get(key) if isinstance(value, dict) else None
        if isinstance(given, str) and whole_number(given) is None:
            return FIRST_NAME + self._names.setdefault(given, len(self._names))
        return self._whole(entry, key)

    def _side(self, entry: Entry, key: str) -> int:
        """Return height or width; 0 where it is not recorded."""
        value = entry.value.get(key)
        is_recorded = value not in (None, "") and value == value  # pandas writes NaN
        return self._whole(entry, key) if is_recorded else 0

    def _ids(self, entry: Entry, key: str) -> tuple[int, ...] | None:
        """Return a list of category ids; None if there is none."""
        given = entry.value.get(key)
        ids = [whole_number(value) for value in given] if isinstance(given, list) else None
        if given is not None and (ids is None or None in ids):
            raise self._misfit(entry, key, given, "a list of category ids")
        return None if ids is None else tuple(number for number in ids if number is not None)

    def _whole(self, entry: Entry, key: str) -> int:
        value = entry.value.get(key) if isinstance(entry.value, dict) else None
        number = whole_number(value)
        if number is None:
            raise self._misfit(entry, key, value, "an integer below 2**63")
        return number

    def _misfit(self, entry: Entry, key: str, value: Any, expected: str) -> ShardError:
        return ShardError(
            f"{self.path}: {entry.name}[{self.counts[entry.name]}] is not as in COCO: {key} is "
            f"{short_repr(value)}, expected {expected}. Correct the file."
        )


def number_images(
    images: list[ImageEntry], annotations: NDArray[np.void], num_names: int
) -> list[ImageEntry]:
    """Return the images with numbers as ids; if any id is not a number, places in the list from 1.

    Args:
        images: in the order of the file.
        annotations: their ``image_id`` is changed likewise; -1 for an image that is not listed.
        num_names: how many image ids are not numbers.
    """
    ids = np.array([image.id for image in images])
    of_object = annotations["image_id"]
    if (ids < FIRST_NAME + MAX_NAMES).any():
        order = np.argsort(ids)
        place = order[np.minimum(np.searchsorted(ids, of_object, sorter=order), len(ids) - 1)]
        of_object[:] = np.where(ids[place] == of_object, place + 1, -1)
        # Ids that are numbers could otherwise be mistaken for places in the list in results.
        names = [str(image.id) if image.source_id is None else image.source_id for image in images]
        return [
            replace(image, id=number, source_id=name)
            for number, (image, name) in enumerate(zip(images, names, strict=True), 1)
        ]
    of_object[of_object < FIRST_NAME + num_names] = -1
    return images


def _number_annotations(
    path: Path, data: mmap.mmap, annotations: NDArray[np.void], notes: list[Json]
) -> bool:
    """Give annotations new ids if some have none or the same; return whether it did.

    An annotation that occurs twice, word for word, is an error.
    """
    found, first, counts = np.unique(annotations["id"], return_inverse=True, return_counts=True)
    is_shared = (counts > 1)[first]
    if not is_shared.any() and NO_ID not in found:
        return False
    texts = Counter(
        (image_id, number, data[offset : offset + size])
        for number, image_id, _, offset, size in annotations[is_shared].tolist()
        if number != NO_ID
    )
    twice = {number for (_, number, _), count in texts.items() if count > 1}
    _refuse(path, "annotation ids that occur more than once", twice)
    annotations["id"] = np.arange(1, len(annotations) + 1)
    what = "some have none" if NO_ID in found else "some are shared"
    notes.append({"changed": f"ids of annotations replaced by their places in the file: {what}"})
    return True


def _check_lists(path: Path, keys: list[str], counts: Counter[str]) -> None:
    for name in LISTS:
        if name not in keys:
            if name == "annotations" and "image_info" in path.name:
                continue  # lists of test images, whose annotations are kept secret
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
        ("category", np.array([category["id"] for category in categories])),
    ):
        found, first, counts = np.unique(ids, return_index=True, return_counts=True)
        shown = found[counts > 1].tolist()
        if what == "image":
            entries = (images[place] for place in first[counts > 1].tolist())
            shown = [image.id if image.source_id is None else image.source_id for image in entries]
        _refuse(path, f"{what} ids that occur more than once", shown)
    known = [category["id"] for category in categories]
    unknown = np.setdiff1d(annotations["category_id"], known).tolist()
    _refuse(path, "annotations of category ids that are not in its categories", unknown)
    listed = {number for image in images for number in (*image.negative, *image.not_exhaustive)}
    _refuse(path, "category ids of images that are not in its categories", listed - set(known))
    negative = [image.id for image in images if FIRST_NAME + MAX_NAMES <= image.id < 0]
    _refuse(path, "image ids that are negative", negative)


def _table(columns: dict[str, array[int]]) -> NDArray[np.void]:
    """Return columns of integers as one array of records."""
    table = np.empty(len(columns["id"]), dtype=[(name, np.int64) for name in columns])
    for name, column in columns.items():
        table[name] = np.frombuffer(column, dtype=np.int64) if len(column) else []
    return table


def _with_characters(path: Path, data: mmap.mmap, entry: Entry) -> Json:
    """Return an entry decoded from UTF-8, while ``Entry.value`` has a character for each byte."""
    text = data[entry.offset : entry.offset + entry.size]
    if text.isascii():
        return entry.value if isinstance(entry.value, dict) else {}
    try:
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{path}: not JSON (byte {entry.offset}: {error.reason}). Store the file as UTF-8."
        ) from error
    return value if isinstance(value, dict) else {}


def _with_its_image(path: Path, data: mmap.mmap, entry: Entry) -> Json:
    """Return an annotation, decoded from UTF-8 if the id of its image needs it, which is slow."""
    value = entry.value if isinstance(entry.value, dict) else {}
    image_id = value.get("image_id")
    is_ascii = not isinstance(image_id, str) or image_id.isascii()
    return value if is_ascii else _with_characters(path, data, entry)


def _refuse(path: Path, what: str, ids: Iterable[int | str]) -> None:
    if found := sorted(ids, key=lambda number: (str(type(number)), number)):
        listed = ", ".join(str(number) for number in found[:5]) + ", ..." * (len(found) > 5)
        raise ShardError(f"{path}: {len(found)} {what}: {listed}. Correct the file.")
