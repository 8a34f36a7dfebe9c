"""Records in COCO's form to shards: how to convert a format of your own.

A source of ``bigdet shards`` is a function. Yours is named in place of those of bigdet:

    bigdet shards my_package.readers:convert --root DIR --out DIR

    # my_package/readers.py
    from pathlib import Path
    from bigdet.data.making.sources.records import convert_records

    def convert(root: Path, *, out, making, progress):
        # Options are explained by the lines of the docstring's Args.
        images = [{"id": 1, "file_name": "1.jpg", "height": 480, "width": 640}]
        annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40]}]
        categories = [{"id": 1, "name": "bolt"}]
        records = {"images": images, "annotations": annotations, "categories": categories}
        return convert_records("mine", root, records, out, making=making, progress=progress)

It is given ``out`` (folder or address for the shards), ``making`` (``--processes``, ``--part``,
``--long-side`` and the like) and ``progress`` (called with the images done and in all) by name, and
passes them on. Its other parameters become options of the command, of type ``Path``, ``str``,
``int`` or ``float``. It returns the manifest of the new set, None if only a part was made, and
raises ``ValueError`` if something is wrong with the data. A source whose records do not fit in
memory calls ``conversion.convert`` with a ``conversion.Source`` instead.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigdet.data.format.manifest import Manifest
from bigdet.data.making.conversion import DEFAULT_MAKING, Making, Progress, convert, no_progress
from bigdet.data.making.sources.coco import CocoSource
from bigdet.data.making.sources.coco_file import load_coco
from bigdet.data.making.sources.image_files import check_folder
from bigdet.data.making.storage import open_unused


def convert_records(
    name: str,
    images: Path,
    records: Mapping[str, Any],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    making: Making = DEFAULT_MAKING,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Write records in COCO's form as shards; what is wrong with one of them is noted.

    Args:
        name: that of the source, for the manifest.
        images: folder that the file names are relative to.
        records: ``images`` (id, file_name, height, width), ``annotations`` (id, image_id,
            category_id, bbox as x, y, width, height in pixels, maybe segmentation, ...) and
            ``categories`` (id, name); all that JSON can hold.
        out: folder or address for the shards.
        options: those of the manifest: how the set is made.
        making: size of the tars, number of processes and the like.
        progress: called now and then with the number of images done and in all.

    Returns:
        The manifest of the new set; None if only a part was made.

    Raises:
        ShardError: the records contradict themselves, or nothing in them can be used.
    """
    open_unused(out)
    check_folder(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        source = CocoSource(name, images, load_coco(path), making.exif)
        source.info = replace(source.info, options=dict(options or {}))
        return convert(source, out, making, progress)
