"""Detections on disk: each rank writes its own, then rank 0 collects all of them and reads them.

The files are temporary and have no name, so nothing is left even after SIGKILL; ``write`` makes a
file that stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

import orjson

from bigdet import distributed, messages
from bigdet.evaluation.detections import Result
from bigdet.host.files import put_in_place


class SavedResults:
    """COCO results in a file, one line per image; iteration reads them by image id."""

    def __init__(self, folder: Path | None = None) -> None:
        """Start with an empty file.

        Args:
            folder: where it is, made if needed; None for the system's temporary folder.
        """
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._lines: list[tuple[int, int, int]] = []  # image id, start and size of its line, bytes
        self._end = 0

    @property
    def num_images(self) -> int:
        """The number of images, including those without detections."""
        return len(self._lines)

    def image_ids(self) -> list[int]:
        """Return the ids of the images in rising order."""
        return sorted(image_id for image_id, _, _ in self._lines)

    def add(self, image_id: int, results: Sequence[Result]) -> None:
        """Append all results of one image."""
        line = orjson.dumps(results)
        self._file.write(line)
        self._lines.append((image_id, self._end, len(line)))
        self._end += len(line)

    def write(self, file: Path) -> None:
        """Write everything to a file that stays, for ``read``; complete or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        with temporary.open("wb") as opened:
            for image_id, start, size in self._lines:
                self._file.seek(start)
                opened.write(b"%d %d\n%b" % (image_id, size, self._file.read(size)))
        put_in_place(temporary, file)

    @classmethod
    def read(cls, file: Path) -> SavedResults:
        """Open a file that ``write`` has written.

        Raises:
            ValueError: the file is cut short or altered.
        """
        results = cls()
        results._file.close()
        results._file = file.open("rb")
        place, end = 0, os.fstat(results._file.fileno()).st_size
        try:
            while place < end:
                image_id, size = map(int, results._file.readline().split())
                results._lines.append((image_id, results._file.tell(), size))
                place = results._file.seek(size, os.SEEK_CUR)
        except ValueError:
            place = -1  # not a line of ``write``
        if place != end:
            raise ValueError(f"{file}: cut short or altered since it was written.")
        return results

    def gather(self) -> None:
        """Move the results of all ranks to rank 0 (collective); the others are empty afterwards.

        Raises:
            SharedError: on all ranks, if the disk of rank 0 is full.
        """
        gathered = distributed.gather_objects((self._end, self._lines))
        self._file.seek(0, 2)
        problem: OSError | None = None
        for rank, (num_bytes, lines) in enumerate(gathered):
            if rank == 0:
                continue
            for part in messages.receive_bytes(rank, num_bytes):
                try:
                    if problem is None:
                        self._file.write(part)
                except OSError as error:  # the others still have to send everything
                    problem = error
            self._lines += [(image_id, start + self._end, size) for image_id, start, size in lines]
            self._end += num_bytes
        if not distributed.is_main():
            self._file.seek(0)
            messages.send_bytes(self._file, self._end)
            self._file.truncate(0)
            self._lines, self._end = [], 0
        with distributed.together():
            if problem is not None:
                raise problem

    def of_images(self, image_ids: Collection[int]) -> Iterator[Result]:
        """Yield the results of some images in the order of their ids; the others are not read."""
        for image_id, start, size in sorted(self._lines):
            if image_id in image_ids:
                self._file.seek(start)
                yield from orjson.loads(self._file.read(size))

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not if opening it failed
            self._file.close()

    def __iter__(self) -> Iterator[Result]:
        return self.of_images({image_id for image_id, _, _ in self._lines})
