"""Group normalization and ReLU of channels_last tensors, forward and backward, for a GPU.

An image is a matrix ``(H * W, C)``. Each program takes a part of its rows and 64 channels: first to
add up what the statistics need, then, when all parts are known, to compute with them. Sums are fp32
and in a fixed order, so that two runs give the same.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton takes no other annotations.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # rows and channels
PROGRAMS = 1024  # about as many as keep a large GPU busy
MOST_PARTS = 256
OPTIONS = {"tile": TILE, "enable_fp_fusion": True}
_SIZES = ["num_rows", "num_channels", "chunk", "num_parts", "per_group"]


@triton.jit
def _over_groups(values, channels, per_group):
    """Add up ``(T,)`` values over the channels of the same group: ``(T,)``."""
    is_same = (channels // per_group)[:, None] == (channels // per_group)[None, :]
    return tl.sum(tl.where(is_same, values[None, :], 0.0), axis=1)


@triton.jit
def _place(num_channels, num_rows, chunk, tile: tl.constexpr):
    """Say which channels and rows of which image a program takes: first row and end."""
    channels = tl.program_id(2) * tile + tl.arange(0, tile)
    first = tl.program_id(1) * chunk
    return tl.program_id(0).to(tl.int64), channels, first, tl.minimum(first + chunk, num_rows)


@triton.jit
def _parts(image, channels, top, num_parts, num_channels, tile: tl.constexpr):
    """Give the places of what some parts of an image left ``(T, T)``, and which there are."""
    parts = top + tl.arange(0, tile)
    places = (image * num_parts + parts)[:, None] * num_channels + channels[None, :]
    return parts, places, (parts < num_parts)[:, None] & (channels < num_channels)[None, :]


@triton.jit
def _normalized(values, mean, rstd, scale, shift):
    """Normalize ``(T, T)`` fp32: before and after scale and shift."""
    away = (values - mean[None, :]) * rstd[None, :]
    return away, away * scale[None, :] + shift[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _moments(x, means, squares, num_rows, num_channels, chunk, num_parts, tile: tl.constexpr):
    """Of each part and channel: the mean, and the sum of squared distances from it."""
    image, channels, first, end = _place(num_channels, num_rows, chunk, tile)
    x += image * num_rows * num_channels
    mean, square = tl.zeros([tile], tl.float32), tl.zeros([tile], tl.float32)
    for top in range(first, end, tile):
        rows = top + tl.arange(0, tile)
        is_inside = (rows < end)[:, None] & (channels < num_channels)[None, :]
        places = rows[:, None] * num_channels + channels[None, :]
        values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
        before, count = (top - first).to(tl.float32), tl.minimum(end - top, tile).to(tl.float32)
        own = tl.sum(values, axis=0) / count
        away = tl.where(is_inside, values - own[None, :], 0.0)
        change = own - mean
        square += tl.sum(away * away, axis=0) + change * change * (
            before * count / (before + count)
        )
        mean += change * (count / (before + count))
    place = (image * num_parts + tl.program_id(1)) * num_channels + channels
    tl.store(means + place, mean, mask=channels < num_channels)
    tl.store(squares + place, square, mask=channels < num_channels)


@triton.jit(do_not_specialize=_SIZES)
def _normalize(
    x, y, weight, bias, means, squares, mean_of, rstd_of,
    num_rows, num_channels, chunk, num_parts, per_group, eps,
    relu: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Normalize; keep mean and reciprocal deviation of each image and channel."""
    image, channels, first, end = _place(num_channels, num_rows, chunk, tile)
    is_channel = channels < num_channels
    total = tl.zeros([tile], tl.float32)
    for top in range(0, num_parts, tile):
        parts, places, is_part = _parts(image, channels, top, num_parts, num_channels, tile)
        counts = tl.minimum(num_rows - parts * chunk, chunk).to(tl.float32)
        part_means = tl.load(means + places, mask=is_part, other=0.0)
        total += tl.sum(tl.where(is_part, part_means * counts[:, None], 0.0), axis=0)
    numbers = (num_rows * per_group).to(tl.float32)
    mean = _over_groups(total, channels, per_group) / numbers
    total = tl.zeros([tile], tl.float32)
    for top in range(0, num_parts, tile):
        parts, places, is_part = _parts(image, channels, top, num_parts, num_channels, tile)
        counts = tl.minimum(num_rows - parts * chunk, chunk).to(tl.float32)
        away = tl.load(means + places, mask=is_part, other=0.0) - mean[None, :]
        within = tl.load(squares + places, mask=is_part, other=0.0)
        total += tl.sum(tl.where(is_part, within + away * away * counts[:, None], 0.0), axis=0)
    rstd = 1.0 / tl.sqrt(_over_groups(total, channels, per_group) / numbers + eps)
    if tl.program_id(1) == 0:
        tl.store(mean_of + image * num_channels + channels, mean, mask=is_channel)
        tl.store(rstd_of + image * num_channels + channels, rstd, mask=is_channel)
    scale = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    x += image * num_rows * num_channels
    y += image * num_rows * num_channels
    for top in range(first, end, tile):
        rows = top + tl.arange(0, tile)
        is_inside = (rows < end)[:, None] & is_channel[None, :]
        places = rows[:, None] * num_channels + channels[None, :]
        values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
        _, result = _normalized(values, mean, rstd, scale, shift)
        if relu:
            result = tl.where(result <= 0, 0.0, result)  # what is not a number stays so
        tl.store(y + places, result.to(y.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=_SIZES)
def _gradient_sums(
    x, grad, weight, bias, mean_of, rstd_of, sums, products,
    num_rows, num_channels, chunk, num_parts,
    relu: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Of each part and channel: the sum of gradients, and of their products with the input."""
    image, channels, first, end = _place(num_channels, num_rows, chunk, tile)
    is_channel = channels < num_channels
    mean = tl.load(mean_of + image * num_channels + channels, mask=is_channel, other=0.0)
    rstd = tl.load(rstd_of + image * num_channels + channels, mask=is_channel, other=0.0)
    scale = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    x += image * num_rows * num_channels
    grad += image * num_rows * num_channels
    total, product = tl.zeros([tile], tl.float32), tl.zeros([tile], tl.float32)
    for top in range(first, end, tile):
        rows = top + tl.arange(0, tile)
        is_inside = (rows < end)[:, None] & is_channel[None, :]
        places = rows[:, None] * num_channels + channels[None, :]
        values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
        slopes = tl.load(grad + places, mask=is_inside, other=0.0).to(tl.float32)
        away, result = _normalized(values, mean, rstd, scale, shift)
        if relu:
            slopes = tl.where(result <= 0, 0.0, slopes)
        total += tl.sum(slopes, axis=0)
        product += tl.sum(slopes * away, axis=0)
    place = (image * num_parts + tl.program_id(1)) * num_channels + channels
    tl.store(sums + place, total, mask=is_channel)
    tl.store(products + place, product, mask=is_channel)


@triton.jit(do_not_specialize=_SIZES)
def _gradient(
    x, grad, grad_x, weight, bias, mean_of, rstd_of, sums, products,
    num_rows, num_channels, chunk, num_parts, per_group,
    relu: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The gradient of the input."""
    image, channels, first, end = _place(num_channels, num_rows, chunk, tile)
    is_channel = channels < num_channels
    mean = tl.load(mean_of + image * num_channels + channels, mask=is_channel, other=0.0)
    rstd = tl.load(rstd_of + image * num_channels + channels, mask=is_channel, other=0.0)
    scale = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    total, product = tl.zeros([tile], tl.float32), tl.zeros([tile], tl.float32)
    for top in range(0, num_parts, tile):
        _, places, is_part = _parts(image, channels, top, num_parts, num_channels, tile)
        total += tl.sum(tl.load(sums + places, mask=is_part, other=0.0), axis=0)
        product += tl.sum(tl.load(products + places, mask=is_part, other=0.0), axis=0)
    numbers = (num_rows * per_group).to(tl.float32)
    total = _over_groups(total * scale, channels, per_group) / numbers
    product = _over_groups(product * scale, channels, per_group) / numbers
    offset = image * num_rows * num_channels
    for top in range(first, end, tile):
        rows = top + tl.arange(0, tile)
        is_inside = (rows < end)[:, None] & is_channel[None, :]
        places = offset + rows[:, None] * num_channels + channels[None, :]
        values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
        slopes = tl.load(grad + places, mask=is_inside, other=0.0).to(tl.float32)
        away, result = _normalized(values, mean, rstd, scale, shift)
        if relu:
            slopes = tl.where(result <= 0, 0.0, slopes)
        slopes = slopes * scale[None, :] - total[None, :] - away * product[None, :]
        slopes *= rstd[None, :]
        tl.store(grad_x + places, slopes.to(grad_x.dtype.element_ty), mask=is_inside)


def _division(x: Tensor) -> tuple[int, int]:
    """Return the rows of a part, and how many parts an image has."""
    images, channels = x.shape[:2]
    tiles = -(-x.shape[2] * x.shape[3] // TILE)
    others = images * -(-channels // TILE)
    parts = min(tiles, max(PROGRAMS // others, 1), MOST_PARTS)
    chunk = -(-tiles // parts) * TILE
    return chunk, -(-tiles * TILE // chunk)


class FusedGroupNorm(torch.autograd.Function):
    """See ``ops.group_norm.group_norm``; the input is channels_last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
    ) -> Tensor:
        """Normalize; keep the input, and mean and deviation of each image and channel."""
        (images, channels), (chunk, parts) = x.shape[:2], _division(x)
        left = torch.empty(2, images, parts, channels, dtype=torch.float32, device=x.device)
        of_image = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
        grid = (images, parts, -(-channels // TILE))
        size = x.shape[2] * x.shape[3], channels, chunk, parts
        _moments[grid](x, left[0], left[1], *size, **OPTIONS)
        y = torch.empty_like(x)
        _normalize[grid](
            x, y, weight, bias, left[0], left[1], of_image[0], of_image[1], *size,
            channels // num_groups, eps, relu=relu, **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, of_image)
        ctx.launch = grid, size, channels // num_groups, relu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of input, scale and shift."""
        x, weight, bias, of_image = ctx.saved_tensors
        grid, size, per_group, relu = ctx.launch
        grad = grad.contiguous(memory_format=torch.channels_last)
        shape = 2, grid[0] * grid[1], size[1]
        left = torch.empty(shape, dtype=torch.float32, device=x.device)
        known = weight, bias, of_image[0], of_image[1], left[0], left[1], *size
        _gradient_sums[grid](x, grad, *known, relu=relu, **OPTIONS)
        grad_x = torch.empty_like(x)
        _gradient[grid](x, grad, grad_x, *known, per_group, relu=relu, **OPTIONS)
        grad_bias, grad_weight = left.sum(1).unbind()
        return grad_x, None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None
