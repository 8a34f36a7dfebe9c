"""The suppression for GPUs, run by Triton's interpreter on a CPU, against torchvision's."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigdet.ops import nms
from tests.spawn import run_ranks

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton, which torch's CUDA build brings"
)


def groups_of_boxes(count: int, has_ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups 0 to 4, of which 2 is empty; ties have boxes without an area."""
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 40
    sides = torch.rand(count, 2, generator=generator) * 30
    scores = torch.rand(count, generator=generator)
    if has_ties:  # whole pixels, five scores: many overlaps and scores are equal
        corners, sides, scores = corners.round(), sides.round(), (scores * 5).round()
        sides[::9], sides[::31] = 0, -3
    scores[::7] = -torch.inf
    groups = torch.randint(0, 5, (count,), generator=generator)
    return torch.cat([corners, corners + sides], dim=1), scores, groups.where(groups != 2, 1)


def in_interpreter() -> list[tuple[list[bool], list[bool]]]:
    """What the kernel and torchvision keep, for several thresholds."""
    warnings.filterwarnings("ignore", "invalid value encountered in divide")  # 0 / 0, in numpy
    found = []
    for has_ties in (False, True):
        boxes, scores, groups = groups_of_boxes(330, has_ties)
        for iou in (0.0, 0.3, 0.5, 0.7, 1.0):
            kept = nms.kernel_nms(boxes, scores, groups, 5, iou, is_sorted=False)
            found.append((kept, nms.grouped_nms(boxes, scores, groups, 5, iou)))
    rows = nms._by_group(scores, groups)
    scores[rows[1::3]] = -torch.inf  # left out in between, as the RPN does
    args = boxes[rows], scores[rows], groups[rows], 5, 0.5
    found.append((nms.kernel_nms(*args, is_sorted=True), nms.grouped_nms(*args)))
    return [(kept.tolist(), expected.tolist()) for kept, expected in found]


@needs_triton
def test_the_kernel_keeps_what_torchvision_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported: a new process
    [found] = run_ranks(in_interpreter, 1, tmp_path)
    counts = [sum(expected) for _, expected in found]
    assert 30 < min(counts) < max(counts) < 300
    for kept, expected in found:
        assert kept == expected


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus_without_one(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from bigdet.ops.nms_kernel import TILE, _suppress

    types = {"boxes": "*fp32", "starts": "*i64", "kept": "*i8", "most": "fp32", "tile": "constexpr"}
    source = ASTSource(_suppress, signature=types, constexprs={"tile": TILE})
    options = {"num_warps": 8, "enable_fp_fusion": False}
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.metadata.shared < 48 * 1024
    # Rounded as on a CPU, or boxes at the threshold would differ.
    assert "div.rn.f32" in kernel.asm["ptx"]
    assert "fma" not in kernel.asm["ptx"]


def test_several_groups_in_a_call_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores, groups = groups_of_boxes(330, has_ties=True)
    calls = []

    def counted(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
        calls.append(len(boxes))
        return original(boxes, scores, iou)

    original = nms.nms
    monkeypatch.setattr(nms, "nms", counted)
    one_by_one = nms._nms_in_calls(boxes, scores, groups, 5, 0.5, 1)
    assert len(calls) == 4  # a group is empty
    in_two = nms._nms_in_calls(boxes, scores, groups, 5, 0.5, 3 * max(calls))
    assert len(calls) == 6
    assert max(calls) <= 3 * max(calls[:4])
    assert torch.equal(in_two, one_by_one)
