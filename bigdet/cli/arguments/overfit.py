"""Let a detector memorize 16 real images: does everything work together, from pixels to AP?

    bigdet overfit mask_rcnn --shards data/coco/train
    bigdet overfit keypoint_rcnn --shards data/people/train model.backbone=resnet10

Takes the first 16 images of a set on which every object has at least 24 pixels at the training size
(and, for keypoints, at least one labeled keypoint), trains a small model on them from random
weights, and evaluates it on the same 16. Exits with 1 unless every AP50 exceeds --goal. key=value
after the detector changes options of its config, which is in ``bigdet/cli/overfit.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bigdet.cli.parsing import add_count, add_overrides, command_parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("overfit", __doc__)
    parser.add_argument("detector", help="value of model.detector, such as mask_rcnn")
    add_overrides(parser)
    parser.add_argument("--shards", required=True, help="shard set that the images are taken from")
    parser.add_argument("--goal", type=float, default=0.8, help="AP50 to exceed; default 0.8")
    add_count(parser, "--every", 50, "steps between evaluations")
    return parser.parse_intermixed_args(arguments)
