"""Names and shapes of the tensors of detectron2's and mmdetection's detectors, from their code.

Each function gives ``{name: shape}``. detectron2: modeling/backbone/{resnet,fpn}.py,
proposal_generator/rpn.py, roi_heads/{box,mask,keypoint}_head.py, roi_heads/fast_rcnn.py,
meta_arch/retinanet.py. mmdetection: models/backbones/{resnet,swin}.py, models/necks/fpn.py,
models/dense_heads/{rpn,retina}_head.py, models/roi_heads/{bbox,mask}_heads; a layer of its
ConvModule has the normalization beside the convolution, as ``bn`` or ``gn``.
"""

from __future__ import annotations

import math

import torch

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SWIN = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
STATISTICS = ("running_mean", "running_var")

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, kind: str, width: int) -> Shapes:
    """Scale and shift; bn: running statistics too."""
    kinds = ("weight", "bias", *(STATISTICS if kind == "bn" else ()))
    return {f"{name}.{one}": (width,) for one in kinds}


def layer(name: str, *shape: int) -> Shapes:
    """A convolution or fully connected layer with a bias."""
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def bottlenecks(depth: int, groups: int, group_width: int):
    """Give stage 0..3, block, input, inner and output channels, and whether it has a shortcut."""
    inputs = 64
    for stage, count in enumerate(DEPTHS[depth]):
        inner, out = groups * group_width * 2**stage, 256 * 2**stage
        for block in range(count):
            yield stage, block, inputs, inner, out, block == 0
            inputs = out


def detectron2_resnet(depth: int, groups: int, group_width: int, kind: str) -> Shapes:
    prefix = "backbone.bottom_up."
    shapes = {f"{prefix}stem.conv1.weight": (64, 3, 7, 7)}
    shapes |= norm(f"{prefix}stem.conv1.norm", kind, 64)
    for stage, block, inputs, inner, out, has_shortcut in bottlenecks(depth, groups, group_width):
        name = f"{prefix}res{stage + 2}.{block}"
        layers = {
            "conv1": (inner, inputs, 1, 1),
            "conv2": (inner, inner // groups, 3, 3),
            "conv3": (out, inner, 1, 1),
        }
        if has_shortcut:
            layers["shortcut"] = (out, inputs, 1, 1)
        for which, shape in layers.items():
            shapes |= {f"{name}.{which}.weight": shape}
            shapes |= norm(f"{name}.{which}.norm", kind, shape[0])
    return shapes


def conv2d(name: str, kind: str, *shape: int) -> Shapes:
    """detectron2's Conv2d: the normalization within, and a bias only without it."""
    if not kind:
        return layer(name, *shape)
    return {f"{name}.weight": shape, **norm(f"{name}.norm", kind, shape[0])}


def detectron2_fpn(channels, first: int, width: int, kind: str) -> Shapes:
    shapes: Shapes = {}
    for level, count in enumerate(channels, start=first):
        shapes |= conv2d(f"backbone.fpn_lateral{level}", kind, width, count, 1, 1)
        shapes |= conv2d(f"backbone.fpn_output{level}", kind, width, width, 3, 3)
    return shapes


def detectron2_box_head(head, predictor, kind, convs, classes, deltas, width, fc_width) -> Shapes:
    shapes: Shapes = {}
    for number in range(1, convs + 1):
        shapes |= conv2d(f"{head}conv{number}", kind, width, width, 3, 3)
    shapes |= layer(f"{head}fc1", fc_width, width * 49)
    if not convs:
        shapes |= layer(f"{head}fc2", fc_width, fc_width)
    shapes |= layer(f"{predictor}cls_score", classes + 1, fc_width)
    return shapes | layer(f"{predictor}bbox_pred", 4 * deltas, fc_width)


def detectron2_rcnn(
    depth=50, groups=1, group_width=64, kind="bn", convs=0, classes=80, *, masks=True,
    is_cascade=False, keypoints=0, width=256, fc_width=1024,
) -> Shapes:  # fmt: skip
    """kind gn: in all layers but the RPN's; bn: in the backbone alone."""
    norm_of_heads = "gn" if kind == "gn" else ""
    shapes = detectron2_resnet(depth, groups, group_width, kind)
    shapes |= detectron2_fpn((256, 512, 1024, 2048), 2, width, norm_of_heads)
    rpn = "proposal_generator.rpn_head."
    shapes |= layer(f"{rpn}conv", width, width, 3, 3)
    shapes |= layer(f"{rpn}objectness_logits", 3, width, 1, 1)
    shapes |= layer(f"{rpn}anchor_deltas", 12, width, 1, 1)
    for stage in ("0.", "1.", "2.") if is_cascade else ("",):
        names = (f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}")
        deltas = 1 if is_cascade else classes
        shapes |= detectron2_box_head(
            *names, norm_of_heads, convs, classes, deltas, width, fc_width
        )
    head = "roi_heads.mask_head."
    if masks:
        for number in range(1, 5):
            shapes |= conv2d(f"{head}mask_fcn{number}", norm_of_heads, width, width, 3, 3)
        shapes |= layer(f"{head}deconv", width, width, 2, 2)
        shapes |= layer(f"{head}predictor", classes, width, 1, 1)
    if keypoints:
        head = "roi_heads.keypoint_head."
        for number in range(1, 9):
            shapes |= layer(f"{head}conv_fcn{number}", 512, width if number == 1 else 512, 3, 3)
        shapes |= {f"{head}score_lowres.weight": (512, keypoints, 4, 4)}
        shapes |= {f"{head}score_lowres.bias": (keypoints,)}
    return shapes


def detectron2_retinanet(classes=80, width=256) -> Shapes:
    shapes = detectron2_resnet(50, 1, 64, "bn")
    shapes |= detectron2_fpn((512, 1024, 2048), 3, width, "")
    shapes |= layer("backbone.top_block.p6", width, 2048, 3, 3)
    shapes |= layer("backbone.top_block.p7", width, width, 3, 3)
    for branch in ("cls", "bbox"):
        for number in (0, 2, 4, 6):
            shapes |= layer(f"head.{branch}_subnet.{number}", width, width, 3, 3)
    shapes |= layer("head.cls_score", 9 * classes, width, 3, 3)
    return shapes | layer("head.bbox_pred", 9 * 4, width, 3, 3)


def mmdetection_resnet(depth: int, groups: int, group_width: int, kind: str) -> Shapes:
    shapes = {"backbone.conv1.weight": (64, 3, 7, 7), **norm(f"backbone.{kind}1", kind, 64)}
    for stage, block, inputs, inner, out, has_shortcut in bottlenecks(depth, groups, group_width):
        name = f"backbone.layer{stage + 1}.{block}."
        for number, shape in enumerate(
            [(inner, inputs, 1, 1), (inner, inner // groups, 3, 3), (out, inner, 1, 1)], start=1
        ):
            shapes |= {f"{name}conv{number}.weight": shape}
            shapes |= norm(f"{name}{kind}{number}", kind, shape[0])
        if has_shortcut:
            shapes |= {f"{name}downsample.0.weight": (out, inputs, 1, 1)}
            shapes |= norm(f"{name}downsample.1", kind, out)
    return shapes


def mmdetection_swin(size: str) -> Shapes:
    width, depths, heads = SWIN[size]
    shapes = layer("backbone.patch_embed.projection", width, 3, 4, 4)
    shapes |= norm("backbone.patch_embed.norm", "ln", width)
    for stage, (depth, num_heads) in enumerate(zip(depths, heads, strict=True)):
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}."
            shapes |= norm(f"{name}norm1", "ln", width) | norm(f"{name}norm2", "ln", width)
            shapes[f"{name}attn.w_msa.relative_position_bias_table"] = (169, num_heads)
            shapes[f"{name}attn.w_msa.relative_position_index"] = (49, 49)
            shapes |= layer(f"{name}attn.w_msa.qkv", 3 * width, width)
            shapes |= layer(f"{name}attn.w_msa.proj", width, width)
            shapes |= layer(f"{name}ffn.layers.0.0", 4 * width, width)
            shapes |= layer(f"{name}ffn.layers.1", width, 4 * width)
        shapes |= norm(f"backbone.norm{stage}", "ln", width)
        if stage < 3:
            name = f"backbone.stages.{stage}.downsample."
            shapes |= norm(f"{name}norm", "ln", 4 * width)
            shapes[f"{name}reduction.weight"] = (2 * width, 4 * width)
            width *= 2
    return shapes


def conv_module(name: str, kind: str, *shape: int) -> Shapes:
    """mmcv's ConvModule."""
    if not kind:
        return layer(f"{name}.conv", *shape)
    return {f"{name}.conv.weight": shape, **norm(f"{name}.{kind}", kind, shape[0])}


def mmdetection_fpn(channels, width: int, kind: str, extra: int = 0) -> Shapes:
    shapes: Shapes = {}
    for level, count in enumerate(channels):
        shapes |= conv_module(f"neck.lateral_convs.{level}", kind, width, count, 1, 1)
        shapes |= conv_module(f"neck.fpn_convs.{level}", kind, width, width, 3, 3)
    for number in range(extra):
        inputs = channels[-1] if number == 0 else width
        name = f"neck.fpn_convs.{len(channels) + number}"
        shapes |= conv_module(name, kind, width, inputs, 3, 3)
    return shapes


def mmdetection_rcnn(
    backbone: Shapes, kind="", convs=0, classes=80, *, channels=(256, 512, 1024, 2048), masks=True,
    is_cascade=False, width=256, fc_width=1024,
) -> Shapes:  # fmt: skip
    """kind: of the normalization in FPN and heads."""
    shapes = backbone | mmdetection_fpn(channels, width, kind)
    shapes |= layer("rpn_head.rpn_conv", width, width, 3, 3)
    shapes |= layer("rpn_head.rpn_cls", 3, width, 1, 1) | layer("rpn_head.rpn_reg", 12, width, 1, 1)
    for stage in ("0.", "1.", "2.") if is_cascade else ("",):
        head = f"roi_head.bbox_head.{stage}"
        for number in range(convs):
            shapes |= conv_module(f"{head}shared_convs.{number}", kind, width, width, 3, 3)
        shapes |= layer(f"{head}shared_fcs.0", fc_width, width * 49)
        if not convs:
            shapes |= layer(f"{head}shared_fcs.1", fc_width, fc_width)
        shapes |= layer(f"{head}fc_cls", classes + 1, fc_width)
        shapes |= layer(f"{head}fc_reg", 4 if is_cascade else 4 * classes, fc_width)
        head = f"roi_head.mask_head.{stage}"
        if masks:
            for number in range(4):
                shapes |= conv_module(f"{head}convs.{number}", kind, width, width, 3, 3)
            shapes |= layer(f"{head}upsample", width, width, 2, 2)
            shapes |= layer(f"{head}conv_logits", classes, width, 1, 1)
    return shapes


def mmdetection_retinanet(classes=80, width=256) -> Shapes:
    shapes = mmdetection_resnet(50, 1, 64, "bn")
    shapes |= mmdetection_fpn((512, 1024, 2048), width, "", extra=2)
    for branch in ("cls", "reg"):
        for number in range(4):
            shapes |= conv_module(f"bbox_head.{branch}_convs.{number}", "", width, width, 3, 3)
    shapes |= layer("bbox_head.retina_cls", 9 * classes, width, 3, 3)
    return shapes | layer("bbox_head.retina_reg", 9 * 4, width, 3, 3)


def swin_channels(size: str) -> tuple[int, ...]:
    return tuple(SWIN[size][0] * 2**stage for stage in range(4))


def num_parameters(shapes: Shapes) -> int:
    """Sizes of all but running statistics and tables of places."""
    buffers = (*STATISTICS, "relative_position_index")
    return sum(math.prod(s) for name, s in shapes.items() if not name.endswith(buffers))


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values, double precision, that keep what flows through the layers near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            state[name] = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            continue
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[name] = value * math.prod(shape[1:]) ** -0.5
    return state
