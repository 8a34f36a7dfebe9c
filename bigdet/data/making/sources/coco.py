"""COCO's and Objects365's annotation files, with a folder of images, to shards.

A file that contradicts itself (an id is used twice, a category is unknown) is an error. What is
wrong with one image or one annotation is left out or clipped, counted in the manifest and listed
in ``skipped.jsonl``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.manifest import Category, Manifest, ShardError
from bigdet.data.format.mix import name_key, take_id
from bigdet.data.format.shard_set import LABEL_LISTS, STRING_IDS
from bigdet.data.making.annotations import clean_annotation
from bigdet.data.making.conversion import (
    DEFAULT_MAKING,
    MadeSample,
    Making,
    Progress,
    convert,
    no_progress,
)
from bigdet.data.making.shard_tar import MAX_U2, SampleLog, count_boxes
from bigdet.data.making.shard_writer import SetInfo, category_values
from bigdet.data.making.sources.coco_file import CocoFile, ImageEntry, load_coco, read_text
from bigdet.data.making.sources.file_names import FRONT, find_files, what_is_there
from bigdet.data.making.sources.image_files import check_folder, file_bytes, read_image
from bigdet.data.making.storage import open_unused
from bigdet.pictures.pixels import Exif

Json = dict[str, Any]


def convert_coco(
    images: Path,
    annotations: Path,
    out: str | Path,
    *,
    keypoints: Path | None = None,
    categories: list[Category] | None = None,
    making: Making = DEFAULT_MAKING,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write COCO-format data as shards.

    Args:
        images: folder that the file names are relative to.
        annotations: a file like ``instances_train2017.json``.
        out: folder or address for the shards.
        keypoints: a file like ``person_keypoints_train2017.json``, whose keypoints go to the
            annotations of the same image and id.
        categories: the classes in the order of the labels, found by name (on the command line a
            JSON list, annotation file or manifest.json of them); None takes those of the
            annotations by rising id.
        making: size of the tars, number of processes and the like.
        progress: called now and then with the number of images done and in all.

    Returns:
        The manifest of the new set; None if only a part was made.

    Raises:
        ShardError: the input is not COCO, contradicts itself, or nothing in it can be used.
    """
    open_unused(out)  # before a file of 450 MB is read
    check_folder(images)
    source = CocoSource("coco", images, in_order(load_coco(annotations), categories), making.exif)
    if keypoints is not None:
        source.add_keypoints(load_coco(keypoints))
    return convert(source, out, making, progress)


def convert_objects365(
    images: Path,
    annotations: Path,
    out: str | Path,
    *,
    categories: list[Category] | None = None,
    making: Making = DEFAULT_MAKING,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write Objects365 (v1 or v2) as shards: COCO's form, but files are not where they are named.

    ``images/v1/patch8/x.jpg`` may be ``patch8/x.jpg`` or ``x.jpg`` in the folder of the images.

    Args:
        images: folder of the patches.
        annotations: a file like ``zhiyuan_objv2_train.json``.
        out: as for ``convert_coco``, like results and errors.
        categories: the classes in the order of the labels, found by name (on the command line a
            JSON list, annotation file or manifest.json of them); None takes those of the
            annotations by rising id.
        making: as for ``convert_coco``.
        progress: likewise.
    """
    open_unused(out)  # before a file of 450 MB is read
    check_folder(images)
    coco = in_order(load_coco(annotations), categories)
    source = CocoSource("objects365", images, coco, making.exif)
    return convert(source, out, making, progress)


def in_order(coco: CocoFile, categories: list[Category] | None) -> CocoFile:
    """Return a file with its classes in the order of a list, matched by name as ``mix.py`` does.

    A class keeps the id that it has in the file, so that results fit the file; one that the file
    lacks gets that of the list, or a free one. Classes that are not in the list leave the images'
    lists of classes (LVIS) too, which is noted.

    Raises:
        ShardError: there are objects of a class that is not in the list.
    """
    if categories is None:
        return coco
    exact = {category.name: category for category in coco.categories}
    folded = {name_key(name): category for name, category in exact.items()}
    used = {category.id for category in coco.categories}
    ordered: list[Category] = []
    for category in categories:
        found = exact.get(category.name) or folded.get(name_key(category.name))
        if found is None or found in ordered:
            found = replace(category, id=take_id(category.id, used))
        ordered.append(found)
    ids = [category.id for category in ordered]
    left_out = coco.annotations["category_id"][~np.isin(coco.annotations["category_id"], ids)]
    if len(left_out):
        names = [c.name for c in coco.categories if c.id in np.unique(left_out)]
        raise ShardError(
            f"{coco.path}: {len(left_out)} objects of {len(names)} categories that are not in the "
            f"list: {', '.join(names[:5])}. Add them to it."
        )
    return _only_classes(replace(coco, categories=ordered), set(ids), coco.categories)


def _only_classes(coco: CocoFile, ids: set[int], before: list[Category]) -> CocoFile:
    """Return a file whose images list no other classes than these; ``before`` has them all."""
    listed = {n for image in coco.images for n in (*image.negative, *image.not_exhaustive)}
    names = [category.name for category in before if category.id in listed - ids]
    if not names:
        return coco
    images = [
        replace(
            image,
            negative=tuple(number for number in image.negative if number in ids),
            not_exhaustive=tuple(number for number in image.not_exhaustive if number in ids),
        )
        for image in coco.images
    ]
    note = {"changed": "classes not in the list of categories left out of lists of images"}
    return replace(coco, images=images, notes=[*coco.notes, {**note, "classes": names}])


class CocoSource:
    """The images of a COCO file by rising id, see ``conversion.Source``."""

    def __init__(self, kind: str, images: Path, coco: CocoFile, exif: Exif) -> None:
        self.images, self.coco, self._exif = images, coco, exif
        self._points: CocoFile | None = None
        entries = coco.images
        self._files = find_files(images, [entry.file_name for entry in entries])
        self.file_bytes = self._files.file_bytes
        if not self.file_bytes.any():
            self._refuse_folder()
        options: Json = {"images": str(images), "annotations": str(coco.path)}
        if any(entry.source_id is not None for entry in entries):
            options |= STRING_IDS
        self.info = SetInfo(coco.path.stem, kind, coco.categories, options, coco.federated)
        # What is too large for the format is skipped later; here it must not overflow.
        sides = np.array([(e.height, e.width) for e in entries]).clip(0, 2 * MAX_U2)  # (N, 2)
        self.pixels: NDArray[np.int64] = sides.prod(axis=1)
        self.long_sides: NDArray[np.int64] = sides.max(axis=1)
        self._ids = np.array([entry.id for entry in entries], dtype=np.int64)
        self._first, self._end = coco.of_images(self._ids)
        self.annotation_bytes = self._text_bytes(coco, self._first, self._end)
        unlisted = coco.annotations[~np.isin(coco.annotations["image_id"], self._ids)]
        self.notes = coco.notes + _notes("annotation dropped: its image is not listed", unlisted)
        self.fingerprint = self._fingerprint(coco.digest)

    def add_keypoints(self, points: CocoFile) -> None:
        """Add keypoints from another file to the annotations of the same image and id."""
        if self.coco.is_numbered or points.is_numbered:
            numbered = self.coco.path if self.coco.is_numbered else points.path
            raise ShardError(
                f"{numbered}: the annotations have no unique ids, by which keypoints are matched. "
                "Give every annotation an id of its own, the same in both files."
            )
        numbers = {image.source_id: image.id for image in self.coco.images}
        for image in points.images:
            if image.source_id is not None and numbers.get(image.source_id, -1) != image.id:
                raise ShardError(
                    f"{points.path}: image {image.source_id!r} is number {image.id}, but not in "
                    f"{self.coco.path}. If image ids are strings, list the same images in the "
                    "same order in both files."
                )
        known = {category.id: place for place, category in enumerate(self.coco.categories)}
        categories = list(self.coco.categories)
        for category in points.categories:
            place = known.get(category.id)
            if place is None or categories[place].name != category.name:
                raise ShardError(
                    f"{points.path}: category {category.id} is {category.name!r}, but not in "
                    f"{self.coco.path}. Give the keypoints of the same data set."
                )
            categories[place] = replace(
                category, supercategory=categories[place].supercategory or category.supercategory
            )
        if all(category.keypoints is None for category in points.categories):
            raise ShardError(
                f"{points.path}: no category has keypoints. Give a file like "
                "person_keypoints_train2017.json."
            )
        self._points = points
        self._first_points, self._end_points = points.of_images(self._ids)
        self.annotation_bytes += self._text_bytes(points, self._first_points, self._end_points)
        options = {**self.info.options, "keypoints": str(points.path)}
        self.info = replace(self.info, categories=categories, options=options)
        unlisted = points.annotations[~np.isin(points.annotations["image_id"], self._ids)]
        self.notes += points.notes + _notes(
            "keypoints dropped: their image is not listed", unlisted
        )
        self.fingerprint = self._fingerprint(f"{self.coco.digest} {points.digest}")

    def span(self, first: int, end: int) -> CocoSpan:
        """Return samples ``first..end - 1``."""
        coco, points, rows = self.coco, self._points, range(first, end)
        return CocoSpan(
            folder=self.images,
            paths=self._files.paths[first:end],
            ways=[self._way(n) for n in rows],
            exif=self._exif,
            images=coco.images[first:end],
            were_there=(self.file_bytes[first:end] > 0).tolist(),
            path=coco.path,
            annotations=[coco.annotations[self._first[n] : self._end[n]] for n in rows],
            categories=self.info.categories,
            federated=coco.federated,
            points_path=points.path if points else None,
            points=[points.annotations[self._first_points[n] : self._end_points[n]] for n in rows]
            if points
            else None,
        )

    def _text_bytes(
        self, file: CocoFile, first: NDArray[np.int64], end: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return what the annotations of each image take in the file, about as in a tar."""
        sums = np.concatenate([[0], np.cumsum(file.annotations["size"])])
        sizes: NDArray[np.int64] = sums[end] - sums[first] + 256
        return sizes

    def _way(self, place: int) -> str | None:
        """Return how a file was found if that is worth saying.

        Objects365's files are not where they are named, and LVIS names COCO's folders train2017 and
        val2017, one of which may be given.
        """
        way = self._files.ways.get(place)
        lies_elsewhere = self.info.source == "objects365" or self.coco.has_urls
        return None if way == FRONT and lies_elsewhere else way

    def _refuse_folder(self) -> None:
        """Fail at once, not after an hour of misses, if the folder is the wrong one."""
        names, paths = [image.file_name for image in self.coco.images], self._files.paths
        if any(path is not None and file_bytes(self.images / path) is not None for path in paths):
            return  # only empty ones
        raise ShardError(
            f"{self.images}: holds none of the {len(names)} images that {self.coco.path} names "
            f"(the first is {names[0]}), nor any that could be meant (other slashes, case, "
            "accents or suffix, %20 decoded, leading folders left out). "
            f"{what_is_there(self.images, names[0])} Give the folder that the names are relative "
            "to."
        )

    def _fingerprint(self, digest: str) -> str:
        made_of = hashlib.blake2b(digest.encode(), digest_size=16)
        made_of.update(self.file_bytes.tobytes())
        made_of.update(repr([category_values(c) for c in self.info.categories]).encode())
        return made_of.hexdigest()


@dataclass(frozen=True)
class CocoSpan:
    """Some of the images, with the places of their annotations, see ``conversion.Span``."""

    folder: Path
    paths: list[str | None]
    ways: list[str | None]
    exif: Exif
    images: list[ImageEntry]
    were_there: list[bool]
    path: Path
    annotations: list[NDArray[np.void]]
    categories: list[Category]
    federated: bool
    points_path: Path | None
    points: list[NDArray[np.void]] | None

    def samples(self, log: SampleLog) -> Iterator[MadeSample | None]:
        """Yield one sample after the other; None after noting in the log why one is left out."""
        labels = {category.id: label for label, category in enumerate(self.categories)}
        for place, image in enumerate(self.images):
            about = {"image_id": image.id, "file_name": image.file_name}
            inner = self.paths[place]
            path = None if inner is None else self.folder / inner
            recorded = (image.height, image.width) if image.height else None
            read = read_image(path, recorded, about, log, self.exif)
            if read is None:
                if self.were_there[place] and path is not None and file_bytes(path) is None:
                    raise ShardError(
                        f"{path}: was there when the conversion began and is gone. Check that "
                        "its disk or network folder is mounted here, and start again to continue."
                    )
                yield None
                continue
            height, width = read[1].shape[:2]
            size = (height, width)
            if recorded is None:
                log.change("size of an image not recorded: taken from its file", **about)
            if self.ways[place] is not None:
                log.change(f"file found by {self.ways[place]}", **about, found=inner)
            sources = read_text(self.path, self.annotations[place])
            if self.points is not None and self.points_path is not None:
                points = read_text(self.points_path, self.points[place])
                merge_keypoints(sources, points, image.id, log)
            annotations = []
            for source in sources:
                label = labels[source["category_id"]]
                ids = {"image_id": image.id, "annotation_id": source["id"]}
                category = self.categories[label]
                cleaned = clean_annotation(source, size, label, category, ids, log)
                if cleaned is not None:
                    annotations.append(cleaned)
            if count_boxes(annotations) > MAX_U2:
                log.skip("more boxes than shards hold", **about)
                yield None
                continue
            record = {**about, "height": size[0], "width": size[1], "annotations": annotations}
            if image.source_id is not None:
                record["source_id"] = image.source_id
            if self.federated:
                lists = (image.negative, image.not_exhaustive)
                for name, listed in zip(LABEL_LISTS, lists, strict=True):
                    record[name] = [labels[number] for number in listed]
            yield MadeSample(*read, record)


def merge_keypoints(sources: list[Json], points: list[Json], image_id: int, log: SampleLog) -> None:
    """Add the keypoints of an image to its annotations of the same ids."""
    by_id = {source["id"]: source for source in sources}
    for point in points:
        ids = {"image_id": image_id, "annotation_id": point["id"]}
        source = by_id.get(point["id"])
        if source is None or source["category_id"] != point["category_id"]:
            log.change("keypoints dropped: no annotation of this id and category", **ids)
        else:
            source["keypoints"] = point.get("keypoints")


def _notes(reason: str, annotations: NDArray[np.void]) -> list[Json]:
    return [
        {"changed": reason, "image_id": image_id, "annotation_id": annotation_id}
        for image_id, annotation_id in zip(
            annotations["image_id"].tolist(), annotations["id"].tolist(), strict=True
        )
    ]
