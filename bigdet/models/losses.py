"""Losses over slots, some of which are empty; always in at least single precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigdet.ops.boxes import box_areas
from bigdet.ops.devices import is_gpu

GIOU_EPSILON = 1e-7  # torchvision's
# Logits whose focal losses are computed at once: on a GPU 134 MB of fp32, where each piece costs
# the time of 20 launches; on a CPU 16 MB.
CHUNK, CPU_CHUNK = 2**25, 2**22


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
    """Give 1 - GIoU of each of ``(N, 4)`` boxes with its target (Rezatofighi et al.): ``(N,)``.

    torchvision's ``generalized_box_iou_loss``, which makes the host wait for the device.
    """
    low, high = torch.minimum(boxes, targets), torch.maximum(boxes, targets)
    common = torch.cat([high[:, :2], low[:, 2:]], dim=1)
    shared = torch.where((common[:, 2:] > common[:, :2]).all(dim=1), box_areas(common), 0)
    union = box_areas(boxes) + box_areas(targets) - shared
    hull = box_areas(torch.cat([low[:, :2], high[:, 2:]], dim=1))
    return 1 - (shared / (union + GIOU_EPSILON) - (hull - union) / (hull + GIOU_EPSILON))


def binary_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the binary cross entropy of each logit with its target in [0, 1]."""
    logits = at_least_fp32(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the softmax cross entropy of ``(..., K)`` logits with ``(...)`` labels."""
    flat = F.cross_entropy(at_least_fp32(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def focal_loss_sum(
    logits: Tensor,
    labels: Tensor,
    is_positive: Tensor,
    weights: Tensor,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Add up the weighted focal losses of all logits (Lin et al., RetinaNet, equation 5).

    Args:
        logits: ``(..., K)``, one binary decision per class.
        labels: ``(...)`` int64 in ``0..K-1``; used where the row is positive.
        is_positive: ``(...)`` bool; other rows belong to no class.
        weights: ``(...)`` of the rows; 0 leaves a row out.
        alpha: weight of the logit of the own class; the others weigh 1 - alpha.
        gamma: exponent that lowers the weight of easy decisions.

    Returns:
        A scalar. No one-hot targets are made, and nothing in the size of the logits is kept for
        backward but the logits themselves (plain autograd keeps five such tensors, in fp32).
    """
    total: Tensor = _FocalLossSum.apply(logits, labels, is_positive, weights, alpha, gamma)
    return total


class _FocalLossSum(torch.autograd.Function):
    """The sum in chunks of rows; backward computes the derivatives from the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        is_positive: Tensor,
        weights: Tensor,
        alpha: float,
        gamma: float,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, is_positive, weights)
        ctx.alpha, ctx.gamma = alpha, gamma
        total = at_least_fp32(logits.new_zeros(()))
        for values, label, positive, weight in _row_chunks(logits, labels, is_positive, weights):
            x, own = at_least_fp32(values), label[:, None]
            losses = _losses_of_no(x, 1 - alpha, gamma)
            own_losses = losses.gather(1, own)
            of_yes = _losses_of_no(-x.gather(1, own), alpha, gamma)
            losses.scatter_(1, own, torch.where(positive[:, None], of_yes, own_losses))
            total += torch.where(weight > 0, losses.sum(dim=1) * weight, 0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, is_positive, weights = ctx.saved_tensors
        alpha, gamma = ctx.alpha, ctx.gamma
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        chunks = _row_chunks(logits, labels, is_positive, weights)
        (grads,) = zip(*_row_chunks(grad), strict=True)
        for out, (values, label, positive, weight) in zip(grads, chunks, strict=True):
            x, own = at_least_fp32(values), label[:, None]
            slopes = _slopes_of_no(x, 1 - alpha, gamma)
            own_slopes = slopes.gather(1, own)
            of_yes = -_slopes_of_no(-x.gather(1, own), alpha, gamma)
            slopes.scatter_(1, own, torch.where(positive[:, None], of_yes, own_slopes))
            # In fp32 up to here: a loss scale keeps what fp16 would round to 0.
            scaled = slopes * (weight * grad_total)[:, None]
            out.copy_(torch.where(weight[:, None] > 0, scaled, 0))
        return grad, None, None, None, None, None


def _row_chunks(logits: Tensor, *facts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split rows of logits ``(..., K)`` and what is known of them ``(...)`` into pieces."""
    num_classes = logits.shape[-1]
    chunk = CHUNK if is_gpu(logits.device) else CPU_CHUNK
    size = max(chunk // num_classes, 1)
    flat = [logits.view(-1, num_classes), *(fact.flatten() for fact in facts)]
    return zip(*(torch.split(tensor, size) for tensor in flat), strict=True)


def _losses_of_no(x: Tensor, weight: float, gamma: float) -> Tensor:
    """Give the focal losses of logits whose answer is no."""
    return F.softplus(x).mul_(x.sigmoid().pow_(gamma)).mul_(weight)


def _slopes_of_no(x: Tensor, weight: float, gamma: float) -> Tensor:
    """Give the derivatives of `_losses_of_no`."""
    p = x.sigmoid()
    slopes = F.softplus(x).mul_(1 - p).mul_(gamma).add_(p)
    return slopes.mul_(p.pow_(gamma)).mul_(weight)
