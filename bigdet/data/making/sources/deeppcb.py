"""DeepPCB's layout (a list per split, a text file of boxes per image), to shards.

https://github.com/tangsanli5201/DeepPCB: a line of ``trainval.txt`` or ``test.txt`` names an image
and its text file, ``group20085/20085/20085000.jpg group20085/20085_not/20085000.txt``, where the
image with the defects is ``20085000_test.jpg``, next to ``20085000_temp.jpg`` without. A line of a
text file is ``x1 y1 x2 y2 type``, corners in pixels of the image and a type of 1 to 6.

It is converted to COCO's form first, so that what is wrong with one box is clipped or left out,
counted and listed as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigdet.data.format.manifest import Manifest, ShardError
from bigdet.data.making.conversion import DEFAULT_MAKING, Making, Progress, no_progress
from bigdet.data.making.sources.image_files import check_folder, safe_path
from bigdet.data.making.sources.image_headers import read_header
from bigdet.data.making.sources.records import convert_records
from bigdet.data.making.storage import open_unused
from bigdet.pictures.pixels import Exif, turned_size

TYPES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
"""Types of defects, in the order of their numbers from 1."""


def convert_deeppcb(
    root: Path,
    split: str,
    out: str | Path,
    *,
    making: Making = DEFAULT_MAKING,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write one split as shards; image ids are places in its list, from 1.

    Args:
        root: the folder PCBData, which holds the lists and what they name.
        split: a list in it without ``.txt``: ``trainval`` or ``test``.
        out: folder or address for the shards.
        making: size of the tars, number of processes and the like.
        progress: called now and then with the number of images done and in all.

    Returns:
        The manifest of the new set; None if only a part was made.

    Raises:
        ShardError: the layout is not as expected.
    """
    open_unused(out)
    check_folder(root)
    records, options = read_split(root, split, making.exif), {"root": str(root), "split": split}
    return convert_records(
        "deeppcb", root, records, out, options=options, making=making, progress=progress
    )


def read_split(root: Path, split: str, exif: Exif = "shown") -> dict[str, list[dict[str, Any]]]:
    """Return a split in COCO's form, file names relative to the folder.

    ``exif`` says which image the boxes are of if EXIF turns it, as no size is recorded.
    """
    listed = root / f"{split}.txt"
    found = ", ".join(sorted(path.stem for path in root.glob("*.txt"))) or "none"
    advice = f"Give the folder PCBData of DeepPCB and one of its lists (found: {found})."
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(listed, advice), start=1):
        names = line.split()
        paths = [safe_path(root, name) for name in names]
        if len(names) != 2 or None in paths:
            raise ShardError(
                f"{listed}: line {number}: found {line!r}, expected the name of an image and of "
                f"its text file, relative to {root}. {advice}"
            )
        stem, _, suffix = names[0].rpartition(".")
        of_defects = f"{stem}_test.{suffix}"
        name = of_defects if (root / of_defects).is_file() else names[0]
        height, width = _size(root / name, exif, f"{listed}: line {number}")
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for x1, y1, x2, y2, kind in _boxes(root / names[1]):
            box = [x1, y1, x2 - x1, y2 - y1]
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": kind}
            annotations.append({**ids, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(TYPES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _lines(path: Path, advice: str) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: cannot be read ({error}). {advice}") from error


def _size(path: Path, exif: Exif, place: str) -> tuple[int, int]:
    """Return height and width of an image."""
    try:
        header = read_header(path.read_bytes())
        return turned_size(header.size, header.tag) if exif == "shown" else header.size
    except (OSError, ValueError, SyntaxError) as error:
        raise ShardError(
            f"{path}: cannot be read as an image ({error}); {place} names it. Get it again, or "
            f"remove the line."
        ) from error


def _boxes(path: Path) -> list[list[int]]:
    """Return corners and type of each line of a text file."""
    boxes = []
    for number, line in enumerate(_lines(path, "A list of the split names it."), start=1):
        words = line.replace(",", " ").split()
        values = [int(word) for word in words if word.lstrip("-").isdecimal()]
        if len(words) != 5 or len(values) != 5 or not 1 <= values[4] <= len(TYPES):
            raise ShardError(
                f"{path}: line {number}: found {line!r}, expected x1 y1 x2 y2 type, whole numbers, "
                f"the type 1 to {len(TYPES)} ({', '.join(TYPES)}). Correct or remove the line."
            )
        boxes.append(values)
    return boxes
