"""The images of a command line: files, folders, globs or a shard set, as a list."""

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
        image_id: in the results: the data set's id, or the position in the list, from 1.
        file_name: in the results; None in a data set, whose ids name the images.
        stem: name of the drawn picture, without suffix.
        size: height, width after turning.
        read: returns ``(H, W, 3)`` uint8 RGB or raises ``ValueError``; safe in any thread.
        source_id: replaces ``image_id`` in the results where a data set's own ids are strings.
    """

    name: str
    image_id: int
    file_name: str | None
    stem: str
    size: tuple[int, int]
    read: Callable[[], Pixels]
    source_id: str | None = None


def list_inputs(given: Sequence[str], exif: Exif = "shown") -> tuple[list[Input], int]:
    """List the images that words of a command line name.

    Args:
        given: files, folders and globs, or the folder or address of one shard set.
        exif: whether files are turned; images of a shard set are used as it annotates them.

    Returns:
        The images, and how many files are not images or words match none. Each of these has a
        message in the log.
    """
    sets = [word for word in given if is_shard_set(word)]
    if sets:
        if len(given) > 1:
            raise ValueError(
                f"{sets[0]}: is a shard set, whose image ids could clash with those of other "
                f"images. Give it alone."
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
    """Return whether a word is the address of a shard set, or a folder that is one."""
    return is_remote(word) or Path(word, MANIFEST_NAME).is_file()


def find_files(given: Sequence[str]) -> tuple[list[Path], int]:
    """Return the files that the words name, each once, and how many words name none.

    A folder means the pictures in it, a glob (``**`` for all folders below) those that match.
    """
    paths: list[Path] = []
    num_bad = 0
    for word in given:
        path = Path(word)
        if path.is_dir():
            found = sorted(filter(_is_picture, path.iterdir()))
            problem = (
                f"the folder contains no picture ({', '.join(sorted(SUFFIXES))}; its subfolders "
                f"are not searched, '{path}/**' searches them)"
            )
        elif path.exists():
            found, problem = [path], ""
        elif glob.has_magic(word):
            found = sorted(map(Path, glob.glob(word, recursive=True)))
            found = [file for file in found if _is_picture(file) and file.is_file()]
            problem = "no picture matches"
        else:
            found, problem = [], "does not exist. Give pictures, folders of them, globs or shards"
        if not found:
            num_bad += 1
            logger.error("%s: %s; left out", word, problem)
        paths += found
    return list(dict.fromkeys(paths)), num_bad


def _is_picture(file: Path) -> bool:
    """Judge by the name; macOS adds a file ``._NAME`` to each file on other file systems."""
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
    reading = threading.Lock()  # a shard set is not thread-safe
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
