"""Activation checkpointing: a block keeps its input only, and runs again in the backward pass.

``engine.activation_checkpointing`` turns it on in everything that is `Checkpointed`: each block of
the backbone, the pyramid, the convolutions of the heads. Losses and gradients stay what they are:
random words (drop path) are those of the first run, and batch normalization counts statistics of
the first run alone (``norms.count_lane``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigdet.models.norms import BatchNorm2d, valid_rows


class Checkpointed(nn.Module):
    """A module that runs its blocks through `run`.

    Attributes:
        is_checkpointed: whether blocks keep their inputs only.
    """

    is_checkpointed = False

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Call a block; with checkpointing, keep nothing of what it computes for backward."""
        if not (self.is_checkpointed and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        norms = (layer for layer in self.modules() if isinstance(layer, BatchNorm2d))
        rows = next((layer.rows for layer in norms), None)
        if rows is None:
            return checkpoint(block, *inputs, use_reentrant=False)

        def run_in_context(*given: Any) -> Any:
            with valid_rows(self, rows):  # also in the second run
                return block(*given)

        return checkpoint(run_in_context, *inputs, use_reentrant=False)


def enable_checkpointing(module: nn.Module) -> None:
    """Turn activation checkpointing on in every part of a model that supports it."""
    for layer in module.modules():
        if isinstance(layer, Checkpointed):
            layer.is_checkpointed = True
