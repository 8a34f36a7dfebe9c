"""Losses over slots, some of which are empty; always in at least single precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Give the tensor in fp32 if it is in a shorter type, else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | int) -> Tensor:
    """Add up the values where the mask is set and divide by the count, at least 1.

    With an empty mask this is an exact 0 with zero gradients, so that an image without objects
    still runs through every parameter.
    """
    total = torch.where(mask, values, 0).sum()
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def delta_losses(deltas: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Give the smooth L1 loss of predicted deltas, summed over the four.

    Args:
        deltas: ``(..., 4)`` predicted.
        targets: ``(..., 4)``; anything, even not a number, where the mask is not set.
        mask: ``(...)`` bool.
        beta: where the square turns linear; 0 is L1.

    Returns:
        ``(...)``
    """
    targets = torch.where(mask.unsqueeze(-1), targets, 0)  # 0 x nan would spoil the gradients
    return F.smooth_l1_loss(at_least_fp32(deltas), targets, beta=beta, reduction="none").sum(-1)


def giou_losses(boxes: Tensor, targets: Tensor) -> Tensor:
    """Give 1 - GIoU of each of ``(N, 4)`` boxes with its target (Rezatofighi et al.): ``(N,)``."""
    losses: Tensor = generalized_box_iou_loss(boxes, targets)
    return losses


def binary_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the binary cross entropy of each logit with its target in [0, 1]."""
    logits = at_least_fp32(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the softmax cross entropy of ``(..., K)`` logits with ``(...)`` labels."""
    flat = F.cross_entropy(at_least_fp32(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)
