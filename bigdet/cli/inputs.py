"""What ``bigdet.predict`` is given: files, folders, globs or a shard set, as a list of images."""

from __future__ import annotations

import glob
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigdet.data.examples.samples import decode_sample, read_sample
from bigdet.data.format.manifest import MANIFEST_NAME
from bigdet.data.format.remote import is_remote
from bigdet.data.format.shard_set import STRING_IDS, ShardSet
from bigdet.pictures.files import read_picture, shown_size
from bigdet.pictures.pixels import SUFFIXES, Exif

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Input:
    """One image to detect objects on.

    Attributes:
        name: for messages.
        image_id: of the results: the data set's own, or the place in the list, from 1.
        file_name: of the results; None in a data set, whose ids say enough.
        stem: of the file for the drawn picture.
        size: height, width, as it is seen.
        read: gives ``(H, W, 3)`` uint8 RGB, or raises ``ValueError``; for any thread.
        source_id: for the results in place of ``image_id``, where a data set's own ids are strings.
    """

    name: str
    image_id: int
    file_name: str | None
    stem: str
    size: tuple[int, int]
    read: Callable[[], Pixels]
    source_id: str | None = None


def list_inputs(given: Sequence[str], exif: Exif = "shown") -> tuple[list[Input], int]:
    """List the images that words of a command line stand for.

    Args:
        given: files, folders and globs, or the folder or address of one shard set.
        exif: how files are seen; the images of a shard set are seen as it annotates them.

    Returns:
        The images, and how many more there should have been: files that are no images, words that
        stand for none. Each has had its message in the log.
    """
    sets = [word for word in given if is_shard_set(word)]
    if sets:
        if len(given) > 1:
            raise ValueError(
                f"{sets[0]}: is a shard set, whose image ids could be those of the other images. "
                f"Give it alone."
            )
        return _of_shards(ShardSet(sets[0])), 0
    paths, num_bad = find_files(given)
    inputs = []
    for number, (path, stem) in enumerate(zip(paths, stems(paths), strict=True), start=1):
        try:
            size = shown_size(path, exif)
        except ValueError as error:
            num_bad += 1
            logger.error("%s: %s; left out", path, error)
            continue
        read = partial(read_picture, path, exif)
        inputs.append(Input(str(path), number, str(path), stem, size, read))
    return inputs, num_bad


def is_shard_set(word: str) -> bool:
    """Tell whether a word is the address of a shard set, or a folder that is one."""
    return is_remote(word) or Path(word, MANIFEST_NAME).is_file()


def find_files(given: Sequence[str]) -> tuple[list[Path], int]:
    """Return the files that are meant, each once, and how many words stood for none.

    A folder stands for the pictures in it, a glob (``**`` for all folders below) for those that
    fit.
    """
    paths: list[Path] = []
    num_bad = 0
    for word in given:
        path = Path(word)
        if path.is_dir():
            found = sorted(filter(_is_picture, path.iterdir()))
            problem = (
                f"the folder holds no picture ({', '.join(sorted(SUFFIXES))}; folders in it are "
                f"not searched, '{path}/**' searches them)"
            )
        elif path.exists():
            found, problem = [path], ""
        elif glob.has_magic(word):
            found = sorted(map(Path, glob.glob(word, recursive=True)))
            found = [file for file in found if _is_picture(file) and file.is_file()]
            problem = "no picture fits"
        else:
            found, problem = [], "does not exist. Give pictures, folders of them, globs or shards"
        if not found:
            num_bad += 1
            logger.error("%s: %s; left out", word, problem)
        paths += found
    return list(dict.fromkeys(paths)), num_bad


def _is_picture(file: Path) -> bool:
    """Judge by the name; for each file on foreign disks macOS adds one of its own, ``._NAME``."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith("._")


def stems(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a name for each drawn picture; equal ones get a number."""
    taken: set[str] = set()
    for path in paths:
        name, count = path.stem, 1
        while name in taken:
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name)
        yield name


def _of_shards(shards: ShardSet) -> list[Input]:
    reading = threading.Lock()  # a shard set is not for several threads
    has_names = STRING_IDS.items() <= shards.manifest.options.items()

    def read(row: int) -> Pixels:
        with reading:
            sample = read_sample(shards, row)
        return decode_sample(shards, row, sample).permute(1, 2, 0).contiguous().numpy()

    return [
        Input(
            name=f"{shards.address}: {shards.key(row)}",
            image_id=int(entry["image_id"]),
            file_name=None,
            stem=shards.key(row),
            size=(int(entry["height"]), int(entry["width"])),
            read=partial(read, row),
            source_id=shards.record(row).get("source_id") if has_names else None,
        )
        for row, entry in enumerate(shards.index)
    ]
