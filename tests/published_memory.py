"""Compares the memory that `bigdet plan --device` predicts with what others have published.

    python -m tests.published_memory [--rows vitdet_b ...]

prints the table of bigdet/README.md. Published figures are ``torch.cuda.max_memory_allocated`` of
detectors of the same architecture in detectron2, mmdetection and torchvision. So a row has two
predictions: of bigdet's detector, and of the same with what the others do differently. None of that
is a number fitted to the figures: DDP keeps a second copy of the gradients in its buckets
(``gradient_as_bucket_view=False``), attention keeps matrices of all pairs of tokens with softmax in
fp32, normalizations give fp32 under CUDA's autocast, and group normalization of torch 1.3, in which
detectron2's older rows were measured, is batch normalization followed by scale and shift.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bigdet.config.load import load_config
from bigdet.host.accelerators import GPUS
from bigdet.planning.devices import gpu_seconds
from bigdet.planning.simulated import FusedAttention, Step, simulate

GIB = 1 << 30
CLASSES, OBJECTS = 80, 20
FP32 = ["engine.precision=fp32"]
R50 = ["configs/r50_imagenet.yaml", *FP32]
NO_CASCADE_MASK = "model.detector=faster_rcnn"


@dataclass(frozen=True)
class Row:
    """A published figure.

    Attributes:
        words: config and options with which bigdet trains the same.
        gib: published memory.
        seconds: published time of a step; on an A100 where ``is_amp``, else on a V100.
        source: who published it.
        is_amp: under mixed precision.
    """

    words: list[str]
    gib: float
    seconds: float | None
    source: str
    is_amp: bool = False


D2, MMDET = "detectron2, MODEL_ZOO", "mmdetection, configs/mask_rcnn"
VITDET = "detectron2, projects/ViTDet"
VISION = "torchvision 0.3, models"
CASCADE = "model.detector=cascade_mask_rcnn"
ROWS = {
    "vitdet_b": Row(["configs/vitdet_b.yaml"], 10.9, 0.314, VITDET, is_amp=True),
    "vitdet_l": Row(["configs/vitdet_l.yaml"], 20.9, 0.603, VITDET, is_amp=True),
    "vitdet_h": Row(["configs/vitdet_h.yaml"], 31.5, 1.098, VITDET, is_amp=True),
    "vitdet_b_cascade": Row(["configs/vitdet_b.yaml", CASCADE], 12.3, 0.362, VITDET, is_amp=True),
    "vitdet_l_cascade": Row(["configs/vitdet_l.yaml", CASCADE], 22.3, 0.643, VITDET, is_amp=True),
    "vitdet_h_cascade": Row(["configs/vitdet_h.yaml", CASCADE], 32.9, 1.137, VITDET, is_amp=True),
    "swin_b_cascade": Row(["configs/swin_b_cascade.yaml"], 8.7, 0.389, VITDET, is_amp=True),
    "swin_l_cascade": Row(["configs/swin_l_cascade.yaml"], 12.6, 0.508, VITDET, is_amp=True),
    "faster_r50": Row([*R50, NO_CASCADE_MASK], 3.0, 0.210, D2),
    "mask_r50": Row(R50, 3.4, 0.261, D2),
    "cascade_r50": Row([*R50, CASCADE], 4.0, 0.317, D2),
    "mask_r50_gn": Row(["configs/r50_gn_imagenet.yaml", *FP32], 7.3, 0.356, D2),
    "mask_r50_gn_scratch": Row(["configs/r50_gn_scratch.yaml", *FP32], 9.8, 0.400, D2),
    "mask_r50_mmdet": Row(R50, 4.4, None, MMDET),
    "mask_r101_mmdet": Row([*R50, "model.backbone=resnet101"], 6.4, None, MMDET),
    "faster_r50_torchvision": Row([*R50, NO_CASCADE_MASK], 5.2, 0.2288, VISION),
    "mask_r50_torchvision": Row(R50, 5.4, 0.2728, VISION),
}


class TheirWays(TorchFunctionMode):
    """Attention and normalization as detectron2 computes them under CUDA's autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.group_norm and not torch.is_autocast_enabled("cpu"):
            return _old_group_norm(*args, **(kwargs or {}))
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    weights: Tensor = torch.softmax(scores.float(), dim=-1)
    return weights @ v


def _old_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows = x.contiguous().view(1, len(x) * groups, -1)
    normalized = F.batch_norm(rows, None, None, training=True, eps=eps).view(x.shape)
    shape = (1, -1, 1, 1)
    return torch.addcmul(bias.view(shape), normalized, weight.view(shape))


def predicted(row: Row) -> tuple[Step, Step]:
    """Simulate bigdet's step, and one with their ways."""
    config = load_config(row.words[0], row.words[1:])
    phase = next(iter(config.phases))
    ways = [FusedAttention(), TheirWays()]
    own, theirs = (simulate(config, phase, CLASSES, OBJECTS, way) for way in ways)
    return own, theirs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    print("| detector | published | bigdet | | their ways | | published s | estimate, A100 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in parser.parse_args().rows:
        row = ROWS[name]
        own, theirs = predicted(row)
        gib, theirs_gib = own.peak / GIB, (theirs.peak + theirs.gradients) / GIB
        seconds = f"{gpu_seconds(own, GPUS['A100']):.3f}" if row.is_amp else ""
        print(
            f"| {name} ({row.source}) | {row.gib} | {gib:.1f} | {gib / row.gib - 1:+.0%} "
            f"| {theirs_gib:.1f} | {theirs_gib / row.gib - 1:+.0%} "
            f"| {row.seconds or ''} | {seconds} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
