"""Gradients averaged over the ranks while the backward pass still computes others (ZeRO stage 0).

DeepSpeed's stage 0 would send all of them after the backward pass, and copy each one twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigdet import distributed

SENT_ELEMENTS = 4_000_000
"""Numbers that are sent in one call, 16 MB: the last call, which no computation hides, is short."""


class GradientAverage:
    """Makes the gradients of a step averages over all ranks (collective).

    A bucket of gradients is sent when its last one is there, and the buckets in one order on every
    rank, which is about that of the backward pass. Gradients become views of their buckets, so that
    nothing is copied back.

    Args:
        parameters: what is trained, by name, in about the order of the forward pass.
        group: all ranks, for nothing else: a rank that lacks a gradient sends later than others do,
            maybe after a collective of its modules (SyncBN).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Any = None) -> None:
        self._buckets: list[_Bucket] = []
        self._num_sent = 0
        self._is_last_pass = False
        self._hooks: list[Any] = []
        for name, parameter in reversed(list(parameters.items())):
            if not self._buckets or self._buckets[-1].size >= SENT_ELEMENTS:
                self._buckets.append(_Bucket(group))
            bucket = self._buckets[-1]
            bucket.add(name, parameter)
            add_hook: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(add_hook(partial(self._arrived, bucket, name)))

    def expect(self) -> None:
        """Tell that the next backward pass is the last one of this step."""
        self._is_last_pass = True

    def finish(self) -> None:
        """Wait until all gradients are averages; 0 counts where no loss depends on a parameter."""
        for bucket in self._buckets:
            for name in list(bucket.missing):
                bucket.take(name)
        self._send_complete()
        for bucket in self._buckets:
            bucket.settle()
        self._num_sent, self._is_last_pass = 0, False

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, bucket: _Bucket, name: str, _parameter: Tensor) -> None:
        if self._is_last_pass:
            bucket.take(name)
            self._send_complete()

    def _send_complete(self) -> None:
        while self._num_sent < len(self._buckets) and not self._buckets[self._num_sent].missing:
            self._buckets[self._num_sent].send()
            self._num_sent += 1


class _Bucket:
    """Parameters whose gradients are sent together.

    Attributes:
        size: how many numbers they have.
        missing: names of those whose gradient has not been taken in this step.
    """

    def __init__(self, group: Any) -> None:
        self.size = 0
        self.missing: set[str] = set()
        self._places: dict[str, tuple[nn.Parameter, int]] = {}
        self._flat = torch.empty(0)
        self._group = group
        self._work: Any = None

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Make room for a gradient."""
        self._places[name] = parameter, self.size
        self.missing.add(name)
        self.size += parameter.numel()

    def take(self, name: str) -> None:
        """Move a gradient into this bucket; 0 if there is none."""
        parameter, first = self._places[name]
        if name not in self.missing:
            raise ValueError(
                f"the gradient of {name} came twice in one backward pass, as with reentrant "
                f"activation checkpointing. Use torch.utils.checkpoint with use_reentrant=False."
            )
        self.missing.remove(name)
        if not len(self._flat):
            self._flat = parameter.new_empty(self.size)
        place = _shaped(self._flat[first : first + parameter.numel()], parameter)
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)
        parameter.grad = place

    def send(self) -> None:
        """Begin to add up the gradients of all ranks."""
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    def settle(self) -> None:
        """Wait for the sum, and make it the average."""
        self._work.wait()
        self._flat *= 1 / distributed.world_size()
        self._flat, self._work = torch.empty(0), None  # the gradients keep it in memory
        self.missing = set(self._places)


def _shaped(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Return a view of numbers in the shape of a parameter, in memory ordered as it is."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        count, channels, height, width = parameter.shape
        return numbers.view(count, height, width, channels).permute(0, 3, 1, 2)
    return numbers.view(parameter.shape)
