"""PASCAL VOC's folders (Annotations, ImageSets/Main, JPEGImages), to shards.

Pixels count from 1 and edges are inclusive, so a box covers ``xmin - 1 .. xmax`` in continuous
coordinates. Objects marked difficult (or ignore, iscrowd, which other tools add) become crowd:
neither learned nor counted as missed, as in VOC's own evaluation. Parts (a person's head, hands,
feet) are left out.

Image ids are rows, so images that cannot be used are found before the first shard is written.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.manifest import Category, Manifest, ShardError
from bigdet.data.making.annotations import clean_annotation
from bigdet.data.making.conversion import (
    DEFAULT_MAKING,
    MadeSample,
    Making,
    Progress,
    convert,
    no_progress,
)
from bigdet.data.making.processes import Tick, run_jobs, useful_processes
from bigdet.data.making.shard_tar import MAX_U2, SampleLog
from bigdet.data.making.shard_writer import SetInfo, category_values
from bigdet.data.making.sources.file_names import SUFFIX, find_files
from bigdet.data.making.sources.image_files import file_bytes, is_inside, read_image
from bigdet.data.making.sources.voc_files import ImageFolder, XmlFolder, parse_xml, read_split
from bigdet.data.making.storage import open_unused
from bigdet.pictures.pixels import Exif

FLAGS = ("difficult", "ignore", "iscrowd")
YES = ("true", "yes", "y", "t")
NO = ("", "false", "no", "n", "f", "unspecified")
IMAGES_PER_CHECK = 64
BYTES_PER_OBJECT = 120  # of a stored annotation, about

Json = dict[str, Any]


@dataclass(frozen=True)
class VocImage:
    """One image as its XML file describes it.

    Attributes:
        stem: its name in the list of the split.
        path: of the image; None if the name leads out of the folder.
        size: recorded height and width; None if nothing is recorded.
        objects: ``name, box`` (xmin, ymin, xmax, ymax as in the file; NaN for what is no number),
            ``difficult, num_parts``.
    """

    stem: str
    path: Path | None
    size: tuple[int, int] | None
    objects: list[Json]


def convert_voc(
    root: Path,
    split: str,
    out: str | Path,
    *,
    categories: list[Category] | None = None,
    making: Making = DEFAULT_MAKING,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write one split of a data set in VOC's layout as shards.

    Args:
        root: the folder with Annotations, ImageSets and JPEGImages.
        split: a file in ``ImageSets/Main`` without ``.txt``.
        out: folder or address for the shards.
        categories: the classes in the order of the labels (on the command line a JSON list of
            them); None takes the names in all XML files of the folder, of any split, in
            alphabetical order with ids from 1.
        making: size of the tars, number of processes and the like.
        progress: called now and then with the number of images done and in all.

    Returns:
        The manifest of the new set; None if only a part was made.

    Raises:
        ShardError: the layout is not VOC's, or nothing in it can be used.
    """
    open_unused(out)
    log, folder = SampleLog(), ImageFolder(root / "JPEGImages")
    files = XmlFolder(root / "Annotations")
    images = [
        image
        for stem in read_split(root, split, log)
        if (image := _load(files, stem, folder, log)) is not None
    ]
    if not images:
        raise ShardError(
            f"{root}: none of the images of split {split} has a file in Annotations that can be "
            f"read{_reasons(log)}. Give the folder that holds Annotations, ImageSets and "
            f"JPEGImages."
        )
    has_folders = any("/" in image.stem for image in images)
    categories = categories or find_categories(root, has_folders)
    images = _find_others(root / "JPEGImages", images, log)
    images = _usable(images, making, log)
    if not images:
        raise ShardError(f"{root}: not one image could be used{_reasons(log)}. Check the files.")
    source = VocSource(root, split, images, categories, log.lines, making.exif)
    return convert(source, out, making, progress)


def _reasons(log: SampleLog) -> str:
    """Return why images are left out: how many for which reason, with the first of each."""
    lines = [line for line in log.lines if "skipped" in line]
    counts = Counter(line["skipped"] for line in lines)
    listed = []
    for reason, count in counts.most_common(3):
        first = next(line for line in lines if line["skipped"] == reason)
        about = ", ".join(f"{name} {value}" for name, value in first.items() if name != "skipped")
        listed.append(f"{count} x {reason} (the first: {about})")
    return ": " + "; ".join(listed) if listed else ""


def find_categories(root: Path, has_folders: bool = False) -> list[Category]:
    """Return the names of the objects in all annotations, in alphabetical order, ids from 1."""
    names = set()
    for path in XmlFolder(root / "Annotations").paths(has_folders):
        tree = parse_xml(path)
        if not isinstance(tree, str):
            names |= {name for entry in tree.findall("object") if (name := _text(entry, "name"))}
    if not names:
        raise ShardError(f"{root}: no object in Annotations has a name. Give a list of categories.")
    return [Category(number, name) for number, name in enumerate(sorted(names), 1)]


class VocSource:
    """The usable images of a split in the order of its list, see ``conversion.Source``."""

    def __init__(
        self,
        root: Path,
        split: str,
        images: list[VocImage],
        categories: list[Category],
        notes: list[Json],
        exif: Exif,
    ) -> None:
        self._exif = exif
        options = {"root": str(root), "split": split}
        self.info = SetInfo(f"{root.name}_{split}", "voc", categories, options)
        self.notes, self._images = notes, images
        known = {category.name for category in categories}
        unknown = {o["name"] for image in images for o in image.objects if o["name"]} - known
        if unknown:
            raise ShardError(
                f"{root}: objects of {len(unknown)} categories that are not in the list: "
                f"{', '.join(sorted(unknown)[:5])}. Add them to it."
            )
        edges = np.array([o["box"] for image in images for o in image.objects], dtype=np.float64)
        if edges.size and ((edges >= 0) & (edges <= 1)).all():
            raise ShardError(
                f"{root}: all edges of all boxes are from 0 to 1, so they seem to be relative "
                f"coordinates. Expected pixels: multiply them by the width and the height."
            )
        sizes = np.array([image.size or (0, 0) for image in images]).clip(0, MAX_U2)  # (N, 2)
        counts = [len(image.objects) for image in images]
        self.pixels: NDArray[np.int64] = sizes.prod(axis=1)
        self.long_sides: NDArray[np.int64] = sizes.max(axis=1)
        self.annotation_bytes = 256 + BYTES_PER_OBJECT * np.array(counts, dtype=np.int64)
        self.file_bytes = np.array(
            [(file_bytes(image.path) if image.path else None) or 0 for image in images],
            dtype=np.int64,
        )
        # Ids of annotations continue from image to image; those that are dropped leave gaps.
        self._first_ids = (1 + np.cumsum(counts) - counts).tolist()
        made_of = hashlib.blake2b(self.file_bytes.tobytes(), digest_size=16)
        made_of.update(repr([(image.stem, image.size, image.objects) for image in images]).encode())
        made_of.update(repr([category_values(category) for category in categories]).encode())
        self.fingerprint = made_of.hexdigest()

    def span(self, first: int, end: int) -> VocSpan:
        """Return samples ``first..end - 1``."""
        ids = self._first_ids[first:end]
        return VocSpan(self._images[first:end], first + 1, ids, self.info.categories, self._exif)


@dataclass(frozen=True)
class VocSpan:
    """Some of the images, see ``conversion.Span``."""

    images: list[VocImage]
    first_id: int
    first_annotation_ids: list[int]
    categories: list[Category]
    exif: Exif

    def samples(self, log: SampleLog) -> Iterator[MadeSample | None]:
        """Yield one sample after the other; all of them were found usable before."""
        labels = {category.name: label for label, category in enumerate(self.categories)}
        for place, image in enumerate(self.images):
            read = read_image(image.path, image.size, {"file_name": image.stem}, log, self.exif)
            if read is None:
                raise ShardError(
                    f"{image.path}: {log.lines[-1]['skipped']}, but it could be used when the "
                    "conversion began. Do not change files that are converted; start again."
                )
            height, width = read[1].shape[:2]
            image_id = self.first_id + place
            annotations = []
            for number, entry in enumerate(image.objects, self.first_annotation_ids[place]):
                about = {"image_id": image_id, "file_name": image.stem, "annotation_id": number}
                cleaned = clean_object(number, entry, (height, width), labels, about, log)
                if cleaned is not None:
                    annotations.append(cleaned)
            assert image.path is not None
            record = {"image_id": image_id, "file_name": image.path.name}
            record |= {"height": height, "width": width, "annotations": annotations}
            yield MadeSample(*read, record)


def clean_object(
    number: int,
    entry: Json,
    image_size: tuple[int, int],
    labels: dict[str, int],
    about: Json,
    log: SampleLog,
) -> Json | None:
    """Return an entry of ``VocImage.objects`` as shards hold it; None after noting why not.

    ``number`` is its id; ``about`` says in the log which object it is.
    """
    for _ in range(entry["num_parts"]):
        log.change("part of an object left out", **about)
    if not entry["name"]:
        log.change("annotation dropped: the object has no name", **about)
        return None
    x0, y0, x1, y1 = entry["box"]
    if x1 <= x0 or y1 <= y0:  # equal edges would mean one pixel, but are a slip of the mouse
        log.change("annotation dropped: box has no area in the image", **about)
        return None
    if entry["difficult"]:
        log.change("difficult object made crowd", **about)
    source = {
        "id": number,
        "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
        "iscrowd": int(entry["difficult"]),
    }
    label = labels[entry["name"]]
    return clean_annotation(source, image_size, label, Category(0, entry["name"]), about, log)


def _load(files: XmlFolder, stem: str, folder: ImageFolder, log: SampleLog) -> VocImage | None:
    """Read the annotations of an image; None after noting why it cannot be used."""
    if not is_inside(stem):
        log.skip("file name leads out of the image folder", file_name=stem)
        return None
    path = files.find(stem)
    if path is None:
        log.skip("annotation file missing", file_name=stem)
        return None
    if path.name != f"{PurePosixPath(stem).name}.xml":
        log.change("annotation file found by ignoring case or form of accents", file_name=stem)
    tree = parse_xml(path, log, file_name=stem)
    if isinstance(tree, str):
        log.skip("annotation file not readable", file_name=stem, error=tree)
        return None
    objects = tree.findall("object")
    if len(objects) > MAX_U2:
        log.skip("more boxes than shards hold", file_name=stem)
        return None
    names = ("size/height", "size/width")
    sides = [_number(tree, name) for name in names]
    has_size = all(isinstance(side, int) and side > 0 for side in sides)
    if not has_size and any(_text(tree, name) not in ("", "0") for name in names):
        found = [_text(tree, name) for name in names]
        log.change(
            "size of an image not recorded: taken from its file", file_name=stem, found=found
        )
    height, width = sides
    return VocImage(
        stem=stem,
        path=folder.find(stem, _text(tree, "filename")),
        size=(int(height), int(width)) if has_size else None,  # many tools leave it out
        objects=[_object(entry, stem, log) for entry in objects],
    )


def _find_others(folder: Path, images: list[VocImage], log: SampleLog) -> list[VocImage]:
    """Return the images, with the files of those that have another suffix or other letters."""
    images = list(images)
    lost = [
        place
        for place, image in enumerate(images)
        if image.path is not None and file_bytes(image.path) is None
    ]
    found = find_files(folder, [images[place].stem for place in lost])
    for number, place in enumerate(lost):
        inner = found.paths[number]
        if found.file_bytes[number] and inner is not None:
            images[place] = replace(images[place], path=folder / inner)
        if (way := found.ways.get(number, SUFFIX)) != SUFFIX:
            log.change(f"file found by {way}", file_name=images[place].stem, found=inner)
    return images


def _object(entry: ElementTree.Element, stem: str, log: SampleLog) -> Json:
    """Return the entry of one object; its parts are nested deeper, with boxes of their own."""
    edges = ("xmin", "ymin", "xmax", "ymax")
    is_difficult = False
    for name in FLAGS:
        flag, number = _text(entry, name).lower(), _number(entry, name)
        is_difficult |= flag in YES or number == 1
        if not (flag in (*YES, *NO) or number in (0, 1)):
            log.change(f"{name} is neither yes nor no: taken as no", file_name=stem, found=flag)
    return {
        "name": _text(entry, "name"),
        "box": [_number(entry, f"bndbox/{edge}") for edge in edges],
        "difficult": is_difficult,
        "num_parts": len(entry.findall("part")),
    }


def _usable(images: list[VocImage], making: Making, log: SampleLog) -> list[VocImage]:
    """Return the images that can be read, decoded and are of the recorded size."""
    chunks = [
        images[first : first + IMAGES_PER_CHECK]
        for first in range(0, len(images), IMAGES_PER_CHECK)
    ]
    num_bytes = sum(file_bytes(image.path) or 0 for image in images if image.path)
    processes = min(making.processes, len(chunks), useful_processes(num_bytes))
    verdicts: dict[str, Json] = {}
    find = partial(_find_unusable, making.exif)
    for part in run_jobs(find, chunks, processes, lambda num_images: None):
        verdicts |= part
    log.lines += [verdicts[image.stem] for image in images if image.stem in verdicts]
    return [image for image in images if image.stem not in verdicts]


def _find_unusable(exif: Exif, images: list[VocImage], tick: Tick) -> dict[str, Json]:
    """Return the log's line of each image that cannot be used."""
    log = SampleLog()
    for image in images:
        read_image(image.path, image.size, {"file_name": image.stem}, log, exif)
        tick()
    return {line["file_name"]: line for line in log.lines if "skipped" in line}


def _text(entry: ElementTree.Element, name: str) -> str:
    return (entry.findtext(name) or "").strip()


def _number(entry: ElementTree.Element, name: str) -> float:
    """Return a number, an integer where it is one; NaN for anything else."""
    try:
        value = float(_text(entry, name))
    except ValueError:
        return math.nan
    return int(value) if value.is_integer() else value
