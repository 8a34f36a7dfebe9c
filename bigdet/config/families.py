"""What each backbone and each detector is, one row each; `backbone_facts` also has a user's own.

Rules, derived values, construction, published weights, export and documents read it here, without
torch: ``build`` names what builds the part, and is imported only then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from bigdet.config.own import import_callable, parameters_of, refuse_unknown
from bigdet.config.timm_names import PREFIX as TIMM
from bigdet.config.timm_names import timm_row

Function = TypeVar("Function", bound=Callable[..., Any])

LACKS = {
    "norm": "has LayerNorm",
    "drop_path": "has no drop path",
    "relative_positions": "has no choice of relative positions",
    "stride_in_1x1": "has no blocks with 1x1 convolutions",
    "taps": "gives features of its stages, not of chosen blocks",
    "token_window": "has no windows of tokens to choose",
    "rope_window": "has no rotary positions that are scaled to the grid of its training",
    "global_blocks": "has no windows of tokens to choose",
    "image_windows": "takes images whole",
}
"""Options of ``model`` that are for some backbones, and why they have no effect on others."""


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """What a backbone is.

    Attributes:
        build: what builds it, ``module:attribute``; called with ``sizes`` and with the options in
            ``heeds``, all by name.
        sizes: depths and widths.
        heeds: the options of ``model`` that it takes, of `LACKS`.
        has_levels: it gives four levels, C2 to C5, for a pyramid; else one map, and the model has
            no FPN.
        depth: number of blocks that ``taps`` may name.
        published: timm's name of its ImageNet weights, those from which detection papers start.
        is_own: it is a user's.
    """

    build: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    heeds: tuple[str, ...] = ()
    has_levels: bool = True
    depth: int = 0
    published: str | None = None
    is_own: bool = False


@dataclass(frozen=True, kw_only=True)
class DetectorFacts:
    """What a detector is.

    Attributes:
        parts: in the order in which data flows through them; the first is ``backbone``, and ``fpn``
            is left out of a model whose backbone has one level.
        options: the options of ``model`` that it takes, of `DETECTOR_OPTIONS`.
        normalized: parts other than the backbone that have norms with ``norm_scope: all``.
        learns: what it learns and predicts of objects besides boxes.
        is_exportable: ``bigdet export`` can export it.
        build: what builds it, ``module:attribute``; of a user's own the name in the config.
    """

    parts: tuple[str, ...]
    options: tuple[str, ...] = ()
    normalized: tuple[str, ...] = ()
    learns: tuple[Literal["masks", "keypoints"], ...] = ()
    is_exportable: bool = False
    build: str = ""

    @property
    def is_cascade(self) -> bool:
        """Whether it has three box heads, one after another."""
        return "cascade" in self.options

    @property
    def limits(self) -> Literal["roi", "retina"] | None:
        """The section of ``model`` that limits the detections of an image, if there is one."""
        if "roi" in self.options:
            return "roi"
        return "retina" if "retina" in self.options else None


def _resnet(
    layers: list[int], published: str | None = None, *, is_bottleneck: bool = True, **widths: int
) -> BackboneFacts:
    return BackboneFacts(
        build="bigdet.models.backbones.resnet:ResNet",
        sizes={"layers": layers, "is_bottleneck": is_bottleneck, **widths},
        heeds=("norm", "stride_in_1x1") if is_bottleneck else ("norm",),
        published=published,
    )


_resnext = functools.partial(_resnet, cardinality=32)


def _transformer(build: str, published: str, **sizes: Any) -> BackboneFacts:
    """Return the facts of a backbone with LayerNorm and drop path."""
    return BackboneFacts(
        build=f"bigdet.models.backbones.{build}",
        sizes=sizes,
        heeds=("drop_path",),
        published=published,
    )


def _swin(
    embed_dim: int, depths: list[int], num_heads: list[int], published: str, kind: str = "Swin"
) -> BackboneFacts:
    return _transformer(
        f"swin:{kind}", published, embed_dim=embed_dim, depths=depths, num_heads=num_heads
    )


_swin_v2 = functools.partial(_swin, kind="SwinV2")


def _convnext(depths: list[int], widths: list[int], published: str) -> BackboneFacts:
    return _transformer("convnext:ConvNeXt", published, depths=depths, widths=widths)


def _vit(width: int, depth: int, num_heads: int, published: str) -> BackboneFacts:
    facts = _transformer("vit:ViT", published, width=width, depth=depth, num_heads=num_heads)
    return dataclasses.replace(facts, heeds=(*facts.heeds, "relative_positions"))


_THREE_SIX_TWELVE = [3, 6, 12, 24]  # attention heads of the stages of Swin-T and Swin-S

BACKBONES: dict[str, BackboneFacts] = {
    "resnet10": _resnet([1, 1, 1, 1], is_bottleneck=False),
    "resnet18": _resnet([2, 2, 2, 2], "resnet18.tv_in1k", is_bottleneck=False),
    "resnet34": _resnet([3, 4, 6, 3], "resnet34.tv_in1k", is_bottleneck=False),
    "resnet50": _resnet([3, 4, 6, 3], "resnet50.tv_in1k"),
    "resnet101": _resnet([3, 4, 23, 3], "resnet101.tv_in1k"),
    "resnet152": _resnet([3, 8, 36, 3], "resnet152.tv_in1k"),
    "resnext50_32x4d": _resnext([3, 4, 6, 3], "resnext50_32x4d.tv_in1k", base_width=4),
    "resnext50_32x8d": _resnext([3, 4, 6, 3], base_width=8),
    "resnext101_32x4d": _resnext([3, 4, 23, 3], "resnext101_32x4d.gluon_in1k", base_width=4),
    "resnext101_32x8d": _resnext([3, 4, 23, 3], "resnext101_32x8d.tv_in1k", base_width=8),
    "resnext152_32x8d": _resnext([3, 8, 36, 3], base_width=8),
    "swin_t": _swin(96, [2, 2, 6, 2], _THREE_SIX_TWELVE, "swin_tiny_patch4_window7_224.ms_in1k"),
    "swin_s": _swin(96, [2, 2, 18, 2], _THREE_SIX_TWELVE, "swin_small_patch4_window7_224.ms_in1k"),
    "swin_b": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], "swin_base_patch4_window7_224.ms_in1k"),
    "swin_l": _swin(
        192, [2, 2, 18, 2], [6, 12, 24, 48], "swin_large_patch4_window7_224.ms_in22k_ft_in1k"
    ),
    "swinv2_t": _swin_v2(96, [2, 2, 6, 2], _THREE_SIX_TWELVE, "swinv2_tiny_window8_256.ms_in1k"),
    "swinv2_s": _swin_v2(96, [2, 2, 18, 2], _THREE_SIX_TWELVE, "swinv2_small_window8_256.ms_in1k"),
    "swinv2_b": _swin_v2(128, [2, 2, 18, 2], [4, 8, 16, 32], "swinv2_base_window8_256.ms_in1k"),
    "convnext_t": _convnext([3, 3, 9, 3], [96, 192, 384, 768], "convnext_tiny.fb_in1k"),
    "convnext_s": _convnext([3, 3, 27, 3], [96, 192, 384, 768], "convnext_small.fb_in1k"),
    "convnext_b": _convnext([3, 3, 27, 3], [128, 256, 512, 1024], "convnext_base.fb_in1k"),
    "vit_ti": _vit(192, 12, 3, "deit_tiny_patch16_224.fb_in1k"),
    "vit_s": _vit(384, 12, 6, "deit_small_patch16_224.fb_in1k"),
    "vit_b": _vit(768, 12, 12, "deit_base_patch16_224.fb_in1k"),
    "vit_l": _vit(1024, 24, 16, "vit_large_patch16_224.mae"),
    "vit_h": _vit(1280, 32, 16, "vit_huge_patch14_224.mae"),
    "vgg16": BackboneFacts(
        build="bigdet.models.backbones.vgg:VGG", has_levels=False, published="vgg16.tv_in1k"
    ),
}

DETECTOR_OPTIONS = {
    "width": "{} does not use it",
    "neck": "{} has no choice of it",
    "box_head": "{} has no box head",
    "fc_width": "{} has no box head",
    "rpn": "{} has no proposals",
    "roi": "{} has no box head on proposals",
    "cascade": "{} is not a cascade",
    "keypoint": "{} has no keypoint head",
    "retina": "is for retinanet, but model.detector is {}",
}
"""Options of ``model`` that are for some detectors, and why they have no effect on others."""

PUBLISHED = {name: row.published for name, row in BACKBONES.items() if row.published is not None}
"""timm's names of the published weights of backbones."""

_TWO_STAGE = ("width", "neck", "box_head", "fc_width", "rpn", "roi")


def _rcnn(heads: tuple[str, ...] = (), options: tuple[str, ...] = (), **more: Any) -> DetectorFacts:
    return DetectorFacts(
        parts=("backbone", "fpn", "rpn", "box_head", *heads),
        options=(*_TWO_STAGE, *options),
        normalized=("fpn", "box_head", *heads),
        build="bigdet.models.build:build_rcnn",
        **more,
    )


_with_masks = functools.partial(_rcnn, ("mask_head",), learns=("masks",))

DETECTORS: dict[str, DetectorFacts] = {
    "faster_rcnn": _rcnn(is_exportable=True),
    "mask_rcnn": _with_masks(is_exportable=True),
    "cascade_rcnn": _rcnn(options=("cascade",)),
    "cascade_mask_rcnn": _with_masks(options=("cascade",)),
    "keypoint_rcnn": _rcnn(("keypoint_head",), ("keypoint",), learns=("keypoints",)),
    "retinanet": DetectorFacts(
        parts=("backbone", "fpn", "retina_head"),
        options=("width", "retina"),
        normalized=("fpn", "retina_head"),
        is_exportable=True,
        build="bigdet.models.build:build_retinanet",
    ),
}


def backbone_facts(name: str) -> BackboneFacts:
    """Return what a ``model.backbone`` is: bigdet's, ``timm:NAME`` or a user's own.

    A user's own takes those of `LACKS` that its function has as parameters.

    Raises:
        ValueError: there is none of this name, or it cannot be imported or called.
    """
    if name.startswith(TIMM):
        return _timm_backbone(name)
    refuse_unknown("model.backbone", name, BACKBONES)
    return BACKBONES[name] if name in BACKBONES else _own_backbone(name)


@functools.cache
def _timm_backbone(name: str) -> BackboneFacts:
    row = timm_row(name)
    sizes: dict[str, Any] = {"name": row.name}
    if row.is_plain and "_dino" in row.name:  # DINOv2 and v3 use the output of their last norm
        sizes["final_norm"] = True
    return BackboneFacts(
        build=f"bigdet.models.backbones.timm_net:Timm{'Plain' if row.is_plain else 'Pyramid'}",
        sizes=sizes,
        heeds=tuple(row.heeds),
        depth=row.depth,
        published=row.name if row.has_weights else None,
    )


@functools.cache
def _own_backbone(name: str) -> BackboneFacts:
    key = "model.backbone"
    parameters = parameters_of(key, name, import_callable(key, name))
    needed = [n for n, each in parameters.items() if n in LACKS or each.default is each.empty]
    if others := [each for each in needed if each not in LACKS]:
        raise ValueError(
            f"{key}: {name} requires {', '.join(others)}. Expected parameters that are options of "
            f"model ({', '.join(LACKS)}) or have defaults."
        )
    return BackboneFacts(build=name, heeds=tuple(needed), is_own=True)


def detector_facts(name: str) -> DetectorFacts:
    """Return what a ``model.detector`` is.

    Raises:
        ValueError: there is none of this name, or it cannot be imported, or has no description.
    """
    refuse_unknown("model.detector", name, DETECTORS)
    return DETECTORS[name] if name in DETECTORS else _own_detector(name)


@functools.cache
def _own_detector(name: str) -> DetectorFacts:
    key = "model.detector"
    function = import_callable(key, name)
    facts = getattr(function, "facts", None)
    if not isinstance(facts, DetectorFacts):
        raise ValueError(
            f"{key}: {name} has no description. Write @describe_detector(parts=(...), "
            f"options=(...)) of bigdet.config.families above it."
        )
    parameters, expected = [*parameters_of(key, name, function)], "config, num_classes, backbone"
    if ", ".join(parameters[:3]) != expected:
        raise ValueError(f"{key}: {name} takes ({', '.join(parameters)}), expected ({expected}).")
    return dataclasses.replace(facts, build=name)


def describe_detector(
    *,
    parts: tuple[str, ...],
    options: tuple[str, ...] = (),
    normalized: tuple[str, ...] = (),
    learns: tuple[Literal["masks", "keypoints"], ...] = (),
) -> Callable[[Function], Function]:
    """Describe the detector that a user's function builds; see `DetectorFacts`.

    The contract of the function is in ``models/detector.py``, ``Detector``.
    """
    for what, found, known in (
        ("options", options, tuple(DETECTOR_OPTIONS)),
        ("normalized", normalized, parts),
        ("learns", learns, ("masks", "keypoints")),
    ):
        if others := [each for each in found if each not in known]:
            raise ValueError(f"{what}: found {', '.join(others)}, expected of {', '.join(known)}.")
    if "backbone" not in parts[:1]:
        raise ValueError(f"parts: found {parts}, expected backbone first.")
    facts = DetectorFacts(parts=parts, options=options, normalized=normalized, learns=learns)

    def note(function: Function) -> Function:
        function.facts = facts  # type: ignore[attr-defined]
        return function

    return note
