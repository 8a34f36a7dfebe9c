"""The moving average (EMA) of the weights: of each rank, the part that its optimizer steps.

The average is computed element by element, so no rank needs another one for it, and it costs one
more fp32 copy of a rank's share. Every floating-point buffer is averaged too, whole on each rank:
running statistics belong to the weights that they were measured with, so those of the average are
an average as well, as in timm, YOLOX, RTMDet and EVA-02. (mmengine by default takes the newest.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SWAPPED_ELEMENTS = 2**22
"""How many numbers are copied at a time to change places: 16 MiB."""


class MovingAverage:
    """The average of what an optimizer steps, on one rank.

    Attributes:
        names: the trained parameters and floating-point buffers of the module.
        values: what this rank has of the average, in tensors of the engine's own making.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Collection[str],
        parts: Callable[[], Sequence[Tensor]],
        use_parts: Callable[[], None],
    ) -> None:
        """Begin with the weights as they are.

        Args:
            module: that is trained.
            trained: names of its parameters that are.
            parts: gives the tensors that the optimizer of this rank steps, in fp32; always of the
                same sizes, in the same order.
            use_parts: makes the module use them after they were changed. Collective.
        """
        state = module.state_dict(keep_vars=True)
        buffers = {
            name: value
            for name, value in state.items()
            if not isinstance(value, nn.Parameter) and value.is_floating_point()
        }
        self.names = [*trained, *buffers]
        self._buffers = list(buffers.values())
        self._parts, self._use_parts = parts, use_parts
        self.values = [value.detach().clone() for value in self._live()]

    def _live(self) -> list[Tensor]:
        """What is averaged, as it is now."""
        return [*self._parts(), *self._buffers]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are now."""
        for value, live in zip(self.values, self._live(), strict=True):
            value.copy_(live)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move each number towards the newest one: ``decay`` of the old stays."""
        torch._foreach_lerp_(self.values, self._live(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module the average inside a block, and its weights back after it. Collective.

        They change places, which costs no memory. After an error in the block they stay as they
        are: the run ends, and ranks that still waited for each other would hang.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, live in zip(self.values, self._live(), strict=True):
            # In the order that they have in memory, which is the same for both.
            flat = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in (value, live))
            blocks = (torch.split(numbers, SWAPPED_ELEMENTS) for numbers in flat)
            for ours, theirs in zip(*blocks, strict=True):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)
        self._use_parts()
