"""Choices in which detection frameworks differ and which weights do not show.

bigdet's own are the defaults. Parity tests and imported weights select others. The place of
the background class is not one of them: bigdet has it last, and importing permutes the rows of the
classifier (see ``models/heads/box.py``). Nor are losses and assignment: they are
options of the config (``model.rpn.box_beta``, ``model.rpn.border``, ``model.roi.box_loss``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """One choice per field.

    Attributes:
        roi_align_aligned: regions are pooled with the half-pixel shift.
        anchors_rounded: sides of anchors are rounded to whole pixels, as torchvision does.
        anchor_strides_from_canvas: anchors lie canvas size // feature size apart (torchvision),
            not at the nominal stride of their level; both agree where 64 divides the canvas.
        rpn_normalizer: RPN losses are divided by the number of sample ``slots`` (256 per image) or
            by the number of anchors ``sampled`` into them (torchvision).
        retina_normalizer: RetinaNet's losses are divided by the number of positive anchors of the
            ``lane``, or of each ``image`` and then by the number of images (torchvision).
        p6_source: RetinaNet makes P6 from ``c5`` (the paper, detectron2, mmdetection) or from
            ``p5`` (torchvision's first RetinaNet; its second takes C5).
    """

    roi_align_aligned: bool = True
    anchors_rounded: bool = False
    anchor_strides_from_canvas: bool = False
    rpn_normalizer: Literal["slots", "sampled"] = "slots"
    retina_normalizer: Literal["lane", "image"] = "lane"
    p6_source: Literal["c5", "p5"] = "c5"


OWN = Conventions()
"""bigdet's."""

TORCHVISION = Conventions(
    roi_align_aligned=False,
    anchors_rounded=True,
    anchor_strides_from_canvas=True,
    rpn_normalizer="sampled",
    retina_normalizer="image",
)
