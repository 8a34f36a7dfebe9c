"""What a rank holds of weights and optimizer state: copied to be saved, filled when loaded.

Every engine keeps each tensor as a whole on all ranks, or as consecutive numbers of the flattened
tensor on each: ZeRO's partitions, FSDP2's rows. So one description does for all of them, and what
one engine saved on some ranks, another one loads on others.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bigdet import distributed, messages
from bigdet.pieces.index import Catalog
from bigdet.pieces.tensor_file import NAMES, Spec


@dataclass(frozen=True)
class Part:
    """What this rank holds of one tensor.

    Attributes:
        kind: ``MODEL``, ``NEWEST``, or what the optimizer calls it.
        name: of the parameter or buffer.
        shape: of the whole tensor.
        first: number, in the flattened whole tensor, of the first one that is held.
        values: the numbers held, of any shape, where the engine has them: setting them sets it.
        is_whole: every rank holds all of the tensor.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    first: int
    values: Tensor
    is_whole: bool = False

    @property
    def spec(self) -> Spec:
        """Type and shape of the whole tensor as it is saved: floating point is fp32."""
        dtype = torch.float32 if self.values.is_floating_point() else self.values.dtype
        return Spec(NAMES[dtype], self.shape)


@dataclass(frozen=True)
class Piece:
    """Consecutive numbers of a flattened tensor, copied to the CPU: ``values`` are ``(count,)``."""

    kind: str
    name: str
    first: int
    values: Tensor


@dataclass(frozen=True)
class Share:
    """What one rank saves of the state of an engine.

    Attributes:
        pieces: together with those of the other ranks, all of every tensor.
        catalog: type and shape of all tensors, the same on all ranks.
        loss_scale: of fp16: ``value`` and ``good_steps`` since it last changed. Empty otherwise.
    """

    pieces: list[Piece] = field(default_factory=list)
    catalog: Catalog = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)

    def with_more(self, other: Share) -> Share:
        """Add tensors of other kinds."""
        return replace(
            self, pieces=self.pieces + other.pieces, catalog=self.catalog | other.catalog
        )


class Source(Protocol):
    """What an engine can continue from, such as ``pieces.reading.Stored``."""

    @property
    def catalog(self) -> Catalog:
        """Type and shape of every tensor."""
        ...

    @property
    def loss_scale(self) -> dict[str, float]:
        """Of fp16; empty where there was none."""
        ...

    def read(self, kind: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Give consecutive numbers of a flattened tensor, by default all that follow ``first``."""
        ...

    def lacking(self, ranges: Iterator[tuple[str, str, int, int]]) -> set[str]:
        """Say which files some ranges (kind, name, first, count) need that are not on this host."""
        ...


def copy_share(parts: Sequence[Part], position: int, size: int, shards: int | None = None) -> Share:
    """Copy what a rank saves to the CPU.

    Args:
        parts: of all tensors; of those that are whole, in the same order on all ranks.
        position: of this rank among those that divide between them what several of them hold.
        size: how many these are.
        shards: how many consecutive ranks divide a tensor that is not whole; others hold copies.
            None: all ranks.
    """
    total = sum(part.values.numel() for part in parts if part.is_whole)
    begin, end = total * position // size, total * (position + 1) // size
    shards = distributed.world_size() if shards is None else shards
    copies, copy = max(1, size // shards), position // shards
    assert copies == 1 or size % shards == 0, (size, shards)
    offset, pieces = 0, []
    catalog: Catalog = {}
    for part in parts:
        catalog.setdefault(part.kind, {})[part.name] = part.spec
        number = part.values.numel()
        first, stop = number * copy // copies, number * (copy + 1) // copies
        if part.is_whole:
            first = min(max(begin - offset, 0), number)
            stop = max(min(end - offset, number), first)
            offset += number
        if first < stop:
            # In logical order: a copy of the whole tensor if it is channels_last.
            copied = _to_cpu(part.values.detach().reshape(-1)[first:stop])
            pieces.append(Piece(part.kind, part.name, part.first + first, copied))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies are under way until here
    return Share(pieces, catalog)


def _to_cpu(values: Tensor) -> Tensor:
    """Copy numbers to the CPU, pinned where they come from a GPU, as fp32 if floating point."""
    dtype = torch.float32 if values.is_floating_point() else values.dtype
    copy = torch.empty(len(values), dtype=dtype, pin_memory=values.is_cuda)
    return copy.copy_(values, non_blocking=True)


def gather_share(share: Share) -> Share:
    """Give rank 0 the pieces of all ranks, one after the other; the others keep none. Collective.

    Rank 0 then has weights and optimizer state whole in its memory.
    """
    listed = [(piece.kind, piece.name, piece.first, len(piece.values)) for piece in share.pieces]
    everywhere = distributed.gather_objects(listed)
    if not distributed.is_main():
        for piece in share.pieces:
            messages.send_tensor(piece.values)
        return Share([], share.catalog, share.loss_scale)
    pieces = list(share.pieces)
    for rank, theirs in enumerate(everywhere[1:], start=1):
        for kind, name, first, count in theirs:
            dtype = share.catalog[kind][name].torch_dtype
            values = messages.receive_tensor(torch.empty(count, dtype=dtype), rank)
            pieces.append(Piece(kind, name, first, values))
    return Share(pieces, share.catalog, share.loss_scale)


def fill(parts: Sequence[Part], source: Source) -> None:
    """Set what this rank holds from what was saved, reading no more than that. Collective.

    Args:
        parts: of the same tensors, in the same order, on all ranks.
        source: has all of these tensors, at least on rank 0 or what each rank needs on that rank.

    Raises:
        SharedError: with what is missing on which host.
    """
    read = source.read
    if _must_send(parts, source):
        read = _Sent(source).read
    with torch.no_grad():
        for part in parts:
            numbers = read(part.kind, part.name, part.first, part.values.numel())
            part.values.copy_(numbers.view(part.values.shape))


def _must_send(parts: Sequence[Part], source: Source) -> bool:
    """Tell whether rank 0 has to send what the other hosts lack. Collective."""
    own = source.lacking((part.kind, part.name, part.first, part.values.numel()) for part in parts)
    found = distributed.all_gather_objects((socket.gethostname(), sorted(own)))
    if not any(files for _, files in found):
        return False
    everything = (
        (kind, name, 0, spec.count)
        for kind, specs in source.catalog.items()
        for name, spec in specs.items()
    )
    if not distributed.broadcast_object(source.lacking(everything)):
        return True
    lines = {host: files for host, files in reversed(found) if files}
    told = "; ".join(
        f"{host} lacks {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}"
        for host, files in lines.items()
    )
    raise distributed.SharedError(
        f"The checkpoint is not complete where it is needed, as the hosts share no disk: {told}. "
        f"Copy these files into its folder there, or start as many ranks on the same hosts as "
        f"before. With checkpoint.gather=true all files are on the host of rank 0."
    )


class _Sent:
    """Tensors that rank 0 reads whole, one after the other, and sends to all. Collective."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, kind: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        spec = self._source.catalog[kind][name]
        values = torch.empty(spec.count, dtype=spec.torch_dtype)
        if distributed.is_main():
            values = self._source.read(kind, name)
        values = distributed.broadcast_tensor(values)
        return values[first : spec.count if count is None else first + count]
