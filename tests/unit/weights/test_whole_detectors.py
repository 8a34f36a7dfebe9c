from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from bigdet.config.heads import KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.weights import load_parts
from bigdet.weights.whole_detectors import from_framework, parts_to_load
from tests.unit.weights import published_layouts as published
from tests.unit.weights.detectron2_formulas import (
    clipped,
    decoded,
    detectron2_features,
    detectron2_pooled,
    detectron2_proposals,
    linear,
    run,
)

R50 = {"detector": "mask_rcnn", "backbone": "resnet50"}
GN = {"norm": "gn", "box_head": "4conv1fc"}
X152 = {"backbone": "resnext152_32x8d"}
D2, MM = published.detectron2_rcnn, published.mmdetection_rcnn
RESNET, SWIN = published.mmdetection_resnet, published.mmdetection_swin
LAYOUTS = {  # the layout, the model of it, and its published number of parameters
    "d2 faster r50": (D2(masks=False), {**R50, "detector": "faster_rcnn"}, 41_753_056),
    "d2 mask r50": (D2(), R50, 44_396_336),
    "d2 mask r101": (D2(101), {**R50, "backbone": "resnet101"}, 63_388_464),
    "d2 mask x101": (D2(101, 32, 8), {**R50, "backbone": "resnext101_32x8d"}, 107_630_640),
    "d2 mask r50 gn": (D2(kind="gn", convs=4), {**R50, **GN}, 45_711_152),
    "d2 mask x152 gn": (D2(152, 32, 8, "gn", 4), {**R50, **X152, **GN}, 142_526_512),
    "d2 cascade mask r50": (
        D2(is_cascade=True), {**R50, "detector": "cascade_mask_rcnn"}, 72_038_046,
    ),
    "d2 cascade mask x152 gn": (
        D2(152, 32, 8, "gn", 4, is_cascade=True),
        {"detector": "cascade_mask_rcnn", **X152, **GN}, 172_791_710,
    ),
    "d2 keypoint r50": (
        D2(classes=1, masks=False, keypoints=17), {**R50, "detector": "keypoint_rcnn"}, 59_186_278,
    ),
    "d2 retinanet r50": (
        published.detectron2_retinanet(), {**R50, "detector": "retinanet"}, 37_968_692,
    ),
    "mm mask r50": (MM(RESNET(50, 1, 64, "bn")), R50, 44_396_336),
    "mm mask r50 gn": (MM(RESNET(50, 1, 64, "gn"), "gn", 4), {**R50, **GN}, 45_711_152),
    "mm mask x101": (
        MM(RESNET(101, 32, 8, "bn")), {**R50, "backbone": "resnext101_32x8d"}, 107_630_640,
    ),
    "mm mask x152": (MM(RESNET(152, 32, 8, "bn")), {**R50, **X152}, 141_211_696),
    "mm cascade mask r50": (  # two mask heads of 2,643,280 more
        MM(RESNET(50, 1, 64, "bn"), is_cascade=True),
        {**R50, "detector": "cascade_mask_rcnn"}, 72_038_046 + 2 * 2_643_280,
    ),
    **{
        f"mm mask swin {size}": (
            MM(SWIN(size), channels=published.swin_channels(size)),
            {**R50, "backbone": f"swin_{size}", "norm": "none"}, count,
        )
        for size, count in (("t", 47_794_602), ("s", 69_112_506), ("b", 107_141_800))
    },
    "mm mask swin t 4conv1fc": (
        MM(SWIN("t"), "", 4, channels=published.swin_channels("t")),
        {**R50, "backbone": "swin_t", "norm": "none", "box_head": "4conv1fc"}, 49_105_322,
    ),
    "mm retinanet r50": (
        published.mmdetection_retinanet(), {**R50, "detector": "retinanet"}, 37_968_692,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_layout_fits_to_the_last_tensor(name: str) -> None:
    shapes, options, count = LAYOUTS[name]
    assert published.num_parameters(shapes) == count
    with torch.device("meta"):
        detector = build_detector(ModelConfig(**options), 1 if "keypoint" in name else 80)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        state |= {
            f"{key.removesuffix('running_mean')}num_batches_tracked": torch.empty(())
            for key in shapes
            if key.endswith("running_mean") and name.startswith("mm")
        }
    framework = "detectron2" if name.startswith("d2") else "mmdetection"
    tensors = from_framework(detector, state, framework, "bgr_255", "x.pth")
    rows = load_parts(detector, tensors, parts_to_load(detector, tensors), "x.pth")
    dropped = 2 * 2_643_280 if name == "mm cascade mask r50" else 0
    assert sum(row.parameters for row in rows) == count - dropped


def loaded(
    state: dict[str, Tensor], framework: str, pixels: str, num_classes: int = 3, **options: object
) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(ModelConfig(width=16, fc_width=32, **options), num_classes).double()
    tensors = from_framework(detector, state, framework, pixels, "x.pth")
    load_parts(detector, tensors, parts_to_load(detector, tensors), "x.pth")
    return detector.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
def test_detectron2s_mask_rcnn_computes_the_same() -> None:
    """All layers by detectron2's names, on images as it takes them: BGR, minus the mean."""
    shapes = published.detectron2_rcnn(classes=3, width=16, fc_width=32)
    state = published.random_state(shapes)
    detector = loaded(state, "detectron2", "bgr_255", stride_in_1x1=True, **R50)
    image = torch.randint(0, 256, (1, 3, 64, 96)).double()
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    deviation = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    expected = detectron2_features(state, (image - mean).flip(1))
    pyramid = detector.fpn(detector.backbone((image - mean) / deviation))
    for level, other in zip(pyramid, expected, strict=False):
        close(level, other)

    name = "proposal_generator.rpn_head."
    hidden = F.relu(run(state, f"{name}conv", expected[0], padding=1))
    logits = run(state, f"{name}objectness_logits", hidden)  # (1, 3, h, w)
    deltas = run(state, f"{name}anchor_deltas", hidden).unflatten(1, (3, 4))
    predictions = detector.rpn(pyramid, [4, 8, 16, 32, 64], (64, 96))
    count = predictions.counts[0]
    close(predictions.logits[:, :count], logits.permute(0, 2, 3, 1).flatten(1))
    close(predictions.deltas[:, :count], deltas.permute(0, 3, 4, 1, 2).flatten(1, 3))

    pooled = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    hidden = F.relu(linear(state, "roi_heads.box_head.fc1", pooled.flatten(1)))
    hidden = F.relu(linear(state, "roi_heads.box_head.fc2", hidden))
    classes, deltas = detector.box_head(pooled)
    close(classes, linear(state, "roi_heads.box_predictor.cls_score", hidden))
    close(deltas.flatten(1), linear(state, "roi_heads.box_predictor.bbox_pred", hidden))

    name, hidden = "roi_heads.mask_head.", torch.randn(3, 16, 14, 14, dtype=torch.float64)
    masks = detector.mask_head(hidden, torch.tensor([2, 0, 1]))
    for number in range(1, 5):
        hidden = F.relu(run(state, f"{name}mask_fcn{number}", hidden, padding=1))
    weights = (state[f"{name}deconv.weight"], state[f"{name}deconv.bias"])
    hidden = run(state, f"{name}predictor", F.relu(F.conv_transpose2d(hidden, *weights, stride=2)))
    close(masks, hidden[torch.arange(3), [2, 0, 1]])


@pytest.mark.parametrize("sampling_ratio", [0, 2])  # detectron2's own is 0
@torch.no_grad()
def test_detectron2s_mask_rcnn_detects_the_same(sampling_ratio: int) -> None:
    """Its inference from pixels to boxes, scores, classes and masks, by its own formulas."""
    shapes = published.detectron2_rcnn(classes=3, width=16, fc_width=32)
    state = published.random_state(shapes, seed=3)
    for name in (
        "proposal_generator.rpn_head.conv",
        "roi_heads.box_head.fc1",
        "roi_heads.mask_head.mask_fcn1",
    ):
        state[f"{name}.weight"] /= 300  # what the pyramid's features are of, so that no score is 1
    state["proposal_generator.rpn_head.anchor_deltas.weight"] /= 5
    state["proposal_generator.rpn_head.anchor_deltas.bias"] *= 0
    state["roi_heads.box_predictor.cls_score.bias"] -= torch.tensor([1.0, 3.0, -2.0, -1.0])
    rpn = RpnConfig(test_candidates=40, test_proposals=30)
    roi = RoiConfig(sampling_ratio=sampling_ratio)
    detector = loaded(state, "detectron2", "bgr_255", stride_in_1x1=True, rpn=rpn, roi=roi, **R50)
    detector.eval_size = (64, 96)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    found = detector.predict([image])[0]

    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    pyramid = detectron2_features(state, (image.double() - mean).flip(0)[None])
    regions = detectron2_proposals(state, pyramid)
    hidden = detectron2_pooled(pyramid, regions, 7, sampling_ratio).flatten(1)
    for layer in ("fc1", "fc2"):
        hidden = F.relu(linear(state, f"roi_heads.box_head.{layer}", hidden))
    scores = linear(state, "roi_heads.box_predictor.cls_score", hidden).softmax(dim=1)[:, :-1]
    deltas = linear(state, "roi_heads.box_predictor.bbox_pred", hidden).view(-1, 4)
    boxes = decoded(deltas, regions.repeat_interleave(3, dim=0), (10, 10, 5, 5))
    rows, labels = (scores > 0.05).nonzero().T
    boxes = clipped(boxes, 64, 96).view(-1, 3, 4)[rows, labels]
    scores = scores[rows, labels]
    kept = torchvision.ops.batched_nms(boxes, scores, labels, 0.5)[:100]
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    hidden = detectron2_pooled(pyramid, boxes, 14, sampling_ratio)
    name = "roi_heads.mask_head."
    for number in range(1, 5):
        hidden = F.relu(run(state, f"{name}mask_fcn{number}", hidden, padding=1))
    weights = (state[f"{name}deconv.weight"], state[f"{name}deconv.bias"])
    hidden = run(state, f"{name}predictor", F.relu(F.conv_transpose2d(hidden, *weights, stride=2)))
    assert len(boxes) > 10
    assert set(labels.tolist()) == {0, 1, 2}
    assert found.labels.tolist() == labels.tolist()
    torch.testing.assert_close(found.scores.double(), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes.double(), boxes, rtol=0, atol=1e-3)
    masks = hidden[torch.arange(len(labels)), labels].sigmoid()
    torch.testing.assert_close(found.masks.double(), masks, rtol=0, atol=1e-4)


def less(number: int) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{int(m[0]) - number}"


IN_MMDETECTION = [  # names of layers in detectron2's Mask R-CNN and in mmdetection's
    (r"^backbone.bottom_up.(stem.)?", "backbone.", r"^$", ""),
    (r"conv(\d).norm.", r"bn\1.", r"^$", ""),
    (r"shortcut.norm.", "downsample.1.", r"^$", ""),
    (r"shortcut.", "downsample.0.", r"^$", ""),
    (r"^backbone.res", "backbone.layer", r"(?<=^backbone.layer)\d", less(1)),
    (r"^backbone.fpn_lateral(\d)", r"neck.lateral_convs.\1.conv", r"(?<=convs.)\d", less(2)),
    (r"^backbone.fpn_output(\d)", r"neck.fpn_convs.\1.conv", r"(?<=fpn_convs.)\d", less(2)),
    (r"^proposal_generator.rpn_head.conv", "rpn_head.rpn_conv", r"^$", ""),
    (r"^proposal_generator.rpn_head.objectness_logits", "rpn_head.rpn_cls", r"^$", ""),
    (r"^proposal_generator.rpn_head.anchor_deltas", "rpn_head.rpn_reg", r"^$", ""),
    (r"^roi_heads.box_head.fc", "roi_head.bbox_head.shared_fcs.", r"(?<=fcs.)\d", less(1)),
    (r"^roi_heads.box_predictor.cls_score", "roi_head.bbox_head.fc_cls", r"^$", ""),
    (r"^roi_heads.box_predictor.bbox_pred", "roi_head.bbox_head.fc_reg", r"^$", ""),
    (
        r"^roi_heads.mask_head.mask_fcn(\d)",
        r"roi_head.mask_head.convs.\1.conv",
        r"(?<=mask_head.convs.)\d",
        less(1),
    ),
    (r"^roi_heads.mask_head.deconv", "roi_head.mask_head.upsample", r"^$", ""),
    (r"^roi_heads.mask_head.predictor", "roi_head.mask_head.conv_logits", r"^$", ""),
]


def test_mmdetections_mask_rcnn_is_detectron2s_by_other_names(small) -> None:
    state, detector = small
    theirs = {}
    for name, value in state.items():
        for pattern, new, number, counted in IN_MMDETECTION:
            if re.search(pattern, name):
                name = re.sub(number, counted, re.sub(pattern, new, name))
        theirs[name] = value
    layout = published.mmdetection_rcnn(RESNET(50, 1, 64, "bn"), classes=3, width=16, fc_width=32)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == layout
    found = from_framework(detector, theirs, "mmdetection", "bgr_255", "x.pth")
    expected = from_framework(detector, state, "detectron2", "bgr_255", "x.pkl")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@torch.no_grad()
def test_mmdetections_cascade_computes_the_same_in_each_stage() -> None:
    shapes = published.mmdetection_rcnn(
        RESNET(50, 1, 64, "bn"), classes=3, masks=False, is_cascade=True, width=16, fc_width=32
    )
    state = published.random_state(shapes)
    detector = loaded(state, "mmdetection", "rgb", detector="cascade_rcnn", backbone="resnet50")
    for name in ("conv1.weight", "layer3.2.bn2.running_var"):
        assert torch.equal(detector.backbone.state_dict()[name], state[f"backbone.{name}"])
    pooled = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    for number, stage in enumerate(detector.box_head.stages):
        name = f"roi_head.bbox_head.{number}."
        hidden = F.relu(linear(state, f"{name}shared_fcs.0", pooled.flatten(1)))
        hidden = F.relu(linear(state, f"{name}shared_fcs.1", hidden))
        classes, deltas = stage(pooled)
        close(classes, linear(state, f"{name}fc_cls", hidden))
        # Shifts in parts of a box: theirs times target_stds of cascade-mask-rcnn_r50_fpn.py.
        own = deltas.flatten(1) / torch.tensor([stage.delta_weights[i] for i in (0, 0, 1, 1)])
        deviations = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
        theirs = linear(state, f"{name}fc_reg", hidden) * torch.tensor(deviations[number])
        close(own, theirs)


@torch.no_grad()
def test_mmdetections_swin_merges_the_same_patches() -> None:
    """As it does: nn.Unfold of 2x2 patches, LayerNorm, a layer to twice the channels."""
    channels = published.swin_channels("t")
    shapes = published.mmdetection_rcnn(
        SWIN("t"), classes=3, channels=channels, width=16, fc_width=32
    )
    state = published.random_state(shapes)
    options = {**R50, "backbone": "swin_t", "norm": "none"}
    detector = loaded(state, "mmdetection", "rgb", **options)
    x = torch.randn(1, 4, 6, 192, dtype=torch.float64)
    name = "backbone.stages.1.downsample."
    rows = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # (1, 6, 768)
    rows = F.layer_norm(rows, (768,), state[f"{name}norm.weight"], state[f"{name}norm.bias"])
    expected = rows @ state[f"{name}reduction.weight"].T
    close(detector.backbone.layers[2].downsample(x).flatten(1, 2), expected)

    block, name = detector.backbone.layers[3].blocks[1], "backbone.stages.3.blocks.1."
    hidden = F.gelu(linear(state, f"{name}ffn.layers.0.0", x.new_ones(1, 768)))
    close(block.mlp(x.new_ones(1, 768)), linear(state, f"{name}ffn.layers.1", hidden))
    table = state[f"{name}attn.w_msa.relative_position_bias_table"]
    # Of two places in a window: row 13 x (y - y' + 6) + x - x' + 6; here (0, 2) and (1, 0).
    close(block.attn._get_rel_pos_bias()[0, :, 2, 7], table[13 * (0 - 1 + 6) + 2 - 0 + 6])


@torch.no_grad()
@pytest.mark.parametrize("framework", ["detectron2", "mmdetection"])
def test_retinanets_layers_speak_of_the_same_anchors(framework: str) -> None:
    is_d2 = framework == "detectron2"
    make: Callable[..., published.Shapes] = getattr(published, f"{framework}_retinanet")
    state = published.random_state(make(classes=3, width=16))
    torch.manual_seed(0)
    config = ModelConfig(detector="retinanet", backbone="resnet50", width=16)
    detector = build_detector(config, 3).double()
    tensors = from_framework(detector, state, framework, "rgb", "x.pth")
    load_parts(detector, tensors, parts_to_load(detector, tensors), "x.pth")
    # The anchors of one point of P3 by their code: detectron2 goes through the sizes and for each
    # through the ratios; mmdetection the other way round.
    sizes, ratios = [32 * 2 ** (step / 3) for step in range(3)], [0.5, 1.0, 2.0]
    pairs = (
        [(s, r) for s in sizes for r in ratios]
        if is_d2
        else [(s, r) for r in ratios for s in sizes]
    )
    theirs = torch.tensor([[size / ratio**0.5, size * ratio**0.5] for size, ratio in pairs])
    own = detector.retina_head.cells[0][:, 2:] * 2  # width, height
    places = [int((theirs - one).abs().sum(dim=1).argmin()) for one in own]
    assert sorted(places) == list(range(9))

    x = torch.randn(1, 16, 1, 1, dtype=torch.float64)
    branches = (
        ("head.cls_subnet.{}", "head.bbox_subnet.{}")
        if is_d2
        else ("bbox_head.cls_convs.{}.conv", "bbox_head.reg_convs.{}.conv")
    )
    last = (
        ("head.cls_score", "head.bbox_pred")
        if is_d2
        else ("bbox_head.retina_cls", "bbox_head.retina_reg")
    )
    found = detector.retina_head([x] * 5, [8] * 5, (8, 8))
    both = (found.logits[0], found.deltas[:, :9])
    for branch, end, ours in zip(branches, last, both, strict=True):
        hidden = x
        for number in (0, 2, 4, 6) if is_d2 else range(4):
            hidden = F.relu(run(state, branch.format(number), hidden, padding=1))
        rows = run(state, end, hidden, padding=1).view(9, -1)
        close(ours[0], rows[places])


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Tensor], Detector]:
    shapes = published.detectron2_rcnn(classes=3, width=16, fc_width=32)
    detector = build_detector(ModelConfig(width=16, fc_width=32, **R50), 3)
    return {name: value.float() for name, value in published.random_state(shapes).items()}, detector


@pytest.mark.parametrize(
    ("mean", "deviation", "pixels", "factors"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb", None),
        ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "bgr", (1, 1, 1)),
        ((102.9801, 115.9465, 122.7717), (1, 1, 1), "bgr_255", (58.395, 57.12, 57.375)),
    ],
)
def test_the_first_convolution_takes_our_images(small, mean, deviation, pixels, factors) -> None:
    state, detector = small
    buffers = {
        "pixel_mean": torch.tensor(mean).view(3, 1, 1),
        "pixel_std": torch.tensor(deviation).view(3, 1, 1),
    }
    theirs = state["backbone.bottom_up.stem.conv1.weight"]
    expected = (
        theirs if factors is None else theirs[:, [2, 1, 0]] * torch.tensor(factors).view(1, 3, 1, 1)
    )
    for said, tensors in ((None, {**state, **buffers}), (pixels, state)):
        named = from_framework(detector, tensors, "detectron2", said, "x.pkl")
        torch.testing.assert_close(named["backbone.conv1.weight"], expected)
    other = "bgr" if pixels == "rgb" else "rgb"
    with pytest.raises(ValueError, match=f"--pixels is {other}, but .* those of {pixels}"):
        from_framework(detector, {**state, **buffers}, "detectron2", other, "x.pkl")
    buffers["pixel_mean"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"found pixel_mean .* has no others"):
        from_framework(detector, {**state, **buffers}, "detectron2", None, "x.pkl")
    with pytest.raises(ValueError, match="does not say how images were given"):
        from_framework(detector, state, "detectron2", None, "x.pkl")


def test_what_would_be_computed_otherwise_is_reported(small, caplog) -> None:
    state, detector = small
    with caplog.at_level(logging.WARNING, "bigdet"):
        from_framework(detector, state, "detectron2", "bgr", "x.pkl")
        assert not caplog.records
        from_framework(detector, state, "detectron2", "bgr_255", "x.pkl")
    assert "model.stride_in_1x1=true builds theirs" in caplog.text


def test_anchors_in_the_file_must_be_those_of_the_config(small) -> None:
    state, detector = small
    cells = detector.rpn.cells
    name = "proposal_generator.anchor_generator.cell_anchors."
    state = state | {f"{name}{level}": one for level, one in enumerate(cells)}
    from_framework(detector, state, "detectron2", "bgr", "x.pkl")
    state[f"{name}1"] = cells[1] * 2
    with pytest.raises(ValueError, match=r"anchors of level 1 are .* of\s*model\.rpn"):
        from_framework(detector, state, "detectron2", "bgr", "x.pkl")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"roi_heads.res5.0.conv1.weight": (4, 4)}, r"1 unexpected \(roi_heads.res5"),
        ({"backbone.bottom_up.res3.0.conv2_offset.weight": (4, 4)}, "1 unexpected .*conv2_offset"),
        ({"proposal_generator.rpn_head.conv.conv1.weight": (4, 4)}, r"rpn_head.conv.conv1"),
        ({"roi_heads.box_predictor.cls_score.weight": (81, 32)}, r"\(81, 32\) for \(4, 32\)"),
        ({"roi_heads.box_head.fc1.weight": (32, 100)}, r"\(32, 100\) for \(32, 784\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(small, extra, message) -> None:
    state, detector = small
    state = state | {name: torch.zeros(shape) for name, shape in extra.items()}
    tensors = from_framework(detector, state, "detectron2", "bgr", "x.pkl")
    with pytest.raises(ValueError, match=message):
        load_parts(detector, tensors, parts_to_load(detector, tensors), "x.pkl")


def test_mmdetection_1_is_refused(small) -> None:
    state = {"backbone.conv1.weight": torch.zeros(4), "bbox_head.fc_cls.weight": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"a name of mmdetection 1, .*upgrade_model_version"):
        from_framework(small[1], state, "mmdetection", "rgb", "x.pth")


def test_keypoints_are_as_many_as_the_config_says() -> None:
    shapes = published.detectron2_rcnn(classes=1, masks=False, keypoints=5)
    config = ModelConfig(
        detector="keypoint_rcnn", backbone="resnet50", keypoint=KeypointConfig(num_keypoints=4)
    )
    with torch.device("meta"):
        detector = build_detector(config, 1)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    tensors = from_framework(detector, state, "detectron2", "bgr", "x.pkl")
    with pytest.raises(ValueError, match=r"keypoint_head.deconv.*\(512, 5, 4, 4\)"):
        load_parts(detector, tensors, parts_to_load(detector, tensors), "x.pkl")
