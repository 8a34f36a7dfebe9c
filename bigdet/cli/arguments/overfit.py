"""Let a detector learn 16 real images by heart: does all of it, from pixels to AP, work together?

    bigdet overfit mask_rcnn --shards data/coco/train
    bigdet overfit keypoint_rcnn --shards data/people/train model.backbone=resnet10

Takes the first 16 images of a set on which every object has at least 24 pixels at the training size
(and, for keypoints, at least one of them labelled), trains a small model from random weights on
them, and measures it on the same 16. Ends with 1 unless every AP50 exceeds --goal. Words after the
detector change options of its config, which is in this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bigdet.cli.running import positive


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bigdet overfit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("detector", help="model.detector, such as mask_rcnn")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options to change"
    )
    parser.add_argument("--shards", required=True, help="shard set to take the images from")
    parser.add_argument("--goal", type=float, default=0.8, help="AP50 to exceed; default 0.8")
    parser.add_argument("--every", type=positive, default=50, help="steps between measurements")
    return parser.parse_intermixed_args(arguments)
