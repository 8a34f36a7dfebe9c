"""A user's own backbone, detector, board and source of shards, in a module outside bigdet.

Tests copy it into a folder that is no part of bigdet and name what is in it.
"""

import json
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bigdet.config.families import describe_detector
from bigdet.config.heads import RoiConfig
from bigdet.data.making.sources.records import convert_records
from bigdet.models.backbone_base import Backbone
from bigdet.models.detector import Detector
from bigdet.models.heads.detections import FlatDetections, usable
from bigdet.models.norms import conv_norm

STRIDE = 16  # of C4, pixels
BEST = 5  # points of an image that are reported


# fmt: off
class Plain(Backbone):
    def __init__(self, norm):
        super().__init__()
        self.channels = [32, 64, 128, 256]
        pairs = pairwise([3, 32, *self.channels])
        stack = [nn.Sequential(nn.MaxPool2d(2), conv_norm(*w, 3, norm, relu=True)) for w in pairs]
        self.blocks = nn.ModuleList(stack)
    stages = property(lambda self: [[block] for block in self.blocks])
    def forward(self, images):
        return list(accumulate(self.blocks, lambda x, f: self.run(f, x), initial=images))[2:]
# fmt: on


class Points(Detector):
    """A class and four distances at every cell of C4."""

    dense_parts = ("backbone", "points")

    def __init__(self, backbone, num_classes):
        super().__init__(backbone)
        self.points = nn.Conv2d(backbone.channels[2], num_classes + 4, 1)

    def use_eval_settings(self, config):
        pass

    @property
    def has_maps(self):
        return False

    @property
    def eval_settings(self):
        return RoiConfig()

    def features(self, batch):
        return self.points(self.backbone(self.pixels(batch))[2])

    def losses(self, batch):
        found = self.features(batch)
        logits, sides = found[:, :-4], found[:, -4:]
        wanted, boxes, is_object = (
            torch.zeros_like(logits),
            torch.zeros_like(sides),
            logits[:, 0] > 9,
        )
        counts = batch.targets.offsets.diff()
        images = torch.arange(len(counts)).repeat_interleave(counts)
        cells = ((batch.targets.boxes[:, :2] + batch.targets.boxes[:, 2:]) / 2 / STRIDE).long()
        place = (images, cells[:, 1], cells[:, 0])
        wanted[images, batch.targets.labels, cells[:, 1], cells[:, 0]] = 1
        is_object = is_object.index_put(place, torch.ones(len(images), dtype=torch.bool))
        boxes = boxes.permute(0, 2, 3, 1).index_put(place, batch.targets.boxes / STRIDE)
        away = (sides.permute(0, 2, 3, 1) - boxes)[is_object].abs().sum()
        return {
            "point_class": F.binary_cross_entropy_with_logits(logits, wanted),
            "point_box": away / max(1, int(is_object.sum())),
        }

    def find(self, features, batch):
        scores = features[:, :-4].sigmoid().flatten(1)
        best = scores.topk(BEST, dim=1)
        cells = features.shape[2] * features.shape[3]
        boxes = features[:, -4:].flatten(2).transpose(1, 2) * STRIDE
        rows = torch.arange(len(features))[:, None].expand(-1, BEST)
        found = FlatDetections(
            images=rows.flatten(),
            boxes=boxes[rows, best.indices % cells].flatten(0, 1),
            scores=best.values.flatten(),
            labels=(best.indices // cells).flatten(),
        )
        return usable(found, batch.image_sizes)

    def maps(self, features, found):
        return {}


@describe_detector(parts=("backbone", "points"))
def points(config, num_classes, backbone):
    return Points(backbone, num_classes)


class File:
    """A board that is a file."""

    def __init__(self, folder, first_step, options):
        self.file = (folder / "lines.txt").open("a")
        print("from", first_step, options["model.backbone"], file=self.file)

    def add_scalars(self, values, step):
        print(step, json.dumps(dict(values)), file=self.file, flush=True)

    def add_picture(self, name, picture, step):
        print(step, name, picture.shape, file=self.file, flush=True)

    def close(self):
        print("closed", file=self.file)
        self.file.close()


def squares(root: Path, side: int = 20, *, out, making, progress):
    """Write pictures of one square each, by the name of their place, as shards.

    Args:
        root: the folder of the pictures, X-Y.png.
        side: of the squares, pixels.
    """
    images, annotations = [], []
    for number, path in enumerate(sorted(root.glob("*.png")), start=1):
        with Image.open(path) as picture:
            width, height = picture.size
        x, y = map(int, path.stem.split("-"))
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, side, side]}
        )
    records = {
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}],
    }  # fmt: skip
    return convert_records("squares", root, records, out, making=making, progress=progress)
