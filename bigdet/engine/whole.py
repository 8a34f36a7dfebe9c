"""The weights of a checkpoint in one file, written one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigdet import distributed, messages
from bigdet.host.files import put_in_place
from bigdet.pieces.index import MODEL, MODEL_FILE
from bigdet.pieces.reading import Stored, open_stored
from bigdet.pieces.tensor_file import write_tensors


def write_whole(folder: Path) -> bool:
    """Write ``model.safetensors`` of a checkpoint, unless it is there (one rank).

    Returns:
        False where this host does not have all pieces: then `write_whole_together` can.

    Raises:
        OSError: the file cannot be written.
        ValueError: a piece is damaged.
    """
    if (folder / MODEL_FILE).is_file():
        return True
    stored = open_stored(folder)
    if stored.lacking(_all_weights(stored)):
        return False
    _write(folder, stored, stored.whole())
    return True


def write_whole_together(folder: Path) -> None:
    """Write ``model.safetensors`` on the host of rank 0 from the pieces of all hosts (collective).

    Raises:
        SharedError: it cannot be written, or pieces are on no host.
    """
    stored: Stored | None = None
    with distributed.together():
        stored = open_stored(folder)
    assert stored is not None
    senders = _senders(stored)
    with distributed.together():
        for place, sender in senders.items():
            if sender is None:
                raise ValueError(f"{folder}: {place} is on no host of this run.")
    tensors = _collect(stored, senders)
    with distributed.together():
        try:
            if distributed.is_main():
                _write(folder, stored, tensors)
        finally:
            for _ in tensors:  # the others' part; and what they still send if rank 0 cannot write
                pass


def _all_weights(stored: Stored) -> Iterator[tuple[str, str, int, int]]:
    for name, spec in stored.catalog[MODEL].items():
        yield MODEL, name, 0, spec.count


def _write(folder: Path, stored: Stored, tensors: Iterator[Tensor]) -> None:
    temporary = folder / f"{MODEL_FILE}.tmp"
    write_tensors(temporary, stored.catalog[MODEL], tensors, stored.metadata)
    put_in_place(temporary, folder / MODEL_FILE)


def _senders(stored: Stored) -> dict[str, int | None]:
    """Give for each file the first rank that has it (collective)."""
    files = sorted({place.file for name in stored.catalog[MODEL] for place in stored.cover(name)})
    own = [(stored.folder / file).is_file() for file in files]
    everywhere = distributed.all_gather_objects(own)
    return {
        file: next((rank for rank, has in enumerate(everywhere) if has[number]), None)
        for number, file in enumerate(files)
    }


def _collect(stored: Stored, senders: dict[str, int | None]) -> Iterator[Tensor]:
    """Send this rank's pieces of the weights to rank 0, which yields whole tensors of them."""
    for name, spec in stored.catalog[MODEL].items():
        values = torch.empty(spec.count if distributed.is_main() else 0, dtype=spec.torch_dtype)
        for place in stored.cover(name):
            sender = senders[place.file]
            room = values[place.first : place.first + place.count]
            if sender == distributed.rank():
                piece = stored.read(MODEL, name, place.first, place.count)
                if sender != 0:
                    messages.send_tensor(piece)
                else:
                    room.copy_(piece)
            elif distributed.is_main():
                assert sender is not None
                messages.receive_tensor(room, sender)
        if distributed.is_main():
            yield values.view(spec.shape)
