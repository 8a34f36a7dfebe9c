"""Messages between single ranks: bytes and tensors to rank 0, and notes for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

POLL_SECONDS = 0.05
CHUNK_BYTES = 16 << 20


def send_bytes(file: IO[bytes], num_bytes: int) -> None:
    """Send the next bytes of a file to rank 0, which calls ``receive_bytes``."""
    while num_bytes:
        part = bytearray(file.read(min(num_bytes, CHUNK_BYTES)))
        dist.send(torch.frombuffer(part, dtype=torch.uint8), dst=0)
        num_bytes -= len(part)


def receive_bytes(sender: int, num_bytes: int) -> Iterator[bytes]:
    """Yield what another rank sends to rank 0, in parts."""
    while num_bytes:
        part = torch.empty(min(num_bytes, CHUNK_BYTES), dtype=torch.uint8)
        dist.recv(part, src=sender)
        yield part.numpy().tobytes()
        num_bytes -= len(part)


def send_tensor(tensor: Tensor) -> None:
    """Send a tensor on the CPU to rank 0, which calls ``receive_tensor``."""
    dist.send(tensor.contiguous(), dst=0)


def receive_tensor(room: Tensor, sender: int) -> Tensor:
    """Fill a tensor on the CPU with what another rank sends to rank 0, and return it."""
    dist.recv(room, src=sender)
    return room


class Notes:
    """Short texts between ranks without a collective, for threads; one rank reads each, once."""

    def __init__(self) -> None:
        """Open a connection of its own to the store of the process group."""
        self._store = dist.distributed_c10d._get_default_store().clone()

    def leave(self, name: str, text: str) -> None:
        """Write a note."""
        self._store.set(f"note/{name}", text)

    def take(self, name: str, must_end: Callable[[], bool]) -> str:
        """Wait for a note, and remove it.

        Raises:
            DistError: rank 0, which keeps the notes, is gone, or ``must_end`` says so.
        """
        while not self._store.check([f"note/{name}"]):
            if must_end():
                raise dist.DistError(f"no word of {name}")
            time.sleep(POLL_SECONDS)
        text: str = self._store.get(f"note/{name}").decode()
        self._store.delete_key(f"note/{name}")
        return text
