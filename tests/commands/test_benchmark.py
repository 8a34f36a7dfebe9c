"""The benchmark of a step with models of other widths and kinds than the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from bigdet.cli.benchmark import main

ROOT = Path(__file__).parents[2]
PRETRAIN = "phases.pretrain"
SMALL = [
    "--rounds", "1", "--objects", "3", f"{PRETRAIN}.resize.size=64",
    f"{PRETRAIN}.images_per_gpu=2", f"{PRETRAIN}.images_per_step=2",
]  # fmt: skip


def benchmark(part: str, config: str, *words: str) -> int:
    return main([part, str(ROOT / "configs" / config), *words])


@pytest.mark.parametrize("more", [
    [],  # 64 channels where torchvision has 256
    ["model.width=48", "model.norm=gn", f"{PRETRAIN}.norm_mode=null",
     "phases.finetune.norm_mode=null", "model.box_head=4conv1fc"],  # 32 groups do not divide 48
])  # fmt: skip
def test_a_step_of_a_narrow_model_is_compared_with_one_as_narrow(
    more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    batch_images = GeneralizedRCNNTransform.batch_images

    def note(self: Any, images: list[Tensor], **options: Any) -> Tensor:
        shapes.update(tuple(image.shape) for image in images)
        return batch_images(self, images, **options)

    monkeypatch.setattr(GeneralizedRCNNTransform, "batch_images", note)
    words = ["--phase", "pretrain", *SMALL, *more]
    assert benchmark("step", "small_direct.yaml", *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["canvas_size"] == [64, 64]
    for name in ("bigdet_fp32", "torchvision_fp32", "torchvision_heads_fp32", "bigdet_bf16"):
        assert printed[name]["images_per_second"] > 0
    assert printed["ratio"] > 0
    assert shapes == {(3, 64, 64)}  # torchvision's are as large as ours


def test_inference_is_measured_with_as_many_detections_as_a_trained_model_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    resize = "evaluation.resize={kind: short_side, size: 300, cap: 400}"
    assert benchmark("predict", "small_direct.yaml", "--rounds", "1", resize) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["image_size"] == [300, 400]
    assert all(count > 50 for count in printed["detections"].values()), printed["detections"]


@pytest.mark.parametrize(("part", "config", "words", "found"), [
    ("step", "retinanet_r50_direct.yaml", SMALL, "retinanet on resnet50, expected Faster or"),
    ("step", "vgg16_scratch.yaml", [], "faster_rcnn on vgg16, expected Faster or"),
    ("predict", "r50_gn_cascade.yaml", ["model.backbone=resnet18"], "torchvision has no cascade"),
])  # fmt: skip
def test_what_torchvision_does_not_have_is_said(
    part: str, config: str, words: list[str], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        benchmark(part, config, *words)
