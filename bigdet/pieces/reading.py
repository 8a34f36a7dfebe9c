"""The tensors of a checkpoint, read by ranges from whichever files hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigdet.pieces.index import MODEL, Catalog, Index, Place, key_in, read_index, read_state
from bigdet.pieces.tensor_file import TensorFile
from bigdet.pieces.unread import Unread


class Stored:
    """A checkpoint on this host, all of it or the files that this host has.

    Attributes:
        folder: of the checkpoint.
        loss_scale: of fp16, empty otherwise.
    """

    def __init__(
        self, folder: Path, index: Index, loss_scale: Mapping[str, float] | None = None
    ) -> None:
        """Take what is where; files are opened when they are needed."""
        self.folder, self._index = folder, index
        self.loss_scale = dict(loss_scale or {})
        self._files: dict[str, TensorFile] = {}

    @property
    def catalog(self) -> Catalog:
        """Type and shape of every tensor."""
        return self._index.catalog

    @property
    def metadata(self) -> dict[str, str]:
        """Of the weights: config, categories, phase."""
        return self._index.metadata

    def read(self, kind: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read consecutive numbers of a flattened tensor, by default all that follow ``first``.

        Raises:
            ValueError: a file that has some of them is damaged, or not on this host.
        """
        spec = self.catalog[kind][name]
        count = spec.count - first if count is None else count
        numbers = torch.empty(count, dtype=spec.torch_dtype)
        spans, gaps = _cover(self._places(kind, name, True), first, first + count)
        if gaps:
            files = ", ".join(sorted(self.lacking([(kind, name, first, count)]))) or "no file"
            raise ValueError(f"{self.folder}: {name} ({kind}) is in {files}, which is not here.")
        for place, start, stop in spans:
            key = key_in(place.file, kind, name, place.first)
            part = self._file(place.file).read(key, start - place.first, stop - start)
            numbers[start - first : stop - first] = part
        return numbers

    def lacking(self, ranges: Iterable[tuple[str, str, int, int]]) -> set[str]:
        """Say which files some ranges (kind, name, first, count) need that are not on this host."""
        files = set()
        for kind, name, first, count in ranges:
            _, gaps = _cover(self._places(kind, name, True), first, first + count)
            everywhere = self._places(kind, name, False) if gaps else []
            for start, stop in gaps:
                files |= {place.file for place, _, _ in _cover(everywhere, start, stop)[0]}
        return files

    def cover(self, name: str, kind: str = MODEL) -> list[Place]:
        """Divide a tensor over the files that have it, on this host or not."""
        spans, _ = _cover(self._places(kind, name, False), 0, self.catalog[kind][name].count)
        return [Place(start, stop - start, place.file) for place, start, stop in spans]

    def whole(self, kind: str = MODEL) -> Iterator[Tensor]:
        """Read the tensors of a kind, one after the other, in the order of the catalog."""
        for name, spec in self.catalog[kind].items():
            yield self.read(kind, name).view(spec.shape)

    def unread(self, kind: str = MODEL) -> Unread:
        """Give the tensors of a kind by name, each read when it is asked for."""
        specs = self.catalog[kind]
        return Unread(lambda name: self.read(kind, name).view(specs[name].shape), specs)

    def _places(self, kind: str, name: str, is_here: bool) -> list[Place]:
        """Give where the numbers of a tensor are, in order; of files on this host alone, if so."""
        places = sorted(self._index.places[kind, name])
        return [place for place in places if not is_here or self._has(place.file)]

    def _has(self, file: str) -> bool:
        return file in self._files or (self.folder / file).is_file()

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]


def _cover(
    places: Sequence[Place], first: int, stop: int
) -> tuple[list[tuple[Place, int, int]], list[tuple[int, int]]]:
    """Divide a range over places (in order): which give which part of it, and what none gives."""
    spans, gaps, position = [], [], first
    for place in places:
        end = min(place.first + place.count, stop)
        if end <= position or place.first >= stop:
            continue
        if place.first > position:
            gaps.append((position, place.first))
        spans.append((place, max(place.first, position), end))
        position = end
    if position < stop:
        gaps.append((position, stop))
    return spans, gaps


def open_stored(folder: Path) -> Stored:
    """Open a checkpoint to read tensors of it, without a check of its hashes.

    Raises:
        ValueError: it is not complete, or its index is damaged.
    """
    state = read_state(folder)
    return Stored(folder, read_index(folder, state["files"]), state.get("loss_scale"))
